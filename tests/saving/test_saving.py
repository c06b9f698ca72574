"""What Keras saves goes on bit by bit, or is refused with a reason."""

import copy
import json

import h5py
import keras
import numpy as np
import pytest

from sequential_optimizer import SequentialOptimizer
from tests.helpers.oracle import assert_same, weights_of
from tests.helpers.saving import (
    BOUNDARY,
    CASES,
    adam_sgd,
    build,
    make_data,
    make_model,
    make_runs,
    saves,
    state_of,
    train,
    warnings_of,
)
from tests.helpers.saving_ways import KERAS, load_keras, load_weights_h5

optimizers = keras.optimizers


def _save(model, folder):
    for save in {way.save for way in KERAS.values()}:
        save(model, folder)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    return make_runs(tmp_path_factory, _save)


COMMON = ["keras", "weights_h5"]
ENDED = ["ended", "ended_before_integer"]
NOT_ENDED = [name for name in CASES if name not in ENDED]


@pytest.mark.parametrize("way", COMMON)
@pytest.mark.parametrize(("name", "calls"), saves(NOT_ENDED))
def test_continues_as_if_never_saved(run_of, name, calls, way):
    run = run_of(name)
    model = KERAS[way].load(run.folder(calls), run.case.make)
    run.assert_continues(model, calls)


@pytest.mark.parametrize("way", [way for way in KERAS if way not in COMMON])
@pytest.mark.parametrize(
    ("name", "calls"), [*saves(["adam_sgd"]), ("returning", BOUNDARY + 2)]
)
def test_continues_after_less_common_ways(run_of, name, calls, way):
    run = run_of(name)
    model = KERAS[way].load(run.folder(calls), run.case.make)
    run.assert_continues(model, calls)


@pytest.mark.parametrize("way", KERAS)
@pytest.mark.parametrize(
    ("name", "calls"), [*saves(["ended"]), ("ended_before_integer", BOUNDARY)]
)
def test_ended_phase_stays_ended(run_of, name, calls, way):
    run = run_of(name)
    model = KERAS[way].load(run.folder(calls), run.case.make)
    assert int(model.optimizer.phase) == int(calls >= run.case.advance_after)
    run.assert_continues(model, calls)


def test_saving_changes_nothing(run_of):
    run = run_of("accumulation")
    without_saving = train(make_model(run.case.make()), 0, run.case.calls)
    assert_same(without_saving, run.states[1:])


def test_loaded_instance_that_returns_is_one_child(run_of):
    run = run_of("returning")
    optimizer = load_keras(run.folder(BOUNDARY), None).optimizer
    assert [type(c).__name__ for c in optimizer.children] == ["Adam", "SGD"]
    assert optimizer.get_config()["child_of_phase"] == [0, 1, 0]
    assert optimizer.get_config()["boundaries"] == [BOUNDARY, BOUNDARY + 2]


def test_copies_share_no_state(run_of):
    run = run_of("adam_sgd")
    for way in ("deepcopy", "clone_model"):
        model = load_weights_h5(run.folder(2), run.case.make)
        (run.folder(2) / way).mkdir(exist_ok=True)
        _save(model, run.folder(2) / way)
        copied = KERAS[way].load(run.folder(2) / way, run.case.make)
        train(copied, 2, 5)
        assert_same(state_of(model), run.states[2])


# --- edited integers -------------------------------------------------------------


@pytest.mark.parametrize(
    ("new_boundary", "calls"), [(5, 2), (5, 3), (5, 4), (2, 3), (1, 2)]
)
def test_obeys_the_integers_of_the_code(run_of, new_boundary, calls):
    folder = run_of("adam_sgd").folder(calls)
    model = load_weights_h5(folder, lambda: adam_sgd([new_boundary]))
    for t in range(calls, 6):
        assert int(model.optimizer.phase) == int(t >= new_boundary)
        before = [int(child.iterations) for child in model.optimizer.children]
        train(model, t, t + 1)
        after = [int(child.iterations) for child in model.optimizer.children]
        active = int(t >= new_boundary)
        assert after[active] == before[active] + 1
        assert after[1 - active] == before[1 - active]


def test_later_integer_is_as_if_it_had_always_been_there(run_of):
    expected = train(make_model(adam_sgd([5])), 0, 6)
    model = load_weights_h5(run_of("adam_sgd").folder(2), lambda: adam_sgd([5]))
    assert_same(train(model, 2, 6), expected[2:])


def test_earlier_integer_ends_the_phase_at_once(run_of):
    expected = train(make_model(adam_sgd([2])), 0, 6)
    model = load_weights_h5(run_of("adam_sgd").folder(2), lambda: adam_sgd([1]))
    assert_same(train(model, 2, 6), expected[2:])


@pytest.mark.parametrize("boundary", [None, 5, 1000])
def test_ended_phase_stays_ended_under_other_boundaries(run_of, boundary):
    run = run_of("ended")
    model = load_weights_h5(run.folder(3), lambda: adam_sgd([boundary]))
    run.assert_continues(model, 3)


# --- other files -----------------------------------------------------------------


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
    def make(*names):
        return SequentialOptimizer([_adam(name) for name in names], [BOUNDARY])

    # Keras counts up within a process: another optimizer came first in the one run.
    saved, path = _trained_file(tmp_path, make("adam_1", "adam_2"))
    model = build(make_model(make("adam", "adam_1")))
    model.load_weights(path)
    assert_same(state_of(model), state_of(saved))


def test_refusal_does_not_spoil_the_next_load(tmp_path, run_of):
    run = run_of("adam_sgd")
    _, path = _trained_file(tmp_path, _adam())
    model = build(make_model(adam_sgd()))
    with pytest.raises(ValueError, match="must have been saved from one"):
        warnings_of(model.load_weights, path)
    model.load_weights(run.folder(3) / "model.weights.h5")
    run.assert_continues(model, 3)


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


# --- pinned files ------------------------------------------------------------------


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
OWN = ["optimizer/vars/layout", *_vars("optimizer", 3)]
ADAM_SGD = (
    OWN + _vars("optimizer", 10, "children/0/") + _vars("optimizer", 6, "children/1/")
)
KEYS = {
    "adam_sgd": ADAM_SGD,
    "returning": ADAM_SGD,
    "same_class": OWN
    + _vars("optimizer", 10, "children/0/")
    + _vars("optimizer", 10, "children/1/"),
    # 4 averages, or 4 accumulators.
    "ema": [*ADAM_SGD, *_vars("optimizer", 7)[3:]],
    "accumulation": [*ADAM_SGD, *_vars("optimizer", 7)[3:]],
    "nested": OWN
    + _vars("optimizer", 3, "children/0/")
    + _vars("optimizer", 10, "children/0/children/0/")
    + _vars("optimizer", 6, "children/0/children/1/")
    + _vars("optimizer", 6, "children/1/"),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_the_h5_file_stay_as_they_are(run_of, name):
    run = run_of(name)
    for calls in run.case.saved_after:
        assert _keys(run.folder(calls) / "model.weights.h5") == sorted(KEYS[name])


def _slots(of, *kinds):
    return {
        f"{of}{2 + i}": [of, f"{name} {kind}", shape]
        for i, (name, shape, kind) in enumerate(
            (name, shape, kind)
            for name, shape in [
                ("dense_0/kernel_0", [4, 3]),
                ("dense_0/bias_0", [3]),
                ("dense_1/kernel_0", [3, 1]),
                ("dense_1/bias_0", [1]),
            ]
            for kind in kinds
        )
    }


def _adam_arrays(of):
    return {
        f"{of}0": [of, "", []],
        f"{of}1": [of, "", []],
        **_slots(of, "momentum", "velocity"),
    }


def _adam_entry(name):
    return {
        "class": "keras>Adam",
        "name": name,
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
        "0": ["", "", []],
        "1": ["", "", []],
        "2": ["", "", []],
        **_adam_arrays("children/0/"),
        **_adam_arrays("children/1/"),
    },
    "trained": [
        ["sequential/dense/kernel", "dense_0/kernel_0", "(4, 3)"],
        ["sequential/dense/bias", "dense_0/bias_0", "(3,)"],
        ["sequential/dense_1/kernel", "dense_1/kernel_0", "(3, 1)"],
        ["sequential/dense_1/bias", "dense_1/bias_0", "(1,)"],
    ],
    "bytes": {},
}


def test_layout_in_the_h5_file_stays_as_it_is(tmp_path):
    model = make_model(CASES["same_class"].make())
    train(model, 0, BOUNDARY + 1)
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        layout = json.loads(np.asarray(file["optimizer/vars/layout"]).tobytes())
        own = [int(file[f"optimizer/vars/{i}"][()]) for i in range(3)]
    # They are what Keras says, and Keras may say more.
    children = [layout["optimizers"][f"children/{i}/"] for i in range(2)]
    settings = [child.pop("settings") for child in children]
    assert [one["beta_1"] for one in settings] == [0.9, 0.5]
    assert not any("name" in one for one in settings)
    assert layout == LAYOUT
    assert own == [BOUNDARY + 1, 0, 1]


# --- callbacks ---------------------------------------------------------------------


def _fit(model, batches, epochs=1, initial_epoch=0, callbacks=()):
    """Fits on these batches, in their order, in every epoch."""
    x, y = make_data()
    rows = x.shape[1]
    x, y = (np.concatenate([array[b] for b in batches]) for array in (x, y))
    return model.fit(
        x,
        y,
        batch_size=rows,
        shuffle=False,
        epochs=epochs,
        initial_epoch=initial_epoch,
        callbacks=list(callbacks),
        verbose=0,
    )


def test_model_checkpoint_continues_as_if_never_saved(tmp_path):
    model = make_model(adam_sgd(), jit_compile=True)
    # One batch an epoch, so each epoch's file is one update later.
    save = [
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
        keras.callbacks.ModelCheckpoint(
            tmp_path / "{epoch}.weights.h5", save_weights_only=True
        ),
    ]
    _fit(model, [0], epochs=6, callbacks=save)
    expected = state_of(model)
    loaded = keras.saving.load_model(tmp_path / "3.keras")
    assert loaded.jit_compile
    assert int(loaded.optimizer.iterations) == 3
    _fit(loaded, [0], epochs=6, initial_epoch=3)
    assert_same(state_of(loaded), expected)
    for epoch in (2, 3, 4):
        for trained in (model, loaded):
            trained.load_weights(tmp_path / f"{epoch}.weights.h5")
            assert int(trained.optimizer.iterations) == epoch
            _fit(trained, [0], epochs=6, initial_epoch=epoch)
            assert_same(state_of(trained), expected)


class _Crash(keras.callbacks.Callback):
    """Ends the process, as it were, after some updates; `advance()`s before."""

    def __init__(self, updates, advance_after=None):
        super().__init__()
        self.updates, self.advance_after = updates, advance_after

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == self.advance_after:
            self.model.optimizer.advance()
        if int(self.model.optimizer.iterations) == self.updates:
            raise KeyboardInterrupt


def _backup(tmp_path):
    return keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=1)


@pytest.mark.parametrize(("updates", "in_epoch"), [(2, 0), (3, 0), (4, 1)])
def test_backup_and_restore_continues_after_a_crash(tmp_path, updates, in_epoch):
    epoch = [0, 1, 2]
    crashed, resumed, uninterrupted = (
        make_model(adam_sgd(), run_eagerly=True) for _ in range(3)
    )
    with pytest.raises(KeyboardInterrupt):
        _fit(crashed, epoch, 2, callbacks=[_backup(tmp_path), _Crash(updates)])
    _fit(resumed, epoch, 2, callbacks=[_backup(tmp_path)])
    # Keras begins the interrupted epoch again.
    batches = (epoch + epoch)[:updates] + epoch * (2 - in_epoch)
    _fit(uninterrupted, batches)
    assert int(resumed.optimizer.iterations) == len(batches)
    assert_same(state_of(resumed), state_of(uninterrupted))


def test_backup_keeps_a_phase_ended(tmp_path):
    crashed, resumed = (
        make_model(adam_sgd([None]), run_eagerly=True) for _ in range(2)
    )
    crash = _Crash(updates=4, advance_after=2)
    with pytest.raises(KeyboardInterrupt):
        _fit(crashed, [0, 1, 2, 3, 4], callbacks=[_backup(tmp_path), crash])
    _fit(resumed, [0, 1], callbacks=[_backup(tmp_path)])
    uninterrupted = make_model(adam_sgd([2]), run_eagerly=True)
    _fit(uninterrupted, [0, 1, 2, 3, 0, 1])
    assert int(resumed.optimizer.phase) == 1
    ours, theirs = (
        [weights_of(model.weights)]
        + [weights_of(child.variables) for child in model.optimizer.children]
        for model in (resumed, uninterrupted)
    )
    assert_same(ours, theirs)


# --- the user's own classes and functions ------------------------------------------


class _SignDescent(optimizers.Optimizer):
    """A user's own optimizer, with an argument and a variable of its own."""

    def __init__(self, learning_rate=0.01, decay=0.5, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.decay = decay

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.sums = [self.add_variable_from_reference(v, "sum") for v in variables]

    def update_step(self, gradient, variable, learning_rate):
        total = self.sums[self._get_variable_index(variable)]
        self.assign(total, total * self.decay + gradient)
        self.assign_sub(variable, learning_rate * keras.ops.sign(total))

    def get_config(self):
        return {**super().get_config(), "decay": self.decay}


@keras.saving.register_keras_serializable(package="tests")
class _Registered(_SignDescent):
    pass


def _with_own_class(cls):
    return SequentialOptimizer([_adam(), cls(0.02, decay=0.25)], [BOUNDARY])


@pytest.mark.parametrize("calls", [2, 3, 4])
@pytest.mark.parametrize("cls", [_SignDescent, _Registered])
def test_child_of_a_users_own_class_continues(tmp_path, cls, calls):
    expected = train(make_model(_with_own_class(cls)), 0, 6)
    model = make_model(_with_own_class(cls))
    train(model, 0, calls)
    model.save(tmp_path / "own.keras")
    custom_objects = None if cls is _Registered else {cls.__name__: cls}
    loaded = keras.saving.load_model(tmp_path / "own.keras", custom_objects)
    assert type(loaded.optimizer.children[1]) is cls
    assert loaded.optimizer.children[1].decay == 0.25
    assert_same(state_of(loaded), expected[calls - 1])
    assert_same(train(loaded, calls, 6), expected[calls:])


def _alone(child):
    return child


def _in_sequence(child):
    return SequentialOptimizer([child, _sgd()], [BOUNDARY])


@pytest.mark.parametrize("around", [_alone, _in_sequence])
def test_custom_objects_are_needed_as_for_a_plain_optimizer(tmp_path, around):
    # Keras finds a class of a module by itself, but not one of a function.
    class Local(_SignDescent):
        pass

    model = build(make_model(around(Local())))
    model.save(tmp_path / "own.keras")
    with pytest.raises(TypeError, match="Could not locate class 'Local'"):
        keras.saving.load_model(tmp_path / "own.keras")
    with keras.saving.custom_object_scope({"Local": Local}):
        loaded = keras.saving.load_model(tmp_path / "own.keras")
    assert_same(state_of(loaded), state_of(model))


def test_from_config_passes_custom_objects():
    # Keras puts the schedule itself in its place, in the config that it is given.
    schedule = optimizers.schedules.ExponentialDecay(0.05, 1, 0.5)
    config = SequentialOptimizer(
        [optimizers.SGD(schedule), _SignDescent()], [BOUNDARY]
    ).get_config()
    before = copy.deepcopy(config)
    optimizer = SequentialOptimizer.from_config(
        config, custom_objects={"_SignDescent": _SignDescent}
    )
    assert type(optimizer.children[1]) is _SignDescent
    assert config == before


@pytest.mark.parametrize("around", [_alone, _in_sequence])
def test_lambda_needs_safe_mode_off_as_for_a_plain_optimizer(tmp_path, around):
    def make():
        return around(optimizers.Adam(lambda: 0.03))

    model = make_model(make())
    train(model, 0, 2)
    with pytest.warns(UserWarning, match="includes a `lambda`"):
        model.save(tmp_path / "lambda.keras")
    with pytest.raises(ValueError, match="safe_mode"):
        keras.saving.load_model(tmp_path / "lambda.keras", safe_mode=True)
    loaded = keras.saving.load_model(tmp_path / "lambda.keras", safe_mode=False)
    assert_same(train(loaded, 2, 6), train(model, 2, 6))


def test_registered_function_needs_no_safe_mode_off(tmp_path):
    model = make_model(
        SequentialOptimizer([_sgd(), optimizers.Adam(_learning_rate)], [BOUNDARY])
    )
    train(model, 0, BOUNDARY)
    model.save(tmp_path / "function.keras")
    loaded = keras.saving.load_model(tmp_path / "function.keras")
    assert_same(train(loaded, BOUNDARY, 6), train(model, BOUNDARY, 6))


@keras.saving.register_keras_serializable(package="tests")
def _learning_rate():
    return 0.03
