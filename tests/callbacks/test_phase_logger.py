"""PhaseLogger prints each switch at its iteration, and logs which child ran."""

import csv
import itertools
import random
import re
import types

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import PhaseLogger, SequentialOptimizer
from tests.helpers.callbacks import GAN, Kill, KilledError, Stage, compiled_model, fit
from tests.helpers.callbacks import make_sequence as make_training_sequence

RATES = {"a": 0.1, "b": 0.01, "c": 0.001, "d": 0.5}


def make_sequence(names, boundaries, **kwargs):
    """Returns a sequence with a child for each letter; a repeated one comes back."""
    children = {
        name: keras.optimizers.SGD(rate, name=name) for name, rate in RATES.items()
    }
    return SequentialOptimizer(
        [children[name] for name in names], list(boundaries), **kwargs
    )


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


def phases_by_hand(updates, boundaries, advance_at=()):
    """Returns the phase of each update, found by going through them one by one.

    Args:
        advance_at: for each call of `advance()`, the iteration before which it comes.
    """
    phases, phase = [], 0
    for t in range(updates):
        while phase < len(boundaries) and boundaries[phase] is not None:
            if t < boundaries[phase]:
                break
            phase += 1
        phase = min(phase + advance_at.count(t), len(boundaries))
        phases.append(phase)
    return phases


def lines_by_hand(names, phases):
    """Returns what is to be printed for updates in these phases."""
    return [
        f"iteration {t}: {names[before]} -> {names[after]}"
        for t, (before, after) in enumerate(itertools.pairwise(phases), start=1)
        if before != after
    ]


class AdvanceInGraph(keras.Sequential):
    """Calls `advance()` in its train step before the updates in `advance_at`."""

    advance_at = ()

    def train_step(self, data):
        optimizer = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        for t in self.advance_at:
            tf.cond(
                tf.equal(optimizer.iterations, t),
                optimizer.advance,
                lambda: None,
            )
        return super().train_step(data)


# --- the lines ---------------------------------------------------------------


def random_schedule(rng, updates):
    """Returns names and boundaries, and the iterations before which to `advance()`."""
    integers = sorted(rng.sample(range(1, updates + 3), rng.randint(0, 3)))
    calls = rng.randint(0 if integers else 1, 2)
    names = [rng.choice("ab")]
    for _ in integers:
        names.append(rng.choice([name for name in "abc" if name != names[-1]]))
    for _ in range(calls):
        names.append(rng.choice([name for name in "abcd" if name != names[-1]]))
    boundaries = integers + [None] * (len(names) - 1 - len(integers))
    first = integers[-1] if integers else 0
    advance_at = sorted(rng.randint(first, updates + 2) for _ in range(calls))
    return "".join(names), boundaries, advance_at


@pytest.mark.parametrize("seed", range(30))
def test_prints_each_switch_at_its_iteration(seed, capsys):
    rng = random.Random(seed)
    updates = rng.randint(8, 18)
    names, boundaries, advance_at = random_schedule(rng, updates)
    optimizer = make_sequence(names, boundaries)
    stage = Stage(optimizer, [PhaseLogger()])
    made = 0
    while made < updates:
        stage.begin_epoch()
        for _ in range(rng.randint(1, 3)):
            for _ in range(rng.randint(0, 6)):  # the steps of one execution
                for _ in range(advance_at.count(made)):
                    optimizer.advance()
                stage.update()
                made += 1
            stage.end_batch()
        logs = stage.end_epoch()
        if made:
            phases = phases_by_hand(made, boundaries, advance_at)
            assert logs["phase"] == phases[-1]
    expected = lines_by_hand(names, phases)
    assert lines_of(capsys) == expected, (names, boundaries, advance_at)


FITS = {
    # name: batches in an epoch, wrapped, settings of compile
    "one by one": (3, False, {"jit_compile": False}),
    "steps_per_execution": (4, False, {"jit_compile": True, "steps_per_execution": 4}),
    "wrapped": (4, True, {"jit_compile": False, "steps_per_execution": 2}),
}


@pytest.mark.parametrize("setting", FITS)
@pytest.mark.parametrize(
    ("names", "boundaries", "advance_at"),
    [
        # Two switches in a window of four, and the child of the first comes back.
        ("aba", [5, 7], ()),
        ("abc", [None, None], (2, 7)),
    ],
)
def test_fit_prints_each_switch_at_its_iteration(
    setting, names, boundaries, advance_at, capsys
):
    batches, is_wrapped, kwargs = FITS[setting]
    optimizer = make_sequence(names, boundaries)
    if is_wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0)
    model = compiled_model(optimizer, AdvanceInGraph, **kwargs)
    model.advance_at = advance_at
    history = fit(model, 3, [PhaseLogger()], batches=batches).history
    phases = phases_by_hand(3 * batches, boundaries, advance_at)
    assert lines_of(capsys) == lines_by_hand(names, phases)
    assert history["phase"] == phases[batches - 1 :: batches]
    rates = [RATES[names[phase]] for phase in history["phase"]]
    assert history["learning_rate"] == pytest.approx(rates)


def test_skipped_steps_of_a_loss_scale_are_no_iterations(capsys):
    sequence = make_sequence("ab", [3])
    optimizer = keras.optimizers.LossScaleOptimizer(sequence)
    stage = Stage(optimizer, [PhaseLogger()])
    stage.begin_epoch()
    phases = []
    for gradient in (1.0, np.inf, np.inf, 1.0, 1.0, np.nan, 1.0):
        stage.update(gradient)
        stage.end_batch()
        phases.append(stage.end_epoch()["phase"])
    # Only the last step is update 3.
    assert phases == [0, 0, 0, 0, 0, 0, 1]
    assert lines_of(capsys) == ["iteration 3: a -> b"]


def test_a_window_of_gradient_accumulation_is_one_iteration(capsys):
    optimizer = make_sequence("ab", [2], gradient_accumulation_steps=3)
    stage = Stage(optimizer, [PhaseLogger(per_batch=True)])
    stage.begin_epoch()
    phases = []
    for _ in range(10):
        stage.update()
        phases.append(stage.end_batch()["phase"])
    # Step 8 is the last of the third window.
    assert phases == [0] * 8 + [1] * 2
    assert lines_of(capsys) == ["iteration 2: a -> b"]


def test_phase_without_an_update_is_passed_over(capsys):
    optimizer = make_sequence("abc", [None, None])
    stage = Stage(optimizer, [PhaseLogger()])
    stage.begin_epoch()
    for t in range(4):
        if t == 3:
            optimizer.advance()
            optimizer.advance()
        stage.update()
        stage.end_batch()
    assert lines_of(capsys) == ["iteration 3: a -> c"]


@pytest.mark.parametrize("steps", [1, 9])
def test_child_that_comes_back_by_advance_is_exact(steps, capsys):
    # When all happened in one execution, the children's counters could not tell.
    optimizer = make_sequence("abab", [None] * 3)
    stage = Stage(optimizer, [PhaseLogger()])
    stage.begin_epoch()
    for t in range(9):
        if t in (2, 3, 7):
            optimizer.advance()
        stage.update()
        if (t + 1) % steps == 0:
            stage.end_batch()
    expected = ["iteration 2: a -> b", "iteration 3: b -> a", "iteration 7: a -> b"]
    assert lines_of(capsys) == expected
    assert optimizer.phase_starts.tolist() == [0, 2, 3, 7]


@pytest.mark.parametrize("before", ["fit", "the first update"])
def test_phase_that_is_ended_before_the_first_update(before, capsys):
    optimizer = make_sequence("ab", [None])
    stage = Stage(optimizer, [PhaseLogger()])
    if before == "fit":
        optimizer.advance()
    stage.begin_epoch()
    if before == "the first update":
        optimizer.advance()
    stage.update()
    stage.end_batch()
    assert lines_of(capsys) == []
    assert optimizer.phase_starts.tolist() == [-1, 0]


@pytest.mark.parametrize("hook", ["end_batch", "end_epoch"])
def test_loop_without_on_epoch_begin_prints_its_switches(hook, capsys):
    # A custom loop that left it out once got no lines at all, and no warning.
    optimizer = make_sequence("ab", [2])
    stage = Stage(optimizer, [PhaseLogger()])
    for _ in range(3):
        stage.update()
        getattr(stage, hook)()
    assert lines_of(capsys) == ["iteration 2: a -> b"]


def test_switch_is_printed_if_the_epoch_ran_out_of_data(capsys):
    # Keras then leaves out the end of the batch.
    stage = Stage(make_sequence("ab", [2]), [PhaseLogger()])
    stage.begin_epoch()
    for _ in range(3):
        stage.update()
    stage.end_epoch()
    assert lines_of(capsys) == ["iteration 2: a -> b"]


def test_nothing_is_printed_without_a_switch_or_verbose(capsys):
    for boundary, verbose in ((9, 1), (2, 0)):
        stage = Stage(make_sequence("ab", [boundary]), [PhaseLogger(verbose=verbose)])
        stage.begin_epoch()
        for _ in range(4):
            stage.update()
            stage.end_batch()
        logs = stage.end_epoch()
        assert logs["phase"] == int(boundary == 2)
    assert capsys.readouterr().out == ""


def test_second_fit_prints_only_what_is_new(capsys):
    model = compiled_model(make_sequence("abc", [2, 6]))
    logger = PhaseLogger()
    fit(model, 1, [logger], batches=2)
    assert lines_of(capsys) == []
    # Ends exactly at the boundary, so the next one starts with the switch.
    fit(model, 1, [logger], batches=3)
    assert lines_of(capsys) == ["iteration 2: a -> b"]
    fit(model, 1, [PhaseLogger()], batches=3)
    assert lines_of(capsys) == ["iteration 6: b -> c"]


# --- resumed runs ------------------------------------------------------------


def _resumable(wrapped):
    # Boundaries inside of epoch 0, at the end of epoch 1, and inside of epoch 2.
    optimizer = make_training_sequence([1, 4, 5])
    if wrapped:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=2.0)
    return compiled_model(optimizer)


@pytest.mark.usefixtures("interrupted_fit")
@pytest.mark.parametrize(("epoch", "wrapped"), [(0, False), (2, True), (3, False)])
def test_resumed_run_prints_no_switch_that_was_before(epoch, wrapped, tmp_path, capsys):
    def run(*callbacks):
        keras.utils.clear_session(free_memory=False)
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        # Behind and in front of it: the order makes no difference.
        model = _resumable(wrapped)
        fit(model, 4, [PhaseLogger(), backup, PhaseLogger(), *callbacks])
        return lines_of(capsys)

    with pytest.raises(KilledError):
        run(Kill(epoch))
    capsys.readouterr()
    expected = {
        0: ["iteration 1: sgd -> adam"],
        2: ["iteration 4: adam -> rmsprop", "iteration 5: rmsprop -> lion"],
    }
    lines = [line for e in range(epoch, 4) for line in expected.get(e, [])]
    assert run() == [line for line in lines for _ in range(2)]


@pytest.mark.parametrize(
    ("names", "saved", "edited", "expected"),
    [
        ("ab", [2], [5], ["iteration 3: b -> a", "iteration 5: a -> b"]),
        ("aba", [8, 9], [1, 2], ["iteration 3: a -> a"]),
    ],
    ids=["raised", "lowered"],
)
def test_boundaries_edited_before_a_resume(names, saved, edited, expected, capsys):
    optimizer = make_sequence(names, saved)
    optimizer.build([tf.Variable([0.5])])
    for _ in range(3):
        optimizer.apply([tf.constant([1.0])])
    store = {}
    optimizer.save_own_variables(store)
    resumed = make_sequence(names, edited)
    stage = Stage(resumed, [PhaseLogger()])
    resumed.load_own_variables(store)
    stage.begin_epoch()
    for _ in range(3):
        stage.update()
        stage.end_batch()
    assert lines_of(capsys) == expected


# --- the logs ----------------------------------------------------------------


def test_epoch_shows_the_phase_and_rate_of_its_last_update():
    # Epochs end after 2, 4, 6 and 8 updates: at a boundary, and inside of phases.
    model = compiled_model(make_sequence("abc", [4, 5]))
    history = fit(model, 4, [PhaseLogger(verbose=0)]).history
    assert history["phase"] == [0, 0, 2, 2]
    assert history["learning_rate"] == pytest.approx([0.1, 0.1, 0.001, 0.001])


def test_learning_rate_follows_the_schedule_of_the_child():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    optimizer = SequentialOptimizer(
        [keras.optimizers.SGD(0.1), keras.optimizers.Adam(schedule)], [3]
    )
    stage = Stage(optimizer, [PhaseLogger(verbose=0)])
    rates = []
    for _ in range(6):
        stage.begin_epoch()
        stage.update()
        rates.append(stage.end_epoch()["learning_rate"])
    # As Keras' own callbacks log it: of the child's next update.
    expected = [0.1] * 3 + [0.5 * 0.5**n for n in (1, 2, 3)]
    assert rates == pytest.approx(expected)


def test_learning_rate_that_a_callback_sets_is_logged():
    def halve(epoch, rate):
        return rate / 2

    model = compiled_model(make_sequence("ab", [4]))
    scheduler = keras.callbacks.LearningRateScheduler(halve)
    history = fit(model, 4, [scheduler, PhaseLogger(verbose=0)]).history
    assert history["phase"] == [0, 0, 1, 1]
    assert history["learning_rate"] == pytest.approx([0.05, 0.025, 0.005, 0.0025])


class BatchLogs(keras.callbacks.Callback):
    """Remembers the logs of each batch."""

    def on_train_begin(self, logs=None):
        self.logs = []

    def on_train_batch_end(self, batch, logs=None):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("per_batch", [True, False])
def test_batches_show_the_phase_on_request(per_batch):
    model = compiled_model(make_sequence("abc", [1, 3]))
    batch_logs = BatchLogs()
    logger = PhaseLogger(per_batch=per_batch, verbose=0)
    history = fit(model, 2, [logger, batch_logs], batches=3).history
    if per_batch:
        assert [logs["phase"] for logs in batch_logs.logs] == [0, 1, 1, 2, 2, 2]
        rates = [logs["learning_rate"] for logs in batch_logs.logs]
        assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001, 0.001, 0.001])
    else:
        assert {key for logs in batch_logs.logs for key in logs} == {"loss"}
    assert history["phase"] == [1, 2]
    # What was logged before is as without the callback.
    plain = compiled_model(make_sequence("abc", [1, 3]))
    assert fit(plain, 2, [], batches=3).history["loss"] == history["loss"]


def test_csv_logger_has_the_columns(tmp_path):
    path = tmp_path / "log.csv"
    model = compiled_model(make_sequence("ab", [3]))
    callbacks = [PhaseLogger(verbose=0), keras.callbacks.CSVLogger(path)]
    history = fit(model, 3, callbacks).history
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == ["0", "1", "1"]
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates == pytest.approx([0.1, 0.01, 0.01])
    assert [float(row["loss"]) for row in rows] == history["loss"]


def test_progress_bar_shows_both_and_the_line_stands_alone(capsys):
    model = compiled_model(make_sequence("ab", [3]))
    keras.utils.enable_interactive_logging()
    fit(model, 2, [PhaseLogger()], verbose=1)
    out = capsys.readouterr().out
    assert "\niteration 3: a -> b\n" in out
    # The bar of an epoch is overwritten again and again; its end is final.
    epochs = re.split(r"Epoch \d/2", out)[1:]
    ends = [re.split(r"[\r\x08]", epoch.rstrip())[-1] for epoch in epochs]
    for end, phase, rate in zip(ends, (0.0, 1.0), (0.1, 0.01), strict=True):
        assert float(re.search(r"phase: (\S+)", end).group(1)) == phase
        assert float(re.search(r"learning_rate: (\S+)", end).group(1)) == rate


def test_line_for_each_epoch_shows_both(capsys):
    fit(compiled_model(make_sequence("ab", [3])), 2, [PhaseLogger()], verbose=2)
    out = capsys.readouterr().out
    assert re.findall(r"phase: (\d)\.0", out) == ["0", "1"]
    assert "iteration 3: a -> b\n" in out


def test_dropped_phase_is_shown_as_the_one_that_continues():
    optimizer = make_sequence("abc", [1, 2])
    optimizer.build([tf.Variable([0.5])])
    for _ in range(3):
        optimizer.apply([tf.constant([1.0])])
    store = {}
    optimizer.save_own_variables(store)
    shorter = make_sequence("ab", [1])
    stage = Stage(shorter, [PhaseLogger()])
    with pytest.warns(UserWarning, match="is loaded into one"):
        shorter.load_own_variables(store)
    stage.begin_epoch()
    logs = stage.end_epoch()
    rate = pytest.approx(0.01)
    assert logs == {"phase": 1, "iterations": 3, "learning_rate": rate}


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"), reason="this Keras has none"
)
def test_child_with_several_learning_rates_shows_nan():
    # Without a value for each epoch, the column could not be plotted, nor read from a
    # CSV file. TensorBoard and ReduceLROnPlateau raised: they ask for the rate.
    several = keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            keras.optimizers.SGD(0.1), {"kernel": keras.optimizers.SGD(0.2)}
        )
    )
    optimizer = SequentialOptimizer([several, keras.optimizers.SGD(0.3)], [2])
    callbacks = [keras.callbacks.ReduceLROnPlateau("loss"), PhaseLogger(verbose=0)]
    history = fit(compiled_model(optimizer), 2, callbacks).history
    assert history["phase"] == [0, 1]
    np.testing.assert_allclose(history["learning_rate"], [np.nan, 0.3])


# --- several optimizers ------------------------------------------------------


def test_gan_logs_each_of_its_sequences(capsys):
    # Its `optimizer` is Keras' default, so PhaseLogger once refused the model. Two of
    # them would have overwritten each other's logs.
    generator = make_sequence("ab", [3], name="generator")
    discriminator = make_sequence("ca", [1], name="discriminator")
    scaled = keras.optimizers.LossScaleOptimizer(discriminator, initial_scale=1.0)
    loggers = [PhaseLogger(optimizer=generator), PhaseLogger(optimizer=scaled)]
    history = fit(GAN(generator, scaled), 2, loggers).history
    assert history["generator_phase"] == [0, 1]
    assert history["discriminator_phase"] == [1, 1]
    assert history["discriminator_iterations"] == [2, 4]
    assert history["generator_learning_rate"] == pytest.approx([0.1, 0.01])
    assert not {"phase", "learning_rate", "iterations"} & history.keys()
    assert lines_of(capsys) == [
        "iteration 1 of discriminator: c -> a",
        "iteration 3 of generator: a -> b",
    ]


KEPT = {
    # name: attributes of a model, made from the sequence
    "Keras' default beside it": lambda one: {"optimizer": "sgd", "g_optimizer": one},
    "None beside it": lambda one: {"optimizer": None, "g_optimizer": one},
    "no `optimizer`": lambda one: {"g_optimizer": one},
    "two names": lambda one: {"g_optimizer": one, "by_name": {"g": one}},
    "a list": lambda one: {"all": ["sgd", one, keras.optimizers.SGD()]},
    "a wrapper": lambda one: {"g": keras.optimizers.LossScaleOptimizer(one)},
    "two, one of the model": lambda one: {
        "optimizer": one,
        "d": make_sequence("c", []),
    },
}


@pytest.mark.parametrize("kept", KEPT)
def test_only_sequence_of_a_model_is_found(kept):
    sequence = make_sequence("ab", [2])
    attributes = KEPT[kept](sequence)
    logger = PhaseLogger()
    logger.set_model(types.SimpleNamespace(**attributes))
    logs = {}
    logger.on_epoch_end(0, logs)
    assert logs == {"phase": 0, "iterations": 0, "learning_rate": pytest.approx(0.1)}


def test_gan_with_one_sequence_needs_no_argument():
    gan = GAN(make_sequence("ab", [3]), keras.optimizers.SGD())
    assert fit(gan, 2, [PhaseLogger(verbose=0)]).history["phase"] == [0, 1]


def test_several_sequences_to_choose_from_are_an_error():
    gan = GAN(make_sequence("ab", [3]), make_sequence("ab", [3]))
    with pytest.raises(
        ValueError, match=r"2 of them.*`PhaseLogger\(optimizer=\.\.\.\)"
    ):
        fit(gan, 1, [PhaseLogger()])


def test_no_sequence_is_an_error_when_fit_begins():
    model = compiled_model(keras.optimizers.SGD(0.1))
    with pytest.raises(ValueError, match=r"`PhaseLogger` needs .* 0 of them.*Compile"):
        fit(model, 1, [PhaseLogger()])
    assert model.train_steps == 0
