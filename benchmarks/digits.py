"""Trains a small network on handwritten digits, first with Adam, then with SGD.

    python -m benchmarks.digits            # about a minute on two cores
    python -m benchmarks.digits --quick    # seconds, but too short to compare

Shows that the switch happens inside one compiled train step, that a run saved before
the switch goes on identically, how the sequence compares with either optimizer alone,
and what a step costs. The digits come with scikit-learn: nothing is downloaded.
"""

import argparse
import itertools
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.harness.checks import CheckError
from benchmarks.harness.terminal import say, without_info_logs
from benchmarks.workloads.handwritten_digits import (
    BATCH,
    LOSS,
    TEST_IMAGES,
    Digits,
    make_model,
)
from sequential_optimizer import SequentialOptimizer, plot_history

PICTURE = Path(__file__).parent / "results" / "digits.png"
# Of weights after a few updates: XLA may add up the same numbers in another order, and
# the wrong child would be off by more than this after its first update.
TOLERANCE = 5e-4


@dataclass(frozen=True)
class Settings:
    """How long everything takes; `steps`, `boundary` and `save_at` count updates."""

    steps: int = 1000
    boundary: int = 500
    save_at: int = 400
    seeds: int = 8
    rounds: int = 60
    block: int = 20


QUICK = Settings(steps=60, boundary=40, save_at=30, seeds=2, rounds=3, block=5)


# --- model and train step ----------------------------------------------------


def first_weights(seed: int) -> list[np.ndarray]:
    """Returns the weights that training starts from."""
    keras.utils.set_random_seed(seed)
    return make_model().get_weights()


def make_adam() -> keras.optimizers.Optimizer:
    """Returns Adam with the learning rate that Keras gives it."""
    return keras.optimizers.Adam()


def make_sgd() -> keras.optimizers.Optimizer:
    """Returns SGD with the learning rate that Keras gives it."""
    return keras.optimizers.SGD(momentum=0.9)


class Trainer(tf.Module):
    """A model, an optimizer and the compiled train step of the two.

    A `tf.Module`, so that TensorFlow can save all of it, train step included.
    """

    def __init__(self, model: keras.Model, optimizer: keras.optimizers.Optimizer):
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        optimizer.build(model.trainable_variables)

    @tf.function(
        input_signature=[
            tf.TensorSpec((BATCH, 8, 8, 1), tf.float32),
            tf.TensorSpec((BATCH,), tf.int32),
        ],
        jit_compile=True,
    )
    def train_step(self, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        """Makes one update and returns the loss before it."""
        with tf.GradientTape() as tape:
            loss = LOSS(labels, self.model(images, training=True))
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    @tf.function(input_signature=[])
    def position(self) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the iterations and the phase of a SequentialOptimizer."""
        return tf.identity(self.optimizer.iterations), self.optimizer.phase

    @tf.function(input_signature=[])
    def state(self) -> list[tf.Tensor]:
        """Returns the weights, then the optimizer variables."""
        variables = [*self.model.variables, *self.optimizer.variables]
        return [tf.identity(variable.value) for variable in variables]


class Contestant:
    """A row of the table: an optimizer with its trainer, and how it did.

    Each of its runs starts from the weights it is given, without a new trace.
    """

    def __init__(self, name: str, optimizer: keras.optimizers.Optimizer):
        self.name = name
        self.optimizer = optimizer
        self.model = make_model()
        # What saves the model saves the optimizer that it was compiled with.
        self.model.compile(optimizer=optimizer, loss=LOSS)
        self.trainer = Trainer(self.model, optimizer)
        self._fresh = [np.array(v.numpy()) for v in optimizer.variables]
        self.accuracy: list[float] = []
        self.loss: list[float] = []

    def restart(self, weights: list[np.ndarray]) -> None:
        """Sets the weights, and the optimizer variables to their first values."""
        self.model.set_weights(weights)
        for variable, value in zip(self.optimizer.variables, self._fresh, strict=True):
            variable.assign(value)

    def evaluate(self, digits: Digits) -> None:
        """Notes the accuracy, in percent, and the loss on the test images."""
        images, labels = digits.test
        logits = self.model(images, training=False)
        right = np.argmax(logits, axis=-1) == labels
        self.accuracy.append(100 * float(np.mean(right)))
        self.loss.append(float(LOSS(labels, logits)))


def train(
    train_step: Callable[..., Any],
    digits: Digits,
    updates: range,
    after_update: Callable[[int, float], None] = lambda iterations, loss: None,
) -> None:
    """Makes the `updates`, and calls `after_update` after each."""
    for update in updates:
        loss = float(train_step(*digits.batch(update)))
        after_update(update + 1, loss)


# --- one run: the switch, saving and resuming --------------------------------


class Progress:
    """A progress bar that lines of text may interrupt."""

    def __init__(self, total: int, unit: str):
        # A bar that cannot redraw itself, as in a file, is shown at its end only.
        self._redraws = sys.stdout.isatty()
        self._bar = keras.utils.Progbar(
            total,
            verbose=1 if self._redraws else 2,
            stateful_metrics=["loss"],
            unit_name=unit,
        )

    def update(self, done: int, **values: float) -> None:
        """Moves the bar to `done` and shows the `values` beside it."""
        self._bar.update(done, values=list(values.items()))

    def say(self, text: str) -> None:
        """Prints a line in the place of the bar, which goes on below it."""
        say(f"\r\x1b[K{text}" if self._redraws else text)


class Curves:
    """The loss of a run, epoch by epoch, in the columns that `plot_history` takes."""

    def __init__(self, contestant: Contestant, digits: Digits):
        self.columns: dict[str, list[float]] = {
            "loss": [],
            "test loss": [],
            "phase": [],
        }
        self._contestant = contestant
        self._digits = digits
        self._losses: list[float] = []

    def add(self, loss: float, phase: int) -> None:
        """Adds the loss of an update, and the phase that it ran in."""
        self._losses.append(loss)
        if len(self._losses) * BATCH < len(self._digits.train[0]):
            return
        images, labels = self._digits.test
        test_loss = LOSS(labels, self._contestant.model(images, training=False))
        self.columns["loss"].append(float(np.mean(self._losses)))
        self.columns["test loss"].append(float(test_loss))
        self.columns["phase"].append(phase)
        self._losses.clear()

    def draw(self, path: Path) -> None:
        """Writes the picture."""
        names = [child.name for child in self._contestant.optimizer.children]
        axes = plot_history(self.columns, metrics=("loss", "test loss"), names=names)
        axes.set_yscale("log")
        path.parent.mkdir(parents=True, exist_ok=True)
        axes.figure.savefig(path, dpi=120)


def run_and_save(
    contestant: Contestant, digits: Digits, settings: Settings, folder: Path
) -> Curves:
    """Trains through the switch, and in mid-run saves the run in two ways."""
    optimizer, trainer = contestant.optimizer, contestant.trainer
    progress = Progress(settings.steps, "step")
    curves = Curves(contestant, digits)
    phase = int(optimizer.phase)

    def after_update(iterations: int, loss: float) -> None:
        nonlocal phase
        curves.add(loss, phase)
        progress.update(iterations, loss=loss)
        before, phase = phase, int(optimizer.phase)
        if phase != before:
            names = [child.name for child in optimizer.children]
            progress.say(f"iteration {iterations}: {names[before]} -> {names[phase]}")

    train(trainer.train_step, digits, range(settings.save_at), after_update)
    trainer.model.save(folder / "digits.keras")
    # TensorFlow traces what it saves once more. A trainer of its own for that, so that
    # the count of this one says how often training traced.
    exported = Trainer(trainer.model, optimizer)
    tf.saved_model.save(exported, str(folder / "saved_model"))
    progress.say(f"iteration {settings.save_at}: saved to .keras and to a SavedModel")
    rest = range(settings.save_at, settings.steps)
    train(trainer.train_step, digits, rest, after_update)
    return curves


def load_keras(folder: Path) -> Trainer:
    """Returns the run that `Model.save` wrote; its train step is traced anew."""
    model = keras.models.load_model(folder / "digits.keras")
    return Trainer(model, model.optimizer)


def load_saved_model(folder: Path) -> Any:
    """Returns the run that `tf.saved_model.save` wrote, train step included."""
    # With any Keras optimizer TensorFlow warns here that the gradient of a gradient
    # was not saved, which no training step asks for.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return tf.saved_model.load(str(folder / "saved_model"))
    finally:
        logger.setLevel(level)


def count_different(actual: Sequence[Any], expected: Sequence[Any]) -> int:
    """Returns how many tensors are missing or not the same, bit by bit."""

    def bits(tensor: Any) -> tuple[Any, ...]:
        array = np.asarray(tensor)
        return array.dtype, array.shape, array.tobytes()

    pairs = itertools.zip_longest(actual, expected)
    return sum(bits(a) != bits(b) for a, b in pairs)


def check_resume(
    kind: str, resumed: Any, digits: Digits, settings: Settings, expected: list
) -> None:
    """Goes on with a loaded run to the end, and compares where it arrives.

    Raises:
        CheckError: if one bit of the weights or optimizer variables is different.
    """
    first, first_phase = (int(n) for n in resumed.position())
    train(resumed.train_step, digits, range(first, settings.steps))
    last, last_phase = (int(n) for n in resumed.position())
    unlike = count_different(resumed.state(), expected)
    way = f"iteration {first} to {last}, phase {first_phase} to {last_phase}"
    say(f"{kind:<11} {way}: {'DIFFERENT' if unlike else 'identical'}")
    if unlike:
        raise CheckError(
            f"the run resumed from {kind} is not identical to the uninterrupted one: "
            f"{unlike} of {len(expected)} variables differ."
        )
    if (first_phase, last_phase) != (0, 1):
        raise CheckError(f"the run resumed from {kind} did not go through the switch.")


def check_graph(trainer: Trainer, digits: Digits) -> None:
    """Prints how often the train step was traced, and checks that it was once.

    Raises:
        CheckError: if it was traced again, or if its graph holds no switch.
    """
    traces = trainer.train_step.experimental_get_tracing_count()
    compiled = trainer.train_step.experimental_get_compiler_ir(*digits.batch(0))
    switches = compiled(stage="hlo").count(" conditional(")
    say(f"train step: traced {traces}x, {switches} conditional in its XLA graph")
    if (traces, switches) != (1, 1):
        raise CheckError("the train step is not one graph with one switch in it.")


# --- several runs, and the time of a step ------------------------------------

Key = tuple[str, int]  # name of a row, phase


def run_seeds(contestants: list[Contestant], settings: Settings) -> None:
    """Trains and evaluates everything that was not yet, with each seed."""
    runs = [
        (contestant, seed)
        for seed in range(settings.seeds)
        for contestant in contestants
        if len(contestant.accuracy) <= seed
    ]
    progress = Progress(len(runs), "run")
    for done, (contestant, seed) in enumerate(runs):
        digits = Digits.load(seed, settings.steps)
        contestant.restart(first_weights(seed))
        train(contestant.trainer.train_step, digits, range(settings.steps))
        contestant.evaluate(digits)
        progress.update(done + 1)


def time_block(
    contestant: Contestant,
    phase: int,
    weights: list[np.ndarray],
    batches: Sequence[tuple[tf.Tensor, tf.Tensor]],
) -> tuple[float, np.ndarray]:
    """Returns the median seconds of a step, and the weights after all of them.

    Args:
        contestant: what is timed, starting anew.
        phase: phase of a SequentialOptimizer, 0 for a plain optimizer.
        weights: the weights to start from.
        batches: list with one batch a step.
    """
    contestant.restart(weights)
    for _ in range(phase):
        contestant.optimizer.advance()
    seconds = []
    for batch in batches:
        start = time.perf_counter()
        # Reading the loss waits for the end of the step.
        float(contestant.trainer.train_step(*batch))
        seconds.append(time.perf_counter() - start)
    after = [weight.ravel() for weight in contestant.model.get_weights()]
    return float(np.median(seconds)), np.concatenate(after)


def time_steps(rows: list[Contestant], settings: Settings) -> dict[Key, np.ndarray]:
    """Times both phases of the sequence beside their plain optimizers.

    In every round each program makes the same updates from the same weights, in a
    random order. The plain optimizers do so twice, which shows how far apart two
    equal programs are.

    Returns:
        The seconds of a step, one entry a round, by name of the row and phase. The
        name of the plain optimizers' other time is "plain".
    """
    *alone, sequence = rows
    programs: dict[Key, tuple[Contestant, int]] = {}
    for k, row in enumerate(alone):
        programs["plain", k] = (row, 0)
        programs[row.name, k] = (row, 0)
        programs[sequence.name, k] = (sequence, k)
    weights, digits = first_weights(0), Digits.load(0, settings.block)
    batches = [digits.batch(update) for update in range(settings.block)]
    rng = np.random.default_rng(0)
    progress = Progress(settings.rounds, "round")
    seconds: dict[Key, list[float]] = {key: [] for key in programs}
    for done in range(settings.rounds):
        results = {}
        for i in rng.permutation(len(programs)):
            key, (row, phase) = list(programs.items())[i]
            taken, results[key] = time_block(row, phase, weights, batches)
            seconds[key].append(taken)
        check_same_updates(results)
        progress.update(done + 1)
    return {key: np.array(values) for key, values in seconds.items()}


def check_same_updates(results: dict[Key, np.ndarray]) -> None:
    """Raises CheckError if a timed program did not do what its plain one did."""
    for (name, phase), weights in results.items():
        off = float(np.max(np.abs(weights - results["plain", phase])))
        if not off <= TOLERANCE:
            raise CheckError(
                f"{name} in phase {phase}: the timed updates are off by {off}."
            )


# --- the table ---------------------------------------------------------------


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """Returns the mean and the standard deviation as text."""
    return f"{np.mean(values):.{digits}f} +- {np.std(values, ddof=1):.{digits}f}"


def ratio_and_spread(
    row: Contestant, phase: int, seconds: dict[Key, np.ndarray]
) -> str:
    """Returns the median and the quartiles of a step over a plain step as text."""
    if (row.name, phase) not in seconds:
        return "-"
    ratios = seconds[row.name, phase] / seconds["plain", phase]
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def table(rows: list[Contestant], seconds: dict[Key, np.ndarray]) -> str:
    """Returns the table as text, one line a contestant."""
    form = "{:<11}  {:<15}  {:<16}  {:<19}  {:<19}"
    lines = [
        form.format(
            "", "test accuracy", "test loss", "step with Adam", "step with SGD"
        ),
        form.format("", "%", "", "over plain Adam's", "over plain SGD's"),
    ]
    for row in rows:
        accuracy, loss = mean_and_spread(row.accuracy, 2), mean_and_spread(row.loss, 4)
        steps = [ratio_and_spread(row, phase, seconds) for phase in range(2)]
        lines.append(form.format(row.name, accuracy, loss, *steps))
    return "\n".join(line.rstrip() for line in lines)


def notes(
    rows: list[Contestant], seconds: dict[Key, np.ndarray], settings: Settings
) -> str:
    """Returns what a reader has to know about the numbers in the table."""
    *alone, sequence = rows
    adam, sgd = (row.optimizer for row in alone)
    ms = [1000 * np.median(seconds["plain", phase]) for phase in range(2)]
    leads = [
        mean_and_spread(np.subtract(sequence.accuracy, row.accuracy), 2)
        for row in alone
    ]
    return "\n".join(
        [
            f"Accuracy and loss on {TEST_IMAGES} test images: mean +- standard "
            f"deviation over {settings.seeds} seeds.",
            "A seed sets the split, the first weights and the batches, for all rows.",
            f"Sequence minus Adam in accuracy, seed by seed: {leads[0]}; "
            f"minus SGD: {leads[1]}.",
            f"{settings.steps} updates of {BATCH} images. In the sequence Adam makes "
            f"the first {settings.boundary}.",
            f"Learning rates: Adam {float(adam.learning_rate):g}, "
            f"SGD {float(sgd.learning_rate):g} (momentum {sgd.momentum:g}). "
            "They are Keras' defaults, not tuned.",
            f"Steps: plain Adam's take {ms[0]:.2f} ms, plain SGD's {ms[1]:.2f} ms. The "
            "ratios are median (quartiles)",
            f"of {settings.rounds} rounds. Adam alone and SGD alone are timed against "
            "themselves: that is noise.",
        ]
    )


# --- the command -------------------------------------------------------------


def make_contestants(settings: Settings) -> list[Contestant]:
    """Returns Adam alone, SGD alone and the sequence, with their steps compiled."""
    sequence = SequentialOptimizer([make_adam(), make_sgd()], [settings.boundary])
    contestants = [
        Contestant("Adam alone", make_adam()),
        Contestant("SGD alone", make_sgd()),
        Contestant("Adam -> SGD", sequence),
    ]
    batch = Digits.load(seed=0, steps=1).batch(0)
    with without_info_logs():
        for contestant in contestants:
            contestant.trainer.train_step(*batch)
    return contestants


def show_one_run(sequence: Contestant, settings: Settings) -> Curves:
    """Runs the sequence once, saves it before the switch and resumes it twice."""
    digits = Digits.load(seed=0, steps=settings.steps)
    sequence.restart(first_weights(0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        curves = run_and_save(sequence, digits, settings, folder)
        expected = sequence.trainer.state()
        sequence.evaluate(digits)
        say(f"loading both; comparing each bit of {len(expected)} variables at the end")
        for kind, load in ((".keras", load_keras), ("SavedModel", load_saved_model)):
            check_resume(kind, load(folder), digits, settings, expected)
    return curves


def run_all(settings: Settings, picture: Path | None) -> None:
    """Does what the head of this file says, and draws the `picture` of one run.

    Raises:
        CheckError: if something that was to be shown is not so.
    """
    say("compiling the train steps")
    contestants = make_contestants(settings)
    sequence = contestants[-1]
    say(f"training with Adam, then SGD: {settings.steps} updates")
    curves = show_one_run(sequence, settings)
    if picture is not None:
        curves.draw(picture)
        say(f"loss of this run, with its phases: {picture}")
    say(f"training with Adam, SGD and the sequence: {settings.seeds} seeds")
    run_seeds(contestants, settings)
    say("timing the steps")
    seconds = time_steps(contestants, settings)
    check_graph(sequence.trainer, Digits.load(seed=0, steps=1))
    say(f"\n{table(contestants, seconds)}\n")
    say(notes(contestants, seconds, settings))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.digits", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="seconds, not a minute")
    parser.add_argument(
        "--picture",
        type=Path,
        help="where to draw the loss of one run (default: benchmarks/results, or "
        "nowhere with --quick)",
    )
    arguments = parser.parse_args(argv)
    settings = QUICK if arguments.quick else Settings()
    picture = arguments.picture or (None if arguments.quick else PICTURE)
    try:
        run_all(settings, picture)
    except CheckError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
