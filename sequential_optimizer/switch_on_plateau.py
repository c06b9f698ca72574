"""Ends a phase when a metric stalls."""

import math
import re
import warnings
from dataclasses import asdict, dataclass, fields
from typing import Any

import keras
import numpy as np

from sequential_optimizer._find_sequence import find_sequence
from sequential_optimizer._phases import last_started
from sequential_optimizer.phase_logger import print_line

# Words in the names of metrics that say which way is better.
_LOWER = "loss|error|crossentropy|divergence|perplexity|mse|rmse|mae|mape|msle"
_HIGHER = "acc|accuracy|auc|precision|recall|f1|fbeta|iou|similarity|r2"

Logs = dict[str, Any] | None


@dataclass
class _Seen:
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
            One callback per metric and optimizer.
        patience: int >= 0, the number of epochs in a row without improvement after
            which the phase ends; 0 is as 1. Defaults to 10.
        min_delta: float >= 0; only a change by more than this is an improvement.
            Defaults to 1e-4.
        mode: `"min"` if lower is better, `"max"` if higher is, `"auto"` (the
            default) to tell from the name of the metric: the last word in it that
            says so counts, as in `<output>_<metric>`.
        cooldown: int >= 0, the number of epochs after a switch that do not count
            towards the patience. Defaults to 0.
        min_iterations: int >= 0, the number of updates that a phase makes in this
            call of `fit` before the callback may end it. Defaults to 0.
        restore_best_weights: bool, whether after a phase that the callback ends the
            next one starts from the weights of its best epoch, instead of its last.
            A copy of the weights is then saved with the optimizer. Defaults to
            `False`.
        verbose: 1 to print a line at each switch, 0 (the default) for silence.
        optimizer: the SequentialOptimizer whose phases the callback ends, or an
            optimizer that wraps it. Defaults to that of the model: the one in
            `model.optimizer` or, if there is none, in the other attributes of the
            model. A model with several, such as a GAN, takes one callback for each.

    Raises:
        ValueError: if an argument breaks one of these rules, or if `mode="auto"`
            cannot tell from the name of the metric which way is better; when `fit`
            begins, if there is no SequentialOptimizer or more than one to choose
            from, or if it is in its last phase already; after an epoch, if two of
            these callbacks watch the same metric for the same optimizer.
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
        optimizer: Any = None,
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
        self.optimizer = optimizer
        self._sign = _sign(mode, monitor)
        self._key = f"SwitchOnPlateau/{monitor}"

    def set_model(self, model: keras.Model) -> None:
        """Starts anew. Keras calls it before any callback restores a backup."""
        super().set_model(model)
        self._sequence = find_sequence(self)
        self._warned = False
        phase = int(self._sequence.phase)
        if self._is_last(phase):
            raise ValueError(
                "`SwitchOnPlateau` needs a phase that can still end. Received: an "
                f"optimizer in phase {phase}, its last. Leave the callback out, or "
                "add an optimizer to the sequence."
            )
        self._write(self._begin(phase, next_epoch=-1), is_best=True)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Warns if a resumed run has lost what this callback saw."""
        seen = self._read()
        if seen.next_epoch not in (-1, epoch):
            warnings.warn(
                f"`SwitchOnPlateau` has seen the epochs before "
                f"{int(seen.next_epoch)}, and epoch {epoch} begins: the run was "
                "resumed from a backup that was made before its turn. Put it before "
                "the callback that saves.",
                stacklevel=2,
            )
        seen.next_epoch = epoch
        self._write(seen)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Looks at the metric, and ends the phase if it has stalled."""
        seen, phase = self._read(), int(self._sequence.phase)
        self._check_alone(seen, epoch)
        seen.next_epoch = epoch + 1
        if phase != seen.phase:
            seen = self._begin(phase, epoch + 1, self.cooldown)
        # Unless the whole epoch belongs to a phase that has ended already.
        is_of_phase = last_started(self._sequence.phase_starts) in (-1, phase)
        is_best = False
        if is_of_phase and not self._is_last(phase):
            value = self._value_in(logs or {})
            is_best = value is not None and self._is_better(value, seen)
            if value is not None and self._is_stalled(value, seen):
                self._switch(epoch, seen)
                seen = self._begin(phase + 1, epoch + 1, self.cooldown)
        self._write(seen, is_best)

    def _is_last(self, phase: int) -> bool:
        return phase == len(self._sequence.boundaries)

    def _check_alone(self, seen: _Seen, epoch: int) -> None:
        if seen.next_epoch > epoch:
            raise ValueError(
                "Each `SwitchOnPlateau` must watch a metric of its own. Received: two "
                f'with monitor="{self.monitor}". Leave one of them out.'
            )

    def _value_in(self, logs: dict[str, Any]) -> float | None:
        if self.monitor in logs:
            return float(logs[self.monitor])
        if not self._warned:
            warnings.warn(
                f"`SwitchOnPlateau` watches the metric `{self.monitor}`, which is not "
                f"available. Available metrics are: {', '.join(logs)}.",
                stacklevel=2,
            )
        self._warned = True
        return None

    def _is_better(self, value: float, seen: _Seen) -> bool:
        return self._sign * value > self._sign * seen.best + self.min_delta

    def _is_stalled(self, value: float, seen: _Seen) -> bool:
        """Counts the epoch, and returns whether it was one too many."""
        in_cooldown = seen.cooldown > 0
        seen.cooldown -= in_cooldown
        if self._is_better(value, seen):
            seen.best, seen.wait = value, 0
            return False
        if in_cooldown:
            return False
        seen.wait += 1
        updates = self._iterations() - seen.started
        return seen.wait >= self.patience and updates >= self.min_iterations

    def _switch(self, epoch: int, seen: _Seen) -> None:
        # There is no best epoch if the metric was never a number.
        if self.restore_best_weights and math.isfinite(seen.best):
            notes, start = self._sequence.notes, f"{self._key}/weight/"
            weights = [notes[key] for key in notes if key.startswith(start)]
            self.model.set_weights(weights)
        before = self._sequence.active_child().name
        self._sequence.advance()
        if self.verbose:
            after = self._sequence.active_child().name
            print_line(
                self,
                f"epoch {epoch + 1}: {before} -> {after}, after {int(seen.wait)} "
                f"without a better {self.monitor} than {seen.best:g}",
            )

    def _begin(self, phase: int, next_epoch: int, cooldown: int = 0) -> _Seen:
        """Returns what has been seen of a phase that has just begun: nothing."""
        start = int(self._sequence.phase_starts[phase])
        return _Seen(
            phase=phase,
            started=start if start >= 0 and next_epoch >= 0 else self._iterations(),
            best=-self._sign * math.inf,
            next_epoch=next_epoch,
            cooldown=cooldown,
        )

    def _iterations(self) -> int:
        return int(self._sequence.iterations.numpy())

    # What is noted with the optimizer is saved, and restored, with it.

    def _read(self) -> _Seen:
        notes = self._sequence.notes
        keys = {field.name: f"{self._key}/{field.name}" for field in fields(_Seen)}
        if not notes.keys() >= set(keys.values()):
            # Restored from a backup that was made without the callback.
            return self._begin(int(self._sequence.phase), next_epoch=-1)
        return _Seen(**{name: float(notes[key]) for name, key in keys.items()})

    def _write(self, seen: _Seen, is_best: bool = False) -> None:
        """Notes what has been seen, and the weights if they are the best so far."""
        notes = self._sequence.notes
        for name, number in asdict(seen).items():
            notes[f"{self._key}/{name}"] = np.array(number, np.float64)
        if self.restore_best_weights and is_best:
            for i, weight in enumerate(self.model.get_weights()):
                # NumPy cannot write bfloat16, which float32 holds exactly.
                dtype = np.float32 if weight.dtype.kind == "V" else weight.dtype
                notes[f"{self._key}/weight/{i}"] = weight.astype(dtype)


def _sign(mode: str, monitor: str) -> int:
    """Returns 1 if a higher value of the metric is better, -1 if a lower one is."""
    signs = {"min": -1, "max": 1}
    if mode in signs:
        return signs[mode]
    # Keras names a metric `<output>_<metric>`, and `mean_io_u` is one of its own.
    words = monitor.lower().replace("io_u", "iou").split("_") if mode == "auto" else []
    for word in reversed(words):
        if re.fullmatch(_LOWER, word):
            return -1
        if re.fullmatch(_HIGHER, word):
            return 1
    raise ValueError(
        '`mode` must be "min" or "max", or "auto" for a metric whose name says which '
        f"way is better. Received: mode={mode!r}, monitor={monitor!r}. Pass "
        '`mode="min"` or `mode="max"`.'
    )


def _check_at_least_0(**arguments: float) -> None:
    for name, value in arguments.items():
        if not value >= 0:
            raise ValueError(
                f"`{name}` must be >= 0. Received: {name}={value!r}. "
                "Pass 0 to do without."
            )
