"""Limited-memory BFGS with one gradient per call."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from sequential_optimizer._quasi_newton import Pair, QuasiNewton


@keras.saving.register_keras_serializable(package="sequential_optimizer")
class LBFGS(QuasiNewton):
    """L-BFGS for full batches: fast convergence at the end of training.

    Learns the curvature of the loss from the last `history_size` steps. Needs only one
    gradient per step: no closure, no line search that evaluates the model, no value of
    the loss. So it works in `fit`, in custom loops, under XLA, and as a phase of a
    `SequentialOptimizer`, after Adam for example.

    **Update.** From the last accepted point x, with the gradient g, the trial point is

        x + t d,  d = -H g,  t = min(1, learning_rate / rms(d)).

    Most trial points are accepted. If the slope along d is uphill at the trial point,
    and more than 0.9 times as steep as the downhill slope at x, the step was too long:
    t becomes the root of the secant of the two slopes, clipped to [t / 10, t / 2]. If
    the gradient is not finite, t becomes t / 10. H comes from the pairs of a step s and
    the change of the gradient y, the rows of S and Y, by the compact form of Byrd,
    Nocedal and Schnabel (Math. Programming 63, 1994, theorem 2.2), with R the upper
    triangle of S Y', D its diagonal, and c = s.y / y.y of the last pair:

        H g = c g + S' p - c Y' q
        q = R^-1 S g
        p = R'^-1 ((D + c Y Y') q - c Y g)

    Pairs without positive curvature are left out. If H gives no direction downhill, H
    is forgotten, and the next direction is -g, shortened to |d|_1 = 1 if longer.

    **Full batch.** Two gradients can be compared only if they are of the same function:
    feed all data in each step. If the data do not fit into memory, set
    `gradient_accumulation_steps` to the number of batches per epoch. Each epoch is then
    one step, as exact as with a single batch if all batches have the same size (for a
    `tf.data.Dataset`, `drop_remainder=True`) and hold the same data in each epoch. A
    child accumulates only in its own phase, which must begin where an epoch does. On
    several devices (`MirroredStrategy`, or your own loop under
    `MultiWorkerMirroredStrategy`) the batch is spread over them, without accumulation.
    Dropout, augmentation and a different batch in each step drown the changes of the
    gradient in noise: steps are rejected, what is learned is wrong, and Adam is better.

    **Memory.** (2 `history_size` + 3) n numbers for n weights, in float32, or float64
    if a weight is: 412 MB for a million weights in float32 at the default. `SSBroyden`
    needs fewer steps but n^2 numbers; use it for up to a few thousand weights.

    **Trial points.** During training the model may be at a trial point, which may turn
    out to be too far. At the end of `fit`, `finalize_variable_values` goes back to the
    last accepted point, so the next `fit` begins with one more gradient there. (If the
    last step of a `fit` is the first of a search, the model stays at the trial point;
    otherwise fits of one step would never move.) Call it at the end of your own loop.
    What `ModelCheckpoint` saves before that may be a trial point, with all that is
    needed to continue, and the next phase may start from one. The `loss` in the logs of
    a full batch is that before the update: let callbacks that keep the best weights
    watch `val_loss`. If something else sets the weights, the search starts there, with
    all it has learned. `SwapEMAWeights` does so at every validation, by rounding: leave
    it out.

    **Loss scaling.** A `LossScaleOptimizer`, which `compile` puts around an optimizer
    under the policy `mixed_float16`, skips a step whose gradient is not finite. The
    search then never learns that its trial point went too far, and stays there: use
    `mixed_bfloat16` or float32, or pass `auto_scale_loss=False` to `compile`.

    **GPUs.** From the Ampere generation on, TensorFlow multiplies float32 matrices, in
    the model and in this update, with 10 bits of precision unless you call
    `tf.config.experimental.enable_tensor_float_32_execution(False)`. Do, or use
    float64: differences of such gradients tell little about the curvature.

    Example:

    >>> import tensorflow as tf
    >>> from sequential_optimizer import LBFGS
    >>> weight = tf.Variable([-1.2, 1.0])
    >>> optimizer = LBFGS(learning_rate=0.1)
    >>> for _ in range(60):
    ...     with tf.GradientTape() as tape:
    ...         a, b = tf.unstack(weight)
    ...         loss = 100 * (b - a**2) ** 2 + (1 - a) ** 2
    ...     optimizer.apply([tape.gradient(loss, weight)], [weight])
    >>> print(weight.numpy().round(2))
    [1. 1.]

    Args:
        learning_rate: float, `keras.optimizers.schedules.LearningRateSchedule`, or a
            callable: the largest step, as the root mean square of the change of the
            weights. Defaults to 1e-2; 1e-3 to 3e-2 suit most networks, and more where
            the weights have far to go.
        history_size: int >= 1, the number of steps to learn from. Defaults to 50.
        gradient_tolerance: float >= 0. Where no derivative is larger, the search has
            converged, and stays. Defaults to 1e-7, or 1e-10 if a weight is float64.
        name: string, the name of the optimizer. Defaults to one made from the class
            name.
        loss_scale_factor: float by which the loss is multiplied and the gradients
            are divided, or `None` (the default).
        gradient_accumulation_steps: int >= 2, the number of calls whose mean gradient
            is one evaluation, or `None` (the default). All of them must pass the same
            variables.
        **kwargs: the other arguments of `keras.optimizers.Optimizer`, all of which
            are refused unless they are `None` or `False`; `ema_momentum` is ignored.

    Raises:
        ValueError: if an argument breaks one of these rules; in `build`, if a variable
            has a constraint or an unknown shape, or is not floating-point.
    """

    def __init__(
        self,
        learning_rate: Any = 1e-2,
        history_size: int = 50,
        gradient_tolerance: float | None = None,
        name: str | None = None,
        loss_scale_factor: float | None = None,
        gradient_accumulation_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        if type(history_size) is not int or history_size < 1:
            raise ValueError(
                "`history_size` must be an integer >= 1. "
                f"Received: history_size={history_size!r}. Pass the number of steps "
                "to learn from, 10 to 100 as a rule."
            )
        super().__init__(
            learning_rate=learning_rate,
            gradient_tolerance=gradient_tolerance,
            name=name,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            **kwargs,
        )
        self.history_size = history_size

    def get_config(self) -> dict[str, Any]:
        """Returns a dict from which `from_config` creates the same optimizer."""
        return {**super().get_config(), "history_size": self.history_size}

    def _add_memory(self, size: int, dtype: str) -> list[keras.Variable]:
        m = self.history_size
        shapes = {
            "steps": (m, size),
            "changes": (m, size),
            "steps_by_changes": (m, m),
            "changes_by_changes": (m, m),
        }
        return [
            self.add_variable(shape=shape, dtype=dtype, name=name)
            for name, shape in shapes.items()
        ]

    def _learn(
        self,
        memory: Sequence[tf.Variable],
        pair: Pair,
        inverse: tf.Tensor,
        gradient: tf.Tensor,
    ) -> tf.Tensor:
        steps, changes, steps_by_changes, changes_by_changes = memory
        # The rows are a ring: the newest pair replaces the oldest.
        row = pair.earlier % self.history_size
        is_new = (tf.range(self.history_size, dtype=row.dtype) == row) & pair.is_kept
        # All rows are written: to set just one, XLA would copy the matrix twice inside
        # the branch of a switch.
        for matrix, vector in ((steps, pair.step), (changes, pair.change)):
            matrix.assign(tf.where(is_new[:, tf.newaxis], vector, matrix))

        # Each matrix is read once for both vectors.
        both = tf.stack([pair.change, gradient])
        s_y, s_g = tf.unstack(tf.matmul(steps, both, transpose_b=True), axis=1)
        y_y, y_g = tf.unstack(tf.matmul(changes, both, transpose_b=True), axis=1)
        # Only the upper triangle of S Y' counts, so it needs no new row, only a column.
        sy = tf.where(is_new, s_y[:, tf.newaxis], steps_by_changes)
        yy = tf.where(is_new, y_y[:, tf.newaxis], changes_by_changes)
        yy = tf.where(is_new[:, tf.newaxis], y_y, yy)
        steps_by_changes.assign(sy)
        changes_by_changes.assign(yy)

        scale, p, q = self._coefficients(pair.count, sy, yy, s_g, y_g)
        product = scale * gradient + tf.linalg.matvec(steps, p, transpose_a=True)
        return product + tf.linalg.matvec(changes, -scale * q, transpose_a=True)

    def _coefficients(
        self,
        count: tf.Tensor,
        sy: tf.Tensor,
        yy: tf.Tensor,
        sg: tf.Tensor,
        yg: tf.Tensor,
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns c, p and q of the compact form; see the class.

        Args:
            count: scalar, the number of pairs so far.
            sy, yy: the matrices S Y' and Y Y', in the order of the ring.
            sg, yg: the vectors S g and Y g, in the order of the ring.
        """
        m = self.history_size
        ages = tf.range(m, dtype=count.dtype)
        oldest_first = (count + ages) % m
        is_filled = ages >= m - count
        identity = tf.eye(m, dtype=sy.dtype)

        def ordered(vector: tf.Tensor) -> tf.Tensor:
            return tf.where(is_filled, tf.gather(vector, oldest_first), 0)

        sy, yy = (
            tf.where(
                is_filled[:, tf.newaxis] & is_filled,
                tf.gather(tf.gather(product, oldest_first), oldest_first, axis=1),
                identity,
            )
            for product in (sy, yy)
        )
        r = tf.linalg.band_part(sy, 0, -1)
        scale = sy[-1, -1] / yy[-1, -1]
        q = _solve(r, ordered(sg))
        p = tf.linalg.diag_part(r) * q
        p += scale * (tf.linalg.matvec(yy, q) - ordered(yg))
        p = _solve(r, p, adjoint=True)
        as_stored = (ages - count) % m
        return scale, tf.gather(p, as_stored), tf.gather(q, as_stored)


def _solve(triangle: tf.Tensor, right: tf.Tensor, adjoint: bool = False) -> tf.Tensor:
    """Solves a system with an upper triangular matrix, or with its transpose."""
    columns = tf.linalg.triangular_solve(
        triangle, right[:, tf.newaxis], lower=False, adjoint=adjoint
    )
    return columns[:, 0]
