"""Shows in which phase a run is."""

from typing import Any

import keras

from sequential_optimizer._find_sequence import (
    Watch,
    child_of,
    find_sequence,
    phase_of_last_update,
    print_line,
)

Logs = dict[str, Any] | None


class PhaseLogger(keras.callbacks.Callback):
    """Puts the phase and the learning rate into the logs, and prints each switch.

    The logs of an epoch get `phase`, the phase that its last update ran in, and
    `learning_rate`, that of the child which made it. So `History`, the progress bar,
    `CSVLogger` and `TensorBoard` show them; put `PhaseLogger` before the last two in
    the list of callbacks. At each switch it prints a line such as
    `iteration 1200: adam -> sgd`: the first 1200 updates are adam's. It does so after
    the next update, also if that was one of several in a call of the train function
    (`steps_per_execution`). Only if `advance()` ended a phase, and its child came
    back, within one such call, the true iteration may be lower than the printed one.

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
        per_batch: bool, whether the logs of each batch get the two as well. Defaults
            to `False`.
        verbose: 1 (the default) to print a line at each switch, 0 for silence.

    Raises:
        ValueError: when `fit` begins, if the model's optimizer is or wraps no
            SequentialOptimizer.
    """

    def __init__(self, per_batch: bool = False, verbose: int = 1) -> None:
        super().__init__()
        self.per_batch = per_batch
        self.verbose = verbose

    def set_model(self, model: keras.Model) -> None:
        """Finds the sequence of the model's optimizer."""
        super().set_model(model)
        self._sequence = find_sequence(model.optimizer, self)
        self._watch: Watch | None = None

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Notes where the run begins, after every callback that restores one."""
        self._watch = self._watch or Watch(self._sequence)

    def on_train_batch_end(self, batch: int, logs: Logs = None) -> None:
        """Prints the switches in the batch, or in the steps executed with it."""
        self._print_switches()
        if self.per_batch and logs is not None:
            logs.update(self._values())

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Adds to the logs of the epoch."""
        # Keras drops the end of a batch when the data ends inside of its steps.
        self._print_switches()
        if logs is not None:
            logs.update(self._values())

    def _print_switches(self) -> None:
        if not self.verbose or self._watch is None:
            return
        for iteration, *phases in self._watch.switches():
            before, after = (child_of(self._sequence, phase).name for phase in phases)
            print_line(self, f"iteration {iteration}: {before} -> {after}")

    def _values(self) -> dict[str, float]:
        phase = phase_of_last_update(self._sequence)
        values: dict[str, float] = {"phase": phase}
        child = child_of(self._sequence, phase)
        if hasattr(child, "learning_rate"):  # a MultiOptimizer has several
            rate = keras.ops.convert_to_numpy(child.learning_rate)
            values["learning_rate"] = float(rate)
        return values
