"""A run that is saved continues under the strategy, on one device, and back.

The gradients are such that their sum over replicas is exact, and one device gets that
sum: so the run must end with the same bits wherever its parts were trained.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers.oracle import assert_same
from tests.slow.strategies.loops import (
    GRADIENTS,
    HAS_CONSTRAINTS,
    UPDATES,
    build,
    replica_id,
    values_of,
)

BOUNDARY = 3


def make_model(strategy, use_ema=True):
    """Returns a compiled model, with the same weights at every call."""
    constraint = keras.constraints.MaxNorm(1.0) if HAS_CONSTRAINTS else None
    with strategy.scope():
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(2, kernel_constraint=constraint),
            ]
        )
        model.layers[0].kernel.assign([[0.5, -1.0], [0.25, 0.75], [-0.5, 1.0]])
        adam = keras.optimizers.Adam(0.05, name="adam")
        sgd = keras.optimizers.SGD(0.02, momentum=0.9, name="sgd")
        optimizer = SequentialOptimizer(
            [adam, sgd, adam], [BOUNDARY, None], use_ema=use_ema, ema_momentum=0.75
        )
        # Eagerly, which takes half the time of tracing these few updates.
        model.compile(optimizer, loss="mse", run_eagerly=True)
    build(strategy, optimizer, model.trainable_variables)
    return model


def train(strategy, replicas, model, first, last):
    """Makes updates; without a strategy with the gradients of all replicas."""

    def gradients_of(update):
        tables = [GRADIENTS[name][:replicas, update] for name in ("kernel", "bias")]
        if not tf.distribute.has_strategy():
            return [tf.constant(table.sum(0), tf.float32) for table in tables]
        return [tf.constant(table, tf.float32)[replica_id()] for table in tables]

    def replica(update):
        model.optimizer.apply(gradients_of(update), model.trainable_variables)

    for update in range(first, last):
        strategy.run(replica, args=(update,))
        if update == UPDATES - 2:
            model.optimizer.advance()


def state_of(strategy, model):
    return values_of(strategy, model.weights + model.optimizer.variables)


@functools.cache
def uninterrupted(strategy):
    """Returns the state after every update, of the first replica."""
    model = make_model(strategy)
    history = []
    for update in range(UPDATES):
        train(strategy, strategy.num_replicas_in_sync, model, update, update + 1)
        history.append(state_of(strategy, model))
    assert int(model.optimizer.phase) == 2
    return [[values[0] for values in state] for state in history]


def assert_state(strategy, model, expected):
    """Asserts that every replica has the expected values."""
    for values, value in zip(state_of(strategy, model), expected, strict=True):
        assert_same(values, [value] * len(values))


# --- the ways of saving ------------------------------------------------------


def via_checkpoint(model, make, path):
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(path))
    new = make()
    checkpoint = tf.train.Checkpoint(model=new, optimizer=new.optimizer)
    checkpoint.read(str(path)).assert_consumed()
    return new


def via_weights(model, make, path):
    model.save_weights(f"{path}.weights.h5")
    new = make()
    new.load_weights(f"{path}.weights.h5")
    return new


def via_keras(model, make, path):
    model.save(f"{path}.keras")
    return keras.models.load_model(f"{path}.keras")


WAYS = {"checkpoint": via_checkpoint, "weights": via_weights, "keras": via_keras}


def move(model, strategy, way, path):
    """Saves the model and loads it under a strategy."""
    with strategy.scope():
        return WAYS[way](model, functools.partial(make_model, strategy), path)


# The switch is in the last part of the run, or on one device.
@pytest.mark.parametrize("cuts", [(1, 2), (2, 4)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_run_moves_to_one_device_and_back(strategy, way, cuts, tmp_path):
    replicas = strategy.num_replicas_in_sync
    expected = uninterrupted(strategy)
    model = make_model(strategy)
    places = [strategy, tf.distribute.get_strategy(), strategy]
    ends = [*cuts, UPDATES]
    begin = 0
    for part, (place, end) in enumerate(zip(places, ends, strict=True)):
        if part:
            model = move(model, place, way, tmp_path / str(part))
            assert_state(place, model, expected[begin - 1])
        train(place, replicas, model, begin, end)
        begin = end
    assert_state(strategy, model, expected[-1])


@pytest.mark.parametrize("cut", [2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_run_continues_under_its_strategy(strategy, way, cut, tmp_path):
    replicas = strategy.num_replicas_in_sync
    model = make_model(strategy)
    train(strategy, replicas, model, 0, cut)
    model = move(model, strategy, way, tmp_path / "saved")
    train(strategy, replicas, model, cut, UPDATES)
    assert_state(strategy, model, uninterrupted(strategy)[-1])


ROWS = 4  # in a batch
_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(UPDATES * ROWS, 3))
Y = _RNG.normal(size=(UPDATES * ROWS, 2))


def fit(model, first, last):
    """Fits the model to the batches from `first` up to `last`."""
    rows = slice(first * ROWS, last * ROWS)
    model.fit(X[rows], Y[rows], batch_size=ROWS, shuffle=False, verbose=0)


def test_fit_continues_with_a_loaded_model(strategy, tmp_path):
    whole, model = (make_model(strategy, use_ema=False) for _ in range(2))
    fit(whole, 0, UPDATES)
    fit(model, 0, 2)
    loaded = move(model, strategy, "keras", tmp_path / "saved")
    fit(loaded, 2, UPDATES)
    assert int(loaded.optimizer.phase) == 1
    assert_same(state_of(strategy, loaded), state_of(strategy, whole))
