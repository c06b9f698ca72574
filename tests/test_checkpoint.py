"""What `tf.train.Checkpoint` saves goes on bit by bit, or is refused untouched."""

import functools

import keras
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.reference import assert_same, weights_of
from tests.saving_tools import (
    BOUNDARY,
    CASES,
    adam_sgd,
    build,
    gradients_of,
    make_data,
    make_model,
    make_runs,
    own_state_of,
    saves,
    state_of,
    train,
    warnings_of,
)
from tests.saving_ways import (
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


# --- changed children --------------------------------------------------------------


def _adam(name=None):
    return optimizers.Adam(0.05, name=name)


def _sgd():
    return optimizers.SGD(0.02, momentum=0.9)


def _nadam():
    return optimizers.Nadam(0.05)


def _returning():
    adam = _adam()
    return SequentialOptimizer([adam, _sgd(), adam], [BOUNDARY, BOUNDARY + 2])


def _trained(tmp_path, optimizer, calls=4):
    """Returns a trained model and its checkpoint."""
    model = make_model(optimizer)
    train(model, 0, calls)
    path = tf.train.Checkpoint(model=model).write(str(tmp_path / "checkpoint"))
    return model, path


def _children_of(model):
    return [weights_of(child.variables) for child in model.optimizer.children]


CHANGED = {
    "added": lambda: SequentialOptimizer([_adam(), _sgd(), _nadam()], [3, 5]),
    "dropped": lambda: SequentialOptimizer([_adam()], []),
    "phase_added": _returning,
}


@pytest.mark.parametrize("built", [True, False], ids=["built", "deferred"])
@pytest.mark.parametrize("change", CHANGED)
def test_children_keep_their_position(tmp_path, change, built):
    saved, path = _trained(tmp_path, adam_sgd())
    model = make_model(CHANGED[change]())
    if built:
        build(model)
    # What was dropped has no place, which TensorFlow reports if it is asked.
    messages = warnings_of(
        lambda: tf.train.Checkpoint(model=model).read(path).expect_partial()
    )
    assert len(messages) == 1
    assert messages[0].startswith("A `SequentialOptimizer` saved with children")
    build(model)
    fresh = _children_of(build(make_model(CHANGED[change]())))
    kept = _children_of(saved)
    for i, variables in enumerate(_children_of(model)):
        assert_same(variables, kept[i] if i < len(kept) else fresh[i])
    assert_same(own_state_of(model.optimizer), own_state_of(saved.optimizer))
    assert_same(weights_of(model.weights), weights_of(saved.weights))


def test_third_phase_added_after_a_run_is_as_if_it_had_always_been_there(tmp_path):
    expected = train(make_model(CHANGED["added"]()), 0, 6)
    _, path = _trained(tmp_path, adam_sgd())
    model = make_model(CHANGED["added"]())
    with pytest.warns(UserWarning, match="a child that was not saved starts afresh"):
        tf.train.Checkpoint(model=model).read(path)
    assert_same(train(model, 4, 6), expected[4:])


REFUSED = {
    "added_at_the_front": (
        adam_sgd,
        lambda: SequentialOptimizer([_nadam(), _adam(), _sgd()], [3, 5]),
        "added or dropped at the end",
    ),
    "dropped_at_the_front": (
        adam_sgd,
        lambda: SequentialOptimizer([_sgd()], []),
        "added or dropped at the end",
    ),
    "reordered": (
        adam_sgd,
        lambda: SequentialOptimizer([_sgd(), _adam()], [3]),
        "added or dropped at the end",
    ),
    "exchanged": (
        adam_sgd,
        lambda: SequentialOptimizer([_adam(), _nadam()], [3]),
        "added or dropped at the end",
    ),
    "same_class_swapped": (
        lambda: SequentialOptimizer([_adam("a"), _adam("b")], [3]),
        lambda: SequentialOptimizer([_adam("b"), _adam("a")], [3]),
        "the same class",
    ),
    "first_of_a_class_dropped": (
        lambda: SequentialOptimizer([_adam("a"), _adam("b")], [3]),
        lambda: SequentialOptimizer([_adam("b")], []),
        "the same class",
    ),
    "first_of_a_class_added": (
        lambda: SequentialOptimizer([_adam("a")], []),
        lambda: SequentialOptimizer([_adam("new"), _adam("a")], [3]),
        "the same class",
    ),
    "ema_added": (adam_sgd, lambda: adam_sgd(use_ema=True), "`use_ema` must be"),
    "ema_dropped": (lambda: adam_sgd(use_ema=True), adam_sgd, "`use_ema` must be"),
    "window_changed": (
        lambda: adam_sgd(gradient_accumulation_steps=2),
        lambda: adam_sgd(gradient_accumulation_steps=3),
        "`gradient_accumulation_steps` must be",
    ),
    "inner_exchanged": (
        CASES["nested"].make,
        lambda: SequentialOptimizer(
            [
                SequentialOptimizer([_adam(), _nadam()], [2], name="inner"),
                optimizers.RMSprop(0.01),
            ],
            [3],
        ),
        "added or dropped at the end",
    ),
    "plain_adam": (_adam, adam_sgd, "must have been saved from one"),
    "plain_sgd_without_momentum": (
        lambda: optimizers.SGD(0.1),
        adam_sgd,
        "must have been saved from one",
    ),
    "plain_adam_with_ema": (
        lambda: optimizers.Adam(0.05, use_ema=True),
        lambda: adam_sgd(use_ema=True),
        "must have been saved from one",
    ),
    "loss_scaled": (
        lambda: optimizers.LossScaleOptimizer(adam_sgd()),
        adam_sgd,
        "must have been saved from one",
    ),
}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """Function from a key of REFUSED to a checkpoint that is refused."""

    @functools.cache
    def path_of(change):
        make_saved, _, _ = REFUSED[change]
        return _trained(tmp_path_factory.mktemp(change), make_saved(), calls=2)[1]

    return path_of


@pytest.mark.parametrize("change", REFUSED)
def test_refused_restore_changes_nothing(refused, change):
    _, make, reason = REFUSED[change]
    model = make_model(make())
    train(model, 0, 1)
    before = state_of(model)
    with pytest.raises(ValueError, match=reason):
        warnings_of(tf.train.Checkpoint(model=model).read, refused(change))
    assert_same(state_of(model), before)


@pytest.mark.parametrize("change", REFUSED)
def test_unbuilt_optimizer_that_refused_a_restore_refuses_to_be_built(refused, change):
    # TensorFlow keeps the refused state for the variables that `build` would create.
    _, make, reason = REFUSED[change]
    model = make_model(make())
    with pytest.raises(ValueError, match=reason):
        warnings_of(tf.train.Checkpoint(model=model).read, refused(change))
    with pytest.raises(ValueError, match=r"Received: .* Create a new optimizer\."):
        build(model)


def test_refusal_does_not_spoil_the_next_restore(refused, run_of):
    model = build(make_model(adam_sgd()))
    checkpoint = tf.train.Checkpoint(model=model)
    with pytest.raises(ValueError, match="must have been saved from one"):
        checkpoint.read(refused("plain_adam"))
    run = run_of("adam_sgd")
    checkpoint.read(_path(run, 3))
    run.assert_continues(model, 3)


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
    return {f"{path}/_{name}": [] for name in ("iterations", "min_phase", "last_phase")}


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
LAYOUT = "model/optimizer/_layout/.ATTRIBUTES/py_state"
PYTHON_STATE = [LAYOUT, "model/optimizer/_notes/.ATTRIBUTES/py_state"]


@pytest.mark.parametrize("name", KEYS)
def test_keys_of_the_checkpoint_stay_as_they_are(run_of, name):
    run = run_of(name)
    expected = {
        f"model/{key}/.ATTRIBUTES/VARIABLE_VALUE": shape
        for key, shape in KEYS[name].items()
    }
    python_state = PYTHON_STATE + [
        key.replace("optimizer", "optimizer/children/0")
        for key in PYTHON_STATE
        if name == "nested"
    ]
    expected |= {key: [] for key in ["_CHECKPOINTABLE_OBJECT_GRAPH", *python_state]}
    for calls in run.case.saved_after:
        assert dict(tf.train.list_variables(_path(run, calls))) == expected


def test_layout_in_the_checkpoint_stays_as_it_is(run_of):
    reader = tf.train.load_checkpoint(_path(run_of("same_class"), 3))
    assert reader.get_tensor(LAYOUT) == (
        b'{"version": 1, "classes": ["Adam", "Adam"], "names": ["first", "second"], '
        b'"phases": [0, 1], "use_ema": false, "gradient_accumulation_steps": null, '
        b'"shapes": [[4, 3], [3], [3, 1], [1]]}'
    )
