"""A LossScaleOptimizer around the sequence: skipped updates count for nobody."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers.models import adam_then_sgd
from tests.helpers.oracle import assert_same
from tests.slow.strategies.loops import (
    build,
    counts_of,
    replica_id,
    values_of,
)

BOUNDARY = 3
CALLS = 8
# Right before the last update of the first phase, where the second would begin, and
# right after its first update.
BROKEN = (2, 4, 6)

_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(2, CALLS, 4, 3)).astype("float32")
Y = _RNG.normal(size=(2, CALLS, 4, 1)).astype("float32")
X[:, BROKEN] = np.inf


def make_model(strategy):
    with strategy.scope():
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        model.layers[0].kernel.assign([[0.5], [-0.25], [0.75]])
    return model


def wrap(strategy, inner):
    """Returns a LossScaleOptimizer whose scale changes within the run."""
    with strategy.scope():
        return keras.optimizers.LossScaleOptimizer(
            inner, initial_scale=1024.0, dynamic_growth_steps=2
        )


def make_step(strategy, model, optimizer):
    build(strategy, optimizer, model.trainable_variables)

    def replica(call):
        x = tf.constant(X)[replica_id(), call]
        y = tf.constant(Y)[replica_id(), call]
        weights = [weight.value for weight in model.trainable_variables]
        with tf.GradientTape() as tape:
            errors = tf.cast(model(x), tf.float32) - y
            loss = optimizer.scale_loss(tf.reduce_mean(errors**2))
        optimizer.apply(tape.gradient(loss, weights), model.trainable_variables)

    @tf.function(autograph=False)
    def step(call):
        strategy.run(replica, args=(call,))

    return step


def own_variables(optimizer):
    return [optimizer.dynamic_scale, optimizer.step_counter]


def run_by_hand(strategy):
    """Returns the values after every call, with one wrapped plain optimizer per phase.

    The second is made when the first has made its updates, and takes over the scale.
    """
    model = make_model(strategy)
    with strategy.scope():
        adam, sgd = adam_then_sgd()
    optimizer = wrap(strategy, adam)
    step = make_step(strategy, model, optimizer)
    history, applied = [], []
    for call in range(CALLS):
        if optimizer.inner_optimizer is adam and sum(applied) == BOUNDARY:
            before, optimizer = optimizer, wrap(strategy, sgd)
            step = make_step(strategy, model, optimizer)
            for new, old in zip(
                own_variables(optimizer), own_variables(before), strict=True
            ):
                new.assign(old.numpy())
        weights = values_of(strategy, model.trainable_variables)
        step(tf.constant(call))
        history.append(values_of(strategy, own_variables(optimizer)))
        history.append(values_of(strategy, model.trainable_variables))
        applied.append(not np.array_equal(weights[0][0], history[-1][0][0]))
    assert applied == [call not in BROKEN for call in range(CALLS)]
    return history, values_of(strategy, adam.variables + sgd.variables)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"], indirect=True)
def test_skipped_updates_delay_the_boundary(strategy, policy):
    model = make_model(strategy)
    with strategy.scope():
        children = adam_then_sgd()
        sequence = SequentialOptimizer(children, [BOUNDARY])
    optimizer = wrap(strategy, sequence)
    step = make_step(strategy, model, optimizer)
    history = []
    for call in range(CALLS):
        step(tf.constant(call))
        history.append(values_of(strategy, own_variables(optimizer)))
        history.append(values_of(strategy, model.trainable_variables))
    expected, of_children = run_by_hand(strategy)
    assert_same(history, expected)
    assert_same(
        values_of(strategy, children[0].variables + children[1].variables), of_children
    )
    for counts in counts_of(strategy, [sequence, *children]):
        assert counts == [CALLS - len(BROKEN), BOUNDARY, 2]
    assert step.experimental_get_tracing_count() == 1
