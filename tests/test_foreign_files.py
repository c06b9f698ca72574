"""Damaged and foreign files end in an error, and leave everything as it was."""

import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer, _saving
from tests.reference import assert_same, weights_of
from tests.saving_tools import (
    BOUNDARY,
    adam_sgd,
    make_model,
    state_of,
    train,
    warnings_of,
)
from tests.saving_ways import (
    read_checkpoint,
    save_checkpoint,
    save_keras,
    save_weights_h5,
)

CALLS = BOUNDARY + 1


@dataclass(frozen=True)
class Format:
    """A kind of file that is loaded into a model that exists.

    Attributes:
        save: function of (model, folder).
        load: function of (model, folder).
        files: the names of the files with data in them.
        errors: what its readers raise when a file is damaged.
    """

    save: Callable
    load: Callable
    files: tuple[str, ...]
    errors: tuple[type[Exception], ...]


def _load_weights(name):
    return lambda model, folder: model.load_weights(folder / name)


FORMATS = {
    "keras": Format(
        save_keras,
        _load_weights("model.keras"),
        ("model.keras",),
        (ValueError, OSError, zipfile.BadZipFile),
    ),
    "weights_h5": Format(
        save_weights_h5,
        _load_weights("model.weights.h5"),
        ("model.weights.h5",),
        (ValueError, OSError),
    ),
    "checkpoint": Format(
        save_checkpoint,
        read_checkpoint,
        ("checkpoint.index", "checkpoint.data-00000-of-00001"),
        # IndexError for an object graph that is cut off.
        (ValueError, IndexError, tf.errors.OpError),
    ),
}
FILES = [(name, file) for name, kind in FORMATS.items() for file in kind.files]


def trained(optimizer=None, calls=CALLS):
    model = make_model(optimizer or adam_sgd())
    train(model, 0, calls)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The state of a run, and the folder with its files in every format."""
    model, folder = trained(), tmp_path_factory.mktemp("saved")
    for kind in FORMATS.values():
        kind.save(model, folder)
    return state_of(model), folder


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of the folder, to do damage in."""
    folder = tmp_path / "damaged"
    shutil.copytree(saved[1], folder)
    return folder


def assert_refused(name, model, folder, match=None, readable=False):
    """Asserts that loading says why it cannot, and that nothing has changed.

    In a file that it can read, Keras loads what fits, weights first, and raises at the
    end (`test_keras_loads_what_fits_before_it_raises`): then the optimizer alone is
    looked at.
    """
    first = int(readable and name != "checkpoint")
    before = state_of(model)[first:]
    with pytest.raises(FORMATS[name].errors, match=match) as raised:
        FORMATS[name].load(model, folder)
    assert str(raised.value)
    assert_same(state_of(model)[first:], before)


# --- damaged ---------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize(("name", "file"), FILES)
def test_truncated_file_is_refused(damaged, name, file, share):
    content = (damaged / file).read_bytes()
    (damaged / file).write_bytes(content[: int(share * len(content))])
    assert_refused(name, trained(calls=2), damaged)


@pytest.mark.parametrize(("name", "file"), FILES)
def test_file_of_something_else_is_refused(damaged, name, file):
    (damaged / file).write_bytes(b"not what it says\n" * 100)
    assert_refused(name, trained(calls=2), damaged)


# Not of `weights_h5`: HDF5 as Keras writes it has no checksums.
@pytest.mark.parametrize(
    ("name", "file"), [pair for pair in FILES if "h5" not in pair[0]]
)
def test_flipped_byte_is_refused_or_does_no_harm(saved, damaged, name, file):
    right, _ = saved
    content = bytearray((damaged / file).read_bytes())
    model = trained(calls=2)
    before = state_of(model)
    refused = 0
    for place in np.random.default_rng(0).integers(len(content), size=25):
        content[place] ^= 0xFF
        (damaged / file).write_bytes(content)
        content[place] ^= 0xFF
        try:
            FORMATS[name].load(model, damaged)
        except FORMATS[name].errors:
            refused += 1
            assert_same(state_of(model), before)
        else:
            assert_same(state_of(model), right)
            model.optimizer.set_weights(before[1])
            model.set_weights(before[0])
    assert refused


@pytest.mark.parametrize("name", FORMATS)
def test_refused_file_does_not_spoil_the_next_load(saved, damaged, name):
    right, folder = saved
    for file in FORMATS[name].files:
        content = (damaged / file).read_bytes()
        (damaged / file).write_bytes(content[: len(content) // 2])
    model = trained(calls=2)
    assert_refused(name, model, damaged)
    FORMATS[name].load(model, folder)
    assert_same(state_of(model), right)


DAMAGES = {
    "iterations": ("0", -1, "must have counters"),
    "min_phase": ("1", -1, "must have counters"),
    "last_phase": ("2", -2, "must have counters"),
    "notes": ("notes", np.frombuffer(b"no npz", np.uint8), "What callbacks noted"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_value_that_cannot_be_is_refused_before_any_is_set(damaged, name):
    key, value, message = DAMAGES[name]
    optimizer = trained(calls=2).optimizer
    before = weights_of(optimizer.variables)
    with h5py.File(damaged / "model.weights.h5", "r+") as file:
        store = file["optimizer/vars"]
        if key in store:
            del store[key]
        store[key] = value
        with pytest.raises(ValueError, match=message):
            optimizer.load_own_variables(store)
    assert_same(weights_of(optimizer.variables), before)


# --- of something else -------------------------------------------------------------


OTHERS = {
    "adam": lambda: keras.optimizers.Adam(0.05),
    "sgd": lambda: keras.optimizers.SGD(0.02, momentum=0.9),
    "loss_scaled": lambda: keras.optimizers.LossScaleOptimizer(adam_sgd()),
    "other_children": lambda: SequentialOptimizer(["rmsprop", "lion"], [BOUNDARY]),
    "average": lambda: adam_sgd(use_ema=True),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("other", OTHERS)
def test_file_of_another_optimizer_is_refused(tmp_path, name, other):
    FORMATS[name].save(trained(OTHERS[other]()), tmp_path)
    assert_refused(name, trained(calls=2), tmp_path, readable=True)


def test_keras_loads_what_fits_before_it_raises(damaged):
    # With a plain optimizer as well; so a refused file may change the weights.
    model = trained(keras.optimizers.Adam(0.05))
    with h5py.File(damaged / "model.weights.h5", "r+") as file:
        del file["optimizer"]["vars"]
        for i in range(len(model.optimizer.variables)):
            file[f"optimizer/vars/{i}"] = np.zeros(7)
        kernel = file["layers/dense/vars/0"][()]
    with pytest.raises(ValueError, match="could not be loaded"):
        model.load_weights(damaged / "model.weights.h5")
    np.testing.assert_array_equal(model.layers[0].kernel.numpy(), kernel)


@pytest.mark.parametrize("name", ["keras", "weights_h5"])
def test_refused_optimizer_is_saved_whole(tmp_path, name):
    FORMATS[name].save(trained(OTHERS["average"]()), tmp_path)
    model = trained()
    assert_refused(name, model, tmp_path, readable=True)
    FORMATS[name].save(model, tmp_path)
    loaded = trained(calls=2)
    FORMATS[name].load(loaded, tmp_path)
    assert_same(state_of(loaded), state_of(model))


@pytest.mark.parametrize("name", ["keras", "weights_h5"])
def test_skipping_a_refused_optimizer_leaves_all_of_it(tmp_path, name):
    FORMATS[name].save(trained(OTHERS["average"]()), tmp_path)
    model = trained(calls=2)
    before = state_of(model)[1]
    path = tmp_path / FORMATS[name].files[0]
    messages = warnings_of(model.load_weights, path, skip_mismatch=True)
    assert any("could not be loaded" in message for message in messages)
    assert_same(state_of(model)[1], before)


@pytest.mark.parametrize("name", FORMATS)
def test_file_of_another_model_is_refused(tmp_path, name):
    other = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    other.compile(adam_sgd(), "mse")
    other.train_on_batch(np.ones((2, 5)), np.ones((2, 3)))
    FORMATS[name].save(other, tmp_path)
    assert_refused(name, trained(calls=2), tmp_path, readable=True)


@pytest.mark.parametrize("name", FORMATS)
def test_another_version_of_the_layout_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(_saving, "_VERSION", 2)
    FORMATS[name].save(trained(), tmp_path)
    monkeypatch.undo()
    assert_refused(name, trained(calls=2), tmp_path, r"\(version 1\)", readable=True)


# --- other values ------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_nan_is_loaded_as_it_was_saved(tmp_path, name):
    model = trained()
    for variable in (*model.weights, *model.optimizer.children[0].variables[2:]):
        variable.assign(np.full(variable.shape, np.nan))
    FORMATS[name].save(model, tmp_path)
    loaded = trained(calls=2)
    FORMATS[name].load(loaded, tmp_path)
    assert_same(state_of(loaded), state_of(model))


def _to_float16(path, keep):
    """Rewrites what `keep` does not say in float16."""
    with h5py.File(path, "r+") as file:
        names = []
        file.visititems(
            lambda name, item: names.append(name) if hasattr(item, "dtype") else None
        )
        for name in names:
            values = file[name][()]
            if not keep(name, values):
                del file[name]
                file[name] = np.asarray(values, np.float16)


def _is_no_number(name):
    return name.endswith(("layout", "built"))


def test_floats_in_float16_are_loaded_as_keras_does(damaged):
    path = damaged / "model.weights.h5"
    _to_float16(path, lambda name, values: values.dtype.kind != "f")
    model = trained(calls=2)
    model.load_weights(path)
    optimizer = model.optimizer
    assert [int(c.iterations) for c in optimizer.children] == [
        BOUNDARY,
        CALLS - BOUNDARY,
    ]
    with h5py.File(path) as file:
        for name, child in zip(("adam", "sgd"), optimizer.children, strict=True):
            group = file[f"optimizer/children/{name}/vars"]
            for i, variable in enumerate(child.variables):
                np.testing.assert_array_equal(variable.numpy(), group[str(i)][()])


def test_counters_in_float16_are_refused(damaged):
    path = damaged / "model.weights.h5"
    _to_float16(path, lambda name, values: _is_no_number(name))
    model = trained(calls=2)
    assert_refused("weights_h5", model, damaged, "must have integers", readable=True)


def test_set_weights_refuses_counters_that_are_no_integers():
    model = trained()
    before = state_of(model)
    arrays = [np.asarray(array, np.float32) for array in before[1]]
    with pytest.raises(ValueError, match="must have integers"):
        model.optimizer.set_weights(arrays)
    assert_same(state_of(model), before)
