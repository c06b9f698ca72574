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
from tests.reference import assert_same, make_variables, weights_of

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
    """Returns whether rounding, which XLA does otherwise, cannot decide the rule."""
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
    """Does it with a compiled train step."""
    weights = make_weights()
    optimizer.build(weights)

    @tf.function(jit_compile=jit_compile)
    def train_step(x, y):
        loss, gradients = loss_and_gradients(weights, x, y)
        phase = optimizer.phase
        optimizer.apply(gradients, weights)
        condition = rule(optimizer, loss, gradients)
        tf.cond(condition, optimizer.advance, lambda: optimizer.phase)
        return phase

    phases = [int(train_step(x, y)) for x, y in zip(X, Y, strict=True)]
    assert train_step.experimental_get_tracing_count() == 1
    return weights, phases


def train_loop(optimizer, rule):
    """Does it with a compiled `tf.while_loop`."""
    weights = make_weights()
    optimizer.build(weights)

    @tf.function(jit_compile=True)
    def train(xs, ys):
        def step(i, phases):
            loss, gradients = loss_and_gradients(weights, xs[i], ys[i])
            phases = tf.tensor_scatter_nd_update(phases, [[i]], [optimizer.phase])
            optimizer.apply(gradients, weights)
            condition = rule(optimizer, loss, gradients)
            tf.cond(condition, optimizer.advance, lambda: optimizer.phase)
            return i + 1, phases

        start = [tf.constant(0), tf.zeros(STEPS, tf.int32)]
        return tf.while_loop(lambda i, _: i < STEPS, step, start)[1]

    half = STEPS // 2
    # In two calls, so that the second one could retrace.
    phases = [*train(X[:half], Y[:half]).numpy()[:half]] if False else None
    del phases
    result = train(tf.constant(X), tf.constant(Y))
    assert train.experimental_get_tracing_count() == 1
    return weights, result.numpy().tolist()
