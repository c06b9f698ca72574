"""What is in a file besides the state of a run, and what may be missing in it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers.oracle import assert_same, weights_of
from tests.helpers.saving import (
    BOUNDARY,
    CASES,
    adam_sgd,
    build,
    make_model,
    state_of,
    train,
    warnings_of,
)
from tests.helpers.saving_ways import load_keras, save_keras

optimizers = keras.optimizers


def _adam(name=None):
    return optimizers.Adam(0.05, name=name)


def _sgd(name=None):
    return optimizers.SGD(0.02, momentum=0.9, name=name)


def _trained_file(tmp_path, optimizer, calls=4):
    """Returns a trained model and the h5 file it was saved to."""
    model = make_model(optimizer)
    train(model, 0, calls)
    path = tmp_path / "saved.weights.h5"
    model.save_weights(path)
    return model, path


def test_automatic_names_do_not_count(tmp_path):
    def make(adam, sgd):
        return SequentialOptimizer([_adam(adam), _sgd(sgd)], [BOUNDARY])

    # Keras counts up within a process: another optimizer came first in the one run.
    saved, path = _trained_file(tmp_path, make("adam_1", "sgd_2"))
    model = build(make_model(make("adam", "sgd_1")))
    model.load_weights(path)
    assert_same(state_of(model), state_of(saved))


def test_skip_mismatch_turns_refusal_into_a_warning(tmp_path):
    _, path = _trained_file(tmp_path, _adam())
    model = build(make_model(adam_sgd()))
    before = weights_of(model.optimizer.variables)
    messages = warnings_of(model.load_weights, path, skip_mismatch=True)
    assert any("must have been saved from one" in message for message in messages)
    assert_same(weights_of(model.optimizer.variables), before)


def test_file_without_an_optimizer_leaves_it_as_it_is(tmp_path):
    make_model().save_weights(tmp_path / "bare.weights.h5")
    model = make_model(adam_sgd())
    train(model, 0, 4)
    before = weights_of(model.optimizer.variables)
    messages = warnings_of(model.load_weights, tmp_path / "bare.weights.h5")
    assert len(messages) == 1
    assert messages[0].startswith("Skipping variable loading for `sequential_optim")
    assert_same(weights_of(model.optimizer.variables), before)


def test_unbuilt_optimizer_is_saved_with_all_it_has(tmp_path):
    model = make_model(adam_sgd([None]))
    model.optimizer.advance()
    model.optimizer.children[1].learning_rate = 0.01
    model.save(tmp_path / "unbuilt.keras")
    loaded = keras.saving.load_model(tmp_path / "unbuilt.keras")
    assert int(loaded.optimizer.phase) == 1
    assert_same(train(loaded, 0, 6), train(model, 0, 6))


def test_loaded_instance_that_returns_is_one_child(tmp_path):
    save_keras(build(make_model(CASES["returning"].make())), tmp_path)
    optimizer = load_keras(tmp_path, None).optimizer
    assert [type(c).__name__ for c in optimizer.children] == ["Adam", "SGD"]
    assert optimizer.get_config()["child_of_phase"] == [0, 1, 0]
    assert optimizer.get_config()["boundaries"] == [BOUNDARY, BOUNDARY + 2]


def test_optimizer_and_weights_are_saved_apart(tmp_path):
    model = make_model(adam_sgd())
    train(model, 0, 4)
    optimizer = tf.train.Checkpoint(optimizer=model.optimizer)
    path = optimizer.write(str(tmp_path / "optimizer"))
    expected = train(model, 4, 6)
    model = build(make_model(adam_sgd()))
    tf.train.Checkpoint(optimizer=model.optimizer).read(path).assert_consumed()
    assert_same(train(model, 4, 6), expected)


def test_checkpoint_of_weights_alone_leaves_the_optimizer(tmp_path):
    path = tf.train.Checkpoint(model=make_model()).write(str(tmp_path / "bare"))
    model = make_model(adam_sgd())
    train(model, 0, 4)
    before = weights_of(model.optimizer.variables)
    tf.train.Checkpoint(model=model).read(path).expect_partial()
    assert_same(weights_of(model.optimizer.variables), before)
    assert_same(weights_of(model.weights), weights_of(make_model().weights))


# --- set_weights -------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["one_less", "one_more", "shape"])
def test_set_weights_sets_all_or_nothing(wrong):
    model = make_model(adam_sgd())
    train(model, 0, 4)
    before = weights_of(model.optimizer.variables)
    arrays = [array + 1 for array in before]
    if wrong == "one_less":
        arrays.pop()
    elif wrong == "one_more":
        arrays.append(np.zeros(()))
    else:
        arrays[-1] = np.zeros((7, 7))
    with pytest.raises(ValueError, match="`weights` must have"):
        model.optimizer.set_weights(arrays)
    assert_same(weights_of(model.optimizer.variables), before)


def test_set_weights_needs_a_built_optimizer():
    with pytest.raises(ValueError, match="must be built before `set_weights`"):
        adam_sgd().set_weights([])


def test_optimizer_made_by_compile_saves_all_of_its_state(tmp_path):
    # Keras tracks no attributes of what is made inside of `compile`.
    model = make_model()
    model.compile(keras.saving.serialize_keras_object(adam_sgd([None])), "mse")
    train(model, 0, 2)
    model.optimizer.advance()
    train(model, 2, 4)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.phase) == 1
    assert_same(state_of(loaded), state_of(model))
    assert_same(train(loaded, 4, 6), train(model, 4, 6))
