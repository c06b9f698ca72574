"""Optimizer variables that `build` fills with the weights of the model.

Schedule-free and lookahead optimizers keep a second copy of the weights, taken in
`build()`. Every child is built before training begins, so by the time a later phase
starts that copy is out of date and has to be taken again.

To find which variables are copies, and of which weights, a twin of the optimizer, made
from its config, is built on probes: small variables like the weights, all with
different values. Twin and optimizer have their variables in the same order. The
optimizer's own values would not do: weights may be equal, and a restored checkpoint
changes these values.
"""

import contextlib
import copy
import itertools
import math
import threading
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from sequential_optimizer import _keras
from sequential_optimizer._saving import held_by, is_sequence

# What the twins must not change is global: random state, and Python's warnings.
_ONE_AT_A_TIME = threading.RLock()

_DIGITS = 127  # per power of two in bfloat16, without the power itself

Pairs = list[tuple[Any, Any]]  # a copy and its weight


def are_initialized(variables: Iterable[Any]) -> bool:
    """Returns, outside graphs, whether the variables have values yet.

    Under a strategy for several devices they do: it initializes what it creates.
    """
    strategy = tf.distribute.get_strategy()
    is_one = isinstance(strategy, tf.distribute.OneDeviceStrategy)
    if tf.distribute.has_strategy() and not is_one:
        return True
    return all(bool(_keras.native(v).is_initialized()) for v in variables)


def retake(copies: Iterable[tuple[Any, Pairs]], has_started: tf.Tensor) -> None:
    """Before an optimizer's first update, copies the weights as its `build` did.

    Args:
        copies: what `find_copies` returned.
        has_started: whether a phase of the child has begun. A user's class may not
            count its updates, and a user may set the count back.
    """
    for owner, pairs in copies:
        is_first = tf.equal(owner.iterations, 0) & ~has_started
        for slot, weight in pairs:
            owner.assign(slot, tf.where(is_first, tf.cast(weight, slot.dtype), slot))


def find_copies(child: Any, starts_later: bool) -> list[tuple[Any, Pairs]]:
    """Returns what `build` copied from the weights: in a child, and in what it wraps.

    Args:
        child: an optimizer that is built.
        starts_later: whether another child makes the first updates. If so, this warns
            of what will be out of date and cannot be taken again.
    """
    found = []
    for optimizer in _optimizers_in(child, set()):
        pairs, stale, reason = _examine(optimizer)
        if pairs:
            found.append((optimizer, pairs))
        if stale and starts_later and not optimizer.iterations.numpy():
            warnings.warn(
                "What an optimizer's `build` takes from the weights must be copies of "
                "them, which can be taken again when its phase starts. Received: "
                f"`{optimizer.name}`, {reason}. By then {len(stale)} of its variables "
                f"may be out of date: {stale[:3]}. Set them in its first update.",
                stacklevel=3,
            )
    return found


def _optimizers_in(optimizer: Any, seen: set[int]) -> Iterator[Any]:
    """Yields the optimizers that an optimizer holds, at any depth, and itself last."""
    if is_sequence(optimizer) or id(optimizer) in seen:
        return  # A sequence looks after its own children.
    seen.add(id(optimizer))
    for _, inner in held_by(optimizer):
        if isinstance(inner, keras.optimizers.Optimizer):
            yield from _optimizers_in(inner, seen)
    if optimizer.built:
        yield optimizer


def _slots_of(optimizer: Any) -> list[Any]:
    """Returns the variables of an optimizer without those of what it wraps."""
    *inner, _ = _optimizers_in(optimizer, set())
    # Keras does not list what a class creates with `tf.Variable`.
    raw = [held for _, held in held_by(optimizer) if isinstance(held, tf.Variable)]
    slots = {id(slot): slot for slot in [*optimizer.variables, *raw]}
    not_slots = [_keras.trained_variables(optimizer), *(o.variables for o in inner)]
    for other in itertools.chain(_keras.counter_and_rate(optimizer), *not_slots):
        slots.pop(id(other), None)
    return list(slots.values())


def _examine(optimizer: Any) -> tuple[Pairs, list[str], str]:
    """Returns the copies, the names of what may be out of date, and why."""
    slots, weights = _slots_of(optimizer), _keras.trained_variables(optimizer)
    try:
        with _ONE_AT_A_TIME, _keras.random_state_kept(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The user has seen these already.
            probes = [_probe_like(weight) for weight in weights]
            first = _seen_in_twin(optimizer, slots, probes, 1)
            if not any(np.any(np.frombuffer(v)) for _, v in first[len(weights) :]):
                return [], [], ""  # As in most optimizers: none depends on weights.
            second, again = (_seen_in_twin(optimizer, slots, probes, i) for i in (2, 1))
    except Exception as error:  # noqa: BLE001
        # Whatever a user's class raises here, it may still train.
        stale = [slot.name for slot in slots if not _is_constant(slot)]
        return [], stale, f"which cannot be made from its config ({error!r:.200})"
    weight_of = dict(zip(zip(first, second, strict=True), weights, strict=False))
    pairs, stale = [], []
    for i, slot in enumerate(slots, start=len(weights)):
        weight = weight_of.get((first[i], second[i]))
        if weight is not None and weight.shape == slot.shape:
            pairs.append((slot, weight))
        elif first[i] != second[i] and first[i] == again[i]:  # not random
            stale.append(slot.name)
    return pairs, stale, "which computes something else from them"


def _is_constant(slot: Any) -> bool:
    if not are_initialized([slot]):
        return len(slot.shape) == 0
    value = slot.numpy().ravel()
    return bool(np.all(value == value[:1]))


def _probe_like(weight: Any) -> Any:
    """Returns a small variable with the rank, dtype and name of a weight."""
    shape = tf.TensorShape(weight.shape)
    dimensions = [None] if shape.rank is None else shape
    sizes = [2 if d is None else min(d, 2) for d in dimensions]
    if not _keras.is_of_keras(weight):
        name = weight.name.partition(":")[0]
        return tf.Variable(tf.zeros(sizes, weight.dtype), name=name)
    scope, _, name = weight.path.rpartition("/")
    parent, _, last = scope.rpartition("/")
    in_scope = keras.name_scope(last, override_parent=parent)
    with in_scope if scope else contextlib.nullcontext():
        return keras.Variable(np.zeros(sizes), dtype=weight.dtype, name=name)


def _seen_in_twin(
    optimizer: Any, slots: list[Any], probes: list[Any], factor: int
) -> list[tuple[tuple[int, ...], bytes]]:
    """Returns the shape and values of each probe, and of each variable of a twin."""
    start = 0
    for probe in probes:
        numbers = start + np.arange(math.prod(probe.shape))
        start += numbers.size
        # Exact in bfloat16. Pairs of the values for factors 1 and 2 differ for
        # `_DIGITS` squared numbers.
        numbers += (factor - 1) * (numbers // _DIGITS)
        value = factor * (1 + (1 + numbers % _DIGITS) / (_DIGITS + 1))
        probe.assign(np.reshape(value, probe.shape))
    twin = type(optimizer).from_config(copy.deepcopy(optimizer.get_config()))
    twin.build(probes)
    variables = _slots_of(twin)
    if [len(v.shape) for v in variables] != [len(slot.shape) for slot in slots]:
        raise ValueError("it makes other variables on other weights")
    values = [np.asarray(v.numpy(), np.float64) for v in [*probes, *variables]]
    return [(value.shape, value.tobytes()) for value in values]
