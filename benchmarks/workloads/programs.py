"""Train steps with plain optimizers and with sequences, checked against each other."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.harness.checks import check_same
from benchmarks.workloads.models import LOSS, Task
from sequential_optimizer import SequentialOptimizer

# In the order in which sequences of 2, 3, ... children have them. The names are given,
# because older versions of Keras call every optimizer by its class.
OPTIMIZERS: dict[str, Callable[..., keras.optimizers.Optimizer]] = {
    "adam": lambda name: keras.optimizers.Adam(1e-3, name=name),
    "sgd": lambda name: keras.optimizers.SGD(1e-2, momentum=0.9, name=name),
    "rmsprop": lambda name: keras.optimizers.RMSprop(1e-4, name=name),
    "nadam": lambda name: keras.optimizers.Nadam(1e-3, name=name),
    "adamw": lambda name: keras.optimizers.AdamW(1e-3, name=name),
    "lion": lambda name: keras.optimizers.Lion(1e-4, name=name),
    "adamax": lambda name: keras.optimizers.Adamax(1e-3, name=name),
    "adadelta": lambda name: keras.optimizers.Adadelta(1e-1, name=name),
}
MODES = ("xla", "graph")


def make_plain(name: str) -> keras.optimizers.Optimizer:
    """Returns a new plain optimizer."""
    return OPTIMIZERS[name](name=name)


def make_sequence(
    children: int = 2, boundaries: Sequence[int | None] | None = None
) -> SequentialOptimizer:
    """Returns a sequence of the first of `OPTIMIZERS`, by default without integers."""
    names = list(OPTIMIZERS)[:children]
    if boundaries is None:
        boundaries = [None] * (children - 1)
    return SequentialOptimizer([make_plain(name) for name in names], boundaries)


class Program:
    """A model, an optimizer and the train step of the two, in each mode.

    Each run starts from the same weights and optimizer variables, without a new trace.

    Args:
        task: the model and its data.
        optimizer: a Keras optimizer, or anything with the methods that are used here.
        model: a model of this task that another program trains as well, or `None` for
            a new one.
    """

    def __init__(self, task: Task, optimizer: Any, model: keras.Model | None = None):
        self.model = model or task.new_model()
        self.optimizer = optimizer
        optimizer.build(self.model.trainable_variables)
        self._variables = [*self.model.variables, *optimizer.variables]
        self._first = [compact(np.array(v.numpy())) for v in self._variables]
        self._batch = tf.constant(task.x), tf.constant(task.y)
        self._functions: dict[str, Any] = {}

    def _train_step(self, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = LOSS(y, self.model(x, training=True))
            # Not the loss itself under a LossScaleOptimizer.
            scaled = self.optimizer.scale_loss(loss)
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(scaled, variables), variables)
        return loss

    def function(self, mode: str = "xla") -> Any:
        """Returns the traced train step, a `tf.function` of the batch."""
        if mode not in self._functions:
            function = tf.function(
                self._train_step, autograph=False, jit_compile=mode == "xla"
            )
            # Tracing it by a call would make TensorFlow warn: it takes the functions
            # of several programs for one that is traced again and again.
            function.get_concrete_function(*self._batch)
            self._functions[mode] = function
        return self._functions[mode]

    def forget(self) -> None:
        """Drops the traced train steps, so that the next one is traced anew."""
        self._functions.clear()

    def step(self, mode: str = "xla") -> tf.Tensor:
        """Makes one update and returns the loss before it."""
        return self.function(mode)(*self._batch)

    def traces(self, mode: str = "xla") -> int:
        """Returns how often the train step was traced."""
        return self.function(mode).experimental_get_tracing_count()

    def restart(self, phase: int = 0) -> None:
        """Sets all variables to their first values, and ends the phases before one."""
        for variable, value in zip(self._variables, self._first, strict=True):
            variable.assign(value)
        for _ in range(phase):
            self.advance()

    def advance(self) -> None:
        """Ends the phase of a sequence, also of one in a LossScaleOptimizer."""
        getattr(self.optimizer, "inner_optimizer", self.optimizer).advance()

    def weights(self) -> list[np.ndarray]:
        """Returns the variables of the model."""
        return [np.array(v.numpy()) for v in self.model.variables]


def compact(array: np.ndarray) -> np.ndarray:
    """Returns the array, stored as one number if it is the same everywhere.

    So are the variables of most optimizers at first, which are twice as large as the
    model.
    """
    if array.size and np.all(array == array.flat[0]):
        return np.broadcast_to(array.flat[0], array.shape)
    return array


def plain_weights(
    plains: Sequence[Program], updates: Sequence[int], mode: str
) -> list[np.ndarray]:
    """Returns the weights after so many updates by each program, one after another."""
    weights = None
    for plain, count in zip(plains, updates, strict=True):
        plain.restart()
        if weights is not None:
            plain.model.set_weights(weights)
        for _ in range(count):
            plain.step(mode)
        weights = plain.weights()
    return weights


def check_sequence(
    sequence: Program, plains: Sequence[Program], mode: str, updates: int = 2
) -> float:
    """Checks that a sequence does, across its switches, what the plain ones do.

    Args:
        sequence: its program; `advance()` must end its phases.
        plains: list with the program of a plain optimizer for each phase.
        mode: string, `"xla"` or `"graph"`.
        updates: int, the number of updates in each phase.

    Returns:
        The `checks.difference`, 0.0 if the weights are the same, bit for bit.

    Raises:
        CheckError: if the weights at the end are not the same.
    """
    expected = plain_weights(plains, [updates] * len(plains), mode)
    sequence.restart()
    first = sequence.weights()
    for phase in range(len(plains)):
        for _ in range(updates):
            sequence.step(mode)
        if phase < len(plains) - 1:
            sequence.advance()
    what = f"sequence of {len(plains)} phases, {mode}"
    return check_same(what, sequence.weights(), expected, first)
