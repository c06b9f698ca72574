"""The models on which the questions are asked, each with one fixed batch of data.

None of them has dropout, so that two programs that make the same updates end with the
same weights. For the same reason nothing has a bias that the model cannot feel (before
a normalization, in attention): its gradient would be nothing but rounding errors, which
Adam blows up to whole updates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np

layers = keras.layers


@dataclass(frozen=True)
class Task:
    """A model and the batch that it is trained on, again and again."""

    name: str
    make_model: Callable[[], keras.Model]
    x: np.ndarray
    y: np.ndarray

    def new_model(self) -> keras.Model:
        """Returns a new model with the same first weights at every call."""
        keras.utils.set_random_seed(0)
        return self.make_model()


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CLASSES = 10


def mlp(width: int = 2048, hidden: int = 8, batch: int = 8) -> Task:
    """A multi-layer perceptron: many weights, little to compute with each.

    By default 30 million weights and 8 examples per step, so that the optimizer takes
    much of a step.
    """

    def make_model() -> keras.Model:
        return keras.Sequential(
            [
                keras.Input((width // 4,)),
                *(layers.Dense(width, activation="relu") for _ in range(hidden)),
                layers.Dense(CLASSES),
            ]
        )

    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, width // 4)).astype(np.float32)
    return Task("MLP", make_model, x, labels(rng, batch))


def residual_cnn(width: int = 32, blocks: int = 2, batch: int = 16) -> Task:
    """A residual network for images of 32 x 32 pixels, in three stages of blocks."""

    def convolve(x, filters, size=3, stride=1):
        x = layers.Conv2D(filters, size, stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization()(x)

    def block(x, filters, stride):
        shortcut = x if stride == 1 else convolve(x, filters, 1, stride)
        x = layers.ReLU()(convolve(x, filters, stride=stride))
        return layers.ReLU()(layers.Add()([convolve(x, filters), shortcut]))

    def make_model() -> keras.Model:
        inputs = keras.Input((32, 32, 3))
        x = layers.ReLU()(convolve(inputs, width))
        for stage in range(3):
            for i in range(blocks):
                x = block(x, width << stage, 2 if stage and i == 0 else 1)
        x = layers.GlobalAveragePooling2D()(x)
        return keras.Model(inputs, layers.Dense(CLASSES)(x))

    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, 32, 32, 3)).astype(np.float32)
    return Task("residual CNN", make_model, x, labels(rng, batch))


def transformer(
    width: int = 256,
    blocks: int = 6,
    heads: int = 4,
    length: int = 64,
    words: int = 1000,
    batch: int = 4,
) -> Task:
    """A language model: causal attention (which needs no positions) in 6 blocks."""

    def block(x):
        attention = layers.MultiHeadAttention(heads, width // heads, use_bias=False)
        normed = layers.LayerNormalization()(x)
        x = layers.Add()([x, attention(normed, normed, use_causal_mask=True)])
        hidden = layers.Dense(4 * width, activation="gelu")
        inner = hidden(layers.LayerNormalization()(x))
        return layers.Add()([x, layers.Dense(width)(inner)])

    def make_model() -> keras.Model:
        inputs = keras.Input((length,), dtype="int32")
        x = layers.Embedding(words, width)(inputs)
        for _ in range(blocks):
            x = block(x)
        x = layers.LayerNormalization()(x)
        return keras.Model(inputs, layers.Dense(words)(x))

    rng = np.random.default_rng(0)
    text = rng.integers(words, size=(batch, length + 1), dtype=np.int32)
    return Task("transformer", make_model, text[:, :-1], text[:, 1:])


def many_variables(count: int, width: int = 32, batch: int = 16) -> Task:
    """A chain of small layers with `count` variables in all, an even number."""

    def make_model() -> keras.Model:
        inputs = keras.Input((width,))
        x = inputs
        for _ in range(count // 2 - 1):
            # The sum keeps the gradient of the first layers from vanishing.
            x = layers.Add()([x, layers.Dense(width, activation="tanh")(x)])
        return keras.Model(inputs, layers.Dense(CLASSES)(x))

    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, width)).astype(np.float32)
    return Task(f"{count} variables", make_model, x, labels(rng, batch))


def labels(rng: np.random.Generator, batch: int) -> np.ndarray:
    """Returns random classes."""
    return rng.integers(CLASSES, size=batch, dtype=np.int32)


def make_tasks(tiny: bool = False) -> list[Task]:
    """Returns the MLP, the residual CNN and the transformer, or a tiny MLP alone."""
    if tiny:
        return [mlp(width=64, hidden=1)]
    return [mlp(), residual_cnn(), transformer()]
