"""Each step equals that of the reference, in every mode."""

import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import LBFGS, SSBroyden
from tests.quasi_newton.reference import LBFGSMemory, Search, SSBroydenMemory
from tests.reference import assert_same, compiled, weights_of

METHODS = {
    "LBFGS": (lambda **kw: LBFGS(history_size=5, **kw), lambda: LBFGSMemory(5)),
    "SSBroyden": (SSBroyden, SSBroydenMemory),
}
# Of the weights, which are about 1. Rounding in float64 is 1e-16; H hands it on from
# step to step, times its condition, which here is up to 1e7.
ATOL = 1e-6


def rosenbrock_gradient(x):
    g = np.zeros_like(x)
    g[:-1] = -400 * x[:-1] * (x[1:] - x[:-1] ** 2) - 2 * (1 - x[:-1])
    g[1:] += 200 * (x[1:] - x[:-1] ** 2)
    return g


def trajectory(memory, calls, learning_rate, spoil=None, tolerance=0.0):
    """Runs the reference; returns it, its gradients and the weights after each."""
    search = Search(memory, np.tile([-1.2, 1.0], 3), learning_rate, tolerance)
    gradients, weights = [], []
    for call in range(calls):
        gradient = rosenbrock_gradient(search.weights)
        if spoil is not None:
            gradient = spoil(call, gradient)
        gradients.append(gradient)
        search(gradient)
        weights.append(search.weights)
    return search, gradients, weights


def follow(optimizer, gradients, mode):
    """Hands an optimizer the gradients; returns the weights after each call.

    The gradients are those of the reference's points, so that differences in rounding
    do not grow from point to point.
    """
    # Two variables, one of them a matrix.
    start = np.tile([-1.2, 1.0], 3)
    variables = [tf.Variable(start[:4].reshape(2, 2)), tf.Variable(start[4:])]
    optimizer.build(variables)

    def apply(gradient):
        optimizer.apply([tf.reshape(gradient[:4], (2, 2)), gradient[4:]], variables)

    step = compiled(apply, mode)
    weights = []
    for gradient in gradients:
        step(tf.constant(gradient))
        weights.append(np.concatenate([v.numpy().ravel() for v in variables]))
    if mode != "eager":
        assert step.experimental_get_tracing_count() == 1
    return weights


def at(calls, change):
    """Returns a function that changes the gradients of some calls."""
    return lambda call, gradient: change(gradient) if call in calls else gradient


def not_finite(gradient):
    return np.append(gradient[:-1], np.inf)


def upwards(gradient):
    return -gradient


# Arguments of `trajectory`, and the events that it must have, or nothing is shown.
TRAJECTORIES = {
    "short steps": ((60, 2**-6), {"starts", "accepts"}),
    "long steps": ((60, 0.25), {"accepts", "overshot"}),
    # The first two before there is a point to go back to.
    "not finite": ((40, 0.25, at({0, 1, 5, 9, 10, 30}, not_finite)), {"stays"}),
    "never finite again": (
        (60, 0.25, at(range(20, 31), not_finite)),
        {"not finite", "resets"},
    ),
    "impatient": ((60, 0.25, at(range(20, 31), upwards)), {"overshot"}),
    "negative curvature": (
        (60, 2**-6, at({7, 20}, lambda gradient: 3 * gradient)),
        {"skips the pair"},
    ),
    "converges": ((200, 0.25, None, 1e-4), {"converged"}),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
@pytest.mark.parametrize("method", METHODS)
def test_each_step_equals_the_reference(method, name, mode):
    make, make_memory = METHODS[method]
    arguments, events = TRAJECTORIES[name]
    search, gradients, weights = trajectory(make_memory(), *arguments)
    assert events <= set(search.events)
    optimizer = make(
        learning_rate=search.learning_rate, gradient_tolerance=search.tolerance
    )
    np.testing.assert_allclose(
        follow(optimizer, gradients, mode), weights, rtol=0, atol=ATOL
    )


@pytest.mark.parametrize("method", METHODS)
def test_nothing_changes_after_convergence(method):
    # Without a tolerance it would learn from rounding, and jump away from the optimum.
    weight = tf.Variable([1.0, -2.0, 3.0])
    optimizer = METHODS[method][0](learning_rate=0.5, gradient_tolerance=1e-6)
    optimizer.build([weight])

    @tf.function(jit_compile=True)
    def descend(calls):
        for _ in tf.range(calls):
            optimizer.apply([weight * tf.constant([1.0, 2.0, 3.0])], [weight])

    descend(50)
    converged = weights_of([weight, *optimizer.variables[1:]])
    assert np.abs(weight).max() < 1e-6
    descend(1_000_000)
    assert_same(weights_of([weight, *optimizer.variables[1:]]), converged)
    assert int(optimizer.iterations) == 1_000_050


@pytest.mark.parametrize("method", METHODS)
def test_useless_memory_is_forgotten(method):
    # What rounding may do in the end is done here by hand: H points uphill, or nowhere.
    weight = tf.Variable([1.0, 2.0], dtype="float64")
    optimizer = METHODS[method][0](learning_rate=2.0**-6)
    for _ in range(3):
        optimizer.apply([weight * tf.constant([1.0, 4.0], "float64")], [weight])
    named = {variable.name: variable for variable in optimizer.variables}
    assert int(named["pairs"]) == 2
    if method == "SSBroyden":
        named["inverse"].assign(-named["inverse"])
    else:
        named["steps"].assign(np.nan * named["steps"])
    before = weight.numpy()
    gradient = before * [1, 4]
    optimizer.apply([tf.constant(gradient)], [weight])
    assert int(named["pairs"]) == 0
    downhill = -gradient / np.linalg.norm(gradient) * 2.0**-6 * 2**0.5
    np.testing.assert_allclose(weight.numpy() - before, downhill, rtol=1e-12)
