"""Conditions in the graph end a phase at the step where eager Python would.

Each rule is written twice: as the recipe, with tensors and `advance()`, and as a user
would in eager Python, with plain optimizers and an `if`.
"""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers.oracle import assert_same, make_variables, weights_of

STEPS = 40
WINDOW = 5

_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(STEPS, 8, 3)).astype(np.float32)
Y = (X @ np.array([[1.0], [-2.0], [0.5]]) + 0.3).astype(np.float32)
# Noise, so that no loss falls at every step.
Y += 0.1 * _RNG.normal(size=Y.shape).astype(np.float32)


def make_weights():
    return make_variables(((3, 1), (1,)))


def make_children():
    return [keras.optimizers.Adam(0.2), keras.optimizers.SGD(0.05, momentum=0.9)]


def loss_and_gradients(weights, x, y):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((x @ weights[0].value + weights[1].value - y) ** 2)
    return loss, tape.gradient(loss, [weight.value for weight in weights])


# --- the rules, as recipes ---------------------------------------------------


def loss_below(threshold):
    def rule(optimizer, loss, gradients):
        return loss < threshold

    return rule


def norm_below(threshold):
    def rule(optimizer, loss, gradients):
        return tf.linalg.global_norm(gradients) < threshold

    return rule


def mean_improves_by_less_than(fraction):
    mean = tf.Variable(0.0)
    mean_before = tf.Variable(math.inf)

    def rule(optimizer, loss, gradients):
        mean.assign_add(loss / WINDOW)
        ends = optimizer.iterations % WINDOW == 0
        stalled = ends & (mean > (1 - fraction) * mean_before)
        mean_before.assign(tf.where(ends, mean, mean_before))
        mean.assign(tf.where(ends, 0.0, mean))
        return stalled

    return rule


# --- the same rules in eager Python ------------------------------------------


def differs_clearly(value, threshold):
    """Returns whether rounding, which differs under XLA, cannot decide the rule."""
    return abs(value - threshold) > 1e-3 * threshold


def plain_loss_below(threshold):
    def rule(loss, gradients):
        assert differs_clearly(loss, threshold)
        return loss < threshold

    return rule


def plain_norm_below(threshold):
    def rule(loss, gradients):
        norm = math.sqrt(sum(float(np.sum(g.numpy() ** 2)) for g in gradients))
        assert differs_clearly(norm, threshold)
        return norm < threshold

    return rule


def plain_mean_improves_by_less_than(fraction):
    losses = []

    def rule(loss, gradients):
        losses.append(loss)
        if len(losses) % WINDOW or len(losses) == WINDOW:
            return False
        mean = np.mean(losses[-WINDOW:])
        mean_before = np.mean(losses[-2 * WINDOW : -WINDOW])
        assert differs_clearly(mean, (1 - fraction) * mean_before)
        return mean > (1 - fraction) * mean_before

    return rule


RULES = {
    "loss": (loss_below, plain_loss_below, 0.5),
    "gradient norm": (norm_below, plain_norm_below, 1.0),
    "running mean": (
        mean_improves_by_less_than,
        plain_mean_improves_by_less_than,
        0.4,
    ),
}


# --- training ----------------------------------------------------------------


def train_plain(children, rule):
    """Trains with plain optimizers; returns the weights and each step's phase."""
    weights, phase, phases = make_weights(), 0, []
    for child in children:
        child.build(weights)
    for x, y in zip(X, Y, strict=True):
        loss, gradients = loss_and_gradients(weights, x, y)
        children[phase].apply(gradients, weights)
        phases.append(phase)
        if phase < len(children) - 1 and rule(float(loss), gradients):
            phase += 1
    return weights, phases


def train_steps(optimizer, rule, jit_compile):
    """Does the same with a compiled train step."""
    weights = make_weights()
    optimizer.build(weights)

    @tf.function(jit_compile=jit_compile)
    def train_step(x, y):
        loss, gradients = loss_and_gradients(weights, x, y)
        phase = optimizer.phase
        optimizer.apply(gradients, weights)
        condition = rule(optimizer, loss, gradients)
        tf.cond(condition, optimizer.advance, lambda: None)
        return phase

    phases = [int(train_step(x, y)) for x, y in zip(X, Y, strict=True)]
    assert train_step.experimental_get_tracing_count() == 1
    return weights, phases


def train_loop(optimizer, rule):
    """Does the same with a compiled `tf.while_loop`."""
    weights = make_weights()
    optimizer.build(weights)

    @tf.function(jit_compile=True)
    def train(xs, ys):
        def step(i, phases):
            loss, gradients = loss_and_gradients(weights, xs[i], ys[i])
            phases = tf.tensor_scatter_nd_update(phases, [[i]], [optimizer.phase])
            optimizer.apply(gradients, weights)
            condition = rule(optimizer, loss, gradients)
            tf.cond(condition, optimizer.advance, lambda: None)
            return i + 1, phases

        start = [tf.constant(0), tf.zeros(STEPS, tf.int32)]
        return tf.while_loop(lambda i, _: i < STEPS, step, start)[1]

    phases = train(tf.constant(X), tf.constant(Y)).numpy().tolist()
    assert train.experimental_get_tracing_count() == 1
    return weights, phases


SETTINGS = {
    "step": lambda optimizer, rule: train_steps(optimizer, rule, jit_compile=False),
    "jitted step": lambda optimizer, rule: train_steps(optimizer, rule, True),
    "jitted while_loop": train_loop,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", RULES)
def test_switches_at_the_step_where_eager_python_does(name, setting):
    in_graph, in_python, threshold = RULES[name]
    plain = make_children()
    expected, expected_phases = train_plain(plain, in_python(threshold))
    # It does switch, and neither at once nor at the end.
    assert 5 < expected_phases.index(1) < STEPS - 5

    optimizer = SequentialOptimizer(make_children(), [None])
    weights, phases = SETTINGS[setting](optimizer, in_graph(threshold))
    assert phases == expected_phases
    counts = [int(child.iterations) for child in optimizer.children]
    assert counts == [int(child.iterations) for child in plain]
    # Adding up in another order moves the last digits.
    assert_same(weights_of(weights), weights_of(expected), atol=1e-5)


def below_each(rule, thresholds):
    """Returns a rule with one threshold per phase, as the recipe writes it."""

    def rule_of_phase(optimizer, loss, gradients):
        threshold = tf.gather(tf.constant(thresholds), optimizer.phase)
        return rule(threshold)(optimizer, loss, gradients)

    return rule_of_phase


@pytest.mark.parametrize("setting", SETTINGS)
def test_each_phase_may_have_its_own_threshold(setting):
    thresholds = [2.0, 0.5]
    plain = [*make_children(), keras.optimizers.RMSprop(0.01)]
    phase = 0

    def in_python(loss, gradients):
        nonlocal phase
        ends = plain_norm_below(thresholds[phase])(loss, gradients)
        phase += ends
        return ends

    _, expected_phases = train_plain(plain, in_python)
    assert set(expected_phases) == {0, 1, 2}

    children = [*make_children(), keras.optimizers.RMSprop(0.01)]
    optimizer = SequentialOptimizer(children, [None, None])
    rule = below_each(norm_below, [*thresholds, 0.0])
    _, phases = SETTINGS[setting](optimizer, rule)
    assert phases == expected_phases


@pytest.mark.parametrize("setting", ["jitted step", "jitted while_loop"])
def test_condition_that_stays_true_ends_one_phase_per_step(setting):
    children = [*make_children(), keras.optimizers.RMSprop(0.01)]
    optimizer = SequentialOptimizer(children, [None, None])
    _, phases = SETTINGS[setting](optimizer, loss_below(math.inf))
    assert phases == [0, 1] + [2] * (STEPS - 2)


@pytest.mark.parametrize("boundary", [3, 30])
def test_boundary_or_condition_whichever_comes_first(boundary):
    _, alone = train_plain(make_children(), plain_loss_below(0.5))
    optimizer = SequentialOptimizer(make_children(), [boundary])
    _, phases = train_loop(optimizer, loss_below(0.5))
    assert 3 < alone.index(1) < 30
    assert phases.index(1) == min(alone.index(1), boundary)


def test_if_of_autograph_is_a_condition_too():
    weights = make_weights()
    optimizer = SequentialOptimizer(make_children(), [None])
    optimizer.build(weights)

    @tf.function(jit_compile=True)
    def train_step(x, y):
        loss, gradients = loss_and_gradients(weights, x, y)
        optimizer.apply(gradients, weights)
        if loss < 0.5:
            optimizer.advance()

    for x, y in zip(X, Y, strict=True):
        train_step(x, y)
    _, expected_phases = train_plain(make_children(), plain_loss_below(0.5))
    assert int(optimizer.children[0].iterations) == expected_phases.index(1)
    assert train_step.experimental_get_tracing_count() == 1


def test_condition_under_loss_scaling():
    weights = make_weights()
    optimizer = SequentialOptimizer(make_children(), [None])
    scaled = keras.optimizers.LossScaleOptimizer(optimizer)
    scaled.build(weights)

    @tf.function(jit_compile=True)
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((x @ weights[0].value + weights[1].value - y) ** 2)
            scaled_loss = scaled.scale_loss(loss)
        gradients = tape.gradient(scaled_loss, [weight.value for weight in weights])
        scaled.apply(gradients, weights)
        tf.cond(loss < 0.5, optimizer.advance, lambda: None)

    for x, y in zip(X, Y, strict=True):
        train_step(x, y)
    _, expected_phases = train_plain(make_children(), plain_loss_below(0.5))
    assert int(optimizer.children[0].iterations) == expected_phases.index(1)
    assert train_step.experimental_get_tracing_count() == 1
