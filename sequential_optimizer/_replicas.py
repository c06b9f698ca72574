"""Where the code of an optimizer runs under `tf.distribute`.

A replica cannot switch by itself: the child in a branch has to meet the other replicas
(`merge_call`), and TensorFlow refuses that inside a branch. So the replicas meet first,
one switch is made for all of them, and inside the branch they run separately again.
Keras' `LossScaleOptimizer` does the same.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from sequential_optimizer import _keras


def check_accumulation(steps: int | None) -> None:
    """Raises ValueError if gradients cannot be accumulated under this strategy."""
    if steps is None or not tf.distribute.has_strategy():
        return
    if not isinstance(tf.distribute.get_strategy(), tf.distribute.OneDeviceStrategy):
        raise ValueError(
            "`gradient_accumulation_steps` must be `None` under a strategy that may "
            "have several replicas or workers, because saving would lose their sums. "
            f"Received: gradient_accumulation_steps={steps} {_strategy_in_words()}. "
            "Use a larger batch, or a strategy of one device."
        )


def check_strategy(optimizers: Sequence[Any]) -> None:
    """Raises ValueError unless optimizers were created under this strategy.

    Args:
        optimizers: optimizers, of which the first is named in the error.
    """
    strategy = tf.distribute.get_strategy()
    # One device has no copies to keep equal: Keras trains any variable there.
    if isinstance(strategy, tf.distribute.OneDeviceStrategy):
        return
    counts = [_keras.call_count(one).value for one in optimizers]
    if not all(map(strategy.extended.variable_created_in_scope, counts)):
        raise ValueError(
            "A `SequentialOptimizer` and its children must be created and built under "
            f"the strategy that they run in. Received: `{optimizers[0].name}`, created "
            f"elsewhere, {_strategy_in_words()}. Use `with strategy.scope():`."
        )


def check_in_replica() -> None:
    """Raises ValueError in cross-replica context."""
    if tf.distribute.in_cross_replica_context():
        raise ValueError(
            "`apply` must be called in each replica. Received: a call in cross-replica "
            f"context {_strategy_in_words()}. Call it inside of `strategy.run(...)`."
        )


def _strategy_in_words() -> str:
    name = type(tf.distribute.get_strategy()).__name__
    return f"under `{name}`" if tf.distribute.has_strategy() else "without a strategy"


def once_across_replicas(function: Callable[..., None], *args: Any) -> None:
    """Calls `function` once for all replicas; each of them has to call this.

    Args:
        function: called in cross-replica context, or directly if there is no
            strategy.
        *args: nested structures; what differs between the replicas arrives as the
            per-replica values that `for_each_replica` takes.

    Raises:
        RuntimeError: in a conditional or a loop inside a replica, where the replicas
            cannot meet.
    """
    context = tf.distribute.get_replica_context()
    if not tf.distribute.has_strategy() or context is None:
        return function(*args)
    try:
        context.merge_call(lambda _, *args: function(*args), args=args)
    except RuntimeError as error:
        if "merge_call" not in str(error):
            raise
        raise RuntimeError(
            "The replicas of a `tf.distribute` strategy must update an optimizer, "
            "call `advance()` or set `learning_rate` together, not in a conditional, a "
            "loop or a `tf.function` inside of one replica. Received: a call in "
            f"`{tf.compat.v1.get_default_graph().name}`. Put the condition or the loop "
            "around `strategy.run(...)`, on what `strategy.reduce(...)` returns."
        ) from error


def for_each_replica(function: Callable[..., None], *args: Any) -> None:
    """Calls `function` in each replica; for functions that run once across replicas."""
    if not tf.distribute.has_strategy():
        return function(*args)
    tf.distribute.get_strategy().extended.call_for_each_replica(function, args=args)


def largest_of_workers(value: tf.Tensor, limit: int) -> tf.Tensor:
    """Returns the largest of the values that the workers pass; called in replicas.

    Each worker of a `MultiWorkerMirroredStrategy` runs its own program, and all of them
    have to call this.

    Args:
        value: scalar integer tensor, 0 <= value <= limit.
        limit: int.
    """
    # `ReduceOp` has no maximum.
    context, add = tf.distribute.get_replica_context(), tf.distribute.ReduceOp.SUM
    passed = context.all_reduce(add, tf.one_hot(value, limit + 1))
    return tf.reduce_max(tf.where(passed > 0, tf.range(limit + 1), 0))


def has_several_workers() -> bool:
    """Whether other programs take part in every update."""
    strategy = tf.distribute.get_strategy()
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
