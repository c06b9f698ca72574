"""Which phase an update runs in.

Pure functions of (boundaries, ended phases, iterations), without an optimizer, so
the rule can be read and tested alone.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class Phases:
    """The phases of a run: where each ends, and which child runs in it.

    Args:
        boundaries: tuple with one entry fewer than there are phases. An `int` is
            the number of updates after which the next phase starts; `None` means
            that the phase lasts until `advance()` ends it. Every `None` comes
            after every `int` (`parse` ensures this).
        child_of_phase: tuple of `int`, the index of each phase's child.
    """

    boundaries: tuple[int | None, ...]
    child_of_phase: tuple[int, ...]

    @classmethod
    def parse(cls, boundaries: Any, child_of_phase: tuple[int, ...]) -> "Phases":
        """Returns the phases for the boundaries that a user passes.

        Args:
            boundaries: list, tuple or 1-D NumPy array of integers and `None`.
            child_of_phase: see above.

        Raises:
            ValueError: if the boundaries are not what `SequentialOptimizer` documents.
        """
        if isinstance(boundaries, np.ndarray):
            boundaries = boundaries.tolist()
        if (
            not isinstance(boundaries, list | tuple)
            or len(boundaries) != len(child_of_phase) - 1
            or not all(map(_may_follow, boundaries, [0, *boundaries]))
        ):
            raise ValueError(
                "`boundaries` must be a list with one entry fewer than `optimizers`: "
                "strictly increasing integers >= 1 that fit int64, then any number of "
                f"`None`. Received: boundaries={boundaries!r}, {len(child_of_phase)} "
                "optimizers. Count updates (steps) from the start of training."
            )
        return cls(tuple(b and int(b) for b in boundaries), child_of_phase)

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
        integers = tf.constant([b for b in self.boundaries if b is not None], tf.int64)
        reached = tf.math.count_nonzero(tf.cast(iterations, tf.int64) >= integers)
        phase = tf.maximum(reached, tf.cast(min_phase, tf.int64))
        return tf.cast(tf.minimum(phase, self.last), tf.int32)

    def child(self, phase: tf.Tensor) -> tf.Tensor:
        """Returns the index of the child of `phase`, a scalar int32 tensor."""
        if self.child_of_phase == tuple(range(self.last + 1)):
            return phase
        return tf.gather(tf.constant(self.child_of_phase, tf.int32), phase)

    def parse_phase(self, phase: Any) -> int | None:
        """Returns the phase that `advance(to=phase)` names, or raises ValueError."""
        if phase is None:
            return None
        if not _is_integer(phase) or not 0 <= phase <= self.last:
            raise ValueError(
                f"`to` must be the index of a phase, an integer from 0 to {self.last}. "
                f"Received: to={phase!r}. Pass `None` for the phase after this one."
            )
        return int(phase)

    def starts_after(self, starts: Any, phase: tf.Tensor, iterations: Any) -> tf.Tensor:
        """Returns for each phase the iteration of its first update, or -1.

        Args:
            starts: int64 tensor with an entry per phase, as it was before this update.
            phase: scalar int32 tensor, the phase that made this update.
            iterations: scalar int64 tensor, the number of updates before this one.
        """
        index = tf.range(self.last + 1)
        begins = tf.logical_and(tf.equal(index, phase), tf.less(starts, 0))
        starts = tf.where(begins, tf.cast(iterations, tf.int64), starts)
        # Phases above this one ran before the boundaries of a resumed run were raised.
        return tf.where(index > phase, tf.constant(-1, tf.int64), starts)


def last_started(starts: Iterable[int]) -> int:
    """Returns the last phase that has made an update, or -1."""
    return max((phase for phase, start in enumerate(starts) if start >= 0), default=-1)


def switches_between(before: Any, now: Any, iterations: int) -> list[tuple[int, ...]]:
    """Returns the switches between two looks at `phase_starts`, in order.

    Args:
        before: `phase_starts` at the first look.
        now: `phase_starts` at the second look.
        iterations: the number of updates at the first look.

    Returns:
        (iteration, phase before, phase after) for each: so many updates came before.
    """
    last, end = last_started(before), last_started(now)
    if 0 <= end < last:
        # A resumed run whose boundaries were raised.
        return [(iterations, last, end)]
    phases = [last, *(k for k, start in enumerate(now) if k > last and start >= 0)]
    return [(int(now[k]), old, k) for old, k in itertools.pairwise(phases) if old >= 0]


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _may_follow(entry: Any, previous: int | None) -> bool:
    if not _is_integer(entry) or previous is None:
        return entry is None
    return previous < int(entry) <= np.iinfo(np.int64).max
