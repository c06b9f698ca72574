"""Ends a phase when a metric stalls."""

import itertools
import math
import re
import warnings
from dataclasses import astuple, dataclass
from typing import Any

import keras
import numpy as np

from sequential_optimizer._find_sequence import (
    Watch,
    count,
    find_sequence,
    phase_of_last_update,
    print_line,
)

# Words in the names of metrics that say which way is better. The lower ones count
# first: `accuracy_loss` is a loss.
_LOWER = "loss|error|crossentropy|divergence|perplexity|mse|rmse|mae|mape|msle"
_HIGHER = "acc|accuracy|auc|precision|recall|f1|fbeta|io_?u|similarity|r2"

Logs = dict[str, Any] | None


@dataclass
class _Plateau:
    """What SwitchOnPlateau has seen of a phase: numbers, so that they can be saved."""

    phase: float
    started: float  # iterations from which on the phase is watched
    best: float
    next_epoch: float  # the first that it has not seen, -1 if it has seen none
    wait: float = 0
    cooldown: float = 0


class SwitchOnPlateau(keras.callbacks.Callback):
    """Ends the current phase when a metric has stopped improving.

    Works like Keras' `ReduceLROnPlateau`, except that it calls `advance()` of the
    model's `SequentialOptimizer` instead of cutting a learning rate: one phase a
    plateau. An integer boundary may end the phase first. After each switch, whoever
    made it, the best value, the patience and the cooldown start anew. An epoch
    counts for the phase that its last update ran in. In the last phase the callback
    does nothing.

    A call of `fit` starts anew, unless `BackupAndRestore` resumes it. What the
    callback has seen is saved with the optimizer, so a resumed run switches in the
    same epoch as one that was never interrupted. Put it before `BackupAndRestore` in
    the list of callbacks, which saves when its turn comes.

    Example:

    >>> import keras
    >>> import numpy as np
    >>> from sequential_optimizer import SequentialOptimizer, SwitchOnPlateau
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    >>> model.compile(SequentialOptimizer(["adam", "sgd"], [None]), loss="mse")
    >>> x = np.ones((8, 1))
    >>> callback = SwitchOnPlateau("loss", patience=2, min_delta=1.0)
    >>> history = model.fit(x, 0 * x, epochs=3, verbose=0, callbacks=[callback])
    >>> int(model.optimizer.phase)
    1

    Args:
        monitor: string, name of the metric in the logs. Defaults to `"val_loss"`.
            One callback a metric.
        patience: int >= 0, the number of epochs in a row without improvement after
            which the phase ends; 0 is as 1. Defaults to 10.
        min_delta: float >= 0; only a change by more than this is an improvement.
            Defaults to 1e-4.
        mode: `"min"` if lower is better, `"max"` if higher is, `"auto"` (the
            default) to tell from the name of the metric.
        cooldown: int >= 0, the number of epochs after a switch that do not count
            towards the patience. Defaults to 0.
        min_iterations: int >= 0, the number of updates that a phase makes in this
            call of `fit` before the callback may end it. Defaults to 0.
        restore_best_weights: bool, whether after a phase that the callback ends the
            next one starts from the weights of its best epoch, instead of its last.
            A copy of the weights is then saved with the optimizer. Defaults to
            `False`.
        verbose: 1 to print a line at each switch, 0 (the default) for silence.

    Raises:
        ValueError: if an argument breaks one of these rules, or if `mode="auto"`
            cannot tell from the name of the metric which way is better; when `fit`
            begins, if the model's optimizer is or wraps no SequentialOptimizer or is
            in its last phase already; after an epoch, if two of these callbacks
            watch the same metric.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        patience: int = 10,
        min_delta: float = 1e-4,
        mode: str = "auto",
        cooldown: int = 0,
        min_iterations: int = 0,
        restore_best_weights: bool = False,
        verbose: int = 0,
    ) -> None:
        super().__init__()
        _check_at_least_0(
            patience=patience,
            min_delta=min_delta,
            cooldown=cooldown,
            min_iterations=min_iterations,
        )
        self.monitor = monitor
        self.patience = patience
        self.min_delta = min_delta
        self.mode = mode
        self.cooldown = cooldown
        self.min_iterations = min_iterations
        self.restore_best_weights = restore_best_weights
        self.verbose = verbose
        self._sign = _sign(mode, monitor)
        self._key = f"SwitchOnPlateau/{monitor}"

    def set_model(self, model: keras.Model) -> None:
        """Starts anew. Keras calls it before any callback restores a backup."""
        super().set_model(model)
        self._sequence = find_sequence(model.optimizer, self)
        self._watch: Watch | None = None
        self._warned = False
        phase = int(self._sequence.phase)
        if phase == self._sequence._phases.last:
            raise ValueError(
                "`SwitchOnPlateau` needs a phase that can still end. Received: an "
                f"optimizer in phase {phase}, its last. Leave the callback out, or "
                "add an optimizer to the sequence."
            )
        self._write(self._begin(phase, next_epoch=-1))

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Warns if a resumed run has lost what this callback saw."""
        # Only now has every callback restored what it restores.
        self._watch = self._watch or Watch(self._sequence)
        plateau = self._read()
        if plateau.next_epoch not in (-1, epoch):
            warnings.warn(
                f"`SwitchOnPlateau` has seen the epochs before "
                f"{int(plateau.next_epoch)}, and epoch {epoch} begins: the run was "
                "resumed from a backup that was made before its turn. Put it before "
                "the callback that saves.",
                stacklevel=2,
            )
        plateau.next_epoch = epoch
        self._write(plateau)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Looks at the metric, and ends the phase if it has stalled."""
        plateau, phase = self._read(), int(self._sequence.phase)
        self._check_alone(plateau, epoch)
        plateau.next_epoch = epoch + 1
        switches = self._watch.switches() if self._watch else []
        if phase != plateau.phase:
            plateau = self._begin(phase, epoch + 1, self.cooldown)
            if switches and switches[-1].after == phase:
                plateau.started = switches[-1].iteration
        # If they differ, the whole epoch belongs to a phase that has ended already.
        is_of_phase = phase == phase_of_last_update(self._sequence)
        is_last = phase == self._sequence._phases.last
        if is_of_phase and not is_last and self._is_stalled(logs or {}, plateau):
            self._switch(epoch, plateau)
            plateau = self._begin(phase + 1, epoch + 1, self.cooldown)
        self._write(plateau)

    def _check_alone(self, plateau: _Plateau, epoch: int) -> None:
        if plateau.next_epoch > epoch:
            raise ValueError(
                "Each `SwitchOnPlateau` must watch a metric of its own. Received: two "
                f'with monitor="{self.monitor}". Leave one of them out.'
            )

    def _is_stalled(self, logs: dict[str, Any], plateau: _Plateau) -> bool:
        """Counts the epoch, and returns whether it was one too many."""
        if self.monitor not in logs:
            self._warn_of_missing_metric(logs)
            return False
        value = float(logs[self.monitor])
        in_cooldown = plateau.cooldown > 0
        plateau.cooldown -= in_cooldown
        if self._sign * value > self._sign * plateau.best + self.min_delta:
            plateau.best, plateau.wait = value, 0
            if self.restore_best_weights:
                self._write_weights(self.model.get_weights())
            return False
        if in_cooldown:
            return False
        plateau.wait += 1
        updates = count(self._sequence.iterations) - plateau.started
        return plateau.wait >= self.patience and updates >= self.min_iterations

    def _switch(self, epoch: int, plateau: _Plateau) -> None:
        arrays = self._sequence._notes.arrays
        # There are none if the metric was never a number.
        if best_weights := [arrays[key] for key in self._keys_of_weights()]:
            self.model.set_weights(best_weights)
        before = self._sequence.active_child().name
        self._sequence.advance()
        if self.verbose:
            after = self._sequence.active_child().name
            print_line(
                self,
                f"epoch {epoch + 1}: {before} -> {after}, after {int(plateau.wait)} "
                f"without a better {self.monitor} than {plateau.best:g}",
            )

    def _begin(self, phase: int, next_epoch: int, cooldown: int = 0) -> _Plateau:
        """Forgets the phase before, and returns what has been seen of this one."""
        for key in self._keys_of_weights():
            del self._sequence._notes.arrays[key]
        return _Plateau(
            phase=phase,
            started=count(self._sequence.iterations),
            best=-self._sign * math.inf,
            next_epoch=next_epoch,
            cooldown=cooldown,
        )

    def _warn_of_missing_metric(self, logs: dict[str, Any]) -> None:
        if not self._warned:
            warnings.warn(
                f"`SwitchOnPlateau` watches the metric `{self.monitor}`, which is not "
                f"available. Available metrics are: {', '.join(logs)}.",
                stacklevel=2,
            )
        self._warned = True

    # What is noted with the optimizer is saved, and restored, with it.

    def _read(self) -> _Plateau:
        noted = self._sequence._notes.arrays.get(self._key)
        if noted is None:  # restored from a backup that was made without the callback
            return self._begin(int(self._sequence.phase), next_epoch=-1)
        return _Plateau(*noted.tolist())

    def _write(self, plateau: _Plateau) -> None:
        arrays = self._sequence._notes.arrays
        arrays[self._key] = np.array(astuple(plateau), np.float64)

    def _keys_of_weights(self) -> list[str]:
        keys = (f"{self._key}/weight/{i}" for i in itertools.count())
        return list(
            itertools.takewhile(self._sequence._notes.arrays.__contains__, keys)
        )

    def _write_weights(self, weights: list[np.ndarray]) -> None:
        for i, weight in enumerate(weights):
            # NumPy cannot write bfloat16, which float32 holds exactly.
            native = weight if weight.dtype.kind != "V" else weight.astype(np.float32)
            self._sequence._notes.arrays[f"{self._key}/weight/{i}"] = native


def _sign(mode: str, monitor: str) -> int:
    """Returns 1 if a higher value of the metric is better, -1 if a lower one is."""
    signs = {"min": -1, "max": 1}
    if mode in signs:
        return signs[mode]
    if mode != "auto":
        raise ValueError(
            '`mode` must be "min", "max" or "auto". '
            f"Received: mode={mode!r}. Pass one of the three."
        )
    for words, sign in ((_LOWER, -1), (_HIGHER, 1)):
        if re.search(f"(^|_)({words})(_|$)", monitor.lower()):
            return sign
    raise ValueError(
        "`mode` must be given for a metric whose name does not say which way is "
        f'better. Received: monitor={monitor!r}, mode="auto". Pass `mode="min"` or '
        '`mode="max"`.'
    )


def _check_at_least_0(**arguments: float) -> None:
    for name, value in arguments.items():
        if not value >= 0:
            raise ValueError(
                f"`{name}` must be >= 0. Received: {name}={value!r}. "
                "Pass 0 to do without."
            )
