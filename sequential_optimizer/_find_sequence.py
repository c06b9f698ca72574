"""Which SequentialOptimizer a model's optimizer is or wraps."""

from typing import Any

import keras

from sequential_optimizer._phases import last_started
from sequential_optimizer.optimizer import SequentialOptimizer


def find_sequence(optimizer: Any, callback: keras.callbacks.Callback) -> Any:
    """Returns the SequentialOptimizer that `optimizer` is or wraps.

    Args:
        optimizer: the optimizer of a compiled model.
        callback: the callback that needs it, for the error.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = sequences_in(optimizer)
    if len(found) != 1:
        raise ValueError(
            f"`{type(callback).__name__}` needs a model whose optimizer is or wraps "
            f"one `SequentialOptimizer`. Received: {optimizer!r}, with {len(found)} "
            "of them. Compile the model with "
            "`optimizer=SequentialOptimizer([...], boundaries=[...])`."
        )
    return found[0]


def child_of(sequence: SequentialOptimizer, phase: int) -> Any:
    """Returns the optimizer that runs in a phase."""
    return sequence.children[sequence.child_of_phase[phase]]


def phase_of_last_update(sequence: SequentialOptimizer) -> int:
    """Returns the phase that the last update ran in; before the first, the next's."""
    phase = last_started(sequence.phase_starts)
    return int(sequence.phase) if phase is None else phase


def sequences_in(optimizer: Any) -> list[SequentialOptimizer]:
    """Returns the sequences that an optimizer is or wraps."""
    if isinstance(optimizer, SequentialOptimizer):
        return [optimizer]
    if hasattr(optimizer, "inner_optimizer"):
        return sequences_in(optimizer.inner_optimizer)
    inner = getattr(optimizer, "optimizers", [])
    return [found for one in inner for found in sequences_in(one)]
