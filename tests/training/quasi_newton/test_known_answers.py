"""Problems whose answers are published, or known on paper."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import LBFGS, SSBroyden
from tests.training.quasi_newton.problems import PROBLEMS

METHODS = {"LBFGS": LBFGS, "SSBroyden": SSBroyden}


def gradients_needed(optimizer, loss, start, is_solved, most, dtype="float64"):
    """Returns the number of gradients until a loss is solved, and the weights."""
    weight = tf.Variable(start, dtype=dtype)
    optimizer.build([weight])

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            value = loss(weight)
        gradient = tape.gradient(value, weight)
        before = tf.identity(weight)
        optimizer.apply([gradient], [weight])
        return value, before

    for calls in range(1, most + 1):
        value, before = step()
        if is_solved(value.numpy()):
            return calls, before.numpy()
    raise AssertionError(f"still {value.numpy()} after {most} gradients")


def is_solved(problem, value):
    tolerance = 1e-5 * problem.minimum if problem.minimum else 1e-8
    return value <= problem.minimum + tolerance


@functools.cache
def gradients_for(name, method):
    """Returns how many gradients it takes to a published minimum."""
    problem = PROBLEMS[name]
    optimizer = METHODS[method](learning_rate=0.1)
    calls, _ = gradients_needed(
        optimizer, problem.loss, problem.start, lambda v: is_solved(problem, v), 1000
    )
    return calls


QUICK = {"rosenbrock", "powell_singular", "wood"}


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in PROBLEMS
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_reaches_the_published_minimum(method, name):
    gradients_for(name, method)


@pytest.mark.parametrize("method", METHODS)
def test_third_point_solves_an_isotropic_quadratic(method):
    # The first pair tells the curvature, and H is exact after it.
    target = np.arange(5.0)
    calls, solution = gradients_needed(
        METHODS[method](learning_rate=100.0),
        lambda x: 3 * tf.reduce_sum((x - target) ** 2),
        np.zeros(5),
        lambda value: value < 1e-25,
        most=3,
    )
    assert calls == 3
    np.testing.assert_allclose(solution, target, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_solves_a_quadratic_of_n_in_a_few_times_n_steps(method):
    # n steps would be enough with an exact line search. Gradient descent takes 10,000.
    curvatures = np.logspace(0, 3, 10)
    calls, _ = gradients_needed(
        METHODS[method](learning_rate=1.0),
        lambda x: tf.reduce_sum(curvatures * x**2),
        np.ones(10),
        lambda value: value < 1e-10,
        most=1000,
    )
    assert calls <= 50


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_needs_about_as_many_gradients_as_scipy(method):
    # SciPy's line search evaluates the model until it accepts a step. Here a rejected
    # point counts as an evaluation as well.
    ratios = {
        name: gradients_for(name, method) / scipy_gradients(name) for name in PROBLEMS
    }
    assert np.median(list(ratios.values())) < 1.5, ratios


@functools.cache
def scipy_gradients(name):
    """Returns how many gradients the better of SciPy's two methods needs."""
    optimize = pytest.importorskip("scipy.optimize")
    problem = PROBLEMS[name]

    @tf.function(autograph=False)
    def value_and_gradient(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = problem.loss(x)
        return value, tape.gradient(value, x)

    def count(method):
        values = []

        def evaluate(x):
            value, gradient = value_and_gradient(tf.constant(x))
            values.append(value.numpy())
            return values[-1], gradient.numpy()

        optimize.minimize(evaluate, problem.start, jac=True, method=method, tol=1e-12)
        solved = (i for i, v in enumerate(values, start=1) if is_solved(problem, v))
        return next(solved, np.inf)

    return min(count(method) for method in ("L-BFGS-B", "BFGS"))


@pytest.mark.parametrize("method", METHODS)
def test_logistic_regression_finds_what_scikit_learn_finds(method):
    datasets = pytest.importorskip("sklearn.datasets")
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels = datasets.load_breast_cancer(return_X_y=True)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    model = linear_model.LogisticRegression(fit_intercept=False, tol=1e-12)
    expected = model.fit(x, labels).coef_[0]

    def loss(weight):
        logits = tf.linalg.matvec(x, weight)
        losses = tf.nn.sigmoid_cross_entropy_with_logits(labels * 1.0, logits)
        return tf.reduce_sum(losses) + tf.reduce_sum(weight**2) / 2

    optimum = loss(tf.constant(expected)).numpy()
    _, weight = gradients_needed(
        METHODS[method](learning_rate=0.1),
        loss,
        np.zeros(30),
        lambda value: value < optimum + 1e-9,
        most=100,
    )
    np.testing.assert_allclose(weight, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_matrix_stays_symmetric_and_usable_for_100000_steps(seed):
    # In float32, with a loss that is only rounding error most of the time. That makes H
    # indefinite along directions that no step takes; once this shows along a change or
    # a gradient, H is forgotten, so that every direction goes downhill.
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, size=(64, 1)).astype("float32")
    y = np.sin(6 * x)
    shapes = [(1, 8), (8,), (8, 8), (8,), (8, 1)]
    weights = [tf.Variable(rng.normal(0, 0.7, s), dtype="float32") for s in shapes]
    optimizer = SSBroyden(gradient_tolerance=0.0)
    optimizer.build(weights)

    def loss():
        hidden = tf.tanh(x @ weights[0] + weights[1])
        hidden = tf.tanh(hidden @ weights[2] + weights[3])
        return tf.reduce_mean((hidden @ weights[4] - y) ** 2)

    @tf.function(jit_compile=True)
    def train():
        for _ in tf.range(10_000):
            with tf.GradientTape() as tape:
                value = loss()
            optimizer.apply(tape.gradient(value, weights), weights)

    state = {variable.name: variable for variable in optimizer.variables}
    for _ in range(10):
        train()
        h = state["inverse"].numpy()
        assert np.isfinite(h).all()
        np.testing.assert_array_equal(h, h.T)
        assert np.dot(state["gradient"], state["direction"]) < 0
    optimizer.finalize_variable_values(weights)
    assert loss() < 1e-7
