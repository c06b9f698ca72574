"""Trains a small network on handwritten digits, first with Adam, then with SGD.

    python -m benchmarks.digits            # within a minute on two cores
    python -m benchmarks.digits --quick    # only two epochs

Shows that the optimizer changes inside one compiled train step, and that a run which is
saved before the switch and resumed ends, bit for bit, where the uninterrupted one does.
The digits come with scikit-learn: nothing is downloaded. Then a physics-informed
network (benchmarks/oscillator.py) shows what a quasi-Newton phase is good for.
"""

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from benchmarks import oscillator
from benchmarks.harness.checks import CheckError, count_different
from benchmarks.harness.report import compile_something
from benchmarks.harness.terminal import say
from benchmarks.workloads.handwritten_digits import BATCH, Digits, make_model
from benchmarks.workloads.models import LOSS
from sequential_optimizer import PhaseLogger, SequentialOptimizer, plot_history

PICTURE = Path(__file__).parent / "results" / "digits.png"


@dataclass(frozen=True)
class Settings:
    """How long it takes; `boundary` and `save_at` count updates, 44 per epoch."""

    epochs: int = 22
    boundary: int = 500
    save_at: int = 400
    network: oscillator.Settings = oscillator.FULL


QUICK = Settings(epochs=2, boundary=60, save_at=30, network=oscillator.QUICK)


# --- the optimizer and the train step ----------------------------------------


def make_optimizer(boundary: int) -> SequentialOptimizer:
    """Returns Adam for the first `boundary` updates, and SGD from there on."""
    adam, sgd = keras.optimizers.Adam(), keras.optimizers.SGD(momentum=0.9)
    return SequentialOptimizer([adam, sgd], boundaries=[boundary])


class Training(tf.Module):
    """A compiled model and its train step.

    A `tf.Module`, so that TensorFlow can save all of it, train step included.
    """

    def __init__(self, model: keras.Model):
        super().__init__()
        self.model = model
        self.optimizer = model.optimizer
        self.optimizer.build(model.trainable_variables)

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
        """Returns the number of updates so far, and the phase."""
        return tf.identity(self.optimizer.iterations), self.optimizer.phase

    @tf.function(input_signature=[])
    def state(self) -> list[tf.Tensor]:
        """Returns the weights, then the optimizer variables."""
        variables = [*self.model.variables, *self.optimizer.variables]
        return [tf.identity(variable.value) for variable in variables]


# --- one run -----------------------------------------------------------------


def train_and_save(
    training: Training, digits: Digits, settings: Settings, folder: Path
) -> keras.callbacks.History:
    """Trains through the switch, and saves on the way; returns the losses."""
    history = keras.callbacks.History()
    # `PhaseLogger` prints the switch, and adds `phase`, `iterations` and
    # `learning_rate` to the logs. `fit` calls callbacks by itself, a loop by hand.
    callbacks = keras.callbacks.CallbackList(
        [PhaseLogger(), history], model=training.model
    )
    callbacks.on_train_begin()
    say("epoch  iteration  optimizer  learning rate    loss  test loss  test accuracy")
    for epoch in range(settings.epochs):
        callbacks.on_epoch_begin(epoch)
        losses = []
        for update in digits.updates_of(epoch):
            losses.append(float(training.train_step(*digits.batch(update))))
            callbacks.on_train_batch_end(update)
            if update + 1 == settings.save_at:
                save(training, folder)
                say(f"iteration {update + 1}: saved to .keras and to a SavedModel")
        test_loss, accuracy = evaluate(training.model, digits)
        logs = {
            "loss": np.mean(losses),
            "test loss": test_loss,
            "test accuracy": accuracy,
        }
        callbacks.on_epoch_end(epoch, logs)
        say(line_of(epoch, history, training.optimizer))
    return history


def evaluate(model: keras.Model, digits: Digits) -> tuple[float, float]:
    """Returns the loss and the accuracy on images that the model has not seen."""
    images, labels = digits.test
    logits = model(images, training=False)
    right = np.argmax(logits, axis=-1) == labels
    return float(LOSS(labels, logits)), float(np.mean(right))


def line_of(
    epoch: int, history: keras.callbacks.History, optimizer: SequentialOptimizer
) -> str:
    """Returns what is printed of an epoch."""
    last = {name: values[-1] for name, values in history.history.items()}
    return (
        f"{epoch + 1:5}  {last['iterations']:9}  "
        f"{optimizer.children[last['phase']].name:9}  {last['learning_rate']:13g}  "
        f"{last['loss']:6.4f}  {last['test loss']:9.4f}  {last['test accuracy']:13.1%}"
    )


def draw(history: keras.callbacks.History, path: Path) -> None:
    """Writes the picture of a run, with its phases."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = plot_history(history, metrics=("loss", "test loss"), ax=figure.subplots())
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, metadata={"Software": None})


# --- saving and resuming -----------------------------------------------------


def save(training: Training, folder: Path) -> None:
    """Saves the run in two ways."""
    training.model.save(folder / "digits.keras")
    # TensorFlow traces what it saves once more. Hence another `Training`, so that the
    # count of the first one says how often training traced.
    tf.saved_model.save(Training(training.model), str(folder / "saved_model"))


def load_keras(folder: Path) -> Training:
    """Returns the run that `Model.save` wrote; its train step is traced anew."""
    return Training(keras.models.load_model(folder / "digits.keras"))


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


def check_resumed(
    kind: str,
    resumed: Any,
    batch: Callable[[int], Sequence[tf.Tensor]],
    updates: int,
    expected: Sequence[Any],
) -> None:
    """Trains a loaded run to the end, and compares where it arrives.

    Args:
        kind: string, how it was saved.
        resumed: a `Training`, or what TensorFlow made of one.
        batch: function from the number of an update to its batch.
        updates: int, the number of updates at the end.
        expected: list of tensors, the state of the uninterrupted run.

    Raises:
        CheckError: if one bit of the weights or optimizer variables is different.
    """
    first, first_phase = (int(n) for n in resumed.position())
    for update in range(first, updates):
        resumed.train_step(*batch(update))
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


def check_graph(train_step: Any, batch: Sequence[tf.Tensor]) -> None:
    """Prints how often the train step was traced, and checks that it was once.

    Raises:
        CheckError: if it was traced again, or if its graph does not hold one switch.
    """
    traces = train_step.experimental_get_tracing_count()
    compiled = train_step.experimental_get_compiler_ir(*batch)
    switches = compiled(stage="hlo").count(" conditional(")
    say(f"train step: traced {traces}x, {switches} conditional in its XLA graph")
    if (traces, switches) != (1, 1):
        raise CheckError("the train step is not one graph with one switch in it.")


# --- the command -------------------------------------------------------------


def show(settings: Settings, picture: Path | None) -> None:
    """Does what the head of this file says, and draws the `picture` of the run.

    Raises:
        CheckError: if something that is to be shown does not hold.
    """
    compile_something()
    keras.utils.set_random_seed(0)
    digits = Digits.load(seed=0, epochs=settings.epochs)
    updates = len(digits.order)
    model = make_model()
    # Saving the model saves the optimizer that it was compiled with.
    model.compile(optimizer=make_optimizer(settings.boundary), loss=LOSS)
    training = Training(model)
    after = updates - settings.boundary
    say(f"Adam for {settings.boundary} updates, then SGD for {after}\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        history = train_and_save(training, digits, settings, folder)
        expected = training.state()
        say("\nboth files, loaded and trained to the end, compared bit for bit:")
        for kind, load in ((".keras", load_keras), ("SavedModel", load_saved_model)):
            check_resumed(kind, load(folder), digits.batch, updates, expected)
        check_graph(training.train_step, digits.batch(0))
        oscillator.show(settings.network, folder)
    if picture is not None:
        draw(history, picture)
        say(f"picture of this run: {os.path.relpath(picture)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.digits", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="only two epochs")
    parser.add_argument(
        "--picture",
        type=Path,
        help="where to draw the losses (default: benchmarks/results, or nowhere with "
        "--quick)",
    )
    arguments = parser.parse_args(argv)
    settings = QUICK if arguments.quick else Settings()
    picture = arguments.picture or (None if arguments.quick else PICTURE)
    try:
        show(settings, picture)
    except CheckError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
