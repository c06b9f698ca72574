"""The search that `LBFGS` and `SSBroyden` share: one gradient per call, no loss.

The usual line search of a quasi-Newton method evaluates the model at several points
before it settles on a step. Here each evaluation is a call of the optimizer, so what
has to last from one call to the next is state: the last accepted point x, the gradient
g there, the direction d and the step t. When a call begins, the model is at the trial
point x + t d, and h is the gradient there:

    weights are not x + t d, or other variables than before have gradients:
                               the search starts where the weights are
    h is not finite:           try again with t <- t / 10
    h.d > 0.9 |g.d|:           try again with t <- the zero of the line through the
                               slopes g.d at 0 and h.d at t, clipped to [t / 10, t / 2]
    otherwise:                 accept: x <- x + t d, g <- h
                               learn from the pair s = t d, y = h - g
                               d <- -H h, t <- min(1, learning_rate / rms(d))

A pair is kept if its curvature y.s is positive beyond rounding. If -H h is not finite
or not downhill, H is forgotten, and d is the steepest descent: -h, shortened to an L1
norm of 1 if it is longer. After ten rejected trial points in a row the next is
accepted; if the gradient there is not finite, the search goes back to x, forgets H, and
tries the steepest descent. For a variable without a gradient, d is zero.

If the first step of a search did not change the gradient at all, it was too short to
move the weights: d is then -h with an L1 norm of 1, however short h is.

At the end of `fit` the model goes back to x, where the next `fit` starts; after trial
points that were rejected, with a step no longer than the one that was due. A `fit` that
ends right after its start leaves the model at the trial point: if it went back, fits of
one step each would never move.
"""

import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from sequential_optimizer import _gradients, _keras, _replicas
from sequential_optimizer._children import CLIPPING
from sequential_optimizer._vectors import (
    EPSILON,
    check_distinct,
    check_shape,
    check_variable,
    flat,
    flat_gradient,
    rounding_of,
    set_flat,
    where_given,
)

_MAX_REJECTIONS = 10
_MAX_SLOPE = 0.9  # at a trial point, relative to the one at the accepted point
# Of a pair, relative to the product of its norms: beyond rounding.
_MIN_CURVATURE = {"float32": 8 * EPSILON["float32"], "float64": 1e-8}
# Below this, a gradient is mostly rounding.
_GRADIENT_TOLERANCE = {"float32": 1e-7, "float64": 1e-10}

_AVERAGE = "Average the weights in the phase before, or on a `SequentialOptimizer`."
# Base-class settings that would change gradients or weights behind the search's back.
_REFUSED = {
    **dict.fromkeys(CLIPPING, "`learning_rate` limits the length of a step instead."),
    "use_ema": _AVERAGE,
    "ema_overwrite_frequency": _AVERAGE,
    "weight_decay": "Add a penalty to the loss, such as a `kernel_regularizer`.",
}

# AutoGraph leaves Keras' code as it is, but would rewrite ours.
_not_autographed = tf.autograph.experimental.do_not_convert


class Pair(NamedTuple):
    """What the step between two accepted points tells about the curvature.

    Attributes:
        step: vector s, the difference of the points.
        change: vector y, the difference of the gradients.
        is_kept: scalar bool, whether to learn from the pair.
        earlier: scalar int64, the number of pairs in the memory before this one.
    """

    step: tf.Tensor
    change: tf.Tensor
    is_kept: tf.Tensor
    earlier: tf.Tensor

    @property
    def count(self) -> tf.Tensor:
        """The number of pairs in the memory after this one."""
        return self.earlier + tf.cast(self.is_kept, self.earlier.dtype)


class _Search(NamedTuple):
    """The state of the search; its vectors hold all weights, one after the other."""

    point: Any  # x
    gradient: Any  # g
    direction: Any  # d
    step: Any  # t; without a trial point zero, or minus the longest step to try next
    rejected: Any  # how many trial points in a row; -1 at the first after a start
    pairs: Any  # how many there are in the memory
    given: Any  # tells for which variables there were gradients in the last call


class _Verdict(NamedTuple):
    """What to do with a trial point: one of these, or else reject it."""

    accepts: tf.Tensor
    stays: tf.Tensor  # no finite gradient, and none to compare with
    resets: tf.Tensor  # no finite gradient for too long


class QuasiNewton(keras.optimizers.Optimizer):
    """Base class; a subclass adds a memory of the curvature."""

    def __init__(
        self,
        learning_rate: Any = 1e-2,
        gradient_tolerance: float | None = None,
        name: str | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(learning_rate, int | float) and not learning_rate >= 0:
            raise ValueError(
                "`learning_rate` must not be negative. "
                f"Received: learning_rate={learning_rate!r}. Pass the largest change "
                "of the weights in a step, such as 1e-2."
            )
        if gradient_tolerance is not None and not (
            isinstance(gradient_tolerance, float) and gradient_tolerance >= 0
        ):
            raise ValueError(
                "`gradient_tolerance` must be a float >= 0, or `None`. "
                f"Received: gradient_tolerance={gradient_tolerance!r}. Pass the "
                "largest derivative that counts as zero, or 0.0."
            )
        _check_strategy(type(self).__name__)
        _replicas.check_accumulation(gradient_accumulation_steps)
        super().__init__(
            learning_rate=learning_rate,
            name=name,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            **kwargs,
        )
        self.gradient_tolerance = gradient_tolerance
        self._check_settings()

    def _check_settings(self) -> None:
        for name, remedy in _REFUSED.items():
            value = getattr(self, name)
            if value not in (None, False):
                raise ValueError(
                    f"`{name}` must not be set, because the search learns from how "
                    "its own steps change the gradient. "
                    f"Received: {name}={value!r} on `{self.name}`. {remedy}"
                )

    def get_config(self) -> dict[str, Any]:
        """Returns a dict from which `from_config` creates the same optimizer."""
        config = super().get_config()
        kept = (
            "name",
            "learning_rate",
            "loss_scale_factor",
            "gradient_accumulation_steps",
        )
        return {
            **{key: config[key] for key in kept},
            "gradient_tolerance": self.gradient_tolerance,
        }

    def _add_memory(self, size: int, dtype: str) -> list[keras.Variable]:
        """Creates the variables of the memory for `size` weights."""
        raise NotImplementedError

    def _learn(
        self,
        memory: Sequence[tf.Variable],
        pair: Pair,
        inverse: tf.Tensor,
        gradient: tf.Tensor,
    ) -> tf.Tensor:
        """Learns from a pair; returns H times `gradient`, meaningless without pairs.

        Args:
            memory: the variables of `_add_memory`.
            pair: the pair.
            inverse: vector, the inverse of the previous H, times the pair's step.
            gradient: vector.
        """
        raise NotImplementedError

    # --- build -------------------------------------------------------------------

    def build(self, variables: Iterable[Any]) -> None:
        """Creates the state of the search.

        Args:
            variables: list of the variables to train.

        Raises:
            ValueError: if a variable has a constraint, is not floating-point, or has
                an unknown shape, or if there are too many weights for the memory.
        """
        if self.built:
            return
        variables = list(variables)
        for variable in variables:
            check_variable(variable)
        size = sum(math.prod(variable.shape) for variable in variables)
        dtypes = {tf.as_dtype(v.dtype) for v in variables}
        dtype = "float64" if tf.float64 in dtypes else "float32"
        self._memory = self._add_memory(size, dtype)

        def add(name: str, shape: tuple[int, ...] = (), dtype: str = dtype) -> Any:
            return self.add_variable(shape=shape, dtype=dtype, name=name)

        self._search = _Search(
            point=add("point", (size,)),
            gradient=add("gradient", (size,)),
            direction=add("direction", (size,)),
            step=add("step"),
            rejected=add("rejected", dtype="int64"),
            pairs=add("pairs", dtype="int64"),
            given=add("given", dtype="int64"),
        )
        super().build(variables)

    # --- apply -------------------------------------------------------------------

    @_not_autographed
    def apply(
        self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None
    ) -> None:
        """Judges the point that the model is at, and moves the model to the next.

        Args:
            grads: list of gradients: tensors or `tf.IndexedSlices` with the shape of
                their variable, or `None` for a variable that is to stay as it is.
            trainable_variables: list of the variables, in the order of `grads`.
                Defaults to those that the optimizer was built on; a variable that
                is left out stays as it is.

        Raises:
            ValueError: if a gradient does not have the shape of its variable, or if a
                variable is there twice.
        """
        self._check_settings()
        grads = list(grads)
        if trainable_variables is None and self.built:
            trainable_variables = _keras.trained_variables(self)
        if grads and trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            _gradients.check_gradients(grads, trainable_variables)
            for gradient, variable in zip(grads, trainable_variables, strict=True):
                check_shape(gradient, variable)
            check_distinct(trainable_variables)
            # Not in the context below, or TensorFlow cannot lift it out of a graph.
            self.build(trainable_variables)
        # The step that hits the end of a dataset of unknown size has no gradients, and
        # must not count: it would shift the windows of accumulation.
        with _gradients.computed_first(grads):
            super().apply(grads, trainable_variables)

    # Keras calls this once for all replicas, with the sums of their gradients.
    def _distributed_tf_update_step(
        self,
        distribution: tf.distribute.Strategy,
        grads_and_vars: Sequence[tuple[Any, Any]],
        learning_rate: Any,
    ) -> None:
        found = {_keras.key_of(self, v): gradient for gradient, v in grads_and_vars}
        variables = _keras.trained_variables(self)
        distribution.extended.update(
            self._search.point.value,
            self._update,
            args=(
                [found.get(_keras.key_of(self, v)) for v in variables],
                [_keras.native(v) for v in variables],
                [variable.value for variable in self._search],
                [variable.value for variable in self._memory],
                learning_rate,
            ),
            group=False,
        )

    def _update(
        self,
        _: tf.Variable,
        grads: list[Any],
        variables: list[tf.Variable],
        slots: list[tf.Variable],
        memory: list[tf.Variable],
        learning_rate: Any,
    ) -> None:
        """Judges the trial point and moves the weights to the next one."""
        search = _Search(*(tf.convert_to_tensor(slot) for slot in slots))
        dtype = search.point.dtype
        found = flat_gradient(grads, variables, dtype)
        trial, is_there = _trial(search, variables)
        # If a layer was frozen or unfrozen, the gradients cannot be compared.
        given = zlib.crc32(bytes(gradient is not None for gradient in grads))
        is_at_trial = is_there & (search.step > 0)
        is_trial = is_at_trial & (search.given == given)
        verdict = _judge(search, found, is_trial)

        step, change = search.step * search.direction, found - search.gradient
        length_of_change = _norm(change)
        enough = _MIN_CURVATURE[dtype.name] * _norm(step) * length_of_change
        is_kept = verdict.accepts & is_trial & (dot(step, change) > enough)
        pair = Pair(step, change, is_kept, search.pairs)
        gradient = tf.where(verdict.accepts, found, search.gradient)
        inverse = -search.step * search.gradient
        product = self._learn(memory, pair, inverse, gradient)

        tolerance = self.gradient_tolerance
        if tolerance is None:
            tolerance = _GRADIENT_TOLERANCE[dtype.name]
        is_converged = verdict.accepts & (tf.reduce_max(tf.abs(found)) <= tolerance)
        turns = verdict.accepts | verdict.resets
        rejects = ~turns & ~verdict.stays
        is_usable = (pair.count > 0) & _is_downhill(product, gradient) & ~verdict.resets
        was_too_short = is_trial & (search.rejected < 0) & (length_of_change == 0)
        steepest = _steepest(gradient, was_too_short)
        descent = -tf.where(is_usable, product, steepest)
        if any(gradient is None for gradient in grads):
            # It stays where it is, such as a layer that was frozen.
            descent = tf.where(where_given(grads, variables), descent, 0)
        direction = tf.where(turns, descent, search.direction)
        longest = _largest_step(direction, tf.cast(learning_rate, dtype))
        is_due = is_there & (search.step < 0)
        longest = tf.where(is_due, tf.minimum(longest, -search.step), longest)
        step = tf.where(turns, longest, _shorter_step(search, found))
        starts = tf.cast(verdict.accepts & ~is_trial, tf.int64)
        rejected = tf.where(rejects, tf.maximum(search.rejected, 0) + 1, -starts)
        pairs = tf.where(is_usable | is_converged | ~turns, pair.count, 0)
        # Without a finite gradient, better where there was one than at a trial point.
        moves = verdict.accepts | (verdict.stays & ~is_at_trial)
        # Always true. It tells XLA that nothing reads the old gradient after this, so
        # that the branches of a switch that leave it alone need no copy of it.
        is_last = pairs >= 0
        after = _Search(
            point=tf.where(moves, trial, search.point),
            gradient=tf.where(verdict.accepts & is_last, found, search.gradient),
            direction=direction,
            step=tf.where(verdict.stays | is_converged, tf.zeros_like(step), step),
            rejected=rejected,
            pairs=pairs,
            given=tf.constant(given, tf.int64),
        )
        for slot, value in zip(slots, after, strict=True):
            slot.assign(value)
        set_flat(variables, after.point + after.step * after.direction)

    @_not_autographed
    def finalize_variable_values(self, var_list: Iterable[Any]) -> None:
        """Goes back from a trial point that no call has judged; for the end of `fit`.

        If the search has only just started, the model stays at its first trial point.

        Args:
            var_list: list of the variables that the optimizer was built on.
        """
        if not self.built:
            return
        search = _Search(*(tf.convert_to_tensor(slot) for slot in self._search))
        variables = [_keras.native(v) for v in _keras.trained_variables(self)]
        trial, is_there = _trial(search, variables)
        is_trial = is_there & (search.step > 0)
        goes_back = is_trial & (search.rejected >= 0)
        kept = tf.where(search.rejected > 0, -search.step, 0)
        kept = tf.where(goes_back, kept, search.step)
        step = tf.where(is_there, kept, 0)
        self.assign(self._search.point, tf.where(is_trial, search.point, trial))
        self.assign(self._search.step, step)
        set_flat(variables, tf.where(goes_back, search.point, trial))


def _check_strategy(name: str) -> None:
    """Raises ValueError under a strategy that has no gradient of all data."""
    strategy = tf.distribute.get_strategy()
    if isinstance(strategy, tf.distribute.ParameterServerStrategy):
        raise ValueError(
            f"`{name}` needs the gradient of all data in each step, but the workers of "
            "a parameter server update the weights one by one. Received: "
            f"`{type(strategy).__name__}`. Use `MirroredStrategy` or "
            "`MultiWorkerMirroredStrategy` instead."
        )


# --- the steps of `_update` --------------------------------------------------------


def _trial(
    search: _Search, variables: list[tf.Variable]
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns where the weights are, and whether the search has put them there.

    That is at the trial point or, if there is none, at the accepted point.
    """
    weights = flat(variables, search.point.dtype)
    step = tf.maximum(search.step, 0) * search.direction
    trial = search.point + step
    size = tf.abs(trial)
    # A compiler may round `trial` once more or less than when it was assigned.
    rounding = 4 * EPSILON[search.point.dtype.name] * (size + tf.abs(step))
    rounding += rounding_of(size, variables)
    is_there = tf.reduce_all(tf.abs(weights - trial) <= rounding)
    # `trial` is the same point before it was rounded to the type of the weights.
    return tf.where(is_there, trial, weights), is_there


def _judge(search: _Search, gradient: tf.Tensor, is_trial: tf.Tensor) -> _Verdict:
    is_finite = tf.reduce_all(tf.math.is_finite(gradient))
    limit = _MAX_SLOPE * tf.abs(dot(search.gradient, search.direction))
    overshot = dot(gradient, search.direction) > limit
    has_patience = search.rejected < _MAX_REJECTIONS
    return _Verdict(
        accepts=is_finite & ~(is_trial & overshot & has_patience),
        stays=~is_finite & ~is_trial,
        resets=~is_finite & is_trial & ~has_patience,
    )


def _shorter_step(search: _Search, gradient: tf.Tensor) -> tf.Tensor:
    """Returns the step to try after one that went too far."""
    before = dot(search.gradient, search.direction)
    behind = dot(gradient, search.direction)
    secant = search.step * before / (before - behind)
    shortest, longest = search.step / 10, search.step / 2
    # A gradient that is not finite may make it NaN, which clipping would pass on.
    secant = tf.where(tf.math.is_finite(secant), secant, shortest)
    return tf.clip_by_value(secant, shortest, longest)


def _largest_step(direction: tf.Tensor, learning_rate: tf.Tensor) -> tf.Tensor:
    """Returns the step, 1 at most, that keeps the change within `learning_rate`."""
    length = _norm(direction)
    longest = tf.maximum(learning_rate, 0) * math.sqrt(direction.shape[0])
    # So that a learning rate that is not a number shows.
    return tf.where(~(length <= longest), longest / length, 1)


def _steepest(gradient: tf.Tensor, is_long: tf.Tensor) -> tf.Tensor:
    """Returns the first direction, but uphill: short even if the gradient is large.

    Args:
        gradient: vector.
        is_long: scalar bool, whether it is not to be short if the gradient is small.
    """
    scale = tf.math.divide_no_nan(1.0, tf.reduce_sum(tf.abs(gradient)))
    return gradient * tf.where(is_long, scale, tf.minimum(scale, 1))


def _is_downhill(product: tf.Tensor, gradient: tf.Tensor) -> tf.Tensor:
    slope = dot(product, gradient)
    return (
        (slope > 0)
        & tf.math.is_finite(slope)
        & tf.math.is_finite(dot(product, product))
    )


def dot(a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(a * b)


def _norm(vector: tf.Tensor) -> tf.Tensor:
    return tf.sqrt(dot(vector, vector))
