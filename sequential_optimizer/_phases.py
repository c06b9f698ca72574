"""Which phase an update runs in.

Pure functions of (boundaries, ended phases, iterations): no optimizer in here,
so the rule can be read, and tested, on its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf

_LARGEST_ITERATION = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Phases:
    """The phases of a run: where each ends, and which child runs in it.

    Args:
        boundaries: tuple with one entry fewer than there are phases. An `int` is
            the number of updates after which the next phase starts, `None` a
            phase that lasts until `advance()` ends it. Every `None` comes after
            every `int` (`check_boundaries` sees to that).
        children: tuple of `int`, for each phase the index of its child.
    """

    boundaries: tuple[int | None, ...]
    children: tuple[int, ...]

    @property
    def last(self) -> int:
        """Index of the last phase."""
        return len(self.boundaries)

    def phase(self, iterations: Any, min_phase: Any) -> tf.Tensor:
        """Returns the phase that update number `iterations` runs in.

        Args:
            iterations: scalar integer tensor, the number of updates applied.
            min_phase: scalar integer tensor, the lowest phase that may run;
                every phase below it was ended by `advance()`.

        Returns:
            A scalar int32 tensor, 0 <= phase <= `last`.
        """
        integers = [b for b in self.boundaries if b is not None]
        reached = tf.reduce_sum(
            tf.cast(
                tf.cast(iterations, tf.int64) >= tf.constant(integers, tf.int64),
                tf.int64,
            )
        )
        phase = tf.maximum(reached, tf.cast(min_phase, tf.int64))
        return tf.cast(tf.minimum(phase, self.last), tf.int32)

    def child(self, phase: tf.Tensor) -> tf.Tensor:
        """Returns the index of the child of `phase`, a scalar int32 tensor."""
        if self.children == tuple(range(self.last + 1)):
            return phase
        return tf.gather(tf.constant(self.children, tf.int32), phase)


def check_boundaries(boundaries: Any, num_phases: int) -> tuple[int | None, ...]:
    """Returns `boundaries` as a tuple of `int` and `None`, or raises.

    Args:
        boundaries: list, tuple or 1-D NumPy array of integers and `None`.
        num_phases: how many phases the boundaries separate.

    Raises:
        ValueError: if the boundaries are not what `SequentialOptimizer` documents.
    """
    if isinstance(boundaries, np.ndarray):
        boundaries = boundaries.tolist()
    if not isinstance(boundaries, Sequence) or isinstance(boundaries, str | bytes):
        raise ValueError(
            "`boundaries` must be a list of integers and `None`. "
            f"Received: boundaries={boundaries!r}. "
            "For a single boundary, pass `boundaries=[10_000]`."
        )
    if len(boundaries) != num_phases - 1:
        raise ValueError(
            "`boundaries` must have one entry fewer than `optimizers`. "
            f"Received: {len(boundaries)} boundaries ({list(boundaries)!r}) for "
            f"{num_phases} optimizers. Pass one boundary between each two phases."
        )
    checked: list[int | None] = []
    for entry in boundaries:
        previous = checked[-1] if checked else 0
        checked.append(_check_entry(entry, previous, boundaries))
    return tuple(checked)


def _check_entry(
    entry: Any, previous: int | None, boundaries: Sequence[Any]
) -> int | None:
    if entry is None:
        return None
    received = f"Received: boundaries={list(boundaries)!r}."
    if not isinstance(entry, int | np.integer) or isinstance(entry, bool):
        raise ValueError(
            "Each entry of `boundaries` must be an integer or `None`, not "
            f"{entry!r} of type `{type(entry).__name__}`. {received} "
            "Count updates (steps), and round a fraction yourself."
        )
    if not 1 <= entry <= _LARGEST_ITERATION:
        raise ValueError(
            f"Each integer in `boundaries` must be >= 1 and fit int64. {received} "
            "Leave out a phase that is to run for no update."
        )
    if previous is None:
        raise ValueError(
            "An integer in `boundaries` may not follow a `None`, because a phase "
            f"that `advance()` ends has no known last update. {received} "
            "Use `None` for every boundary after the first `None`."
        )
    if entry <= previous:
        raise ValueError(
            f"The integers in `boundaries` must be strictly increasing. {received} "
            "Each counts updates from the start of training, not from the start "
            "of its phase."
        )
    return int(entry)
