"""`tf.switch_case` that XLA compiles no slower than its branches."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from sequential_optimizer._keras import repeat_constants, stop_propagating_constants


def switch_case(index: tf.Tensor, branches: Sequence[Callable[[], Any]]) -> Any:
    """Runs `branches[index]()`, inside the graph if there is one.

    Like `tf.switch_case`, except that a single branch needs no switch, and that
    `branches` must not need the value of an outer tensor at compile time (as a shape,
    say), unless that tensor is a small constant.

    TensorFlow marks every Case op that is created inside an XLA function. XLA then
    checks for each input of the Case, including every gradient, whether it is a
    compile-time constant. To find out, it evaluates the whole forward and backward
    pass in its reference interpreter: minutes for a transformer, where the actual
    compilation takes seconds. So the mark is removed.

    Args:
        index: scalar int32 tensor. If it is out of range, the last branch runs.
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
    branches = [functools.partial(_with_constants, branch) for branch in branches]
    outputs = tf.switch_case(index, branches)
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
