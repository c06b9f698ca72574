"""What `tf.train.Checkpoint` saves goes on bit by bit, or is refused untouched."""

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.oracle import assert_same, weights_of
from tests.helpers.saving import (
    BOUNDARY,
    CASES,
    adam_sgd,
    build,
    gradients_of,
    make_data,
    make_model,
    make_runs,
    saves,
    state_of,
    train,
)
from tests.helpers.saving_ways import (
    CHECKPOINT,
    checkpoint_in,
    restore,
    restore_deferred,
    save_checkpoint,
)

optimizers = keras.optimizers


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    return make_runs(tmp_path_factory, save_checkpoint)


def _path(run, calls):
    return checkpoint_in(run.folder(calls))


@pytest.mark.parametrize("way", CHECKPOINT)
@pytest.mark.parametrize(("name", "calls"), saves(CASES))
def test_continues_as_if_never_saved(run_of, name, calls, way):
    run = run_of(name)
    run.assert_continues(CHECKPOINT[way].load(run.folder(calls), run.case.make), calls)


@pytest.mark.parametrize("way", CHECKPOINT)
@pytest.mark.parametrize("boundary", [None, 5, 1000])
def test_ended_phase_stays_ended_under_other_boundaries(run_of, boundary, way):
    run = run_of("ended")
    model = CHECKPOINT[way].load(run.folder(3), lambda: adam_sgd([boundary]))
    assert int(model.optimizer.phase) == 1
    run.assert_continues(model, 3)


def _traced_step(model):
    """Returns a traced train step, the way a user's own loop has one."""
    x, y = (tf.constant(array) for array in make_data())

    @tf.function(autograph=False)
    def step(t):
        gradients = gradients_of(model, model.optimizer, x[t], y[t])
        model.optimizer.apply(gradients, model.trainable_variables)

    def run(start, stop):
        for t in range(start, stop):
            step(tf.constant(t))
        return state_of(model)

    run.step = step
    return run


def test_manager_rolls_a_traced_step_back_without_a_retrace(tmp_path):
    model = build(make_model(adam_sgd()))
    step = _traced_step(model)
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(model=model), str(tmp_path), max_to_keep=3
    )
    states = [None]
    for t in range(6):
        states.append(step(t, t + 1))
        if t + 1 in (2, 3, 4):
            manager.save()
    assert len(manager.checkpoints) == 3
    for calls, path in zip((2, 3, 4), manager.checkpoints, strict=True):
        manager.checkpoint.restore(path).assert_consumed()
        assert_same(state_of(model), states[calls])
        assert_same(step(calls, 6), states[6])
    assert step.step.experimental_get_tracing_count() == 1

    # A new process finds the newest, with nothing built and nothing traced yet.
    resumed = make_model(adam_sgd())
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(model=resumed), str(tmp_path), max_to_keep=3
    )
    assert manager.restore_or_initialize() == manager.latest_checkpoint
    assert_same(_traced_step(resumed)(4, 6), states[6])


def test_manager_starts_afresh_without_a_checkpoint(tmp_path):
    model = make_model(adam_sgd())
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(model=model), str(tmp_path), max_to_keep=1
    )
    assert manager.restore_or_initialize() is None
    assert_same(train(model, 0, 6), train(make_model(adam_sgd()), 0, 6))


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


# --- edited integers -------------------------------------------------------------


@pytest.mark.parametrize(
    ("new_boundary", "calls"), [(5, 2), (5, 3), (5, 4), (2, 3), (1, 2)]
)
def test_obeys_the_integers_of_the_code(run_of, new_boundary, calls):
    folder = run_of("adam_sgd").folder(calls)
    model = restore_deferred(folder, lambda: adam_sgd([new_boundary]))
    for t in range(calls, 6):
        active = int(t >= new_boundary)
        assert int(model.optimizer.phase) == active
        before = [int(child.iterations) for child in model.optimizer.children]
        train(model, t, t + 1)
        after = [int(child.iterations) for child in model.optimizer.children]
        assert after[active] == before[active] + 1
        assert after[1 - active] == before[1 - active]


def test_later_integer_is_as_if_it_had_always_been_there(run_of):
    expected = train(make_model(adam_sgd([5])), 0, 6)
    model = restore(run_of("adam_sgd").folder(2), lambda: adam_sgd([5]))
    assert_same(train(model, 2, 6), expected[2:])


# --- pinned files ------------------------------------------------------------------

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
ADAM_SGD = {
    **PARENT,
    **_child("optimizer/children/0", MOMENTS),
    **_child("optimizer/children/1", WEIGHTS),
}
KEYS = {
    "adam_sgd": ADAM_SGD,
    "returning": ADAM_SGD,
    "same_class": {
        **PARENT,
        **_child("optimizer/children/0", MOMENTS),
        **_child("optimizer/children/1", MOMENTS),
    },
    # The averages, and the accumulators.
    "ema": {**ADAM_SGD, **_listed("optimizer/_variables", 3, WEIGHTS)},
    "accumulation": {**ADAM_SGD, **_listed("optimizer/_variables", 3, WEIGHTS)},
    "nested": {
        **PARENT,
        **_counters("optimizer/children/0"),
        **_child("optimizer/children/0/children/0", MOMENTS),
        **_child("optimizer/children/0/children/1", WEIGHTS),
        **_child("optimizer/children/1", WEIGHTS),
    },
}
STATE = "model/optimizer/_saved_state/.ATTRIBUTES/py_state"


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_the_checkpoint_stay_as_they_are(run_of, name):
    run = run_of(name)
    expected = {
        f"model/{key}/.ATTRIBUTES/VARIABLE_VALUE": shape
        for key, shape in KEYS[name].items()
    }
    expected["_CHECKPOINTABLE_OBJECT_GRAPH"] = []
    for key in (STATE, "model/optimizer/_commit/.ATTRIBUTES/commit"):
        expected[key] = []
        if name == "nested":
            expected[key.replace("optimizer", "optimizer/children/0")] = []
    for calls in run.case.saved_after:
        assert dict(tf.train.list_variables(_path(run, calls))) == expected


def test_state_in_the_checkpoint_is_the_layout_of_an_h5_file(tmp_path):
    model = make_model(CASES["same_class"].make())
    train(model, 0, BOUNDARY + 1)
    path = tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))
    state = tf.train.load_checkpoint(path).get_tensor(STATE)
    model.save_weights(tmp_path / "model.weights.h5")
    with h5py.File(tmp_path / "model.weights.h5") as file:
        layout = np.asarray(file["optimizer/vars/layout"]).tobytes()
    assert state == layout
