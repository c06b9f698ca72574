"""Lists of gradients, one entry a variable.

An entry is a tensor, a `tf.IndexedSlices` or `None`. Where the variable says so
(`overwrite_with_gradient`, float8 scales), it is not a gradient but the new value:
that is never divided, and over a window the largest counts, not the sum.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from sequential_optimizer._keras import is_trained


def check_gradients(grads: Sequence[Any], variables: Sequence[Any]) -> None:
    """Raises ValueError unless there is one entry a variable, and a gradient."""
    if len(grads) != len(variables):
        raise ValueError(
            "`grads` must have one entry for each variable. "
            f"Received: {len(grads)} gradients for {len(variables)} variables. "
            "Pass `None` for a variable without a gradient."
        )
    if all(gradient is None for gradient in grads):
        raise ValueError(
            "`grads` must hold a gradient for at least one variable. "
            f"Received: {len(grads)} times `None`. Check that the loss depends on "
            "the variables and is computed inside the `tf.GradientTape`."
        )


def check_variables(variables: Sequence[Any], optimizer: Any) -> None:
    """Raises ValueError unless an optimizer was built on the variables."""
    unknown = [
        getattr(variable, "path", variable.name)
        for variable in variables
        if not is_trained(optimizer, variable)
    ]
    if unknown:
        raise ValueError(
            "`trainable_variables` must be among those that the optimizer was built "
            f"on. Received: {unknown}. Create a new optimizer for a model with other "
            "variables."
        )


def computed_first(grads: Sequence[Any]) -> contextlib.AbstractContextManager[None]:
    """Returns a context in which all operations of a graph wait for the gradients."""
    parts: list[Any] = []
    for gradient in grads:
        is_sparse = isinstance(gradient, tf.IndexedSlices)
        parts += [gradient.values, gradient.indices] if is_sparse else [gradient]
    return tf.control_dependencies([p for p in parts if tf.is_symbolic_tensor(p)])


def divide(grads: Sequence[Any], divisor: float, variables: Sequence[Any]) -> list[Any]:
    """Divides every gradient by `divisor`."""
    return [
        gradient
        if gradient is None or _is_new_value(variable)
        else keras.ops.divide(gradient, divisor)
        for gradient, variable in zip(grads, variables, strict=True)
    ]


def add_to(
    accumulators: Sequence[Any], grads: Sequence[Any], variables: Sequence[Any]
) -> list[Any]:
    """Returns what the accumulators hold after `grads`, `None` for no gradient."""
    grads = brought_inside(grads, variables)
    return [
        None
        if gradient is None
        else tf.maximum(gradient, accumulator)
        if _is_new_value(variable)
        else tf.add(gradient, accumulator)
        for gradient, variable, accumulator in zip(
            grads, variables, accumulators, strict=True
        )
    ]


def brought_inside(grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """Makes gradients from outside of a branch its own.

    TensorFlow wants all gradients that a child reduces to be of one graph, also where
    the child changed only some. Of sparse ones XLA needs the number of rows when it
    compiles, and a shape from outside of the branch is no constant there.
    """
    inside = []
    for gradient, variable in zip(grads, variables, strict=True):
        shape = tf.TensorShape(variable.shape)
        if isinstance(gradient, tf.IndexedSlices) and shape.is_fully_defined():
            rows = tf.constant(shape.as_list(), tf.int64)
            gradient = tf.IndexedSlices(gradient.values, gradient.indices, rows)
        elif tf.is_symbolic_tensor(gradient):
            gradient = tf.identity(gradient)
        inside.append(gradient)
    return inside


def _is_new_value(variable: Any) -> bool:
    return getattr(variable, "overwrite_with_gradient", False)
