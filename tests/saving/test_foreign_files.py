"""Damaged and foreign files end in an error, and leave everything as it was."""

import json
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer, _saving
from tests.helpers.oracle import assert_same
from tests.helpers.saving import (
    BOUNDARY,
    adam_sgd,
    make_model,
    state_of,
    train,
    warnings_of,
)
from tests.helpers.saving_ways import (
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


# What an array is replaced by (nothing: it is taken out), and what the error says. In
# all cases but the first three, everything except that array was once loaded.
DAMAGES = {
    "iterations": ("0", -1, "must have integers from"),
    "min_phase": ("1", -1, "must have integers from"),
    "last_child": ("2", -2, "must have integers from"),
    "unsigned_iterations": ("0", np.uint64(2**63 + 5), "must have integers from"),
    "iterations_of_a_child": ("children/0/0", -5, "must have integers from"),
    "missing_array": ("children/0/4", None, "nothing that can be read"),
    "missing_child": ("children/1", None, "nothing that can be read"),
    "shape": ("children/1/2", np.zeros((2, 2)), r"\(2, 2\) as the shape"),
    "text": ("children/1/2", np.full((4, 3), "a", "S1"), "must have numbers"),
    "rounded_counter": ("children/1/0", np.float16(3), "must have integers"),
}


@pytest.mark.parametrize("name", ["weights_h5", "keras"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_one_wrong_array_refuses_the_file(damaged, tmp_path, damage, name):
    key, value, message = DAMAGES[damage]
    path = damaged / "model.weights.h5"
    with h5py.File(path, "r+") as file:
        del file["optimizer/vars"][key]
        if value is not None:
            file["optimizer/vars"][key] = value
    if name == "keras":
        with zipfile.ZipFile(damaged / "model.keras") as archive:
            parts = {part: archive.read(part) for part in archive.namelist()}
        parts["model.weights.h5"] = path.read_bytes()
        with zipfile.ZipFile(damaged / "model.keras", "w") as archive:
            for part, content in parts.items():
                archive.writestr(part, content)
    assert_refused(name, trained(calls=2), damaged, message, readable=True)
    if name == "keras":
        with pytest.raises(ValueError, match=message):
            keras.saving.load_model(damaged / "model.keras")


def _set_phases(fields, phases):
    fields["optimizers"][""]["phases"] = phases


LAYOUTS = {
    "empty": b"",
    "no_object": b"[]",
    "other_version": b'{"version": 2}',
    "nothing_but_the_version": b'{"version": 1}',
    # Raised another error, after which a checkpoint was loaded in part.
    "names": lambda fields: fields["optimizers"]["children/0/"].update(name=[1]),
    "deep": b"[" * 100_000,
    "phase_out_of_range": lambda fields: _set_phases(fields, [[0, 0], [7, -1]]),
    "starts_too_many": lambda fields: _set_phases(fields, [[0, 0, 0], [1, -1]]),
    "starts_impossible": lambda fields: _set_phases(fields, [[0, 0], [1, 2**64]]),
    "no_sequence": lambda fields: _set_phases(fields, []),
    "other_bytes": lambda fields: fields.update(bytes=""),
    "array_without_shape": lambda fields: fields["arrays"].update({"0": [""]}),
    "not_utf8": b"\xff\xfe",
    "note_not_in_base64": lambda fields: fields["bytes"].update(a="?"),
}


def _layout_with(edit):
    if isinstance(edit, bytes):
        return edit
    fields = trained().optimizer._saved_state.layout()
    edit(fields)
    return json.dumps(fields).encode()


@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_that_cannot_be_read_refuses_an_h5_file(damaged, name, built):
    with h5py.File(damaged / "model.weights.h5", "r+") as file:
        del file["optimizer/vars/layout"]
        text = np.frombuffer(_layout_with(LAYOUTS[name]), np.uint8)
        file["optimizer/vars/layout"] = text
    model = trained(calls=2) if built else make_model(adam_sgd())
    message = "The saved layout of a"
    assert_refused("weights_h5", model, damaged, message, readable=True)
    if not built:
        model.optimizer.build(model.trainable_variables)
        assert int(model.optimizer.iterations) == 0


@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_that_cannot_be_read_refuses_a_checkpoint(
    tmp_path, monkeypatch, name, built
):
    text = _layout_with(LAYOUTS[name])
    saved = trained()
    monkeypatch.setattr(_saving.SavedState, "serialize", lambda self: text)
    save_checkpoint(saved, tmp_path)
    monkeypatch.undo()
    model = trained(calls=2) if built else make_model(adam_sgd())
    assert_refused("checkpoint", model, tmp_path, "The saved layout of a")
    if not built:
        with pytest.raises(ValueError, match="after it refused state"):
            model.optimizer.build(model.trainable_variables)


# --- bombs -------------------------------------------------------------------------


GIGABYTE = 2**30


def _memory_of(function):
    """Returns how many bytes the largest moment of a call added, in NumPy."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("key", ["layout", "0", "children/0/2", "notes/0"])
def test_deflated_gigabyte_is_not_read(damaged, key):
    # 1 MB of file; once it was loaded, and kept in every later file.
    path = damaged / "model.weights.h5"
    with h5py.File(path, "r+") as file:
        store = file["optimizer/vars"]
        if key in store:
            del store[key]
        store.create_dataset(
            key, (GIGABYTE,), "uint8", chunks=(2**20,), compression="gzip", fillvalue=0
        )
    assert path.stat().st_size < 2**21
    model = trained(calls=2)
    before = state_of(model)[1]

    def load():
        if key == "notes/0":
            model.load_weights(path)  # There is no callback that it could be for.
            return
        with pytest.raises(ValueError, match="could not be loaded"):
            model.load_weights(path)

    assert _memory_of(load) < GIGABYTE // 16
    if key != "notes/0":
        assert_same(state_of(model)[1], before)


def test_notes_that_claim_more_than_there_is_are_refused(tmp_path, monkeypatch):
    # A claimed array of 10**14 elements once ended in a MemoryError.
    saved = trained()
    fields = saved.optimizer._saved_state.layout()
    fields["notes"] = {"a": "<f8[100000000000000]", "b": "<f8[2]"}
    sizes = {"notes/a": 8 * 10**14, "notes/b": 16}
    fields["arrays"].update({key: ["notes/", [size]] for key, size in sizes.items()})
    fields["bytes"] = dict.fromkeys(sizes, "MTIzNDU2Nzg=")  # 8 bytes each
    text = json.dumps(fields).encode()
    monkeypatch.setattr(_saving.SavedState, "serialize", lambda self: text)
    save_checkpoint(saved, tmp_path)
    monkeypatch.undo()
    model = trained(calls=2)
    model.optimizer.notes.update(a=np.zeros(2))
    assert_refused("checkpoint", model, tmp_path, "What a callback noted")
    del model.optimizer.notes["a"]
    model.optimizer.notes.update(b=np.zeros(2))
    assert_refused("checkpoint", model, tmp_path, r"\(8,\) as the shape of `notes/b`")


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


def test_checkpoint_of_another_model_is_refused(tmp_path):
    other = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    other.compile(adam_sgd(), "mse")
    other.train_on_batch(np.ones((2, 5)), np.ones((2, 3)))
    save_checkpoint(other, tmp_path)
    assert_refused("checkpoint", trained(calls=2), tmp_path, readable=True)


@pytest.mark.parametrize("name", FORMATS)
def test_another_version_of_the_layout_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(_saving, "VERSION", 2)
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
    """Rewrites in float16 all that `keep` does not name."""
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
    return name.endswith("layout")


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
        for child_index, child in enumerate(optimizer.children):
            group = file[f"optimizer/vars/children/{child_index}"]
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


@pytest.mark.parametrize(("index", "value"), [(0, -7), (1, -1), (2, -99), (4, -1)])
def test_set_weights_refuses_impossible_counters(index, value):
    model = trained()
    before = state_of(model)
    arrays = list(before[1])
    arrays[index] = np.asarray(value)
    with pytest.raises(ValueError, match=r"`weights` must have integers from"):
        model.optimizer.set_weights(arrays)
    assert_same(state_of(model), before)
