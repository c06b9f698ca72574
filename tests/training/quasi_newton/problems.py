"""Functions to minimize, of Moré, Garbow and Hillstrom (ACM TOMS 7, 1981, 17-41)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tensorflow as tf


@dataclass(frozen=True)
class Problem:
    """A sum of squares.

    Attributes:
        residuals: function from a vector to the list of what is squared.
        start: the published starting point.
        minimum: the published minimum.
    """

    residuals: Callable
    start: tuple[float, ...]
    minimum: float = 0.0

    def loss(self, x):
        return tf.reduce_sum(tf.square(tf.stack(self.residuals(x))))


def rosenbrock(x):
    return [r for i in range(0, x.shape[0], 2) for r in _rosenbrock(x[i], x[i + 1])]


def _rosenbrock(a, b):
    return 10 * (b - a**2), 1 - a


def freudenstein_roth(x):
    return [
        -13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1],
        -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1],
    ]


def beale(x):
    return [y - x[0] * (1 - x[1] ** i) for i, y in ((1, 1.5), (2, 2.25), (3, 2.625))]


def jennrich_sampson(x):
    return [2 + 2 * i - (tf.exp(i * x[0]) + tf.exp(i * x[1])) for i in range(1, 11)]


def helical_valley(x):
    theta = tf.atan(x[1] / x[0]) / (2 * np.pi) + tf.where(x[0] < 0, x[0] * 0 + 0.5, 0)
    return [10 * (x[2] - 10 * theta), 10 * (tf.norm(x[:2]) - 1), x[2]]


BARD = (
    (0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39)
    + (0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)
)  # fmt: skip


def bard(x):
    return [
        y - (x[0] + u / ((16 - u) * x[1] + min(u, 16 - u) * x[2]))
        for u, y in enumerate(BARD, start=1)
    ]


KOWALIK_OSBORNE = {
    4.0: 0.1957, 2.0: 0.1947, 1.0: 0.1735, 0.5: 0.1600, 0.25: 0.0844, 0.167: 0.0627,
    0.125: 0.0456, 0.1: 0.0342, 0.0833: 0.0323, 0.0714: 0.0235, 0.0625: 0.0246,
}  # fmt: skip


def kowalik_osborne(x):
    return [
        y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])
        for u, y in KOWALIK_OSBORNE.items()
    ]


def box(x):
    return [
        tf.exp(-i / 10 * x[0])
        - tf.exp(-i / 10 * x[1])
        - x[2] * (np.exp(-i / 10) - np.exp(-i))
        for i in range(1, 11)
    ]


def powell_singular(x):
    return [
        x[0] + 10 * x[1],
        5**0.5 * (x[2] - x[3]),
        (x[1] - 2 * x[2]) ** 2,
        10**0.5 * (x[0] - x[3]) ** 2,
    ]


def wood(x):
    return [
        10 * (x[1] - x[0] ** 2),
        1 - x[0],
        90**0.5 * (x[3] - x[2] ** 2),
        1 - x[2],
        10**0.5 * (x[1] + x[3] - 2),
        10**-0.5 * (x[1] - x[3]),
    ]


def brown_dennis(x):
    return [
        (x[0] + i / 5 * x[1] - np.exp(i / 5)) ** 2
        + (x[2] + np.sin(i / 5) * x[3] - np.cos(i / 5)) ** 2
        for i in range(1, 21)
    ]


def biggs_exp6(x):
    return [
        x[2] * tf.exp(-i / 10 * x[0])
        - x[3] * tf.exp(-i / 10 * x[1])
        + x[5] * tf.exp(-i / 10 * x[4])
        - (np.exp(-i / 10) - 5 * np.exp(-i) + 3 * np.exp(-4 * i / 10))
        for i in range(1, 14)
    ]


def trigonometric(x):
    n = x.shape[0]
    cosines = tf.reduce_sum(tf.cos(x))
    return [n - cosines + (i + 1) * (1 - tf.cos(x[i])) - tf.sin(x[i]) for i in range(n)]


def broyden_tridiagonal(x):
    zero = x[0] * 0
    padded = [zero, *tf.unstack(x), zero]
    return [
        (3 - 2 * b) * b - a - 2 * c + 1
        for a, b, c in zip(padded, padded[1:], padded[2:], strict=False)
    ]


def variably_dimensioned(x):
    n = x.shape[0]
    moment = tf.reduce_sum(np.arange(1.0, n + 1) * (x - 1))
    return [*tf.unstack(x - 1), moment, moment**2]


PROBLEMS = {
    "rosenbrock": Problem(rosenbrock, (-1.2, 1)),
    "rosenbrock of 100": Problem(rosenbrock, (-1.2, 1) * 50),
    "freudenstein_roth": Problem(freudenstein_roth, (0.5, -2), 48.98425),
    "beale": Problem(beale, (1, 1)),
    "jennrich_sampson": Problem(jennrich_sampson, (0.3, 0.4), 124.362),
    "helical_valley": Problem(helical_valley, (-1, 0, 0)),
    "bard": Problem(bard, (1, 1, 1), 8.21487e-3),
    "kowalik_osborne": Problem(kowalik_osborne, (0.25, 0.39, 0.415, 0.39), 3.07505e-4),
    "box": Problem(box, (0, 10, 20)),
    "powell_singular": Problem(powell_singular, (3, -1, 0, 1)),
    "wood": Problem(wood, (-3, -1, -3, -1)),
    "brown_dennis": Problem(brown_dennis, (25, 5, -5, -1), 85822.2),
    "biggs_exp6": Problem(biggs_exp6, (1, 2, 1, 1, 1, 1), 5.65565e-3),
    "trigonometric": Problem(trigonometric, (0.1,) * 10, 2.79506e-5),
    "broyden_tridiagonal": Problem(broyden_tridiagonal, (-1,) * 10),
    "variably_dimensioned": Problem(
        variably_dimensioned, tuple(1 - i / 10 for i in range(1, 11))
    ),
}
