"""Which SequentialOptimizer a callback follows."""

from typing import Any

import keras

from sequential_optimizer._saving import items_in
from sequential_optimizer.optimizer import SequentialOptimizer


def find_sequence(callback: Any) -> Any:
    """Returns the sequence in a callback's `optimizer` or, without one, in its model.

    Raises:
        ValueError: if there is none, or more than one.
    """
    name, model, optimizer = type(callback).__name__, callback.model, callback.optimizer
    found = _sequences_of(model) if optimizer is None else _sequences_in(optimizer)
    if len(found) != 1:
        raise ValueError(
            f"`{name}` needs one `SequentialOptimizer` to follow. Received: "
            f"{optimizer or model!r}, with {len(found)} of them. Compile the model "
            f"with one, or pass the one to follow: `{name}(optimizer=...)`."
        )
    return found[0]


def _sequences_of(model: Any) -> list[SequentialOptimizer]:
    """Returns the sequences in `model.optimizer`, or else in the model's attributes."""
    # A model that overrides `compile` has Keras' default optimizer, or none.
    found = _sequences_in(getattr(model, "optimizer", None))
    found = found or _sequences_in(getattr(model, "__dict__", {}))
    return list({id(sequence): sequence for sequence in found}.values())


def _sequences_in(where: Any) -> list[SequentialOptimizer]:
    """Returns the sequences that an optimizer is or wraps, or a container holds."""
    if isinstance(where, SequentialOptimizer):
        return [where]
    inner: Any = []
    if isinstance(where, keras.optimizers.Optimizer):
        inner = getattr(where, "optimizers", [getattr(where, "inner_optimizer", None)])
    elif isinstance(where, dict | list | tuple):
        inner = items_in(where)
    return [found for one in inner for found in _sequences_in(one)]


def child_of(sequence: SequentialOptimizer, phase: int) -> Any:
    """Returns the optimizer that runs in a phase."""
    return sequence.children[sequence.child_of_phase[phase]]
