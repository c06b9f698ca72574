"""Every way to save a model with its optimizer, and to continue from there."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from tests.helpers.oracle import weights_of
from tests.helpers.saving import build, make_model


@dataclass(frozen=True)
class Way:
    """A way to save, and to load again.

    Attributes:
        save: function of (model, folder).
        load: function of (folder, function that makes the optimizer), returns a model.
    """

    save: Callable[[Any, Path], None]
    load: Callable[[Path, Callable[[], Any]], Any]


def save_keras(model, folder):
    model.save(folder / "model.keras")


def load_keras(folder, make):
    return keras.saving.load_model(folder / "model.keras")


def load_weights_of_keras_file(folder, make):
    model = build(make_model(make()))
    model.load_weights(folder / "model.keras")
    return model


def save_weights_h5(model, folder):
    model.save_weights(folder / "model.weights.h5")


def load_weights_h5(folder, make):
    model = build(make_model(make()))
    model.load_weights(folder / "model.weights.h5")
    return model


def deepcopy(folder, make):
    return copy.deepcopy(load_weights_h5(folder, make))


def clone(folder, make):
    original = load_weights_h5(folder, make)
    cloned = keras.models.clone_model(original)
    cloned.compile_from_config(original.get_compile_config())
    build(cloned)
    cloned.set_weights(original.get_weights())
    cloned.optimizer.set_weights(weights_of(original.optimizer.variables))
    return cloned


def save_pickle(model, folder):
    (folder / "model.pickle").write_bytes(pickle.dumps(model))


def unpickle(folder, make):
    return pickle.loads((folder / "model.pickle").read_bytes())


def save_arrays(model, folder):
    weights = [model.get_weights(), weights_of(model.optimizer.variables)]
    (folder / "weights.pickle").write_bytes(pickle.dumps(weights))


def set_weights(folder, make):
    model = build(make_model(make()))
    weights, optimizer_variables = pickle.loads(
        (folder / "weights.pickle").read_bytes()
    )
    model.set_weights(weights)
    model.optimizer.set_weights(optimizer_variables)
    return model


def checkpoint_in(folder):
    return str(folder / "checkpoint")


def save_checkpoint(model, folder):
    tf.train.Checkpoint(model=model).write(checkpoint_in(folder))


def read_checkpoint(model, folder):
    """Restores into variables that exist."""
    tf.train.Checkpoint(model=model).read(checkpoint_in(folder)).assert_consumed()


def restore(folder, make):
    model = build(make_model(make()))
    read_checkpoint(model, folder)
    return model


def restore_deferred(folder, make):
    """Restores what the optimizer has, and the rest when it is built."""
    model = make_model(make())
    status = tf.train.Checkpoint(model=model).read(checkpoint_in(folder))
    build(model)
    status.assert_consumed()
    return model


WAYS = {
    "keras": Way(save_keras, load_keras),
    "weights_h5": Way(save_weights_h5, load_weights_h5),
    "weights_of_keras_file": Way(save_keras, load_weights_of_keras_file),
    "pickle": Way(save_pickle, unpickle),
    "deepcopy": Way(save_weights_h5, deepcopy),
    "set_weights": Way(save_arrays, set_weights),
    "clone_model": Way(save_weights_h5, clone),
    "checkpoint": Way(save_checkpoint, restore),
    "checkpoint_deferred": Way(save_checkpoint, restore_deferred),
}
