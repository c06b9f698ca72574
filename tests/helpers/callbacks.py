"""What the tests of the callbacks share: tiny models, scripted metrics, killed runs."""

import keras
import numpy as np
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers.models import Counting, make_model

BATCH = 4

_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(64, 3)).astype("float32")
Y = _RNG.normal(size=(64, 1)).astype("float32")


def compiled_model(optimizer, model_class=Counting, **kwargs):
    """Returns a small model, run eagerly unless told otherwise: half the time."""
    model = make_model(1, model_class=model_class)
    model.compile(optimizer, loss="mse", **(kwargs or {"run_eagerly": True}))
    return model


class GAN(keras.Model):
    """A tiny generator and discriminator, each with its own optimizer."""

    def __init__(self, g_optimizer, d_optimizer, optimizer="rmsprop"):
        super().__init__()
        self.generator = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        self.discriminator = keras.Sequential(
            [keras.Input((1,)), keras.layers.Dense(1)]
        )
        self.compile(optimizer, run_eagerly=True)  # what Keras does by default
        self.g_optimizer = g_optimizer
        self.d_optimizer = d_optimizer

    def train_step(self, data):
        noise, real = data
        with tf.GradientTape() as tape:
            fake = self.generator(noise)
            d_loss = tf.reduce_mean(self.discriminator(fake) - self.discriminator(real))
        variables = self.discriminator.trainable_variables
        self.d_optimizer.apply(tape.gradient(d_loss, variables), variables)
        with tf.GradientTape() as tape:
            g_loss = -tf.reduce_mean(self.discriminator(self.generator(noise)))
        variables = self.generator.trainable_variables
        self.g_optimizer.apply(tape.gradient(g_loss, variables), variables)
        return {"g_loss": g_loss, "d_loss": d_loss}


def make_sequence(boundaries, children=("sgd", "adam", "rmsprop", "lion"), **kwargs):
    """Returns a sequence of children that keep state, named as in `children`."""
    makers = {
        "adam": lambda: keras.optimizers.Adam(0.05, name="adam"),
        "sgd": lambda: keras.optimizers.SGD(0.02, momentum=0.9, name="sgd"),
        "rmsprop": lambda: keras.optimizers.RMSprop(0.01, name="rmsprop"),
        "lion": lambda: keras.optimizers.Lion(0.01, name="lion"),
    }
    instances = {name: makers[name]() for name in children}
    names = children[: len(boundaries) + 1]
    return SequentialOptimizer(
        [instances[name] for name in names], list(boundaries), **kwargs
    )


def fit(model, epochs, callbacks, batches=2, **kwargs):
    """Fits the model to the same batches in every epoch."""
    rows = batches * BATCH
    return model.fit(
        X[:rows],
        Y[:rows],
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        callbacks=callbacks,
        **{"verbose": 0, **kwargs},
    )


class Stage:
    """Stands in for `fit`: calls the hooks of callbacks around eager updates."""

    def __init__(self, optimizer, callbacks):
        weight = tf.Variable([0.5])
        optimizer.build([weight])
        self.optimizer = optimizer
        self.weight = weight
        self.model = _Model(optimizer, weight)
        self.callbacks = callbacks
        self.epoch = 0
        for callback in callbacks:
            callback.set_model(self.model)
        self._call("on_train_begin")

    def _call(self, hook, *args):
        for callback in self.callbacks:
            getattr(callback, hook)(*args)

    def update(self, gradient=1.0):
        self.optimizer.apply([tf.constant([gradient])], [self.weight])

    def begin_epoch(self):
        self._call("on_epoch_begin", self.epoch)

    def end_batch(self):
        """Returns the logs of the batch."""
        logs = {}
        self._call("on_train_batch_end", 0, logs)
        return logs

    def end_epoch(self, **logs):
        """Returns the logs of the epoch."""
        self._call("on_epoch_end", self.epoch, logs)
        self.epoch += 1
        return logs


class _Model:
    """As much of a model as the callbacks look at."""

    def __init__(self, optimizer, weight):
        self.optimizer = optimizer
        self.weight = weight

    def get_weights(self):
        return [self.weight.numpy().copy()]

    def set_weights(self, weights):
        self.weight.assign(weights[0])


class Script(keras.callbacks.Callback):
    """Puts scripted values of a metric into the logs of the epochs."""

    def __init__(self, values, metric="val_loss"):
        super().__init__()
        self.values = values
        self.metric = metric

    def on_epoch_end(self, epoch, logs=None):
        logs[self.metric] = self.values[epoch]


class Recorder(keras.callbacks.Callback):
    """Remembers the phase after, and the weights before and after, each epoch."""

    def __init__(self, sequence):
        super().__init__()
        self.sequence = sequence
        self.phases = {}
        self.before = {}
        self.after = {}

    def on_epoch_begin(self, epoch, logs=None):
        self.before[epoch] = self.model.get_weights()

    def on_epoch_end(self, epoch, logs=None):
        self.phases[epoch] = int(self.sequence.phase)
        self.after[epoch] = self.model.get_weights()


class KilledError(Exception):
    """Raised where a run is killed."""


class Kill(keras.callbacks.Callback):
    """Kills the run after the first batch of an epoch, or at its end."""

    def __init__(self, epoch, at_end=False):
        super().__init__()
        self.fatal_epoch = epoch
        self.at_end = at_end

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == self.fatal_epoch and not self.at_end:
            raise KilledError

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.fatal_epoch:
            raise KilledError
