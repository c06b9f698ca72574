"""What is in a file, pinned: an old file must load in every later version."""

import json

import h5py
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.saving import BOUNDARY, CASES, make_model, make_runs, train
from tests.helpers.saving_ways import checkpoint_in, save_checkpoint, save_weights_h5


def _save(model, folder):
    save_weights_h5(model, folder)
    save_checkpoint(model, folder)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    return make_runs(tmp_path_factory, _save)


# --- Keras files -----------------------------------------------------------------


def _keys(path):
    keys = []
    with h5py.File(path) as file:
        file.visititems(
            lambda key, item: keys.append(key) if hasattr(item, "dtype") else None
        )
    return sorted(key for key in keys if key.startswith("optimizer/"))


def _vars(path, count, prefix=""):
    return [f"{path}/vars/{prefix}{i}" for i in range(count)]


# The parent: iterations, lowest phase that may run, child of the last update.
# Adam: iterations, learning rate, 2 x 4; SGD: the same two, 4; RMSprop likewise.
H5_OWN = ["optimizer/vars/layout", *_vars("optimizer", 3)]
H5_ADAM_SGD = (
    H5_OWN
    + _vars("optimizer", 10, "children/0/")
    + _vars("optimizer", 6, "children/1/")
)
H5_KEYS = {
    "adam_sgd": H5_ADAM_SGD,
    "returning": H5_ADAM_SGD,
    "same_class": H5_OWN
    + _vars("optimizer", 10, "children/0/")
    + _vars("optimizer", 10, "children/1/"),
    # 4 averages, or 4 accumulators.
    "ema": [*H5_ADAM_SGD, *_vars("optimizer", 7)[3:]],
    "accumulation": [*H5_ADAM_SGD, *_vars("optimizer", 7)[3:]],
    "nested": H5_OWN
    + _vars("optimizer", 3, "children/0/")
    + _vars("optimizer", 10, "children/0/children/0/")
    + _vars("optimizer", 6, "children/0/children/1/")
    + _vars("optimizer", 6, "children/1/"),
}


@pytest.mark.parametrize("name", H5_KEYS)
def test_keys_of_the_h5_file_stay_as_they_are(run_of, name):
    run = run_of(name)
    for calls in run.case.saved_after:
        assert _keys(run.folder(calls) / "model.weights.h5") == sorted(H5_KEYS[name])


def _adam_arrays(of):
    shapes = [s for shape in ([4, 3], [3], [3, 1], [1]) for s in (shape, shape)]
    return {f"{of}{i}": [of, shape] for i, shape in enumerate([[], [], *shapes])}


def _adam_entry(name):
    return {
        "class": "keras>Adam",
        "name": name,
        "settings": {},
        "phases": [],
    }


LAYOUT = {
    "version": 1,
    "optimizers": {
        "": {
            "class": "sequential_optimizer>SequentialOptimizer",
            "name": None,  # one that Keras made
            "settings": {"use_ema": False, "gradient_accumulation_steps": None},
            "phases": [[0, 0], [1, BOUNDARY]],
        },
        "children/0/": _adam_entry("first"),
        "children/1/": _adam_entry("second"),
    },
    "arrays": {
        **{key: ["", []] for key in "012"},
        **_adam_arrays("children/0/"),
        **_adam_arrays("children/1/"),
    },
    "trained": [
        ["sequential/dense/kernel", "sequential_0/dense_0/kernel_0", "(4, 3)"],
        ["sequential/dense/bias", "sequential_0/dense_0/bias_0", "(3,)"],
        ["sequential/dense_1/kernel", "sequential_0/dense_1/kernel_0", "(3, 1)"],
        ["sequential/dense_1/bias", "sequential_0/dense_1/bias_0", "(1,)"],
    ],
    "notes": {},
    "bytes": {},
}


def test_layout_in_the_h5_file_stays_as_it_is(tmp_path):
    model = make_model(CASES["same_class"].make())
    train(model, 0, BOUNDARY + 1)
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        layout = json.loads(np.asarray(file["optimizer/vars/layout"]).tobytes())
        own = [int(file[f"optimizer/vars/{i}"][()]) for i in range(3)]
    assert layout == LAYOUT
    assert own == [BOUNDARY + 1, 0, 1]


# --- checkpoints -----------------------------------------------------------------

KERNEL, BIAS, KERNEL_1, BIAS_1 = [4, 3], [3], [3, 1], [1]
WEIGHTS = [KERNEL, BIAS, KERNEL_1, BIAS_1]
MOMENTS = [KERNEL, KERNEL, BIAS, BIAS, KERNEL_1, KERNEL_1, BIAS_1, BIAS_1]


def _listed(path, first, shapes):
    return {f"{path}/{first + i}": shape for i, shape in enumerate(shapes)}


def _child(path, shapes):
    scalars = {f"{path}/_iterations": [], f"{path}/_learning_rate": []}
    return {**scalars, **_listed(f"{path}/_variables", 2, shapes)}


def _counters(path):
    return {f"{path}/_{name}": [] for name in ("iterations", "min_phase", "last_child")}


PARENT = {
    **_counters("optimizer"),
    **_listed("optimizer/_trainable_variables", 0, WEIGHTS),
}
TF_ADAM_SGD = {
    **PARENT,
    **_child("optimizer/children/0", MOMENTS),
    **_child("optimizer/children/1", WEIGHTS),
}
TF_KEYS = {
    "adam_sgd": TF_ADAM_SGD,
    "returning": TF_ADAM_SGD,
    "same_class": {
        **PARENT,
        **_child("optimizer/children/0", MOMENTS),
        **_child("optimizer/children/1", MOMENTS),
    },
    # The averages, and the accumulators.
    "ema": {**TF_ADAM_SGD, **_listed("optimizer/_variables", 3, WEIGHTS)},
    "accumulation": {
        **TF_ADAM_SGD,
        **_listed("optimizer/_variables", 3, WEIGHTS),
    },
    "nested": {
        **PARENT,
        **_counters("optimizer/children/0"),
        **_child("optimizer/children/0/children/0", MOMENTS),
        **_child("optimizer/children/0/children/1", WEIGHTS),
        **_child("optimizer/children/1", WEIGHTS),
    },
}
STATE = "model/optimizer/_saved_state/.ATTRIBUTES/py_state"


@pytest.mark.parametrize("name", TF_KEYS)
def test_keys_of_the_checkpoint_stay_as_they_are(run_of, name):
    run = run_of(name)
    expected = {
        f"model/{key}/.ATTRIBUTES/VARIABLE_VALUE": shape
        for key, shape in TF_KEYS[name].items()
    }
    expected["_CHECKPOINTABLE_OBJECT_GRAPH"] = []
    for key in (STATE, "model/optimizer/_commit/.ATTRIBUTES/commit"):
        expected[key] = []
        if name == "nested":
            expected[key.replace("optimizer", "optimizer/children/0")] = []
    for calls in run.case.saved_after:
        assert (
            dict(tf.train.list_variables(checkpoint_in(run.folder(calls)))) == expected
        )


def test_state_in_the_checkpoint_is_the_layout_of_an_h5_file(tmp_path):
    model = make_model(CASES["same_class"].make())
    train(model, 0, BOUNDARY + 1)
    path = tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))
    state = tf.train.load_checkpoint(path).get_tensor(STATE)
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        layout = np.asarray(file["optimizer/vars/layout"]).tobytes()
    assert state == layout
