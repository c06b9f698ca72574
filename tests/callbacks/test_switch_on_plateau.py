"""SwitchOnPlateau follows its rule, in `fit` as in plain Python, and after a kill."""

import copy
import functools
import json
import math
import pickle
import random
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import PhaseLogger, SequentialOptimizer, SwitchOnPlateau
from tests.helpers.callbacks import (
    GAN,
    Kill,
    KilledError,
    Recorder,
    Script,
    Stage,
    X,
    Y,
    compiled_model,
    fit,
    make_sequence,
)
from tests.helpers.oracle import assert_same, weights_of

NAN, INF = math.nan, math.inf


def make_sgds(boundaries):
    """Returns a sequence of the cheapest children."""
    children = [
        keras.optimizers.SGD(0.1, name=f"child_{i}") for i in range(len(boundaries) + 1)
    ]
    return SequentialOptimizer(children, list(boundaries))


def drive(callback, values, boundaries=(None,), updates=2, advance_at=()):
    """Feeds one value of the metric per epoch; returns the phase after each epoch.

    Args:
        updates: the number of updates in an epoch.
        advance_at: iterations before which somebody else calls `advance()`.
    """
    optimizer = make_sgds(boundaries)
    stage = Stage(optimizer, [callback])
    phases = []
    for value in values:
        stage.begin_epoch()
        for _ in range(updates):
            if int(optimizer.iterations) in advance_at:
                optimizer.advance()
            stage.update()
        stage.end_epoch(**{callback.monitor: value})
        phases.append(int(optimizer.phase))
    return phases


# --- the rule ----------------------------------------------------------------


def is_stalled(values, mode, patience, min_delta, cooldown):
    """The rule for one phase, whose epochs had these values of the metric."""
    best, wait = None, 0
    for epoch, value in enumerate(values):
        if best is None:
            better = math.isfinite(value)
        elif mode == "min":
            better = value < best - min_delta
        else:
            better = value > best + min_delta
        if better:
            best, wait = value, 0
        elif epoch >= cooldown:
            wait += 1
    return wait >= max(patience, 1)


def phases_by_hand(
    values, boundaries, updates, advance_at, min_iterations, cooldown, **rule
):
    """The rule for a run, update by update; returns the phase after each epoch."""
    phase, iterations = 0, 0
    begin, seen = 0, []  # of the phase: its first update, and the metric
    cooldown_now = 0
    phases = []
    for value in values:
        phase_of_update = None
        for _ in range(updates):
            if iterations in advance_at and phase < len(boundaries):
                phase, begin, seen, cooldown_now = phase + 1, iterations, [], cooldown
            phase_of_update = phase
            iterations += 1
            if phase < len(boundaries) and boundaries[phase] == iterations:
                phase, begin, seen, cooldown_now = phase + 1, iterations, [], cooldown
        if phase == phase_of_update and phase < len(boundaries):
            seen.append(value)
            stalled = is_stalled(seen, cooldown=cooldown_now, **rule)
            if stalled and iterations - begin >= min_iterations:
                phase, begin, seen, cooldown_now = phase + 1, iterations, [], cooldown
        phases.append(phase)
    return phases


@pytest.mark.parametrize("seed", range(40))
def test_rule_equals_plain_python(seed):
    rng = random.Random(seed)
    values = [rng.choice([1.0, 1.5, 2.0, 2.25, 3.0, NAN, INF]) for _ in range(14)]
    integers = sorted(rng.sample(range(1, 28), rng.randint(0, 2)))
    setting = {
        "mode": rng.choice(["min", "max"]),
        "patience": rng.randint(0, 3),
        "min_delta": rng.choice([0, 0.25, 0.5]),
        "cooldown": rng.randint(0, 2),
        "min_iterations": rng.choice([0, 3, 5, 7]),
    }
    if setting["mode"] == "max":
        values = [-value for value in values]
    run = {
        "boundaries": tuple(integers + [None] * rng.randint(0 if integers else 1, 2)),
        "updates": rng.randint(1, 3),
        "advance_at": tuple(rng.sample(range(1, 28), rng.randint(0, 1))),
    }
    callback = SwitchOnPlateau("loss", **setting)
    expected = phases_by_hand(values, **run, **setting)
    assert drive(callback, values, **run) == expected, (values, setting, run)


RULE = {
    "waits for `patience` epochs in a row": (
        {"patience": 3},
        [5, 5, 5, 4, 4, 4, 4, 4],
        [0, 0, 0, 0, 0, 0, 1, 1],
    ),
    "patience 0 ends at the first epoch without improvement": (
        {"patience": 0},
        [5, 4, 4],
        [0, 0, 1],
    ),
    "a change by min_delta is none": (
        {"patience": 1, "min_delta": 0.5},
        [5, 4.5],
        [0, 1],
    ),
    "a change by more than min_delta is one": (
        {"patience": 1, "min_delta": 0.5},
        [5, 4.4375, 3.875],
        [0, 0, 0],
    ),
    "many small changes do not add up to stalling": (
        {"patience": 2, "min_delta": 0.5},
        [5, 4.75, 4.25, 4, 3.5],
        [0, 0, 0, 0, 0],
    ),
    "NaN is no improvement": (
        {"patience": 2},
        [5, NAN, NAN],
        [0, 0, 1],
    ),
    "NaN at first is not the best": (
        {"patience": 2},
        [NAN, 5, NAN, 4, NAN, NAN],
        [0, 0, 0, 0, 0, 1],
    ),
    "only NaN stalls": ({"patience": 3}, [NAN] * 3, [0, 0, 1]),
    "an infinite loss is no improvement": ({"patience": 1}, [INF], [1]),
    "max": (
        {"mode": "max", "patience": 1},
        [1, 2, 3, 3],
        [0, 0, 0, 1],
    ),
    "min_iterations holds a stalled phase": (
        # Two updates per epoch: 8 have been made after the fourth.
        {"patience": 1, "min_iterations": 7},
        [5, 5, 5, 5],
        [0, 0, 0, 1],
    ),
    "min_iterations is enough when reached exactly": (
        {"patience": 1, "min_iterations": 6},
        [5, 5, 5],
        [0, 0, 1],
    ),
}


@pytest.mark.parametrize("name", RULE)
def test_rule_by_example(name):
    setting, values, expected = RULE[name]
    assert drive(SwitchOnPlateau("loss", **setting), values) == expected


def test_each_phase_gets_a_new_best_patience_and_cooldown():
    values = [1, 1, 1, 9, 9, 9, 9, 5, 5, 5, 5, 5]
    # Epoch 0 is the best, and 1 and 2 use up the patience. Then 9 is the best of the
    # next phase, though worse than 1: epoch 3 is its cooldown, and 4 and 5 use up the
    # patience. The same from epoch 6 on, except that 5 in epoch 7 is better.
    expected = [0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3]
    callback = SwitchOnPlateau("loss", patience=2, cooldown=1)
    assert drive(callback, values, boundaries=(None,) * 3) == expected
    # With a longer cooldown, its second epoch no longer counts towards the patience.
    callback = SwitchOnPlateau("loss", patience=2, cooldown=2)
    expected = [0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    assert drive(callback, values, boundaries=(None,) * 3) == expected


def test_there_is_no_cooldown_before_the_first_switch():
    callback = SwitchOnPlateau("loss", patience=1, cooldown=5)
    assert drive(callback, [1, 1]) == [0, 1]


def test_the_best_value_is_kept_up_to_date_in_the_cooldown():
    # 5 in the cooldown is the best; 6 and 6 are worse.
    callback = SwitchOnPlateau("loss", patience=2, cooldown=2)
    values = [1, 1, 1, 9, 5, 6, 6]
    expected = [0, 0, 1, 1, 1, 1, 2]
    assert drive(callback, values, boundaries=(None,) * 2) == expected


def test_min_iterations_counts_from_the_switch_inside_an_epoch():
    # Update 3 is the first of phase 1; it has made 5 after epoch 3, 7 after epoch 4.
    for min_iterations, expected in ((5, [0, 1, 1, 2, 2]), (6, [0, 1, 1, 1, 2])):
        for run in (
            {"boundaries": (3, None)},
            {"boundaries": (None, None), "advance_at": (3,)},
        ):
            callback = SwitchOnPlateau(
                "loss", patience=1, min_iterations=min_iterations
            )
            # Phase 0 sees the first epoch only.
            assert drive(callback, [1] * 5, **run) == expected


@pytest.mark.parametrize(
    ("monitor", "improving"),
    [
        ("loss", [3, 2, 1]),
        ("val_loss", [3, 2, 1]),
        ("val_accuracy_loss", [3, 2, 1]),
        ("mean_squared_error", [3, 2, 1]),
        ("val_mae", [3, 2, 1]),
        ("out_1_loss", [3, 2, 1]),
        ("sparse_categorical_crossentropy", [3, 2, 1]),
        ("val_perplexity", [3, 2, 1]),
        ("accuracy", [1, 2, 3]),
        ("val_acc", [1, 2, 3]),
        ("val_auc_2", [1, 2, 3]),
        ("Recall", [1, 2, 3]),
        ("val_f1_score", [1, 2, 3]),
        ("mean_io_u", [1, 2, 3]),
        ("r2_score", [1, 2, 3]),
        # `<output>_<metric>`, of outputs named loss and error: once minimized.
        ("loss_accuracy", [1, 2, 3]),
        ("val_error_precision_1", [1, 2, 3]),
        ("accuracy_error_rate", [3, 2, 1]),
    ],
)
def test_auto_tells_the_better_direction_by_the_name(monitor, improving):
    worsening = improving[::-1]
    assert drive(SwitchOnPlateau(monitor, patience=1), improving) == [0, 0, 0]
    assert drive(SwitchOnPlateau(monitor, patience=1), worsening) == [0, 1, 1]


@pytest.mark.parametrize("monitor", ["reward", "layer2_norm", "various", "vaccines"])
def test_auto_asks_for_the_mode_of_an_unknown_name(monitor):
    with pytest.raises(ValueError, match=f"`mode` must be .*{monitor}.*Pass"):
        SwitchOnPlateau(monitor)
    assert drive(SwitchOnPlateau(monitor, 1, mode="max"), [1, 2, 1]) == [0, 0, 1]


def test_mode_wins_over_the_name():
    callback = SwitchOnPlateau("val_loss", patience=1, mode="max")
    assert drive(callback, [1, 2, 3, 2]) == [0, 0, 0, 1]


@pytest.mark.parametrize(
    "bad",
    [
        {"mode": "least"},
        {"patience": -1},
        {"min_delta": -0.1},
        {"min_delta": NAN},
        {"cooldown": -1},
        {"min_iterations": -1},
    ],
)
def test_bad_arguments_are_errors_that_name_them(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=rf"`{name}` must be .* Received: {name}="):
        SwitchOnPlateau(**bad)


# --- other switches, and the last phase --------------------------------------


def test_integer_boundary_or_plateau_whichever_comes_first():
    def phases(boundary, values):
        return drive(SwitchOnPlateau("loss", patience=2), values, (boundary, None))

    # The plateau, after the third epoch and its sixth update; the integer behind it
    # does not switch again.
    assert phases(7, [1] * 5) == [0, 0, 1, 1, 1]
    # The integer, inside of the third epoch, which is the first of phase 1.
    assert phases(5, [1] * 6) == [0, 0, 1, 1, 2, 2]
    # Both at once: one switch, and the next epoch is the first of phase 1.
    assert phases(6, [1] * 7) == [0, 0, 1, 1, 1, 2, 2]
    # The integer alone.
    assert phases(5, [5, 4, 3, 2, 1]) == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("value", [1.0, NAN])
def test_epoch_that_ends_at_a_boundary_ends_one_phase(value):
    callback = SwitchOnPlateau("loss", patience=1)
    # After the second epoch phase 1 has made no update yet.
    assert drive(callback, [1.0, value, 2.0], (4, None)) == [0, 1, 1]


def test_advance_of_another_callback_starts_anew():
    class Advance(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                self.model.optimizer.advance()

    phases = {}
    for place in (0, 1):
        optimizer = make_sgds((None, None))
        callbacks = [SwitchOnPlateau("loss", patience=3)]
        callbacks.insert(place, Advance())
        stage = Stage(optimizer, callbacks)
        phases[place] = []
        for _ in range(7):
            stage.begin_epoch()
            stage.update()
            stage.end_epoch(loss=1.0)
            phases[place].append(int(optimizer.phase))
    # From epoch 2 on: the best, then three without improvement.
    assert phases[0] == phases[1] == [0, 1, 1, 1, 1, 2, 2]


def test_two_metrics_make_one_switch_each():
    optimizer = make_sgds((None,) * 3)
    callbacks = [
        SwitchOnPlateau("loss", patience=2),
        SwitchOnPlateau("accuracy", patience=2),
    ]
    stage = Stage(optimizer, callbacks)
    phases = []
    for _ in range(7):
        stage.begin_epoch()
        stage.update()
        stage.end_epoch(loss=1.0, accuracy=1.0)
        phases.append(int(optimizer.phase))
    assert phases == [0, 0, 1, 1, 1, 2, 2]


def test_two_callbacks_for_one_metric_are_an_error():
    callbacks = [SwitchOnPlateau("loss", patience=2), SwitchOnPlateau("loss")]
    stage = Stage(make_sgds((None,)), callbacks)
    stage.begin_epoch()
    with pytest.raises(ValueError, match=r'a different metric.*monitor="loss"'):
        stage.end_epoch(loss=1.0)


def test_last_phase_is_left_alone(capsys):
    optimizer = make_sgds((None,))
    callback = SwitchOnPlateau("loss", patience=1, restore_best_weights=True, verbose=1)
    stage = Stage(optimizer, [callback])

    def epoch(**logs):
        stage.begin_epoch()
        stage.update()
        before = stage.weight.numpy()
        stage.end_epoch(**logs)
        return np.array_equal(stage.weight.numpy(), before)

    assert epoch(loss=1.0)
    assert not epoch(loss=1.0)  # back to the weights of the first epoch
    out = capsys.readouterr().out
    assert out == (
        "epoch 2: child_0 -> child_1, after 1 without a better loss than 1\n"
    )
    for value in (1.0, 0.5, 2.0, NAN, 2.0):
        assert epoch(loss=value)
    assert epoch()  # nor does it miss the metric
    assert capsys.readouterr().out == ""
    assert int(optimizer.phase) == 1


# --- beginning of fit --------------------------------------------------------


def test_no_sequence_is_an_error_when_fit_begins():
    model = compiled_model(
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1))
    )
    with pytest.raises(ValueError, match=r"`SwitchOnPlateau` needs .* 0 of them"):
        fit(model, 1, [SwitchOnPlateau()])
    assert model.train_steps == 0


@pytest.mark.parametrize("how", ["advance", "integer", "one child"])
def test_last_phase_is_an_error_when_fit_begins(how):
    optimizer = make_sgds({"advance": (None,), "integer": (2,), "one child": ()}[how])
    model = compiled_model(optimizer)
    if how == "advance":
        optimizer.advance()
    elif how == "integer":
        fit(model, 1, [])
    steps = model.train_steps
    with pytest.raises(ValueError, match=r"phase that can still end.* its last"):
        fit(model, 1, [SwitchOnPlateau()])
    assert model.train_steps == steps


def test_evaluate_and_predict_in_the_last_phase():
    # Those who pass the same callbacks everywhere once got the error of `fit`.
    model = compiled_model(make_sgds(()))
    model.evaluate(X, Y, verbose=0, callbacks=[SwitchOnPlateau()])
    model.predict(X, verbose=0, callbacks=[SwitchOnPlateau()])


@pytest.mark.slow
def test_evaluate_within_a_run_leaves_what_was_noted():
    # Keras then calls `set_model` again, which once started the patience, the best
    # value and the best weights anew.
    class Evaluate(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.evaluate(X, Y, verbose=0, callbacks=[plateau])

    states = []
    for others in ([], [Evaluate()]):
        plateau = SwitchOnPlateau(patience=2, restore_best_weights=True)
        model = compiled_model(make_sequence([None]))
        recorder = Recorder(model.optimizer)
        fit(model, len(VALUES), [*others, Script(VALUES), plateau, recorder])
        assert list(recorder.phases.values()) == [0, 0, 0, 1, 1, 1]
        states.append(weights_of(model.weights))
    assert_same(*states)


def test_missing_metric_warns_and_names_those_that_exist():
    model = compiled_model(make_sgds((None,)), metrics=["mae"], run_eagerly=True)
    callback = SwitchOnPlateau("val_accuracy", patience=1)
    with pytest.warns(UserWarning, match=r"val_accuracy.*not available") as caught:
        fit(model, 3, [callback], validation_data=(X, Y))
    # Of equal warnings from one place Python shows the first, as with Keras' callbacks.
    (message,) = {str(warning.message) for warning in caught}
    names = re.search(r"metrics are: (.*)\.$", message).group(1)
    assert set(names.split(", ")) == {"loss", "mae", "val_loss", "val_mae"}
    assert int(model.optimizer.phase) == 0


def test_metric_of_every_second_epoch_counts_when_it_is_there():
    callback = SwitchOnPlateau("val_loss", patience=2)
    stage = Stage(make_sgds((None,)), [callback])
    phases = []
    for epoch in range(6):
        stage.begin_epoch()
        stage.update()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            stage.end_epoch(**({"val_loss": 1.0} if epoch % 2 else {}))
        phases.append(int(stage.optimizer.phase))
    assert phases == [0, 0, 0, 0, 0, 1]


def test_phase_does_not_end_in_an_epoch_without_the_metric():
    # It stalled before; the updates that a phase has to make are made only now.
    callback = SwitchOnPlateau("val_loss", patience=1, min_iterations=3)
    stage = Stage(make_sgds((None,)), [callback])
    phases = []
    for logs in ({"val_loss": 1.0}, {"val_loss": 1.0}, {}, {"val_loss": 1.0}):
        stage.begin_epoch()
        stage.update()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            stage.end_epoch(**logs)
        phases.append(int(stage.optimizer.phase))
    assert phases == [0, 0, 0, 1]


def test_fit_starts_anew():
    model = compiled_model(make_sgds((None,)))
    callback = SwitchOnPlateau("val_loss", patience=3)
    for _ in range(2):  # The best, then two without improvement: one too few, twice.
        fit(model, 3, [Script([1.0] * 3), callback])
        assert int(model.optimizer.phase) == 0
    fit(model, 4, [Script([1.0] * 4), callback])
    assert int(model.optimizer.phase) == 1


# --- in fit ------------------------------------------------------------------

# The best epoch is 1, so with `patience=2` the switch is after epoch 3.
VALUES = [3.0, 2.0, 2.5, 2.5, 1.0, 0.5]
BEST, LAST = 1, 3

FIT_MODES = {
    "steps_per_execution": {"jit_compile": True, "steps_per_execution": 2},
    "mixed_float16": {"jit_compile": True},
    "LossScaleOptimizer": {"jit_compile": False},
}


class CountTraces(keras.callbacks.Callback):
    """Notes after each epoch how often the train step has been traced."""

    def on_train_begin(self, logs=None):
        self.traces = []

    def on_epoch_end(self, epoch, logs=None):
        self.traces.append(self.model.train_steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "policy"),
    [
        (name, "mixed_float16" if name == "mixed_float16" else "float32")
        for name in FIT_MODES
    ],
    indirect=["policy"],
)
def test_fit_equals_two_fits_with_plain_optimizers(setting, policy):
    def wrapped(optimizer):
        if setting != "LossScaleOptimizer":
            return optimizer
        return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0)

    plain = [
        keras.optimizers.SGD(0.02, momentum=0.9),
        keras.optimizers.Adam(0.05),
    ]
    model = compiled_model(wrapped(plain[0]), **FIT_MODES[setting])
    fit(model, LAST + 1, [])
    expected = [weights_of(model.weights)]
    model.compile(wrapped(plain[1]), loss="mse", **FIT_MODES[setting])
    fit(model, len(VALUES) - LAST - 1, [])
    expected += [weights_of(model.weights), *(weights_of(o.variables) for o in plain)]

    sequence = make_sequence([None])
    model = compiled_model(wrapped(sequence), **FIT_MODES[setting])
    is_wrapped = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert is_wrapped == (setting in ("mixed_float16", "LossScaleOptimizer"))
    count, recorder = CountTraces(), Recorder(sequence)
    plateau = SwitchOnPlateau(patience=2)
    fit(model, len(VALUES), [Script(VALUES), plateau, recorder, count])
    assert list(recorder.phases.values()) == [0, 0, 0, 1, 1, 1]
    assert len(set(count.traces)) == 1
    assert int(sequence.iterations) == 2 * len(VALUES)
    children = [weights_of(child.variables) for child in sequence.children]
    # How XLA rounds the float16 backward pass depends on what surrounds it.
    atol = 1e-6 if setting == "mixed_float16" else 0.0
    states = [recorder.after[LAST], weights_of(model.weights), *children]
    assert_same(states, expected, atol)


# --- several optimizers ------------------------------------------------------


def test_gan_ends_the_phases_of_each_of_its_sequences():
    # Two callbacks for one metric: each notes with its own optimizer.
    scaled = keras.optimizers.LossScaleOptimizer(make_sgds((None,)), initial_scale=1.0)
    gan = GAN(make_sgds((None,)), scaled)
    recorders = [Recorder(gan.g_optimizer), Recorder(scaled.inner_optimizer)]
    plateaus = [
        SwitchOnPlateau(patience=1, optimizer=gan.g_optimizer),
        SwitchOnPlateau(patience=2, optimizer=scaled),
    ]
    fit(gan, 4, [Script([1.0] * 4), *plateaus, *recorders])
    phases = [list(recorder.phases.values()) for recorder in recorders]
    assert phases == [[0, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("callback_class", [SwitchOnPlateau, PhaseLogger])
def test_callback_with_an_optimizer_is_copied_after_fit(callback_class):
    sequence = make_sgds((None,))
    callback = callback_class(optimizer=sequence)
    model = compiled_model(sequence, keras.Sequential)
    fit(model, 2, [Script([1.0] * 2), callback])
    for copied in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(copied.optimizer) is SequentialOptimizer
        # Nor does it need anything of the run that it was in.
        copied.optimizer = make_sgds((None,))
        fit(compiled_model(copied.optimizer), 1, [Script([1.0]), copied])


# --- best weights ------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "jit_compile"),
    [("float32", True), ("float32", False), ("bfloat16", False), ("float16", False)],
    indirect=["policy"],
)
def test_next_phase_starts_from_the_best_weights(policy, jit_compile):
    sequence = make_sequence([None])
    model = compiled_model(
        sequence, jit_compile=jit_compile, run_eagerly=not jit_compile
    )
    before, after = Recorder(sequence), Recorder(sequence)
    plateau = SwitchOnPlateau(patience=2, restore_best_weights=True)
    fit(model, len(VALUES), [Script(VALUES), before, plateau, after])
    assert_same(after.before[LAST + 1], before.after[BEST])
    assert not np.array_equal(before.after[LAST][0], before.after[BEST][0])
    # All other epochs continue from where the one before ended.
    for epoch in set(range(1, len(VALUES))) - {LAST + 1}:
        assert_same(after.before[epoch], before.after[epoch - 1])


def test_each_run_of_a_loop_starts_over():
    # The second was once taken for one that a backup had resumed.
    model = compiled_model(make_sgds((None,)))
    plateau = SwitchOnPlateau("loss", patience=3)
    callbacks = keras.callbacks.CallbackList([plateau], model=model)
    for _ in range(2):
        callbacks.on_train_begin()
        for epoch in range(2):
            callbacks.on_epoch_end(epoch, {"loss": 1.0})
        callbacks.on_train_end()
    assert int(model.optimizer.phase) == 0


def test_fit_after_load_weights_starts_over(tmp_path):
    # What the file has of the callback was once loaded in the middle of the first
    # epoch, when Keras builds the optimizer.
    def make():
        return compiled_model(make_sgds((None,)))

    model = make()
    fit(model, 3, [SwitchOnPlateau("loss", patience=9)])
    model.save_weights(tmp_path / "model.weights.h5")
    model = make()
    model.load_weights(tmp_path / "model.weights.h5")
    fit(model, 3, [SwitchOnPlateau("loss", patience=9)])
    assert model.optimizer.notes["SwitchOnPlateau/loss/seen"][3] == 3  # next epoch


def test_best_weights_are_not_kept_after_training():
    # Every later file once held them for nothing, and a model that had become smaller
    # could not take them.
    plateau = SwitchOnPlateau("loss", patience=9, restore_best_weights=True)
    model = compiled_model(make_sgds((None,)))
    fit(model, 1, [plateau])
    assert list(model.optimizer.notes) == ["SwitchOnPlateau/loss/seen"]


def test_phase_that_a_boundary_ended_hands_its_last_weights_on():
    optimizer = make_sgds((3, None, None))
    callback = SwitchOnPlateau("loss", patience=1, restore_best_weights=True)
    stage = Stage(optimizer, [callback])
    weights = []
    for value in (1.0, NAN, NAN):
        stage.begin_epoch()
        stage.update()
        stage.update()
        weights.append(stage.weight.numpy())
        stage.end_epoch(loss=value)
    # The integer has ended phase 0, whose best weights were those of epoch 0. Phase 1
    # had no best epoch, so there is nothing to go back to when it ends.
    assert int(optimizer.phase) == 3
    assert_same([stage.weight.numpy()], [weights[-1]])
    assert len({float(weight[0]) for weight in weights}) == 3


def test_each_phase_has_its_own_best_weights():
    optimizer = make_sgds((None, None))
    callback = SwitchOnPlateau("loss", patience=1, restore_best_weights=True)
    stage = Stage(optimizer, [callback])
    weights = []
    # The best epochs are 0 and, of phase 1, 3, which are both worse than epoch 0.
    for value in (1.0, 2.0, 6.0, 5.0, 9.0):
        stage.begin_epoch()
        stage.update()
        weights.append(stage.weight.numpy())
        stage.end_epoch(loss=value)
        if value == 2.0:
            assert_same([stage.weight.numpy()], [weights[0]])
    assert int(optimizer.phase) == 2
    assert_same([stage.weight.numpy()], [weights[3]])


def test_average_starts_over_from_the_best_weights():
    # What had diverged stayed in it, and became the weights when training ended.
    optimizer = SequentialOptimizer(
        [keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.0, name="b")],
        [None],
        use_ema=True,
    )
    callback = SwitchOnPlateau("loss", patience=1, restore_best_weights=True)
    stage = Stage(optimizer, [callback])
    for value, gradient in ((1.0, 1.0), (2.0, np.nan), (2.0, 1.0)):
        stage.begin_epoch()
        stage.update(gradient)
        if value == 1.0:
            best = stage.weight.numpy()
        stage.end_epoch(loss=value)
    optimizer.finalize_variable_values([stage.weight])
    assert_same([stage.weight.numpy()], [best])


# --- killed and resumed ------------------------------------------------------

EPOCHS = 7
# An improvement by 100 never comes, so each phase stalls: its first epoch is the
# best, the next two use up the patience, and after a switch one does not count.
STALLING = {"monitor": "loss", "patience": 2, "min_delta": 100.0, "cooldown": 1}
PHASES = [0, 0, 1, 1, 1, 2, 2]

VARIANTS = {
    "plain": ({}, "float32"),
    "wrapped": ({}, "mixed_float16"),
    "best weights": ({"restore_best_weights": True}, "float32"),
    "best bfloat16 weights": ({"restore_best_weights": True}, "bfloat16"),
}


def start(variant, epochs, around=lambda plateau: [plateau], **kwargs):
    """Starts a run in what could be a new process; returns what it leaves behind.

    Args:
        around: function from the SwitchOnPlateau to the list of callbacks.
    """
    keras.utils.clear_session(free_memory=False)
    sequence = make_sequence([None, None])
    model = compiled_model(sequence)
    recorder = Recorder(sequence)
    plateau = SwitchOnPlateau(**STALLING, **VARIANTS[variant][0])
    try:
        fit(model, epochs, [*around(plateau), recorder], batches=1, **kwargs)
    except KilledError:
        return None
    state = [weights_of(model.weights), weights_of(model.optimizer.variables)]
    return state, recorder.phases


@functools.cache
def uninterrupted(variant):
    return start(variant, EPOCHS)


@pytest.mark.usefixtures("interrupted_fit")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "policy", "epoch", "at_end"),
    [
        (variant, VARIANTS[variant][1], epoch, at_end)
        for variant, epochs in {
            "plain": range(EPOCHS),
            "wrapped": (3,),
            "best weights": (4,),
            "best bfloat16 weights": (2,),
        }.items()
        for epoch in epochs
        for at_end in ([False, True] if variant == "plain" and epoch == 2 else [False])
    ],
    indirect=["policy"],
)
def test_killed_run_resumes_as_if_it_had_not_been(
    variant, policy, epoch, at_end, tmp_path
):
    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path / "backup")

    expected_state, expected_phases = uninterrupted(variant)
    assert list(expected_phases.values()) == PHASES
    killed = start(
        variant, EPOCHS, lambda plateau: [plateau, backup(), Kill(epoch, at_end)]
    )
    assert killed is None
    state, phases = start(variant, EPOCHS, lambda plateau: [plateau, backup()])
    first = epoch + 1 if at_end else epoch
    assert phases == {e: PHASES[e] for e in range(first, EPOCHS)}
    assert_same(state, expected_state)


@pytest.mark.usefixtures("interrupted_fit")
def test_killed_fit_is_repeated_in_the_same_process(tmp_path):
    # It raised: when training begins, nothing has been restored.
    def train(*others):
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        plateau = SwitchOnPlateau("loss", patience=1, min_delta=9.0)
        fit(model, 4, [plateau, backup, *others], batches=1)
        return [*optimizer.phase_starts, int(optimizer.iterations)]

    optimizer = make_sgds((None,))
    model = compiled_model(optimizer)
    with pytest.raises(KilledError):
        train(Kill(3))
    assert int(optimizer.phase) == 1
    assert train() == [0, 2, 4]


@pytest.mark.usefixtures("interrupted_fit")
@pytest.mark.parametrize("epoch", [2, 3])
def test_killed_run_resumes_from_a_tensorflow_checkpoint(epoch, tmp_path):
    class Checkpoints(keras.callbacks.Callback):
        """Saves each epoch with TensorFlow, and restores when the run begins."""

        def on_train_begin(self, logs=None):
            # Else the variables that are built later would be restored later.
            self.model.optimizer.build(self.model.trainable_variables)
            checkpoint = tf.train.Checkpoint(model=self.model)
            self.manager = tf.train.CheckpointManager(checkpoint, str(tmp_path), 1)
            self.manager.restore_or_initialize()

        def on_epoch_end(self, epoch, logs=None):
            self.manager.save()

    def around(plateau):
        return [plateau, Checkpoints()]

    expected_state, _ = uninterrupted("best weights")
    killed = start("best weights", EPOCHS, lambda p: [*around(p), Kill(epoch)])
    assert killed is None
    state, phases = start("best weights", EPOCHS, around, initial_epoch=epoch)
    assert phases == {e: PHASES[e] for e in range(epoch, EPOCHS)}
    assert_same(state, expected_state)


@pytest.mark.usefixtures("interrupted_fit")
@pytest.mark.parametrize("epoch", [1, 3, 6])  # the last one in the last phase
def test_resumed_run_warns_if_it_was_saved_before_the_turn(epoch, tmp_path):
    def around(plateau):
        return [keras.callbacks.BackupAndRestore(tmp_path / "backup"), plateau]

    assert start("best weights", EPOCHS, lambda p: [*around(p), Kill(epoch)]) is None
    with pytest.warns(UserWarning, match="Put it before the callback that saves"):
        start("best weights", EPOCHS, around)  # which continues to the end


@pytest.mark.usefixtures("interrupted_fit")
def test_backup_made_without_the_callback_is_watched_from_there(tmp_path):
    def backup(plateau):
        return [keras.callbacks.BackupAndRestore(tmp_path / "backup")]

    assert start("plain", EPOCHS, lambda p: [*backup(p), Kill(2)]) is None
    _, phases = start("plain", EPOCHS, lambda p: [p, *backup(p)])
    assert phases == {2: 0, 3: 0, 4: 1, 5: 1, 6: 1}


def test_loaded_keras_file_starts_anew(tmp_path):
    model = compiled_model(make_sequence([None]), keras.Sequential)
    fit(model, 3, [Script([1.0] * 3), SwitchOnPlateau(patience=3)])
    model.save(tmp_path / "model.keras")
    model = keras.models.load_model(tmp_path / "model.keras")
    recorder = Recorder(model.optimizer)
    # If it continued, the first epoch would be the third without improvement.
    plateau = SwitchOnPlateau(patience=3)
    fit(model, 5, [Script([2.0] * 5), plateau, recorder])
    assert list(recorder.phases.values()) == [0, 0, 0, 1, 1]


# --- notes -------------------------------------------------------------------


@pytest.fixture
def noted():
    """An optimizer that holds notes, and what they are."""
    optimizer = make_sgds((None,))
    callback = SwitchOnPlateau("loss", patience=9, restore_best_weights=True)
    stage = Stage(optimizer, [callback])
    stage.begin_epoch()
    stage.update()
    stage.end_epoch(loss=0.25)
    notes = dict(optimizer.notes)
    assert_same([notes["SwitchOnPlateau/loss/weight/0"]], [stage.weight.numpy()])
    assert 0.25 in notes["SwitchOnPlateau/loss/seen"]
    return optimizer, notes


def _watched():
    """An optimizer that is watched by a callback that has seen nothing yet."""
    optimizer = make_sgds((None,))
    Stage(optimizer, [SwitchOnPlateau("loss", patience=9, restore_best_weights=True)])
    return optimizer


def assert_notes(optimizer, expected):
    assert optimizer.notes.keys() == expected.keys()
    assert_same(list(optimizer.notes.values()), list(expected.values()))


def test_notes_survive_a_tensorflow_checkpoint(noted, tmp_path):
    optimizer, notes = noted
    path = tf.train.Checkpoint(optimizer=optimizer).write(str(tmp_path / "checkpoint"))
    restored = _watched()
    tf.train.Checkpoint(optimizer=restored).read(path).assert_consumed()
    assert_notes(restored, notes)


def test_notes_survive_a_keras_file(noted):
    optimizer, notes = noted
    store = {}
    optimizer.save_own_variables(store)
    restored = _watched()
    restored.load_own_variables(store)
    assert_notes(restored, notes)


def test_notes_on_a_sequence_in_a_sequence_are_saved():
    # The outer one saved its own only.
    def make():
        inner = make_sgds((None,))
        outer = SequentialOptimizer([inner, keras.optimizers.Adam()], [9])
        outer.build([tf.Variable([0.5])])
        inner.notes["note"] = np.zeros(2)
        return inner, outer

    (inner, outer), (inner_restored, outer_restored) = make(), make()
    inner.notes["note"][:] = [1, 2]
    store = {}
    outer.save_own_variables(store)
    outer_restored.load_own_variables(store)
    assert_same([inner_restored.notes["note"]], [np.array([1.0, 2.0])])


def test_notes_are_held_until_the_optimizer_is_built(noted):
    optimizer, notes = noted
    store = {}
    optimizer.save_own_variables(store)
    restored = make_sgds((None,))
    for key, note in notes.items():
        restored.notes[key] = np.zeros_like(note)
    restored.load_own_variables(store)
    restored.build([tf.Variable([0.5])])
    assert_notes(restored, notes)


def test_file_without_notes_empties_them(noted):
    optimizer, _ = noted
    store = {}
    other = make_sgds((None,))
    other.build([tf.Variable([0.5])])
    other.save_own_variables(store)
    assert not any("notes" in key for key in store)
    optimizer.load_own_variables(store)
    assert optimizer.notes == {}


def test_notes_of_a_callback_that_is_not_there_are_dropped(noted, tmp_path):
    # They once stayed in every later file, best weights and all.
    optimizer, _ = noted
    store = {}
    optimizer.save_own_variables(store)
    path = tf.train.Checkpoint(optimizer=optimizer).write(str(tmp_path / "checkpoint"))
    restored = make_sgds((None,))
    restored.build([tf.Variable([0.5])])
    restored.load_own_variables(store)
    assert restored.notes == {}
    tf.train.Checkpoint(optimizer=restored).read(path).assert_consumed()
    assert restored.notes == {}


def test_notes_of_other_weights_are_refused(noted):
    optimizer, _ = noted
    store = {}
    optimizer.save_own_variables(store)
    other = _watched()
    other.notes["SwitchOnPlateau/loss/weight/0"] = np.zeros(7)
    before = weights_of(other.variables)
    with pytest.raises(ValueError, match="What a callback noted"):
        other.load_own_variables(store)
    assert_same(weights_of(other.variables), before)


def test_refused_file_leaves_the_notes(noted):
    optimizer, notes = noted
    store = {}
    other = SequentialOptimizer([keras.optimizers.Adam(), keras.optimizers.SGD()], [2])
    other.build([tf.Variable([0.5])])
    other.save_own_variables(store)
    with pytest.raises(ValueError, match="another class of child 0"):
        optimizer.load_own_variables(store)
    assert_notes(optimizer, notes)


def test_notes_are_no_part_of_the_config(noted):
    optimizer, _ = noted
    assert "Plateau" not in json.dumps(optimizer.get_config())
