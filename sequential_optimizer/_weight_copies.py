"""Optimizer variables that `build` fills with the weights of the model.

Schedule-free and lookahead optimizers keep a second copy of the weights, taken in
`build()`. Every child is built before training begins, so by the time a later phase
starts that copy is out of date and has to be taken again.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

# Two shapes, because optimizers treat matrices and vectors differently, and values
# that no initializer produces.
_PROBES = {
    "matrix": np.array([[0.1372, 0.8517], [0.4093, 0.6211]], np.float32),
    "vector": np.array([0.2718, 0.5772], np.float32),
}


def are_initialized(variables: Iterable[Any]) -> bool:
    """Returns, outside of graphs, whether the variables have values yet.

    Those of a strategy have: it initializes them when it creates them.
    """
    if tf.distribute.has_strategy():
        return True
    tensors = (v.value if _is_of_keras(v) else v for v in variables)
    return all(bool(tensor.is_initialized()) for tensor in tensors)


def _is_of_keras(variable: Any) -> bool:
    # Not `isinstance`: in older versions of Keras the variables of layers are of the
    # class that `keras.Variable` is derived from.
    return hasattr(variable, "path")


def find_weight_copies(
    child: keras.optimizers.Optimizer, variables: Sequence[Any]
) -> tuple[tuple[int, int], ...]:
    """Returns which of a built child's variables `build` copied from the weights.

    A twin of the child, made from its config, is built on two tiny variables; what
    equals them afterwards is a copy, and its name tells its kind. The values of the
    child itself would not do: a restored checkpoint changes them.

    Args:
        child: a built optimizer.
        variables: the model's variables that it was built on.

    Returns:
        Pairs (index into `child.variables`, index into `variables`).
    """
    positions = {id(slot): i for i, slot in enumerate(child.variables)}
    return tuple(
        (positions[id(slot)], i)
        for optimizer in _optimizers_in(child)
        for slot, i in _copies(optimizer, variables)
    )


def _optimizers_in(child: keras.optimizers.Optimizer) -> list[Any]:
    if hasattr(child, "children"):
        return []  # A SequentialOptimizer looks after its own children.
    if not hasattr(child, "optimizers"):
        return [child]
    inner = [_optimizers_in(optimizer) for optimizer in child.optimizers]
    return list(itertools.chain.from_iterable(inner))


def _copies(
    optimizer: keras.optimizers.Optimizer, variables: Sequence[Any]
) -> list[tuple[keras.Variable, int]]:
    kinds = _copied_kinds(optimizer)
    sources = {
        f"{_prefix(variable)}_{kind}": i
        for i, variable in enumerate(variables)
        for kind in kinds
    }
    return [
        (slot, sources[slot.name])
        for slot in optimizer.variables
        if slot.name in sources
    ]


def _copied_kinds(child: keras.optimizers.Optimizer) -> set[str]:
    probes = [keras.Variable(value, name=name) for name, value in _PROBES.items()]
    try:
        twin = type(child).from_config(child.get_config())
        twin.build(probes)
    except Exception:  # noqa: BLE001
        # Whatever a user's class raises here, it says that the class cannot be made
        # from its config or does not take these shapes, not that training fails.
        return set()
    return {
        slot.name.removeprefix(f"{_prefix(probe)}_")
        for slot in twin.variables
        for probe in probes
        if slot.shape == probe.shape and np.array_equal(slot.numpy(), probe.numpy())
    }


def _prefix(variable: Any) -> str:
    """The name that `Optimizer.add_variable_from_reference` starts with."""
    if _is_of_keras(variable):
        return variable.path.replace("/", "_")
    return variable.name.replace("/", "_").replace(":", "_")
