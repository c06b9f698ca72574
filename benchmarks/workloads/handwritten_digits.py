"""The handwritten digits that come with scikit-learn, and a network that reads them."""

from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

BATCH = 32
TEST_IMAGES = 360
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


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
    def load(cls, seed: int, steps: int) -> "Digits":
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
        epochs = -(-steps * BATCH // len(train))
        order = np.concatenate([rng.permutation(len(train)) for _ in range(epochs)])
        return cls(
            (train, train_labels),
            (test, test_labels),
            order[: steps * BATCH].reshape(steps, BATCH),
        )

    def batch(self, update: int) -> tuple[tf.Tensor, tf.Tensor]:
        """Returns the images and labels of an update, counted from 0."""
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
