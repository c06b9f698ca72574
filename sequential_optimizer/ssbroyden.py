"""Self-scaled Broyden updates of a dense matrix, with one gradient per call."""

import math
from collections.abc import Sequence

import keras
import tensorflow as tf

from sequential_optimizer._quasi_newton import Pair, QuasiNewton, dot
from sequential_optimizer._vectors import EPSILON

_MAX_ELEMENTS = 2**31 - 1  # what TensorFlow indexes with 32 bits


@keras.saving.register_keras_serializable(package="sequential_optimizer")
class SSBroyden(QuasiNewton):
    """Self-scaled Broyden method for full batches: gets further in each step.

    Works like `LBFGS`, whose docstring explains the search, full batches and trial
    points. But H is a dense matrix of n x n numbers, which is rescaled in each step. On
    ill-conditioned problems (physics-informed networks) this can get orders of
    magnitude further in the same number of steps. Each step costs more: use `SSBroyden`
    for up to a few thousand weights, and `LBFGS` above that.

    **Update.** After a step s that changed the gradient by y (Al-Baali and Khalfan;
    Urban, Stefanou and Pons, J. Comput. Phys. 523, 2025, arXiv 2405.04230),

        H <- (H - H y y'H / y'H y + phi (y'H y) v v') / tau + s s' / y's
        v = s / y's - H y / y'H y

    where with B the inverse of H, b = s'B s / y's, h = y'H y / y's, a = h b - 1,

        low = min(1, h (1 - sqrt(a / (a + 1))))
        theta = (1 - b) / b, clipped to [(low - 1) / a, 1 / low]
        sigma = 1 + a theta,  phi = (1 - theta) / sigma
        e = sigma^(-1 / max(n - 1, 1))
        tau = min(1, 1 / b) min(e, 1 / theta)    if theta > 0
        tau = min(min(1, 1 / b) e, sigma)        otherwise.

    B s needs no inverse: it equals -t g. The first H is y's / y'y times the identity. H
    stays symmetric to the last bit. If rounding costs H its positive curvature along y
    or g, H is forgotten; this happens at the limit of the precision.

    **Memory.** n^2 + 3 n numbers for n weights, in float32, or float64 if a weight is:
    100 MB for 5,000 weights in float32.

    Example:

    >>> import numpy as np
    >>> import tensorflow as tf
    >>> from sequential_optimizer import SequentialOptimizer, SSBroyden
    >>> x = np.linspace(-1, 1, 50, dtype="float32")[:, None]
    >>> model = tf.keras.Sequential(
    ...     [tf.keras.layers.Dense(10, "tanh"), tf.keras.layers.Dense(1)]
    ... )
    >>> optimizer = SequentialOptimizer(
    ...     [tf.keras.optimizers.Adam(1e-2), SSBroyden(0.1)], boundaries=[50]
    ... )
    >>> model.compile(optimizer, loss="mse")
    >>> history = model.fit(x, np.sin(3 * x), batch_size=50, epochs=120, verbose=0)
    >>> history.history["loss"][-1] < 0.1 * history.history["loss"][50]
    True

    Args:
        learning_rate: float, `keras.optimizers.schedules.LearningRateSchedule`, or a
            callable: the largest step, as the root mean square of the change of the
            weights. Defaults to 1e-2; 1e-3 to 3e-2 suit most networks, and more where
            the weights have far to go.
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
            has a constraint or an unknown shape, or is not floating-point, or if there
            are too many weights for the matrix.
    """

    def _add_memory(self, size: int, dtype: str) -> list[keras.Variable]:
        if size**2 > _MAX_ELEMENTS:
            count = size**2 * tf.as_dtype(dtype).size
            raise ValueError(
                "`SSBroyden` keeps a matrix with a row and a column per weight, of "
                f"{_MAX_ELEMENTS} numbers at most. Received: {size} weights, whose "
                f"matrix takes {count} bytes. Use `LBFGS` instead."
            )
        return [self.add_variable(shape=(size, size), dtype=dtype, name="inverse")]

    def _learn(
        self,
        memory: Sequence[tf.Variable],
        pair: Pair,
        inverse: tf.Tensor,
        gradient: tf.Tensor,
    ) -> tf.Tensor:
        (matrix,) = memory
        h = tf.convert_to_tensor(matrix)
        s, y = pair.step, pair.change
        ys = dot(y, s)
        # There is no H before the first pair, which starts from a multiple of I.
        is_first = pair.earlier == 0
        scale = ys / dot(y, y)
        # H is read once for both vectors, and before it is written: else XLA copies it.
        hy, hg = tf.unstack(
            tf.matmul(h, tf.stack([y, gradient]), transpose_b=True), axis=1
        )
        hy = tf.where(is_first, scale * y, hy)
        hg = tf.where(is_first, scale * gradient, hg)
        bs = tf.where(is_first, s / scale, inverse)
        yhy = dot(y, hy)
        # If rounding has made H indefinite, H is useless; the NaN, passed on to the
        # product, tells the search.
        yhy = tf.where(yhy > 0, yhy, math.nan)
        tau, phi = _factors(dot(bs, s) / ys, yhy / ys, s.shape[0])

        first = scale * tf.eye(s.shape[0], dtype=h.dtype)
        learned, product = tf.where(is_first, first, h) / tau, hg / tau
        for sign, weight, vector in (
            (-1, 1 / (tau * yhy), hy),
            (tf.sign(phi), tf.abs(phi) * yhy / tau, s / ys - hy / yhy),
            (1, 1 / ys, s),
        ):
            # Outer products v v': with them, rounding cannot make H asymmetric, and
            # seldom costs it its positive curvature.
            v = tf.sqrt(weight) * vector
            learned += sign * (v * v[:, tf.newaxis])
            product += sign * dot(v, gradient) * v
        matrix.assign(tf.where(pair.is_kept, learned, h))
        return tf.where(pair.is_kept, product, hg)


def _factors(b: tf.Tensor, h: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns tau and phi.

    Args:
        b: s'Bs / y's.
        h: y'Hy / y's.
        size: the number of weights.
    """
    # Zero where Hy is a multiple of s, and even negative by rounding.
    a = tf.maximum(h * b - 1, EPSILON[h.dtype.name])
    # h (1 - sqrt(a / (a + 1))), without the cancellation.
    lowest = tf.minimum(h / ((a + 1) * (1 + tf.sqrt(a / (a + 1)))), 1)
    theta = tf.clip_by_value((1 - b) / b, (lowest - 1) / a, 1 / lowest)
    sigma = tf.maximum(1 + a * theta, lowest)
    e = sigma ** (-1 / max(size - 1, 1))
    shrunk = tf.minimum(1 / b, 1)
    tau = tf.where(
        theta > 0,
        shrunk * tf.minimum(e, 1 / theta),
        tf.minimum(shrunk * e, sigma),
    )
    return tau, (1 - theta) / sigma
