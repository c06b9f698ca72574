"""A run that began with a plain optimizer continues as phase 0, with its state."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers.oracle import assert_same, weights_of
from tests.helpers.saving import build, make_data, make_model, train, warnings_of

optimizers = keras.optimizers

TRAINED = 3  # updates of the plain run
BOUNDARY = 2  # updates after which the migrated run leaves its optimizer
UPDATES = 5  # updates of the migrated run

PLAIN = {
    "adam": lambda: optimizers.Adam(0.05),
    # Each would show a counter that starts again.
    "schedule": lambda: optimizers.Adam(
        optimizers.schedules.ExponentialDecay(0.05, 1, 0.5)
    ),
    "own_accumulation": lambda: optimizers.Adam(0.05, gradient_accumulation_steps=2),
    "own_ema": lambda: optimizers.Adam(0.05, use_ema=True, ema_overwrite_frequency=2),
    "clipped": lambda: optimizers.RMSprop(0.05, momentum=0.9, clipnorm=0.1),
}


def _sgd():
    return optimizers.SGD(0.02, momentum=0.9)


def _save_plain(tmp_path, make):
    model = make_model(make())
    train(model, 0, TRAINED)
    model.save(tmp_path / "plain.keras")
    return tmp_path / "plain.keras"


def _migrate(model):
    optimizer = SequentialOptimizer([model.optimizer, _sgd()], [BOUNDARY])
    model.compile(optimizer, "mse", jit_compile=False)
    return model


def _plain_states(model):
    """What plain optimizers do: the first continues, then a new one follows by hand.

    Returns the weights and the variables of both optimizers after each update.
    """
    first, second = model.optimizer, _sgd()
    model.compile(first, "mse")
    states = [
        [weights, variables, None]
        for weights, variables in train(model, TRAINED, TRAINED + BOUNDARY)
    ]
    model.compile(second, "mse")
    states += [
        [weights, weights_of(first.variables), variables]
        for weights, variables in train(model, TRAINED + BOUNDARY, TRAINED + UPDATES)
    ]
    return states


def _assert_goes_on_like(model, expected):
    first, second = model.optimizer.children
    for t, (weights, of_first, of_second) in enumerate(expected):
        assert int(model.optimizer.phase) == int(t >= BOUNDARY)
        train(model, TRAINED + t, TRAINED + t + 1)
        assert_same(weights_of(model.weights), weights)
        assert_same(weights_of(first.variables), of_first)
        if of_second is None:
            assert int(second.iterations) == 0
        else:
            assert_same(weights_of(second.variables), of_second)
    assert int(model.optimizer.iterations) == len(expected)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_model_from_a_file_continues_as_phase_0(tmp_path, name):
    path = _save_plain(tmp_path, PLAIN[name])
    expected = _plain_states(keras.saving.load_model(path))
    model = keras.saving.load_model(path)
    plain = model.optimizer
    trained = weights_of(plain.variables)
    build(_migrate(model))
    assert model.optimizer.children[0] is plain
    assert_same(weights_of(plain.variables), trained)
    assert int(plain._iterations) == TRAINED
    _assert_goes_on_like(model, expected)


def test_plain_model_in_memory_continues_as_phase_0(tmp_path):
    path = _save_plain(tmp_path, PLAIN["adam"])
    expected = _plain_states(keras.saving.load_model(path))
    model = make_model(PLAIN["adam"]())
    train(model, 0, TRAINED)
    _assert_goes_on_like(_migrate(model), expected)


def test_plain_checkpoint_continues_as_phase_0(tmp_path):
    path = _save_plain(tmp_path, PLAIN["adam"])
    plain = keras.saving.load_model(path)
    checkpoint = tf.train.Checkpoint(model=plain).write(str(tmp_path / "checkpoint"))
    expected = _plain_states(plain)
    model = build(make_model(PLAIN["adam"]()))
    tf.train.Checkpoint(model=model).read(checkpoint).assert_consumed()
    _assert_goes_on_like(_migrate(model), expected)


def test_remedy_for_a_refused_plain_file_works(tmp_path):
    path = _save_plain(tmp_path, PLAIN["adam"])
    expected = _plain_states(keras.saving.load_model(path))
    model = build(make_model(SequentialOptimizer([PLAIN["adam"](), _sgd()], [2])))
    with pytest.raises(ValueError, match="pass that as the first child"):
        warnings_of(model.load_weights, path)
    model = build(make_model(PLAIN["adam"]()))
    model.load_weights(path)
    _assert_goes_on_like(_migrate(model), expected)


@pytest.mark.parametrize("calls", [BOUNDARY - 1, BOUNDARY, BOUNDARY + 1])
@pytest.mark.parametrize("way", ["keras", "weights_h5", "checkpoint"])
def test_migrated_run_is_saved_like_any_other(tmp_path, way, calls):
    path = _save_plain(tmp_path, PLAIN["adam"])
    model = _migrate(keras.saving.load_model(path))
    states = train(model, TRAINED, TRAINED + calls)
    saved = tmp_path / f"migrated.{way}"
    if way == "keras":
        model.save(saved)
        loaded = keras.saving.load_model(saved)
    else:
        # By now nothing of the plain run is needed.
        loaded = build(
            make_model(SequentialOptimizer([PLAIN["adam"](), _sgd()], [BOUNDARY]))
        )
        if way == "weights_h5":
            model.save_weights(tmp_path / "migrated.weights.h5")
            loaded.load_weights(tmp_path / "migrated.weights.h5")
        else:
            written = tf.train.Checkpoint(model=model).write(str(saved))
            tf.train.Checkpoint(model=loaded).read(written).assert_consumed()
    states += train(model, TRAINED + calls, TRAINED + UPDATES)
    assert_same(train(loaded, TRAINED + calls, TRAINED + UPDATES), states[calls:])


def _fit(model, start, stop):
    x, y = (np.concatenate(array[start:stop]) for array in make_data())
    rows = len(x) // (stop - start)
    model.fit(x, y, batch_size=rows, shuffle=False, verbose=0)


def test_fit_continues_as_phase_0(tmp_path):
    path = _save_plain(tmp_path, PLAIN["adam"])
    plain = keras.saving.load_model(path)
    plain.compile(plain.optimizer, "mse", jit_compile=False)
    _fit(plain, TRAINED, TRAINED + BOUNDARY)
    model = _migrate(keras.saving.load_model(path))
    _fit(model, TRAINED, TRAINED + BOUNDARY)
    assert_same(weights_of(model.weights), weights_of(plain.weights))
    adam, sgd = model.optimizer.children
    assert_same(weights_of(adam.variables), weights_of(plain.optimizer.variables))
    assert int(sgd.iterations) == 0

    sgd_alone = _sgd()
    plain.compile(sgd_alone, "mse", jit_compile=False)
    _fit(plain, TRAINED + BOUNDARY, TRAINED + UPDATES)
    _fit(model, TRAINED + BOUNDARY, TRAINED + UPDATES)
    assert_same(weights_of(model.weights), weights_of(plain.weights))
    assert_same(weights_of(sgd.variables), weights_of(sgd_alone.variables))


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
def test_mixed_precision_run_continues_with_its_inner_optimizer(tmp_path, policy):
    path = _save_plain(tmp_path, PLAIN["adam"])
    plain = keras.saving.load_model(path)
    model = keras.saving.load_model(path)
    # Keras wraps the optimizer of such a model by itself.
    assert isinstance(model.optimizer, optimizers.LossScaleOptimizer)
    inner = model.optimizer.inner_optimizer
    model.compile(SequentialOptimizer([inner, _sgd()], [BOUNDARY]), "mse")
    assert isinstance(model.optimizer, optimizers.LossScaleOptimizer)

    expected = train(plain, TRAINED, TRAINED + BOUNDARY)
    for t, (weights, _) in enumerate(expected):
        train(model, TRAINED + t, TRAINED + t + 1)
        assert_same(weights_of(model.weights), weights)
    adam = plain.optimizer.inner_optimizer
    assert int(adam.iterations) == TRAINED + BOUNDARY
    assert_same(weights_of(inner.variables), weights_of(adam.variables))

    plain.compile(_sgd(), "mse")
    train(plain, TRAINED + BOUNDARY, TRAINED + UPDATES)
    train(model, TRAINED + BOUNDARY, TRAINED + UPDATES)
    assert_same(weights_of(model.weights), weights_of(plain.weights))
    sequential = model.optimizer.inner_optimizer
    assert int(sequential.iterations) == UPDATES
    assert_same(
        weights_of(sequential.children[1].variables),
        weights_of(plain.optimizer.inner_optimizer.variables),
    )
