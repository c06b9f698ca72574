"""Each step equals that of the reference, in every mode."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import LBFGS, SSBroyden
from sequential_optimizer.ssbroyden import _factors
from tests.helpers.oracle import assert_same, compiled, weights_of
from tests.training.quasi_newton.reference import LBFGSMemory, Search, SSBroydenMemory

METHODS = {
    "LBFGS": (lambda **kw: LBFGS(history_size=5, **kw), lambda: LBFGSMemory(5)),
    "SSBroyden": (SSBroyden, SSBroydenMemory),
}
# Of the weights, which are about 1. Rounding in float64 is 1e-16; H passes it on from
# step to step, times the condition number of H, which here is up to 1e7.
ATOL = 1e-7
TOLERANCE = 1e-4
START = np.tile([-1.2, 1.0], 3)


def rosenbrock_gradient(x):
    g = np.zeros_like(x)
    g[:-1] = -400 * x[:-1] * (x[1:] - x[:-1] ** 2) - 2 * (1 - x[:-1])
    g[1:] += 200 * (x[1:] - x[:-1] ** 2)
    return g


def trajectory(memory, calls, learning_rate, spoil=None):
    """Runs the reference; returns it, its gradients and the weights after each."""
    search = Search(memory, START, learning_rate, TOLERANCE)
    gradients, weights = [], []
    for call in range(calls):
        gradient = rosenbrock_gradient(search.weights)
        if spoil is not None:
            gradient = spoil(call, gradient)
        gradients.append(gradient)
        search(gradient)
        weights.append(search.weights)
    return search, gradients, weights


class Follower:
    """An optimizer that is handed the gradients of the reference's points.

    Not those of its points, so that rounding errors do not grow from point to point.
    """

    def __init__(self, method, mode):
        # Two variables, one of them a matrix.
        self.weights = [tf.Variable(START[:4].reshape(2, 2)), tf.Variable(START[4:])]
        self.optimizer = METHODS[method][0](gradient_tolerance=TOLERANCE)
        self.optimizer.build(self.weights)
        self.variables = [*self.weights, *self.optimizer.variables]
        self.start = weights_of(self.variables)
        self.step = compiled(self.apply, mode)

    def apply(self, gradient):
        gradients = [tf.reshape(gradient[:4], (2, 2)), gradient[4:]]
        self.optimizer.apply(gradients, self.weights)

    def follow(self, gradients, learning_rate):
        """Returns the weights after each call."""
        for variable, value in zip(self.variables, self.start, strict=True):
            variable.assign(value)
        self.optimizer.learning_rate = learning_rate
        weights = []
        for gradient in gradients:
            self.step(tf.constant(gradient))
            weights.append(np.concatenate([w.numpy().ravel() for w in self.weights]))
        return weights


@functools.cache
def make_follower(method, mode):
    return Follower(method, mode)


def at(calls, change):
    """Returns a function that changes the gradients of some calls."""
    return lambda call, gradient: change(gradient) if call in calls else gradient


def not_finite(gradient):
    return np.append(gradient[:-1], np.inf)


def upwards(gradient):
    return -1.5 * gradient


def tiny(gradient):
    return TOLERANCE / 1000 * gradient


# Arguments of `trajectory`, and the events that must occur, or a case shows nothing.
TRAJECTORIES = {
    "short steps": ((30, 2**-6), {"starts", "accepts"}),
    "long steps": ((60, 0.25), {"accepts", "overshot"}),
    # The first two before there is a point to go back to.
    "not finite": (
        (25, 0.25, at({0, 1, 5, 9, 10}, not_finite)),
        {"stays", "not finite"},
    ),
    "never finite again": (
        (30, 0.25, at(range(10, 21), not_finite)),
        {"not finite", "resets"},
    ),
    "no patience": ((30, 0.25, at(range(10, 21), upwards)), {"gives in"}),
    "negative curvature": (
        (25, 2**-6, at({7, 15}, lambda gradient: 3 * gradient)),
        {"skips the pair"},
    ),
    # And continues when there is something to do again.
    "converges": ((25, 0.25, at(range(10, 15), tiny)), {"converged"}),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
@pytest.mark.parametrize("method", METHODS)
def test_each_step_equals_the_reference(method, name, mode):
    arguments, events = TRAJECTORIES[name]
    search, gradients, weights = trajectory(METHODS[method][1](), *arguments)
    assert events <= set(search.events)
    follower = make_follower(method, mode)
    followed = follower.follow(gradients, search.learning_rate)
    np.testing.assert_allclose(followed, weights, rtol=0, atol=ATOL)
    if mode != "eager":
        assert follower.step.experimental_get_tracing_count() == 1


@pytest.mark.slow
@pytest.mark.parametrize("calls", [100, 10**6])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_changes_after_convergence(method, calls):
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
    descend(calls)
    assert_same(weights_of([weight, *optimizer.variables[1:]]), converged)
    assert int(optimizer.iterations) == calls + 50


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


@pytest.mark.parametrize("b", [0.5, 2.0, 1e3])
@pytest.mark.parametrize("h", [1e3, 1e6, 1e8])
def test_factors_survive_float32(b, h):
    # In float32, 1 - sqrt(a / (a + 1)) was 0 for large a, and a sound H was lost. What
    # `1 + a theta` cancels remains: 2% at most here.
    single, double = (
        [float(f) for f in _factors(tf.constant(b, t), tf.constant(h, t), 10)]
        for t in (tf.float32, tf.float64)
    )
    np.testing.assert_allclose(single, double, rtol=2e-2)
