"""The same training in TensorFlow: with our sequence, and with two functions."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.workloads.models import LOSS
from benchmarks.workloads.rival import Trainer, Trainers, Work
from sequential_optimizer import SequentialOptimizer


def make_trainers(work: Work) -> Trainers:
    """Returns the plain programs, and those that switch."""
    return {
        "adam": make_trainer(work, [make_adam(work)]),
        "sgd": make_trainer(work, [make_sgd(work)]),
        "adam copy": make_trainer(work, [make_adam(work)]),
        "sgd copy": make_trainer(work, [make_sgd(work)]),
        "SequentialOptimizer": make_trainer(
            work,
            [SequentialOptimizer([make_adam(work), make_sgd(work)], [work.boundary])],
        ),
        "two functions and an if": make_trainer(
            work, [make_adam(work), make_sgd(work)]
        ),
    }


def make_adam(work: Work) -> keras.optimizers.Optimizer:
    """Returns a new Adam."""
    return keras.optimizers.Adam(work.adam, epsilon=work.epsilon, name="adam")


def make_sgd(work: Work) -> keras.optimizers.Optimizer:
    """Returns a new SGD with momentum."""
    return keras.optimizers.SGD(work.sgd, momentum=work.momentum, name="sgd")


def make_trainer(work: Work, optimizers: list[Any]) -> Trainer:
    """Returns a trainer with a compiled function for each optimizer.

    At the boundary a Python `if` goes over to the second function, if there is one.
    """
    model = work.task.new_model()
    batch = tf.constant(work.task.x), tf.constant(work.task.y)
    variables = list(model.trainable_variables)
    for optimizer in optimizers:
        optimizer.build(model.trainable_variables)
        variables += optimizer.variables
    first = [np.array(variable.numpy()) for variable in variables]
    functions = [make_train_step(model, optimizer) for optimizer in optimizers]
    for function in functions:
        function.get_concrete_function(*batch)
    updates = 0

    def restart() -> None:
        nonlocal updates
        updates = 0
        for variable, value in zip(variables, first, strict=True):
            variable.assign(value)

    def step() -> None:
        nonlocal updates
        second = len(functions) > 1 and updates >= work.boundary
        updates += 1
        functions[1 if second else 0](*batch).numpy()

    return Trainer(restart, step, model.get_weights)


def make_train_step(model: keras.Model, optimizer: Any) -> Any:
    """Returns a function of the batch that makes one update, compiled by XLA."""

    @tf.function(jit_compile=True, autograph=False)
    def train_step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        weights = model.trainable_variables
        optimizer.apply(tape.gradient(loss, weights), weights)
        return loss

    return train_step
