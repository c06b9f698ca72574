"""The model, the children and the state that most tests share."""

import keras
import pytest

from tests.helpers.oracle import weights_of

needs_schedule_free = pytest.mark.skipif(
    not hasattr(keras.optimizers, "ScheduleFreeAdamW"), reason="this Keras has none"
)


# Keras warns of it after the first epoch, in which it learns the size of a dataset.
ran_out_of_data = pytest.mark.filterwarnings("ignore:Your input ran out of data")


class Counting(keras.Sequential):
    """Counts the calls of `train_step`: outside of eager mode, its traces."""

    train_steps = 0

    def train_step(self, data):
        self.train_steps += 1
        return super().train_step(data)


def make_model(*units, features=3, model_class=keras.Sequential):
    """Returns a model of dense layers, with the same weights at every call.

    Args:
        *units: integers, the units of each layer.
        features: integer, the columns of the input.
        model_class: subclass of `keras.Sequential`.
    """
    # Small enough that no gradient overflows in float16 at the first loss scale.
    initializer = keras.initializers.RandomUniform(-0.5, 0.5, seed=1)
    *hidden, last = units
    layers = [
        keras.layers.Dense(n, "tanh", kernel_initializer=initializer) for n in hidden
    ]
    layers.append(keras.layers.Dense(last, kernel_initializer=initializer))
    return model_class([keras.Input((features,)), *layers])


def adam_then_sgd(**kwargs):
    """Returns two children that keep state, with the names that new Keras gives."""
    return [
        keras.optimizers.Adam(0.05, name="adam", **kwargs),
        keras.optimizers.SGD(0.02, momentum=0.9, name="sgd", **kwargs),
    ]


def state_of(model, *optimizers):
    """Returns the variables of the model, random seeds included, and of optimizers."""
    return [weights_of(owner.variables) for owner in (model, *optimizers)]
