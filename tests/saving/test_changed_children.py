"""What may be loaded after the children have changed: one rule for every format.

The children that the file and the optimizer both have must be the same, in the same
order. More or fewer at the end is fine, and warns. Anything else is refused, and then
nothing has changed.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers.oracle import assert_same, make_gradients, make_variables, weights_of
from tests.helpers.saving import (
    BOUNDARY,
    CASES,
    adam_sgd,
    build,
    make_model,
    own_state_of,
    state_of,
    train,
    warnings_of,
)
from tests.helpers.saving_ways import (
    checkpoint_in,
    save_checkpoint,
    save_keras,
    save_weights_h5,
)

optimizers = keras.optimizers


@dataclass(frozen=True)
class Format:
    """A way to save a model, and to load that into a model with another optimizer.

    Attributes:
        save: function of (model, folder).
        load: function of (model, folder).
        built: whether the optimizer is built before it is loaded.
    """

    save: Callable
    load: Callable
    built: bool = True


def _load_h5(model, folder):
    model.load_weights(folder / "model.weights.h5")
    build(model)


def _load_keras(model, folder):
    model.load_weights(folder / "model.keras")
    build(model)


def _load_checkpoint(model, folder):
    tf.train.Checkpoint(model=model).read(checkpoint_in(folder)).expect_partial()
    build(model)


FORMATS = {
    "weights_h5": Format(save_weights_h5, _load_h5),
    "keras": Format(save_keras, _load_keras),
    "checkpoint": Format(save_checkpoint, _load_checkpoint),
    "weights_h5_unbuilt": Format(save_weights_h5, _load_h5, built=False),
    "checkpoint_unbuilt": Format(save_checkpoint, _load_checkpoint, built=False),
}


def _adam(name=None, rate=0.05, **kwargs):
    return optimizers.Adam(rate, name=name, **kwargs)


def _sgd(name=None):
    return optimizers.SGD(0.02, momentum=0.9, name=name)


def _nadam():
    return optimizers.Nadam(0.05)


def _adam_nadam():
    return SequentialOptimizer([_adam(), _nadam()], [BOUNDARY])


class Adam(optimizers.Adam):
    """A user's own, with the name of another."""


def _returning():
    adam = _adam()
    return SequentialOptimizer([adam, _sgd(), adam], [BOUNDARY, BOUNDARY + 2])


def _multi(pattern):
    if not hasattr(optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has none")
    return optimizers.MultiOptimizer(
        optimizers.OptimizerMap(_sgd(), {pattern: _adam()}), name="multi"
    )


def _nested(second):
    inner = SequentialOptimizer([_adam(), second], [2], name="inner")
    return SequentialOptimizer([inner, optimizers.RMSprop(0.01)], [BOUNDARY])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Function of (format, name, optimizer maker) to the run that it saved, once."""

    @functools.cache
    def saved_run(name, key, make, calls=4):
        folder = tmp_path_factory.mktemp(key)
        model = make_model(make())
        train(model, 0, calls)
        FORMATS[name].save(model, folder)
        return model, folder

    return saved_run


def _prepared(name, optimizer):
    """Returns a model that has trained, or, for some formats, is not built."""
    model = make_model(optimizer)
    if FORMATS[name].built:
        train(model, 0, 1)
    return model


def _children_of(model):
    return [weights_of(child.variables) for child in model.optimizer.children]


# --- fine ------------------------------------------------------------------------


CHANGED = {
    "added": lambda: SequentialOptimizer([_adam(), _sgd(), _nadam()], [3, 5]),
    "dropped": lambda: SequentialOptimizer([_adam()], []),
    "phase_added": _returning,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("change", CHANGED)
def test_more_or_fewer_at_the_end_is_fine(saved, change, name):
    run, folder = saved(name, "adam_sgd", adam_sgd)
    model = make_model(CHANGED[change]())
    if FORMATS[name].built:
        build(model)
    messages = warnings_of(FORMATS[name].load, model, folder)
    assert len(messages) == 1
    assert "children ['Adam', 'SGD'] in phases [0, 1] is loaded" in messages[0]
    fresh = _children_of(build(make_model(CHANGED[change]())))
    kept = _children_of(run)
    for i, variables in enumerate(_children_of(model)):
        assert_same(variables, kept[i] if i < len(kept) else fresh[i])
    assert_same(own_state_of(model.optimizer), own_state_of(run.optimizer))
    assert_same(weights_of(model.weights), weights_of(run.weights))
    phases = len(model.optimizer.child_of_phase)
    assert model.optimizer.phase_starts.tolist() == [0, BOUNDARY, -1][:phases]


@pytest.mark.parametrize("name", FORMATS)
def test_third_phase_is_as_if_it_had_always_been_there(saved, name):
    expected = train(make_model(CHANGED["added"]()), 0, 6)
    _, folder = saved(name, "adam_sgd", adam_sgd)
    model = make_model(CHANGED["added"]())
    if FORMATS[name].built:
        build(model)
    assert warnings_of(FORMATS[name].load, model, folder)
    assert_same(train(model, 4, 6), expected[4:])


@pytest.mark.parametrize("name", FORMATS)
def test_nested_sequence_may_grow_at_its_end(saved, name):
    def grown():
        inner = SequentialOptimizer([_adam(), _sgd(), _nadam()], [2, 9], name="inner")
        return SequentialOptimizer([inner, optimizers.RMSprop(0.01)], [BOUNDARY])

    run, folder = saved(name, "nested", lambda: _nested(_sgd()))
    model = make_model(grown())
    if FORMATS[name].built:
        build(model)
    messages = warnings_of(FORMATS[name].load, model, folder)
    assert messages
    inner, inner_run = (m.optimizer.children[0] for m in (model, run))
    for i in range(2):
        child, child_run = (one.children[i] for one in (inner, inner_run))
        assert_same(weights_of(child.variables), weights_of(child_run.variables))
    assert inner.phase_starts.tolist() == [0, 2, -1]


@pytest.mark.parametrize("name", FORMATS)
def test_dropped_last_child_finalizes_nothing(saved, name):
    def make(*names):
        children = {
            "adam": optimizers.Adam(0.05, use_ema=True),
            "sgd": optimizers.SGD(0.02, momentum=0.9, use_ema=True),
        }
        return SequentialOptimizer([children[n] for n in names], [3][: len(names) - 1])

    _, folder = saved(name, "averaged", functools.partial(make, "adam", "sgd"))
    model = make_model(make("adam"))
    if FORMATS[name].built:
        build(model)
    warnings_of(FORMATS[name].load, model, folder)
    before = weights_of(model.weights)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    assert_same(weights_of(model.weights), before)


@pytest.mark.parametrize("name", FORMATS)
def test_last_child_is_told_from_the_last_phase(saved, name):
    # The phase of the last update belonged to `a`, and now belongs to `c`, which has
    # made no update: its average, all zeros, once replaced the weights.
    def make(third):
        first = optimizers.SGD(0.1, name="a")
        second = optimizers.Adam(0.1, name="b")
        return SequentialOptimizer([first, second, third or first], [1, 2])

    run, folder = saved(name, "a_b_a", lambda: make(None))
    model = make_model(make(optimizers.RMSprop(0.1, name="c", use_ema=True)))
    if FORMATS[name].built:
        build(model)
    warnings_of(FORMATS[name].load, model, folder)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    assert_same(weights_of(model.weights), weights_of(run.weights))
    assert model.optimizer.phase_starts.tolist() == [0, 1, -1]


@keras.saving.register_keras_serializable(package="tests", name="Registered")
class _MyAdam2(optimizers.Adam):
    """Its automatic name says neither the registered name nor all of the class's."""


@pytest.mark.parametrize("name", ["weights_h5", "checkpoint"])
def test_automatic_names_of_any_class_do_not_count(saved, name):
    def make():
        return SequentialOptimizer([_MyAdam2(0.05, name=None), _sgd()], [BOUNDARY])

    run, folder = saved(name, "my_adam", make)
    _MyAdam2(0.05, name=None)
    model = _prepared(name, make())
    child, child_run = (one.optimizer.children[0] for one in (model, run))
    assert child.name != child_run.name
    FORMATS[name].load(model, folder)
    assert_same(state_of(model), state_of(run))


@pytest.mark.parametrize("name", FORMATS)
def test_settings_of_a_child_may_be_edited(saved, name):
    _, folder = saved(name, "adam_sgd", adam_sgd)
    edited = SequentialOptimizer([_adam(rate=0.01, beta_1=0.8), _sgd()], [BOUNDARY])
    model = _prepared(name, edited)
    assert warnings_of(FORMATS[name].load, model, folder) == []


# --- refused -----------------------------------------------------------------------


@dataclass(frozen=True)
class Refused:
    """A change that is refused.

    Attributes:
        saved: function that makes the optimizer of the file.
        now: function that makes the one it is loaded into.
        reason: what the error says.
    """

    saved: Callable
    now: Callable
    reason: str


REFUSED = {
    "exchanged": Refused(
        adam_sgd,
        _adam_nadam,
        "another class of child 1: keras>SGD, now keras>Nadam",
    ),
    "added_at_the_front": Refused(
        adam_sgd,
        lambda: SequentialOptimizer([_nadam(), _adam(), _sgd()], [3, 5]),
        "another class of child 0",
    ),
    "dropped_at_the_front": Refused(
        adam_sgd, lambda: SequentialOptimizer([_sgd()], []), "another class of child 0"
    ),
    "reordered": Refused(
        adam_sgd,
        lambda: SequentialOptimizer([_sgd(), _adam()], [3]),
        "another class of child 0",
    ),
    # Told apart by `__name__`, it once took the state of Keras' Adam.
    "own_class_of_the_same_name": Refused(
        adam_sgd,
        lambda: SequentialOptimizer([Adam(0.05), _sgd()], [BOUNDARY]),
        r"keras>Adam, now tests\.saving\.test_changed_children>Adam",
    ),
    "names_swapped": Refused(
        lambda: SequentialOptimizer([_adam("a"), _adam("b")], [3]),
        lambda: SequentialOptimizer([_adam("b"), _adam("a")], [3]),
        "another name of child 0: a, now b",
    ),
    "first_name_dropped": Refused(
        lambda: SequentialOptimizer([_adam("a"), _adam("b")], [3]),
        lambda: SequentialOptimizer([_adam("b")], []),
        "another name of child 0",
    ),
    "first_name_added": Refused(
        lambda: SequentialOptimizer([_adam("a")], []),
        lambda: SequentialOptimizer([_adam("new"), _adam("a")], [3]),
        "another name of child 0",
    ),
    # A name that Keras made says nothing, and states were once silently exchanged.
    "unnamed_swapped": Refused(
        lambda: SequentialOptimizer([_adam(), _adam("late")], [3]),
        lambda: SequentialOptimizer([_adam("late"), _adam()], [3]),
        "another name of child 0: None, now late",
    ),
    "first_unnamed_dropped": Refused(
        lambda: SequentialOptimizer([_adam(), _adam("late")], [3]),
        lambda: SequentialOptimizer([_adam("late")], []),
        "another name of child 0: None, now late",
    ),
    "first_unnamed_added": Refused(
        lambda: SequentialOptimizer([_adam("late")], []),
        lambda: SequentialOptimizer([_adam(), _adam("late")], [3]),
        "another name of child 0: late, now None",
    ),
    "more_variables_in_a_child": Refused(
        adam_sgd,
        lambda: SequentialOptimizer([_adam(amsgrad=True), _sgd()], [BOUNDARY]),
        r"shape None of array `children/0/10`, now \[4, 3\]",
    ),
    "ema_added": Refused(
        adam_sgd,
        lambda: adam_sgd(use_ema=True),
        "another settings of the sequence: {'use_ema': False",
    ),
    "ema_dropped": Refused(
        lambda: adam_sgd(use_ema=True),
        adam_sgd,
        "another settings of the sequence: {'use_ema': True",
    ),
    "accumulation_added": Refused(
        adam_sgd,
        lambda: adam_sgd(gradient_accumulation_steps=2),
        "another settings of the sequence: .*'gradient_accumulation_steps': None",
    ),
    "window_changed": Refused(
        lambda: adam_sgd(gradient_accumulation_steps=2),
        lambda: adam_sgd(gradient_accumulation_steps=3),
        "another settings of the sequence: .*'gradient_accumulation_steps': 2",
    ),
    "inner_exchanged": Refused(
        lambda: _nested(_sgd()),
        lambda: _nested(_nadam()),
        "another class of child 1",
    ),
    "other_variables_in_a_multi_optimizer": Refused(
        lambda: SequentialOptimizer([_multi(".*kernel"), _sgd("last")], [BOUNDARY]),
        lambda: SequentialOptimizer([_multi(".*"), _sgd("last")], [BOUNDARY]),
        r"shape .* of array `children/0/\d+`, now \[",
    ),
}
# The checkpoints of plain Keras lose what is in a MultiOptimizer, and TensorFlow does
# not say so: `test_checkpoint_of_a_multi_optimizer_loses_what_is_in_it`.
CASES_REFUSED = [(key, name) for key in REFUSED for name in FORMATS]


@pytest.mark.parametrize(("change", "name"), CASES_REFUSED)
def test_anything_else_is_refused(saved, change, name):
    refused = REFUSED[change]
    _, folder = saved(name, change, refused.saved, calls=2)
    model = _prepared(name, refused.now())
    before = state_of(model)
    with pytest.raises(ValueError, match=refused.reason):
        warnings_of(FORMATS[name].load, model, folder)
    if FORMATS[name].built:
        # Keras has loaded the weights of the model by then, with any optimizer.
        first = int("checkpoint" not in name)
        assert_same(state_of(model)[first:], before[first:])
        return
    with pytest.raises(ValueError, match=r"Received: .* Create a new optimizer\."):
        build(model)


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.built])
@pytest.mark.parametrize(
    ("other", "reason"),
    [(_adam_nadam, "another class"), (_adam, "must have been saved from one")],
)
def test_refusal_does_not_spoil_the_next_load(saved, name, other, reason):
    model = _prepared(name, adam_sgd())
    _, folder = saved(name, "other", other)
    with pytest.raises(ValueError, match=reason):
        warnings_of(FORMATS[name].load, model, folder)
    run, folder = saved(name, "adam_sgd", adam_sgd)
    FORMATS[name].load(model, folder)
    assert_same(state_of(model), state_of(run))
    assert_same(model.optimizer.phase_starts, run.optimizer.phase_starts)


# --- another optimizer's -------------------------------------------------------------


OTHERS = {
    "adam": _adam,
    "sgd_without_momentum": lambda: optimizers.SGD(0.1),
    "averaged_adam": lambda: optimizers.Adam(0.05, use_ema=True),
    "loss_scaled": CASES["loss_scaled"].make,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("other", OTHERS)
def test_state_of_another_optimizer(saved, other, name):
    run, folder = saved(name, other, OTHERS[other], calls=2)
    model = _prepared(name, adam_sgd())
    before = state_of(model)
    if FORMATS[name].built:
        with pytest.raises(ValueError, match="must have been saved from one"):
            warnings_of(FORMATS[name].load, model, folder)
        assert_same(state_of(model)[1:], before[1:])
        return
    # What fine-tuning from a file does: as in Keras, the optimizer starts afresh.
    messages = warnings_of(FORMATS[name].load, model, folder)
    assert len(messages) == 1
    assert messages[0].startswith("Skipping variable loading for")
    fresh = build(make_model(adam_sgd()))
    assert_same(weights_of(model.weights), weights_of(run.weights))
    assert_same(
        weights_of(model.optimizer.variables), weights_of(fresh.optimizer.variables)
    )


def test_checkpoint_of_a_multi_optimizer_loses_what_is_in_it(tmp_path):
    # Not ours to mend: TensorFlow does not find the optimizers in it, with plain Keras
    # either. A test that fails here says that a new version does.
    variables = make_variables()
    trained = _multi(".*w0.*")
    for gradients in make_gradients(variables, 2):
        trained.apply(gradients, variables)
    path = tf.train.Checkpoint(o=trained).write(str(tmp_path / "multi"))
    loaded = _multi(".*w0.*")
    loaded.build(variables)
    tf.train.Checkpoint(o=loaded).read(path).assert_consumed()
    assert int(loaded.iterations) == 2
    assert [int(inner.iterations) for inner in loaded.optimizers] == [0, 0]


@pytest.mark.parametrize("name", ["weights_h5", "keras", "weights_h5_unbuilt"])
def test_keras_file_keeps_what_is_in_a_multi_optimizer(saved, name):
    def make():
        return SequentialOptimizer([_multi(".*kernel"), _sgd("last")], [BOUNDARY])

    run, folder = saved(name, "multi", make)
    model = _prepared(name, make())
    FORMATS[name].load(model, folder)
    assert_same(state_of(model), state_of(run))
    assert np.any(model.optimizer.children[0].optimizers[0].variables[2])
