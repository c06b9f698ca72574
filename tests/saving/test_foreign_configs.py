"""Configs that no SequentialOptimizer wrote end in an error, and execute nothing."""

import copy

import keras
import pytest

from sequential_optimizer import SequentialOptimizer
from tests.helpers.oracle import (
    assert_same,
    make_gradients,
    make_variables,
    run,
    run_plain,
)
from tests.helpers.saving import adam_sgd, make_model, warnings_of


def config_with(**changes):
    return adam_sgd().get_config() | changes


CHILD = keras.saving.serialize_keras_object(keras.optimizers.Adam())
WRONG = {
    "none": (None, "`config` must have"),
    "list": ([], "`config` must have"),
    "empty": ({}, "`config` must have"),
    "no_list": (config_with(optimizers="adam"), "`config` must have"),
    "no_children": (config_with(optimizers=[]), "`config` must have"),
    "no_optimizer": (config_with(optimizers=[CHILD, 3]), "Each entry of `optimizers`"),
    "nothing": (config_with(optimizers=[CHILD, None]), "Each entry of `optimizers`"),
    "no_config": (config_with(optimizers=[CHILD, {}]), "Each entry of `optimizers`"),
    "phases_no_list": (config_with(child_of_phase="01"), "`config` must have"),
    "phases_of_text": (config_with(child_of_phase=["0", "1"]), "`config` must have"),
    "phases_of_bool": (config_with(child_of_phase=[False, True]), "`config` must have"),
    "phase_too_high": (config_with(child_of_phase=[0, 2]), "`config` must have"),
    "phase_negative": (config_with(child_of_phase=[0, -1]), "`config` must have"),
    "child_without_phase": (config_with(child_of_phase=[0, 0]), "`config` must have"),
    "nested_phases": (config_with(child_of_phase=[[0], [1]]), "`config` must have"),
    "boundary_missing": (config_with(boundaries=[]), "one entry fewer"),
    "boundary_text": (config_with(boundaries=["3"]), "strictly increasing"),
    "boundaries_text": (config_with(boundaries="3"), "strictly increasing"),
    "boundary_nan": (config_with(boundaries=[float("nan")]), "strictly increasing"),
    "unknown_argument": (config_with(extra=1), "extra"),
    "child_setting": (config_with(clipnorm=1.0), "`clipnorm` must be set on the child"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_config_is_refused_and_left_as_it_is(name):
    config, message = WRONG[name]
    before = copy.deepcopy(config)
    with pytest.raises(ValueError, match=message):
        SequentialOptimizer.from_config(config)
    assert repr(config) == repr(before)


@pytest.mark.parametrize(
    "child",
    [
        {"class_name": "NoSuchOptimizer", "config": {}},
        {**CHILD, "class_name": "NoSuchOptimizer"},
        {**CHILD, "module": "no_such_module", "registered_name": "a>B"},
    ],
    ids=["short", "class", "module"],
)
def test_unknown_class_is_refused_by_its_name(child):
    with pytest.raises(
        (ValueError, TypeError), match=r"NoSuchOptimizer|no_such_module"
    ):
        SequentialOptimizer.from_config(config_with(optimizers=[CHILD, child]))


# --- nothing is executed -----------------------------------------------------------


def _call(path, module, name, argument):
    return {
        "module": module,
        "class_name": name,
        "config": {argument: str(path)},
        "registered_name": name,
    }


CALLS = {
    "system": lambda path: _call(f"touch {path}", "os", "system", "command"),
    "mkdir": lambda path: _call(path, "os", "mkdir", "path"),
    "path": lambda path: _call(path, "pathlib", "Path", "args"),
    "open": lambda path: _call(path, "builtins", "open", "file"),
}


@pytest.mark.parametrize("name", CALLS)
def test_config_cannot_call_what_is_no_optimizer(tmp_path, name):
    path = tmp_path / "made"
    config = config_with(optimizers=[CHILD, CALLS[name](path)])
    with pytest.raises((ValueError, TypeError)):
        SequentialOptimizer.from_config(config)
    # Also not where a child takes what it calls later: as its learning rate.
    sgd = keras.saving.serialize_keras_object(keras.optimizers.SGD())
    sgd["config"]["learning_rate"] = CALLS[name](path)
    with pytest.raises((ValueError, TypeError)):
        SequentialOptimizer.from_config(config_with(optimizers=[CHILD, sgd]))
    assert not path.exists()


def test_lambda_in_a_file_is_not_executed(tmp_path):
    made = tmp_path / "made"
    child = keras.optimizers.SGD(lambda path=str(made): open(path, "w").close() or 0.1)
    model = make_model(SequentialOptimizer([keras.optimizers.Adam(), child], [3]))
    # Keras warns that it cannot be loaded in safe mode.
    assert "safe_mode=False" in warnings_of(model.save, tmp_path / "model.keras")[0]
    with pytest.raises(ValueError, match="safe_mode"):
        keras.saving.load_model(tmp_path / "model.keras")
    assert not made.exists()


# --- large and deep ----------------------------------------------------------------


def test_thousands_of_phases():
    adam, sgd = keras.optimizers.Adam(0.05), keras.optimizers.SGD(0.1, momentum=0.9)
    count = 4000
    optimizer = SequentialOptimizer([adam, sgd] * (count // 2), list(range(1, count)))
    loaded = SequentialOptimizer.from_config(optimizer.get_config())
    assert loaded.get_config() == optimizer.get_config()
    assert len(loaded.children) == 2
    variables, copies = make_variables(), make_variables()
    batches = make_gradients(variables, 5)
    plain = [keras.optimizers.Adam(0.05), keras.optimizers.SGD(0.1, momentum=0.9)]
    assert_same(
        run(loaded, variables, batches, "xla"),
        run_plain((plain * 3)[:5], range(1, 5), copies, batches, "xla"),
    )


def nested(depth):
    optimizer = keras.optimizers.Adam(0.05)
    for level in range(depth):
        optimizer = SequentialOptimizer([optimizer], [], name=f"level_{level}")
    return optimizer


def test_deep_nesting_round_trips_and_trains():
    depth = 20
    optimizer = nested(depth)
    loaded = SequentialOptimizer.from_config(optimizer.get_config())
    assert loaded.get_config() == optimizer.get_config()
    variables, copies = make_variables(), make_variables()
    batches = make_gradients(variables, 3)
    assert_same(
        run(loaded, variables, batches, "graph"),
        run_plain([keras.optimizers.Adam(0.05)], [], copies, batches, "graph"),
    )


def test_nesting_without_end_is_refused():
    config = CHILD
    for level in range(2000):
        config = {
            "module": "builtins",
            "class_name": "SequentialOptimizer",
            "registered_name": "sequential_optimizer>SequentialOptimizer",
            "config": {
                "name": f"level_{level}",
                "optimizers": [config],
                "boundaries": [],
            },
        }
    with pytest.raises(RecursionError):
        SequentialOptimizer.from_config(config["config"])
