"""What plain Keras cannot do under a strategy, and is hence not promised.

A test that fails here says that a new version can do it: lift the restriction, and
update the table in the README.
"""

import functools
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers.models import adam_then_sgd
from tests.slow.strategies.conftest import AGGREGATES, NAME
from tests.slow.strategies.loops import (
    HAS_SEVERAL_STEPS,
    build,
    replica_id,
    values_of,
)

optimizers = keras.optimizers
InvalidArgumentError = tf.errors.InvalidArgumentError

mirrored = pytest.mark.skipif(
    not NAME.startswith("mirrored"), reason="about MirroredStrategy"
)
central = pytest.mark.skipif(
    NAME != "central-storage" or not AGGREGATES,
    reason="about CentralStorageStrategy, where it works at all",
)

# A condition in a replica whose branch has to meet the other replicas.
CANNOT_MEET = "merge_call.* called while defining a new graph"
# An assignment in a replica, to a variable that all of them share.
CANNOT_ASSIGN = "specify an aggregation method to update a AggregatingVariable"


def check_still_fails(train, error, message):
    """Asserts that `train` raises what it does today."""
    raised = error_of(train, error)
    assert raised is not None, (
        "This works now. Lift the restriction, test the sequence here against the "
        "plain optimizers, and update the table in the README."
    )
    assert re.search(message, str(raised)), raised


def error_of(train, error):
    """Returns what `train` raises, `None` if nothing."""
    try:
        train()
    except error as raised:
        return raised
    return None


def make_adam(**kwargs):
    return optimizers.Adam(0.05, **kwargs)


def make_sequence():
    return SequentialOptimizer(adam_then_sgd(), [1])


with_plain_or_sequence = pytest.mark.parametrize("make", [make_adam, make_sequence])


def make_variable(strategy):
    with strategy.scope():
        return keras.Variable([1.0, 2.0], dtype="float32", name="v")


def train(strategy, make, graph=True, built=True, jit_compile=False, constraint=None):
    """Trains a variable with the optimizer that `make` returns."""
    variable = make_variable(strategy)
    variable.constraint = constraint
    with strategy.scope():
        optimizer = make()
    if built:
        build(strategy, optimizer, [variable])

    def step():
        strategy.run(lambda: optimizer.apply([tf.ones(2)], [variable]))

    if graph:
        step = tf.function(step, autograph=False, jit_compile=jit_compile)
    for _ in range(2):
        step()


def fit(strategy, make, layer=None, **kwargs):
    with strategy.scope():
        layers = [keras.Input((2,)), *([layer()] if layer else [])]
        model = keras.Sequential([*layers, keras.layers.Dense(1)])
        model.compile(make(), loss="mse", **{"jit_compile": False, **kwargs})
    model.fit(np.ones((8, 2)), np.ones((8, 1)), batch_size=4, verbose=0)


# --- MirroredStrategy --------------------------------------------------------


@mirrored
@with_plain_or_sequence
def test_mirrored_step_cannot_be_compiled_for_several_cpus(strategy, make):
    check_still_fails(
        lambda: train(strategy, make, jit_compile=True),
        InvalidArgumentError,
        "tfvariable_on_a_different_device",
    )


@mirrored
@pytest.mark.skipif(HAS_SEVERAL_STEPS, reason="works in Keras 3.5: test_equality.py")
@with_plain_or_sequence
def test_mirrored_fit_cannot_execute_several_steps(strategy, make):
    check_still_fails(
        lambda: fit(strategy, make, steps_per_execution=2),
        InvalidArgumentError,
        "must feed a value for placeholder",
    )


@mirrored
def test_mirrored_graph_cannot_accumulate_gradients(strategy):
    make = functools.partial(make_adam, gradient_accumulation_steps=2)
    check_still_fails(lambda: train(strategy, make), RuntimeError, CANNOT_MEET)


# A sequence can do the next two: test_equality.py.


@mirrored
def test_mirrored_graph_cannot_overwrite_with_averages(strategy):
    make = functools.partial(make_adam, use_ema=True, ema_overwrite_frequency=2)
    check_still_fails(lambda: train(strategy, make), RuntimeError, CANNOT_MEET)


@mirrored
def test_mirrored_graph_cannot_build_the_optimizer(strategy):
    check_still_fails(
        lambda: train(strategy, make_adam, built=False),
        InvalidArgumentError,
        "must feed a value for placeholder",
    )


@mirrored
@pytest.mark.parametrize("broken", [0, 1])
def test_mirrored_loss_scaling_looks_at_the_first_replica_only(strategy, broken):
    # Where it looks, the update is skipped; otherwise the weights are lost.
    variable = make_variable(strategy)
    with strategy.scope():
        optimizer = optimizers.LossScaleOptimizer(make_adam())
    build(strategy, optimizer, [variable])

    def replica():
        gradient = tf.where(tf.equal(replica_id(), broken), np.inf, 1.0)
        optimizer.apply([tf.fill([2], tf.cast(gradient, tf.float32))], [variable])

    tf.function(lambda: strategy.run(replica), autograph=False)()
    for value in values_of(strategy, [variable])[0]:
        np.testing.assert_array_equal(value, [1, 2] if broken == 0 else [np.nan] * 2)


# --- CentralStorageStrategy --------------------------------------------------


@pytest.mark.skipif(NAME != "central-storage" or AGGREGATES, reason="about Keras 3.5")
@with_plain_or_sequence
def test_central_storage_cannot_update_anything_in_old_keras(strategy, make):
    check_still_fails(lambda: train(strategy, make), ValueError, CANNOT_ASSIGN)


@central
def test_central_storage_cannot_constrain_a_variable(strategy):
    constraint = keras.constraints.UnitNorm()
    check_still_fails(
        lambda: train(strategy, make_adam, constraint=constraint),
        ValueError,
        CANNOT_ASSIGN,
    )


@central
@pytest.mark.parametrize("frequency", [None, 2])
def test_central_storage_cannot_average_weights(strategy, frequency):
    # A sequence can, all phases together: test_equality.py.
    make = functools.partial(make_adam, use_ema=True, ema_overwrite_frequency=frequency)
    check_still_fails(lambda: train(strategy, make), ValueError, CANNOT_ASSIGN)


@central
def test_central_storage_cannot_normalize_batches(strategy):
    check_still_fails(
        lambda: fit(strategy, make_adam, keras.layers.BatchNormalization),
        ValueError,
        CANNOT_ASSIGN,
    )


@central
@with_plain_or_sequence
def test_central_storage_cannot_scale_the_loss(strategy, make):
    check_still_fails(
        lambda: train(strategy, lambda: optimizers.LossScaleOptimizer(make())),
        ValueError,
        CANNOT_ASSIGN,
    )


@central
@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [(True, RuntimeError, CANNOT_MEET), (False, ValueError, CANNOT_ASSIGN)],
)
def test_central_storage_cannot_accumulate_gradients(strategy, graph, error, message):
    make = functools.partial(make_adam, gradient_accumulation_steps=2)
    check_still_fails(lambda: train(strategy, make, graph=graph), error, message)
