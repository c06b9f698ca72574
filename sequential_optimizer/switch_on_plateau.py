"""Ends a phase when a metric stalls."""

import warnings
from dataclasses import astuple, dataclass
from typing import Any

import keras
import numpy as np

from sequential_optimizer._find_sequence import find_sequence
from sequential_optimizer._phases import last_started
from sequential_optimizer.phase_logger import Logs, print_line

# Words in the names of metrics that say which way is better.
_LOWER = "loss error crossentropy divergence perplexity mse rmse mae mape msle"
_HIGHER = "acc accuracy auc precision recall f1 fbeta iou r2"
_BETTER = dict.fromkeys(_LOWER.split(), "min") | dict.fromkeys(_HIGHER.split(), "max")


@dataclass
class _Seen:
    """What SwitchOnPlateau has seen of a phase: only numbers, which can be saved."""

    phase: float
    started: float  # the iteration at which the run began
    best: float
    next_epoch: float  # the first not seen yet, -1 if none has been seen
    cooldown: float
    wait: float = 0


@dataclass(eq=False)
class SwitchOnPlateau(keras.callbacks.Callback):
    """Ends the current phase when a metric has stopped improving.

    Works like Keras' `ReduceLROnPlateau`, except that it calls `advance()` of the
    model's `SequentialOptimizer` instead of cutting a learning rate: one phase per
    plateau. An integer boundary may end the phase first. After each switch, whatever
    caused it, the best value, the patience and the cooldown start over. An epoch
    counts for the phase of its last update. In the last phase the callback does
    nothing.

    Each call of `fit`, or of `on_train_begin` in your own loop, starts over, unless
    `BackupAndRestore` resumes a run. What the callback has seen is saved with the
    optimizer, so a resumed run switches in the same epoch as one that was never
    interrupted. In the list of callbacks, put `SwitchOnPlateau` before
    `BackupAndRestore`, which saves when its turn comes.

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
            which the phase ends; 0 counts as 1. Defaults to 10.
        min_delta: float >= 0; only a change by more than this is an improvement.
            Defaults to 1e-4.
        mode: `"min"` if lower is better, `"max"` if higher is, `"auto"` (the
            default) to tell from the name of the metric: its last telling word
            decides, because Keras' names are `<output>_<metric>`.
        cooldown: int >= 0, the number of epochs after a switch that do not count
            towards the patience. Defaults to 0.
        min_iterations: int >= 0, the number of updates that a phase makes in this
            call of `fit` before the callback may end it. Defaults to 0.
        restore_best_weights: bool, whether to go back to the weights of a phase's
            best epoch when the callback ends the phase. They are those of the whole
            model, even if it has several optimizers, and a copy of them is saved with
            the optimizer. A moving average of `use_ema` starts over from them. Put
            callbacks that keep weights (`ModelCheckpoint`, `EarlyStopping`) before this
            one, which sets others; of several such callbacks for one model, only the
            last can restore. Defaults to `False`.
        verbose: 1 to print a line at each switch, 0 (the default) for silence.
        optimizer: the SequentialOptimizer whose phases the callback ends, or an
            optimizer that wraps it. Defaults to that of the model: the one in
            `model.optimizer` or, if there is none, in the other attributes of the
            model. A model with several, such as a GAN, takes one callback for each.

    Raises:
        ValueError: if an argument breaks one of these rules, or if `mode="auto"`
            cannot tell from the name of the metric which way is better; when `fit`
            begins, if there is no SequentialOptimizer or more than one to choose
            from; in the first epoch, if that is in its last phase already; after an
            epoch, if two of these callbacks watch the same metric for the same
            optimizer.
    """

    monitor: str = "val_loss"
    patience: int = 10
    min_delta: float = 1e-4
    mode: str = "auto"
    cooldown: int = 0
    min_iterations: int = 0
    restore_best_weights: bool = False
    verbose: int = 0
    optimizer: Any = None

    def __post_init__(self) -> None:
        super().__init__()
        self._sign = _sign(self.mode, self.monitor)
        self._seen_key = f"SwitchOnPlateau/{self.monitor}/seen"
        self._weight_key = f"SwitchOnPlateau/{self.monitor}/weight/"
        for name in ("patience", "min_delta", "cooldown", "min_iterations"):
            value = getattr(self, name)
            if not value >= 0:
                raise ValueError(
                    f"`{name}` must be >= 0. Received: {name}={value!r}. Use 0 or more."
                )

    def set_model(self, model: keras.Model) -> None:
        """Creates the notes that a backup may restore, if there are none yet.

        Keras calls this before any callback restores a backup, and in `evaluate`, too.
        """
        super().set_model(model)
        self._sequence = find_sequence(self)
        self._write(self._read())

    def on_train_begin(self, logs: Logs = None) -> None:
        """Starts over, unless a callback before this one has restored a backup."""
        if self._sequence.notes.get(self._seen_key) is self._noted:
            self._write(self._begin(self._iterations()), is_best=True)

    def on_epoch_begin(self, epoch: int, logs: Logs = None) -> None:
        """Raises if no phase can end, and warns if what was seen has been lost."""
        seen, last = self._read(), len(self._sequence.boundaries)
        # Not when training begins: after that a callback may restore an earlier phase.
        if seen.next_epoch == -1 and int(self._sequence.phase) == last:
            raise ValueError(
                "`SwitchOnPlateau` needs a phase that can still end. Received: an "
                "optimizer in its last phase. Drop the callback, or add a phase."
            )
        if seen.next_epoch not in (-1, epoch):
            warnings.warn(
                f"`SwitchOnPlateau` has seen the epochs before {int(seen.next_epoch)}, "
                f"and epoch {epoch} begins: the backup was made before this callback's "
                "turn. Put it before the callback that saves.",
                stacklevel=2,
            )
        seen.next_epoch = epoch
        self._write(seen)

    def on_epoch_end(self, epoch: int, logs: Logs = None) -> None:
        """Looks at the metric, and ends the phase if it has stalled."""
        logs, seen, phase = logs or {}, self._read(), int(self._sequence.phase)
        if seen.next_epoch > epoch:
            raise ValueError(
                "Each `SwitchOnPlateau` must watch a different metric. Received: two "
                f'with monitor="{self.monitor}". Leave one of them out.'
            )
        if phase != seen.phase:
            seen = self._begin(seen.started, self.cooldown)
        seen.next_epoch = epoch + 1
        # False if the whole epoch belongs to a phase that has ended already.
        is_of_phase = last_started(self._sequence.phase_starts) in (-1, phase)
        is_best = False
        if is_of_phase and phase < len(self._sequence.boundaries):
            if self.monitor in logs:
                is_best = self._count(float(logs[self.monitor]), seen)
                if self._is_stalled(seen):
                    self._switch(epoch, seen)
            else:
                warnings.warn(
                    f"`SwitchOnPlateau` watches the metric `{self.monitor}`, which is "
                    f"not available. Available metrics are: {', '.join(logs)}.",
                    stacklevel=2,
                )
        self._write(seen, is_best)

    def on_train_end(self, logs: Logs = None) -> None:
        """Drops the best weights, so that later files do not hold them for nothing."""
        for key in self._weight_keys():
            del self._sequence.notes[key]

    def _count(self, value: float, seen: _Seen) -> bool:
        """Counts an epoch, and returns whether it is the best of its phase so far."""
        is_best = self._sign * value > self._sign * seen.best + self.min_delta
        if is_best:
            seen.best, seen.wait = value, 0
        elif seen.cooldown == 0:
            seen.wait += 1
        seen.cooldown = max(seen.cooldown - 1, 0)
        return is_best

    def _is_stalled(self, seen: _Seen) -> bool:
        begin = max(seen.started, self._sequence.phase_starts[int(seen.phase)])
        updates = self._iterations() - begin
        return updates >= self.min_iterations and seen.wait >= max(self.patience, 1)

    def _switch(self, epoch: int, seen: _Seen) -> None:
        # There is no best epoch if the metric was never a number.
        if self.restore_best_weights and np.isfinite(seen.best):
            notes = self._sequence.notes
            self.model.set_weights([notes[key] for key in self._weight_keys()])
            self._sequence.restart_averages()
        before = self._sequence.active_child().name
        self._sequence.advance()
        if self.verbose:
            after = self._sequence.active_child().name
            wait = f"{seen.wait:g} without a better {self.monitor} than {seen.best:g}"
            print_line(self, f"epoch {epoch + 1}: {before} -> {after}, after {wait}")

    def _begin(self, started: float, cooldown: int = 0) -> _Seen:
        """Returns what has been seen when the current phase begins: nothing."""
        best = -self._sign * np.inf
        return _Seen(int(self._sequence.phase), started, best, -1, cooldown)

    def _iterations(self) -> int:
        return int(self._sequence.iterations.numpy())

    # What is noted on the optimizer is saved and restored with the optimizer.

    def _read(self) -> _Seen:
        noted = self._sequence.notes.get(self._seen_key)
        if noted is None:  # also after a backup made without this callback
            return self._begin(self._iterations())
        return _Seen(*noted.tolist())

    def _weight_keys(self) -> list[str]:
        return [key for key in self._sequence.notes if key.startswith(self._weight_key)]

    def _write(self, seen: _Seen, is_best: bool = False) -> None:
        """Notes what has been seen, and the weights if they are the best so far."""
        notes = self._sequence.notes
        self._noted = notes[self._seen_key] = np.array(astuple(seen))
        if self.restore_best_weights and (is_best or not self._weight_keys()):
            for i, weight in enumerate(self.model.get_weights()):
                # NumPy cannot write bfloat16, which float32 holds exactly.
                dtype = np.float32 if weight.dtype.kind == "V" else weight.dtype
                notes[f"{self._weight_key}{i}"] = weight.astype(dtype)


def _sign(mode: str, monitor: str) -> int:
    """Returns 1 if a higher value of the metric is better, -1 if a lower one is."""
    # Keras names a metric `<output>_<metric>`, and has one called `mean_io_u`.
    words = monitor.lower().replace("io_u", "iou").split("_")
    telling = [word for word in words if word in _BETTER]
    better = _BETTER[telling[-1]] if mode == "auto" and telling else mode
    if better not in ("min", "max"):
        raise ValueError(
            '`mode` must be "min" or "max", or "auto" for a metric whose name says '
            f"which way is better. Received: mode={mode!r}, monitor={monitor!r}. Pass "
            '`mode="min"` or `mode="max"`.'
        )
    return 1 if better == "max" else -1
