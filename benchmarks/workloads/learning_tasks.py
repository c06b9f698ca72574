"""Tasks for the question whether switching makes a better model.

Each has separate data for training, for tuning the learning rates and for testing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from benchmarks.workloads import handwritten_digits as digits
from benchmarks.workloads.models import LOSS

Data = tuple[np.ndarray, np.ndarray]
BATCH = 32
NEURONS = 20
# So that one grid of learning rates fits both tasks; the landscape stays what it is.
SCALE = np.float32(NEURONS**0.5)


@dataclass(frozen=True)
class Split:
    """The data that belong to one seed."""

    train: Data
    validation: Data
    test: Data


@dataclass(frozen=True)
class LearningTask:
    """A model, its data, and how it is judged.

    Args:
        name: string.
        metric: string, what the test is reported in; lower is better.
        epochs: int.
        loss: loss function of Keras.
        make_model: function that returns a model with new random weights.
        load: function from a seed to the data.
        judge: function from outputs and targets to the metric.
    """

    name: str
    metric: str
    epochs: int
    loss: Any
    make_model: Callable[[], keras.Model]
    load: Callable[[int], Split]
    judge: Callable[[np.ndarray, np.ndarray], float]


def digits_task(epochs: int) -> LearningTask:
    """Returns the classification of handwritten digits, as in the example."""

    def load(seed: int) -> Split:
        data = digits.Digits.load(seed)
        images, labels = data.train
        count = digits.TEST_IMAGES
        # They come in random order.
        return Split(
            (images[count:], labels[count:]),
            (images[:count], labels[:count]),
            data.test,
        )

    def judge(logits: np.ndarray, labels: np.ndarray) -> float:
        return 100 * float(np.mean(np.argmax(logits, axis=-1) != labels))

    return LearningTask(
        "digits", "test error, %", epochs, LOSS, digits.make_model, load, judge
    )


def teacher_task(epochs: int) -> LearningTask:
    """Returns the regression on a network of ReLUs, by one of the same size.

    From Safran and Shamir, "Spurious local minima are common in two-layer ReLU neural
    networks" (ICML 2018): inputs are normally distributed, the target is the sum of 20
    ReLUs with orthonormal weights, and the model is such a sum too. They prove that it
    has local minima that are not global, and find that gradient descent ends in them
    in most runs. As everything but the weights of the model is symmetric, those of the
    target may be the unit vectors.
    """

    def make_model() -> keras.Model:
        inputs = keras.Input((NEURONS,))
        hidden = keras.layers.Dense(NEURONS, activation="relu", use_bias=False)(inputs)
        return keras.Model(
            inputs, keras.ops.sum(hidden, axis=-1, keepdims=True) / SCALE
        )

    def load(seed: int) -> Split:
        rng = np.random.default_rng(seed)

        def draw(count: int) -> Data:
            x = rng.normal(size=(count, NEURONS)).astype(np.float32)
            return x, np.maximum(x, 0).sum(axis=-1, keepdims=True) / SCALE

        return Split(draw(3200), draw(1000), draw(4000))

    def judge(outputs: np.ndarray, targets: np.ndarray) -> float:
        # In double precision a diverged run has an error, too.
        errors = np.float64(outputs) - targets
        share = float(np.mean(errors**2) / np.var(targets))
        # No worse than the mean of the targets, also if training diverged.
        return 100 * (share if share < 1 else 1.0)

    return LearningTask(
        "teacher and student",
        "test error, % of variance",
        epochs,
        keras.losses.MeanSquaredError(),
        make_model,
        load,
        judge,
    )
