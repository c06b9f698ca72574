"""Shows which phase a run is in."""

from dataclasses import dataclass
from typing import Any

import keras

from sequential_optimizer._find_sequence import child_of, find_sequence
from sequential_optimizer._phases import last_started, switches_between

Logs = dict[str, Any] | None


@dataclass(eq=False)
class PhaseLogger(keras.callbacks.Callback):
    """Puts the phase and the learning rate into the logs, and prints each switch.

    The logs of each epoch get `phase`, the phase of its last update; `learning_rate`,
    that of the child that made this update, NaN if it has several; and `iterations`,
    the number of updates so far. So `History`, the progress bar, `CSVLogger` and
    `TensorBoard` show them; put `PhaseLogger` before the last two, and before a
    `History` of your own, in the list of callbacks.

    Each switch is printed as a line such as `iteration 1200: adam -> sgd`: the first
    1200 updates are adam's. The line appears after the first update of the new phase
    or, with `steps_per_execution`, after the call of the train function that made this
    update. A phase that ends without an update is skipped.

    A model with several sequences, such as a GAN, takes one `PhaseLogger` for each,
    with `optimizer=`. The names in the logs then begin with the sequence's name: for
    `SequentialOptimizer(..., name="generator")` they are `generator_phase`,
    `generator_learning_rate` and `generator_iterations`, and a switch is printed as
    `iteration 1200 of generator: adam -> sgd`.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from sequential_optimizer import PhaseLogger, SequentialOptimizer
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(SequentialOptimizer(["adam", "lion"], [2]), loss="mse")
    >>> x = np.ones((8, 1))
    >>> history = model.fit(x, x, epochs=3, verbose=0, callbacks=[PhaseLogger()])
    iteration 2: adam -> lion
    >>> history.history["phase"]
    [0, 0, 1]

    Args:
        per_batch: bool, whether the logs of each batch get the same entries. Defaults
            to `False`.
        verbose: 1 (the default) to print a line at each switch, 0 for silence.
        optimizer: the SequentialOptimizer to follow, or an optimizer that wraps it.
            Defaults to that of the model: the one in `model.optimizer` or, if there
            is none, in the other attributes of the model.

    Raises:
        ValueError: when `fit` begins, if there is no SequentialOptimizer or more than
            one to choose from.
    """

    per_batch: bool = False
    verbose: int = 1
    optimizer: Any = None

    def __post_init__(self) -> None:
        super().__init__()

    def set_model(self, model: keras.Model) -> None:
        """Finds the sequence to follow."""
        super().set_model(model)
        self._sequence = find_sequence(self)
        self._look()

    def on_train_begin(self, logs: Logs = None) -> None:
        """Tells the history whose phases it holds."""
        if history := getattr(self.model, "history", None):
            history.sequence = self._sequence

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Notes where the run begins, after any callback has restored it."""
        self._look()

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Prints the switches in the batch, or in the steps executed with it."""
        if self.verbose or self.per_batch:
            self._print_switches()
        if self.per_batch and logs is not None:
            logs.update(self._values())

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Adds to the logs of the epoch."""
        # Keras leaves out `on_train_batch_end` if the data ends inside an execution.
        self._print_switches()
        if logs is not None:
            logs.update(self._values())

    def _look(self) -> None:
        self._starts = self._sequence.phase_starts
        self._iterations = int(self._sequence.iterations.numpy())

    def _print_switches(self) -> None:
        starts, iterations = self._starts, self._iterations
        self._look()
        if not self.verbose:
            return
        of = f" of {self._sequence.name}" if self.optimizer else ""
        for iteration, *pair in switches_between(starts, self._starts, iterations):
            before, after = (child_of(self._sequence, phase).name for phase in pair)
            print_line(self, f"iteration {iteration}{of}: {before} -> {after}")

    def _values(self) -> dict[str, float]:
        phase = last_started(self._starts)
        if phase < 0:  # before the first update: the phase that it will run in
            phase = int(self._sequence.phase)
        child = child_of(self._sequence, phase)
        # A MultiOptimizer has several.
        rate = getattr(child, "learning_rate", float("nan"))
        rate = float(keras.ops.convert_to_numpy(rate))
        values = {"phase": phase, "iterations": self._iterations, "learning_rate": rate}
        prefix = f"{self._sequence.name}_" if self.optimizer else ""
        return {prefix + key: value for key, value in values.items()}


def print_line(callback: keras.callbacks.Callback, line: str) -> None:
    """Prints a line, below the progress bar if there is one."""
    has_bar = (callback.params or {}).get("verbose") in (1, "auto")
    print("\n" * has_bar + line)
