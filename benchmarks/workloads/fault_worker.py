"""The training runs that the question `faults` kills, as a user would write them.

Each saves on the way, and continues from what it finds when it is started again. It
reports what it does: `report(event, number, text)`, where the number is that of updates
made so far. A run that is not killed reports the same, bit for bit, as one that is.

    restored   it begins with what it has found
    epoch      `fit` begins; the number is that of the epoch
    begins     an epoch of `fit` begins; the text is the digest of the state
    update     an update was made; the text is the digest of the state
    saving     a save begins
    saved      it has ended
    refused    a broken checkpoint was not used; the text says why
    finished   the last update was made
"""

import contextlib
import hashlib
import inspect
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer, SwitchOnPlateau

# Between two updates, so that a kill can fall there.
PAUSE = 0.01


def digest(variables: Iterable[Any]) -> str:
    """Returns a text that differs if a bit of the variables does."""
    total = hashlib.blake2b(digest_size=16)
    for variable in variables:
        total.update(variable.numpy().tobytes())
    return total.hexdigest()


def make_children() -> list[Any]:
    """Returns optimizers that keep state, the first of which comes back."""
    adam = keras.optimizers.Adam(0.01, clipnorm=1.0, name="adam")
    sgd = keras.optimizers.SGD(0.01, momentum=0.9, use_ema=True, name="sgd")
    return [adam, sgd, adam]


# --- a custom loop, with tf.train.CheckpointManager ------------------------------


@dataclass(frozen=True)
class Loop:
    """A training loop.

    Args:
        updates: int, how many there are.
        switches: two ints; the first is a boundary, and before the second update
            `advance()` is called.
        save_every: int, the number of updates between two checkpoints.
        width: int, the number of rows and columns of the weights.
    """

    updates: int
    switches: tuple[int, int]
    save_every: int
    width: int


def train_in_cluster(send: Callable, loop: Loop, folder: str, worker: int) -> None:
    """Trains on one of the workers of a cluster."""
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    train(Reporter(send), strategy, loop, Path(folder), worker)


def train_alone(send: Callable, loop: Loop, folder: str, worker: int) -> None:
    """Trains in this process only."""
    train(Reporter(send), tf.distribute.get_strategy(), loop, Path(folder), worker)


class Reporter:
    """Sends reports."""

    def __init__(self, send: Callable) -> None:
        self._send = send

    def __call__(self, event: str, number: int, text: str = "") -> None:
        print(event, number, text, flush=True)
        self._send((event, number, text))


def train(
    report: Reporter,
    strategy: tf.distribute.Strategy,
    loop: Loop,
    folder: Path,
    worker: int,
) -> None:
    """Trains from the newest whole checkpoint in the folder, or from the start."""
    with strategy.scope():
        weights = make_weights(loop.width)
        optimizer = SequentialOptimizer(
            make_children(), [loop.switches[0], None], use_ema=True
        )
        # Before restoring: what does not exist yet would be restored only later.
        optimizer.build(weights)
    state = [*weights, *optimizer.variables]
    step = make_step(strategy, weights, optimizer)
    checkpoint = tf.train.Checkpoint(
        optimizer=optimizer, **{weight.name: weight for weight in weights}
    )
    managers = [
        tf.train.CheckpointManager(checkpoint, str(folder / name), max_to_keep=3)
        # All workers save, because of variables that are spread over them. What
        # counts is what the first one has saved.
        for name in ("checkpoints", f"worker{worker}")
    ]
    resume(managers[0], report)
    first = int(optimizer.iterations.numpy())
    report("restored", first)
    report("update", first, digest(state))
    for t in range(first, loop.updates):
        if t == loop.switches[1]:
            optimizer.advance()
        step(make_batch(t, worker, loop.width))
        report("update", t + 1, digest(state))
        time.sleep(PAUSE)
        if (t + 1) % loop.save_every == 0:
            report("saving", t + 1)
            managers[min(worker, 1)].save()
            report("saved", t + 1)
    report("finished", loop.updates)


def resume(manager: tf.train.CheckpointManager, report: Reporter) -> None:
    """Restores the newest checkpoint that is whole.

    TensorFlow checks what it reads, and sets no variable that exists if a checkpoint
    is broken; but it raises, and looks for no other one.

    Raises:
        RuntimeError: if there is a list of checkpoints but none of them is whole.
    """
    for path in reversed(manager.checkpoints):
        try:
            manager.checkpoint.restore(path).assert_consumed()
        # IndexError: a data file that is too short.
        except (tf.errors.OpError, IndexError) as error:
            report("refused", 0, f"{Path(path).name}: {type(error).__name__}: {error}")
        else:
            return
    # A list that cannot be read counts as none, with a warning only.
    if (Path(manager.directory) / "checkpoint").exists():
        raise RuntimeError(f"No checkpoint in {manager.directory} is whole.")


def make_weights(width: int) -> list[keras.Variable]:
    """Returns the same weights at every call."""
    rng = np.random.default_rng(1)
    return [
        keras.Variable(
            rng.normal(size=(width, width)) / width**0.5, dtype="float32", name=name
        )
        for name in ("first", "second")
    ]


def make_batch(t: int, worker: int, width: int) -> tf.Tensor:
    """Returns the batch of an update, which differs from worker to worker."""
    rng = np.random.default_rng((t, worker))
    return tf.constant(rng.normal(size=(4, width)), tf.float32)


def make_step(
    strategy: tf.distribute.Strategy, weights: list[keras.Variable], optimizer: Any
) -> Callable:
    """Returns the traced step."""

    def replica(x: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            outputs = tf.tanh(x @ weights[0].value) @ weights[1].value
            loss = tf.reduce_mean((outputs - tf.sin(x)) ** 2)
        gradients = tape.gradient(loss, [weight.value for weight in weights])
        optimizer.apply(gradients, weights)

    @tf.function(autograph=False)
    def step(x: tf.Tensor) -> None:
        strategy.run(replica, args=(x,))

    return step


# --- fit, with BackupAndRestore --------------------------------------------------


@dataclass(frozen=True)
class Fit:
    """A call of `fit` under a MirroredStrategy with two replicas.

    Args:
        epochs: int.
        batches: int, of an epoch.
        switches: two ints, the updates from which on another child is active. The
            first is a boundary.
        save_freq: as of `BackupAndRestore`. With "epoch" the second switch is made by
            a `SwitchOnPlateau`, otherwise it is a boundary too.
        width: int, the number of inputs and of units of the hidden layer.
    """

    epochs: int
    batches: int
    switches: tuple[int, int]
    save_freq: str | int
    width: int


class Reports(keras.callbacks.Callback):
    """Reports what `fit` does.

    Args:
        stop_after: the number of updates after which `fit` is left, if any.
    """

    def __init__(
        self, report: Reporter, settings: Fit, stop_after: int | None = None
    ) -> None:
        super().__init__()
        self._report = report
        self._settings = settings
        self._stop_after = stop_after
        self._has_begun = False

    def _state(self) -> tuple[int, str]:
        optimizer = self.model.optimizer
        variables = [*self.model.weights, *optimizer.variables]
        return int(optimizer.iterations.numpy()), digest(variables)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        updates, text = self._state()
        if not self._has_begun:
            self._has_begun = True
            self._check(updates, epoch)
            self._report("epoch", epoch)
            self._report("restored", updates)
        self._report("begins", updates, text)

    def _check(self, updates: int, epoch: int) -> None:
        settings = self._settings
        if settings.save_freq == "epoch" and updates != epoch * settings.batches:
            raise RuntimeError(
                f"BackupAndRestore restored update {updates}, but epoch {epoch} "
                "begins: it was killed between its two files. Delete them, and start "
                "again."
            )

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        updates, text = self._state()
        self._report("update", updates, text)
        if updates == self._stop_after:
            raise GoBack
        time.sleep(PAUSE)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        # The callback that saves comes next.
        self._report("saving", (epoch + 1) * self._settings.batches)


class ReportsSaved(keras.callbacks.Callback):
    """Reports that the callbacks before it have saved."""

    def __init__(self, report: Reporter, settings: Fit) -> None:
        super().__init__()
        self._report = report
        self._settings = settings

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._report("saved", (epoch + 1) * self._settings.batches)


def make_fitted(settings: Fit) -> keras.Model:
    """Returns the compiled model, under its strategy."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
    keras.utils.set_random_seed(1)
    by_plateau = settings.save_freq == "epoch"
    boundaries = [settings.switches[0], None if by_plateau else settings.switches[1]]
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = keras.Sequential(
            [
                keras.Input((settings.width,)),
                keras.layers.Dense(settings.width, activation="tanh"),
                keras.layers.Dense(1),
            ]
        )
        optimizer = SequentialOptimizer(make_children(), boundaries, use_ema=True)
        optimizer.build(model.trainable_variables)
        # XLA cannot compile for several CPU devices.
        model.compile(optimizer, loss="mse", jit_compile=False)
    return model


def run_fit(model: keras.Model, settings: Fit, callbacks: list, first: int = 0) -> None:
    """Fits the model to the same batches in every epoch."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(settings.batches * 8, settings.width)).astype("float32")
    if settings.save_freq == "epoch":
        # An improvement by 100 never comes.
        plateau = SwitchOnPlateau("loss", patience=1, min_delta=100.0)
        callbacks = [callbacks[0], plateau, *callbacks[1:]]
    model.fit(
        x,
        np.sin(x[:, :1]),
        batch_size=8,
        epochs=settings.epochs,
        initial_epoch=first,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )


# Newer versions of Keras can keep the backup before, and fall back on it.
SECOND_FILE = (
    {"double_checkpoint": True}
    if "double_checkpoint"
    in inspect.signature(keras.callbacks.BackupAndRestore).parameters
    else {}
)


def report_broken_backup(report: Reporter, folder: Path) -> None:
    """Reports what Keras will refuse to restore."""
    path = folder / "latest.weights.h5"
    try:
        if path.exists():
            h5py.File(path).close()
    except OSError as error:
        report("refused", 0, f"{path.name}: OSError: {error}")


def fit(send: Callable, settings: Fit, folder: str, worker: int) -> None:
    """Fits from the backup in the folder, or from the start."""
    report = Reporter(send)
    model = make_fitted(settings)
    report_broken_backup(report, Path(folder))
    backup = keras.callbacks.BackupAndRestore(
        folder, save_freq=settings.save_freq, delete_checkpoint=False, **SECOND_FILE
    )
    callbacks = [Reports(report, settings), backup, ReportsSaved(report, settings)]
    run_fit(model, settings, callbacks)
    report("finished", int(model.optimizer.iterations.numpy()))


class GoBack(Exception):  # noqa: N818 (nothing is wrong)
    """Leaves `fit`."""


def fit_going_back(
    send: Callable, settings: Fit, returns: list[tuple[int, int]]
) -> None:
    """Fits without a backup, and goes back where Keras sends a killed run.

    A backup remembers an epoch at most, not a batch: a run that is resumed from the
    middle of an epoch sees batches again.

    Args:
        returns: pairs of a number of updates, and the epoch that begins after them.
    """
    report = Reporter(send)
    model = make_fitted(settings)
    first = 0
    for stop, epoch in returns:
        with contextlib.suppress(GoBack):
            run_fit(model, settings, [Reports(report, settings, stop)], first)
        first = epoch
    run_fit(model, settings, [Reports(report, settings)], first)
    report("finished", int(model.optimizer.iterations.numpy()))
