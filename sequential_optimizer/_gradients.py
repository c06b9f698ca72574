"""Lists of gradients, one entry per variable.

An entry is a tensor, a `tf.IndexedSlices` or `None`. If the variable has
`overwrite_with_gradient` set (float8 scales), the entry is the new value instead: it
is never divided, and accumulation takes the maximum, not the sum.
"""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from sequential_optimizer import _keras


def check_gradients(grads: Sequence[Any], variables: Sequence[Any]) -> None:
    """Raises ValueError without one entry per variable, or without any gradient."""
    missing = sum(gradient is None for gradient in grads)
    if len(grads) != len(variables) or missing == len(grads):
        raise ValueError(
            "`grads` must have one entry for each variable, and at least one gradient. "
            f"Received: {len(grads)} gradients, {missing} times `None`, for "
            f"{len(variables)} variables. Pass `trainable_variables` at the first call,"
            " and compute a loss that depends on them inside the `tf.GradientTape`."
        )


def check_variables(variables: Sequence[Any], optimizer: Any) -> None:
    """Raises ValueError unless an optimizer was built on the variables."""
    unknown = [v for v in variables if not _keras.is_trained(optimizer, v)]
    if unknown:
        raise ValueError(
            "`trainable_variables` must be among those that the optimizer was built "
            f"on. Received: {[_keras.path_of(v) for v in unknown]}. Create a new "
            "optimizer for a model with other variables."
        )


def computed_first(grads: Sequence[Any]) -> Any:
    """Returns a context whose operations, in a graph, wait for the gradients.

    Where one gradient tells that all of them will come, they wait for that one only:
    the others are still computed while the first weights are updated.
    """
    # Those of `tf.IndexedSlices`; any other gradient is one part.
    parts = [getattr(g, part, g) for g in grads for part in ("values", "indices")]
    parts = [p for p in parts if tf.is_symbolic_tensor(p)]
    # The backward pass begins at the last weights.
    if _what_may_fail(parts[-1:]) == _what_may_fail(parts):
        parts = parts[-1:]
    return tf.control_dependencies(parts)


def _what_may_fail(tensors: Sequence[tf.Tensor]) -> set[tf.Operation]:
    """Returns the operations that tensors come from and that may have no result."""
    found, new = set(), [tensor.op for tensor in tensors]
    while new:
        operation = new.pop()
        if operation not in found:
            found.add(operation)
            new += [*operation.control_inputs, *(x.op for x in operation.inputs)]
    return set(filter(_may_fail, found))


def _may_fail(operation: tf.Operation) -> bool:
    """Whether it reads data, or checks something. A variable can always be read."""
    if operation.type == "Placeholder":  # an input of the graph
        return operation.outputs[0].dtype != tf.resource
    is_check = operation.type.startswith("CheckNumerics")
    is_read = operation.type == "ReadVariableOp"
    return is_check or (operation.op_def.is_stateful and not is_read)


def divide(grads: Sequence[Any], divisor: float, variables: Sequence[Any]) -> list[Any]:
    """Divides every gradient by `divisor`."""
    return [
        g if g is None or _is_new_value(v) else keras.ops.divide(g, divisor)
        for g, v in zip(grads, variables, strict=True)
    ]


def add_to(accumulator: Any, gradient: Any, variable: Any) -> Any:
    """Returns the accumulator's new value, or `None` if there is no gradient."""
    (gradient,) = brought_inside([gradient], [variable])
    if gradient is None:
        return None
    add = tf.maximum if _is_new_value(variable) else tf.add
    return add(tf.cast(gradient, accumulator.dtype), accumulator)


def brought_inside(grads: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
    """Copies gradients from outside a branch into the graph of the branch.

    TensorFlow requires all gradients that a child reduces to be in one graph, even if
    the child changed only some. For sparse ones XLA needs the number of rows when it
    compiles, and a shape from outside the branch is not a constant inside.
    """
    inside = []
    for gradient, variable in zip(grads, variables, strict=True):
        shape = tf.TensorShape(variable.shape)
        if isinstance(gradient, tf.IndexedSlices) and shape.is_fully_defined():
            dtype = getattr(gradient.dense_shape, "dtype", tf.int64)
            rows = tf.constant(shape.as_list(), dtype)
            gradient = tf.IndexedSlices(gradient.values, gradient.indices, rows)
        elif tf.is_symbolic_tensor(gradient):
            gradient = tf.identity(gradient)
        inside.append(gradient)
    return inside


def _is_new_value(variable: Any) -> bool:
    return getattr(variable, "overwrite_with_gradient", False)
