"""The handwritten digits that come with scikit-learn, and a network that reads them."""

from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from benchmarks.workloads.models import Task

BATCH = 32
TEST_IMAGES = 360


@dataclass(frozen=True)
class Digits:
    """The images of one split, and which of them each update sees.

    The batch depends on nothing but the number of the update, so a resumed run sees
    what the uninterrupted one saw.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    order: np.ndarray

    @classmethod
    def load(cls, seed: int, epochs: int = 1) -> "Digits":
        """Returns the split and the order of the images that belong to `seed`."""
        images, labels = load_digits(return_X_y=True)
        images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
        train, test, train_labels, test_labels = train_test_split(
            images,
            labels.astype(np.int32),
            test_size=TEST_IMAGES,
            stratify=labels,
            random_state=seed,
        )
        rng = np.random.default_rng(seed)
        used = len(train) // BATCH * BATCH
        order = [rng.permutation(len(train))[:used] for _ in range(epochs)]
        return cls(
            (train, train_labels),
            (test, test_labels),
            np.concatenate(order).reshape(-1, BATCH),
        )

    def updates_of(self, epoch: int) -> range:
        """Returns the numbers of the updates of an epoch, all counted from 0."""
        count = len(self.train[0]) // BATCH
        return range(epoch * count, (epoch + 1) * count)

    def batch(self, update: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the images and labels of an update."""
        images, labels = self.train
        rows = self.order[update]
        return tf.constant(images[rows]), tf.constant(labels[rows])


def make_model() -> keras.Model:
    """Returns a small convolutional network with new random weights."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def make_task() -> Task:
    """Returns the network with one batch, on which a step takes a millisecond."""
    images, labels = Digits.load(seed=0).train
    return Task("digits", make_model, images[:BATCH], labels[:BATCH])
