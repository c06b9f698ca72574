"""Physics-informed networks, as a Keras user writes them, with known solutions.

A network u is trained so that an equation holds at given points inside the domain and
on its border. All points are one batch: the loss is the same function at every step.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Points = dict[str, tf.Tensor]
AT_START, AT_BORDER = 100, 100  # points in x and in t


class PINN(keras.Model):
    """A network trained on the residuals of a problem.

    Args:
        width: int, neurons of each hidden layer, with tanh.
        depth: int, the number of hidden layers.
        inputs: int, 2 for x and t.
        dtype: string, of the weights and of all that is computed.
    """

    inside = 1_000  # points at which the equation is to hold

    def __init__(self, width: int, depth: int, inputs: int, dtype: str) -> None:
        # Without it Keras would cast what goes into the model to float32.
        super().__init__(dtype=dtype)
        dense = keras.layers.Dense
        layers = [dense(width, "tanh", dtype=dtype) for _ in range(depth)]
        layers += [dense(1, dtype=dtype)]
        self.network = keras.Sequential([keras.Input((inputs,), dtype=dtype), *layers])
        self.built = True
        self._config = (width, depth, inputs, dtype)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments, so that Keras can load the model."""
        names = ("width", "depth", "inputs", "dtype")
        return dict(zip(names, self._config, strict=True))

    def residuals(self, points: Points) -> list[tf.Tensor]:
        """Returns what should be zero; each problem has its own."""
        raise NotImplementedError

    def compute_residual_loss(self, points: Points) -> tf.Tensor:
        """Returns the sum of the mean squares of all residuals."""
        squares = [tf.reduce_mean(r**2) for r in self.residuals(points)]
        return tf.add_n(squares)

    def train_step(self, points: Points) -> dict[str, tf.Tensor]:
        """Makes one update with all points."""
        with tf.GradientTape() as tape:
            loss = self.compute_residual_loss(points)
        weights = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, weights), weights)
        return {"loss": loss}

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Returns u at some points."""
        return self.network(inputs)

    def fit_points(
        self, points: Points, steps: int, at_once: int, callbacks: Sequence[Any] = ()
    ) -> None:
        """Calls `fit` with all points in each step, and `at_once` steps per epoch."""
        self.fit(
            tf.data.Dataset.from_tensors(points).repeat(),
            steps_per_epoch=at_once,
            epochs=steps // at_once,
            shuffle=False,
            callbacks=list(callbacks),
            verbose=0,
        )

    def relative_error(self, at: tf.Tensor, exact: np.ndarray) -> float:
        """Returns the relative error at some points."""
        return relative_error(self(at).numpy()[:, 0], exact)

    def first_derivatives(self, at: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """Returns u, and its derivative by each input."""
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(at)
            u = self.network(at)
        return u, tf.split(tape.gradient(u, at), at.shape[1], axis=1)

    def second_derivatives(
        self, at: tf.Tensor
    ) -> tuple[tf.Tensor, list[tf.Tensor], list[tf.Tensor]]:
        """Returns u, and its first and second derivative by each input."""
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            tape.watch(at)
            u, first = self.first_derivatives(at)
        second = [tape.gradient(d, at)[:, i : i + 1] for i, d in enumerate(first)]
        return u, first, second


# --- problems ------------------------------------------------------------------


class Convection(PINN):
    """u_t + beta u_x = 0, u(x, 0) = sin x, with period 2 pi."""

    beta = 10.0
    domain = ((0.0, 2 * np.pi), (0.0, 1.0))

    def residuals(self, points: Points) -> list[tf.Tensor]:
        _, (u_x, u_t) = self.first_derivatives(points["inside"])
        return [
            u_t + self.beta * u_x,
            self(points["start"]) - tf.sin(points["start"][:, :1]),
            self(points["left"]) - self(points["right"]),
        ]

    @classmethod
    def solution(cls, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Returns the exact u."""
        return np.sin(x - cls.beta * t)


class Convection30(Convection):
    """The same, three times as fast."""

    beta = 30.0


class Convection40(Convection):
    """The same, four times as fast."""

    beta = 40.0


class Reaction(PINN):
    """u_t = 5 u (1 - u), u(x, 0) = exp(-(x - pi)^2 / (2 (pi/4)^2)), period 2 pi."""

    rho = 5.0
    domain = ((0.0, 2 * np.pi), (0.0, 1.0))

    def residuals(self, points: Points) -> list[tf.Tensor]:
        u, (_, u_t) = self.first_derivatives(points["inside"])
        bump = tf.exp(-8 / np.pi**2 * (points["start"][:, :1] - np.pi) ** 2)
        return [
            u_t - self.rho * u * (1 - u),
            self(points["start"]) - bump,
            self(points["left"]) - self(points["right"]),
        ]

    @classmethod
    def solution(cls, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Returns the exact u."""
        grown = np.exp(-8 / np.pi**2 * (x - np.pi) ** 2 + cls.rho * t)
        return grown / (grown + 1 - np.exp(-8 / np.pi**2 * (x - np.pi) ** 2))


class Wave(PINN):
    """u_tt = 4 u_xx, u(x, 0) = sin pi x + sin(5 pi x) / 2, u_t(x, 0) = 0, u = 0."""

    domain = ((0.0, 1.0), (0.0, 1.0))

    def residuals(self, points: Points) -> list[tf.Tensor]:
        _, _, (u_xx, u_tt) = self.second_derivatives(points["inside"])
        u, (_, u_t) = self.first_derivatives(points["start"])
        x = np.pi * points["start"][:, :1]
        return [
            u_tt - 4 * u_xx,
            u - tf.sin(x) - tf.sin(5 * x) / 2,
            u_t,
            self(points["left"]),
            self(points["right"]),
        ]

    @staticmethod
    def solution(x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Returns the exact u."""
        x, t = np.pi * x, np.pi * t
        return np.sin(x) * np.cos(2 * t) + np.sin(5 * x) * np.cos(10 * t) / 2


class Burgers(PINN):
    """u_t + u u_x = nu u_xx, u(x, 0) = -sin pi x, u(-1, t) = u(1, t) = 0."""

    nu = 0.01 / np.pi
    domain = ((-1.0, 1.0), (0.0, 1.0))
    # With fewer the equation holds at all of them, but not in the shock between them.
    inside = 5_000

    def residuals(self, points: Points) -> list[tf.Tensor]:
        u, (u_x, u_t), (u_xx, _) = self.second_derivatives(points["inside"])
        return [
            u_t + u * u_x - self.nu * u_xx,
            self(points["start"]) + tf.sin(np.pi * points["start"][:, :1]),
            self(points["left"]),
            self(points["right"]),
        ]

    @classmethod
    def solution(cls, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Returns u by the transformation of Cole and Hopf, with Hermite quadrature.

        From Basdevant et al., "Spectral and finite difference solutions of the Burgers
        equation" (Computers & Fluids 14, 1986), section 2.
        """
        nodes, weights = np.polynomial.hermite.hermgauss(120)
        # u(x, t) is a mean of -sin(pi y), y = x - nodes sqrt(4 nu t).
        y = x[..., np.newaxis] - nodes * np.sqrt(4 * cls.nu * t)[..., np.newaxis]
        exponent = -np.cos(np.pi * y) / (2 * np.pi * cls.nu)
        # Relative to the largest: e^50 squared would be too much.
        factors = weights * np.exp(exponent - exponent.max(axis=-1, keepdims=True))
        return (-np.sin(np.pi * y) * factors).sum(axis=-1) / factors.sum(axis=-1)


@keras.saving.register_keras_serializable(package="benchmarks")
class Oscillator(PINN):
    """u'' + 4 u' + 400 u = 0, u(0) = 1, u'(0) = 0: a damped oscillation."""

    def residuals(self, points: Points) -> list[tf.Tensor]:
        u, (u_t,), (u_tt,) = self.second_derivatives(points["inside"])
        start, (slope,) = self.first_derivatives(points["start"])
        # Each of about the size of u.
        return [(u_tt + 4 * u_t + 400 * u) / 400, start - 1, slope / 20]

    @staticmethod
    def solution(t: np.ndarray) -> np.ndarray:
        """Returns the exact u."""
        frequency = np.sqrt(396)
        swing = np.cos(frequency * t) + 2 / frequency * np.sin(frequency * t)
        return np.exp(-2 * t) * swing


PROBLEMS: dict[str, type[PINN]] = {
    "convection 10": Convection,
    "reaction 5": Reaction,
    "wave": Wave,
    "Burgers": Burgers,
    "convection 30": Convection30,
    "convection 40": Convection40,
}


# --- points --------------------------------------------------------------------


def draw_points(problem: type[PINN], seed: int, dtype: str) -> Points:
    """Returns random points inside of the domain, and evenly spaced ones around it."""
    (left, right), (start, end) = problem.domain
    rng = np.random.default_rng(seed)
    inside = rng.uniform((left, start), (right, end), (problem.inside, 2))
    x, t = np.linspace(left, right, AT_START), np.linspace(start, end, AT_BORDER)
    arrays = {
        "inside": inside,
        "start": np.stack([x, np.full_like(x, start)], axis=1),
        "left": np.stack([np.full_like(t, left), t], axis=1),
        "right": np.stack([np.full_like(t, right), t], axis=1),
    }
    return {name: tf.constant(array, dtype) for name, array in arrays.items()}


def relative_error(values: np.ndarray, exact: np.ndarray) -> float:
    """Returns the norm of the error, over the norm of the solution."""
    return float(np.linalg.norm(values - exact) / np.linalg.norm(exact))


def make_error(
    problem: type[PINN], dtype: str, size: int = 100
) -> Callable[[PINN], float]:
    """Returns a function from a network to its relative error on a grid."""
    x, t = np.meshgrid(*(np.linspace(low, high, size) for low, high in problem.domain))
    grid = tf.constant(np.stack([x.ravel(), t.ravel()], axis=1), dtype)
    exact = problem.solution(x.ravel(), t.ravel())

    return lambda model: model.relative_error(grid, exact)
