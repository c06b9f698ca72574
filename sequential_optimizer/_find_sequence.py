"""Which SequentialOptimizer a model is trained with, and where it stands."""

from typing import Any, NamedTuple

import keras

from sequential_optimizer.optimizer import SequentialOptimizer


def find_sequence(optimizer: Any, callback: keras.callbacks.Callback) -> Any:
    """Returns the SequentialOptimizer that `optimizer` is or wraps.

    Args:
        optimizer: the optimizer of a compiled model.
        callback: the callback that needs it, for the error.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = _sequences_in(optimizer)
    if len(found) != 1:
        raise ValueError(
            f"`{type(callback).__name__}` needs a model whose optimizer is or wraps "
            f"one `SequentialOptimizer`. Received: {optimizer!r}, with {len(found)} "
            "of them. Compile the model with "
            "`optimizer=SequentialOptimizer([...], boundaries=[...])`."
        )
    return found[0]


def names_of_phases(optimizer: Any) -> list[str]:
    """Returns the names of the children, phase by phase; none for other optimizers."""
    found = _sequences_in(optimizer)
    if len(found) != 1:
        return []
    phases = range(found[0]._phases.last + 1)
    return [child_of(found[0], phase).name for phase in phases]


def _sequences_in(optimizer: Any) -> list[SequentialOptimizer]:
    if isinstance(optimizer, SequentialOptimizer):
        return [optimizer]
    if hasattr(optimizer, "inner_optimizer"):
        return _sequences_in(optimizer.inner_optimizer)
    inner = getattr(optimizer, "optimizers", [])
    return [found for one in inner for found in _sequences_in(one)]


def child_of(sequence: SequentialOptimizer, phase: int) -> Any:
    return sequence.children[sequence._phases.children[phase]]


def phase_of_last_update(sequence: SequentialOptimizer) -> int:
    phase = count(sequence._last_phase)
    # There is none before the first update, nor if that phase has been dropped.
    return phase if 0 <= phase <= sequence._phases.last else int(sequence.phase)


def count(counter: keras.Variable) -> int:
    # Keras' variables that are mirrored on several devices have no `__int__`.
    return int(counter.numpy())


class _Switch(NamedTuple):
    iteration: int  # updates made before it
    before: int  # phases
    after: int


class Watch:
    """Finds the switches between updates that were made while nobody looked.

    Which updates those were follows from the counters of the children: each counts
    its own. As long as the phase stays, looking reads one scalar.
    """

    def __init__(self, sequence: SequentialOptimizer) -> None:
        self._sequence = sequence
        self._note()

    def _note(self) -> None:
        self._phase = phase_of_last_update(self._sequence)
        self._iteration = count(self._sequence.iterations)
        self._made = [count(child._iterations) for child in self._sequence.children]

    def switches(self) -> list[_Switch]:
        """Returns the switches since the last call, in their order."""
        first, last = self._phase, phase_of_last_update(self._sequence)
        if first == last:
            return []
        iteration, made_before = self._iteration, self._made
        self._note()
        left = [now - then for now, then in zip(self._made, made_before, strict=True)]
        if last < first:  # the boundaries of a resumed run were raised
            return [_Switch(iteration, first, last)]
        found = []
        for phase in range(first, last):
            updates = self._updates_in(phase, last, iteration, left)
            left[self._sequence._phases.children[phase]] -= updates
            iteration += updates
            found.append(_Switch(iteration, phase, phase + 1))
        return found

    def _updates_in(
        self, phase: int, last: int, iteration: int, left: list[int]
    ) -> int:
        """Returns how many updates `phase`, begun at `iteration`, made.

        If the child came back since, this is the largest number it can be: exact if
        the phase ended at its boundary, or if there was one update since the last
        look.
        """
        phases = self._sequence._phases
        child, boundary = phases.children[phase], phases.boundaries[phase]
        updates = left[child]
        if child not in phases.children[phase + 1 : last + 1]:
            return updates
        if child == phases.children[last]:
            updates -= 1  # Its last phase made an update, or it would not be the last.
        if boundary is not None:
            updates = min(updates, boundary - iteration)
        return max(updates, 0)


def print_line(callback: keras.callbacks.Callback, line: str) -> None:
    """Prints a line, below the progress bar if there is one."""
    has_bar = (callback.params or {}).get("verbose") in (1, "auto")
    print("\n" * has_bar + line)
