"""`tf.switch_case` that XLA compiles no slower than its branches."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from sequential_optimizer._keras import repeat_constants, stop_propagating_constants


def switch_case(index: tf.Tensor, branches: Sequence[Callable[[], Any]]) -> Any:
    """Runs `branches[index]()`, inside the graph if there is one.

    As `tf.switch_case`, except that one branch alone needs no switch, and that
    `branches` must not need the value of an outer tensor at compile time (as a shape,
    say), unless that is a small constant.

    TensorFlow marks a Case op that is created anywhere inside an XLA function. XLA
    then asks of every input of the Case, every gradient of the model among them,
    whether it is a compile-time constant, and answers by evaluating the whole forward
    and backward pass in its reference interpreter: minutes for a transformer, where
    the compilation proper takes seconds. So the mark is taken off again.

    Args:
        index: scalar int32 tensor. The last branch runs if there is none of this index.
        branches: functions without arguments that return the same structure of
            tensors, or `None`.

    Returns:
        What the branch returns.
    """
    if len(branches) == 1:
        return branches[0]()
    if tf.executing_eagerly():
        return tf.switch_case(index, list(branches))
    graph = tf.compat.v1.get_default_graph()
    operations_before = len(graph.get_operations())
    outputs = tf.switch_case(
        index, [functools.partial(_with_constants, branch) for branch in branches]
    )
    for operation in graph.get_operations()[operations_before:]:
        if operation.type in ("Case", "StatelessCase"):
            # The only way that also works when the switch sits inside another
            # functional op: leaving the XLA context with
            # `tf.control_dependencies(None)` does not, because TensorFlow looks at
            # the enclosing graphs as well.
            stop_propagating_constants(operation)
    return outputs


def _with_constants(branch: Callable[[], Any]) -> Any:
    repeat_constants(tf.compat.v1.get_default_graph())
    return branch()
