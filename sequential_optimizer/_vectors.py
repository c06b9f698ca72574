"""All weights of a model as one vector."""

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from sequential_optimizer import _keras

# The distance from 1 to the next number, for each type that weights may have.
EPSILON = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23, "float64": 2**-52}


def check_variable(variable: Any) -> None:
    """Raises ValueError unless a variable can be searched over."""
    name = _keras.path_of(variable)
    dtype = tf.as_dtype(variable.dtype).name
    if dtype not in EPSILON or getattr(variable, "overwrite_with_gradient", False):
        raise ValueError(
            f"A quasi-Newton method needs weights of type {', '.join(EPSILON)} that "
            f"nothing else changes. Received: `{name}` of type {dtype}. Freeze the "
            "layer, or use another optimizer."
        )
    if getattr(variable, "constraint", None) is not None:
        raise ValueError(
            "A quasi-Newton method cannot keep a constraint, which would move the "
            f"weights away from its search. Received: `{name}` with "
            f"{variable.constraint}. Add a penalty to the loss instead, or freeze "
            "the layer."
        )
    if not tf.TensorShape(variable.shape).is_fully_defined():
        raise ValueError(
            "A quasi-Newton method needs the shape of each variable. Received: "
            f"`{name}` of shape {variable.shape}. Create it with a shape that is known."
        )


def check_shape(gradient: Any, variable: Any) -> None:
    """Raises ValueError if a gradient does not have the shape of its variable."""
    if gradient is None:
        return
    shape = tf.TensorShape(variable.shape)
    if isinstance(gradient, tf.IndexedSlices):
        found = shape[:1].concatenate(gradient.values.shape[1:])
    else:
        found = tf.convert_to_tensor(gradient).shape
    if not found.is_compatible_with(shape):
        raise ValueError(
            "Each entry of `grads` must have the shape of its variable. Received: "
            f"{found} for `{_keras.path_of(variable)}` of shape "
            f"{shape}. Pass the gradient of a scalar loss with respect to the variable."
        )


def check_distinct(variables: Sequence[Any]) -> None:
    """Raises ValueError if a variable is there twice."""
    seen: set[int] = set()
    for variable in variables:
        if id(variable) in seen:
            raise ValueError(
                "`trainable_variables` must hold each variable once, because a "
                "quasi-Newton method needs the whole gradient of each. Received: "
                f"`{_keras.path_of(variable)}` twice. Add up its gradients."
            )
        seen.add(id(variable))


def flat(variables: Iterable[tf.Variable], dtype: tf.DType) -> tf.Tensor:
    return tf.concat([tf.reshape(tf.cast(v, dtype), [-1]) for v in variables], axis=0)


def flat_gradient(
    grads: Iterable[Any], variables: Iterable[tf.Variable], dtype: tf.DType
) -> tf.Tensor:
    parts = []
    for gradient, variable in zip(grads, variables, strict=True):
        if gradient is None:
            gradient = tf.zeros(variable.shape, dtype)
        elif isinstance(gradient, tf.IndexedSlices):
            gradient = tf.math.unsorted_segment_sum(
                gradient.values, gradient.indices, variable.shape[0]
            )
        size = variable.shape.num_elements()
        parts.append(tf.reshape(tf.cast(gradient, dtype), [size]))
    return tf.concat(parts, axis=0)


def where_given(grads: Iterable[Any], variables: Iterable[tf.Variable]) -> tf.Tensor:
    """Returns for each weight whether its variable has a gradient."""
    parts = [
        tf.fill([variable.shape.num_elements()], gradient is not None)
        for gradient, variable in zip(grads, variables, strict=True)
    ]
    return tf.concat(parts, axis=0)


def rounding_of(size: tf.Tensor, variables: Iterable[tf.Variable]) -> tf.Tensor:
    """Returns by how much the type of its variable may round each weight.

    Args:
        size: vector, the absolute values of the weights.
        variables: list of the variables.
    """

    def of(dtype: str, size: tf.Tensor) -> tf.Tensor:
        # Below its smallest normal number, float16 is no more precise than there.
        return EPSILON[dtype] * (size + (2**-14 if dtype == "float16" else 0))

    dtypes = [variable.dtype.name for variable in variables]
    if len(set(dtypes)) == 1:  # without taking the vector apart
        return of(dtypes[0], size)
    sizes = [variable.shape.num_elements() for variable in variables]
    return tf.concat(list(map(of, dtypes, tf.split(size, sizes))), axis=0)


def set_flat(variables: Sequence[tf.Variable], values: tf.Tensor) -> None:
    sizes = [variable.shape.num_elements() for variable in variables]
    for variable, part in zip(variables, tf.split(values, sizes), strict=True):
        variable.assign(tf.cast(tf.reshape(part, variable.shape), variable.dtype))
