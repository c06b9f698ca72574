"""What every rival is asked to do, in whatever framework: the same training.

A rival is a module with a function `make_trainers(work)` that returns `Trainers`. All
start from the same weights, see the same batch and make the same updates, first with
Adam and then with SGD with momentum.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.workloads.models import Task


class NotAvailableError(Exception):
    """A framework does not work here; the message says why."""


@dataclass(frozen=True)
class Work:
    """A model of dense layers with its batch, the settings of both optimizers, and when
    the second takes over.

    Args:
        task: the model and the batch.
        boundary: int, the number of updates with Adam.
        adam: float, the learning rate of Adam. Small, because Adam turns a gradient
            that has vanished, but for rounding errors, into a whole update.
        epsilon: float. Keras adds it to the root of the uncorrected second moment, the
            others to that of the corrected one: in the first update that is 32 times
            more. Hence one so small that neither is felt.
        sgd: float, the learning rate of SGD. It never changes, so it does not matter
            whether it is multiplied into the momentum (Keras) or not (the others).
        momentum: float.
    """

    task: Task
    boundary: int
    adam: float = 1e-4
    epsilon: float = 1e-12
    sgd: float = 1e-3
    momentum: float = 0.9

    def first_weights(self) -> list[np.ndarray]:
        """Returns kernel, bias, kernel, bias, ...; a kernel is (inputs, outputs)."""
        return self.task.new_model().get_weights()


class Trainer:
    """A program that trains.

    Args:
        restart: function that goes back to the first weights and to update 0.
        step: function that makes one update, and returns when it is made.
        weights: function that returns the weights in the order of Keras.
    """

    def __init__(
        self,
        restart: Callable[[], Any],
        step: Callable[[], Any],
        weights: Callable[[], list[np.ndarray]],
    ):
        self.restart = restart
        self.step = step
        self.weights = weights

    def train(self, updates: int) -> list[np.ndarray]:
        """Returns the weights after so many updates from the first ones."""
        self.restart()
        for _ in range(updates):
            self.step()
        return self.weights()

    def time(self, updates: int) -> np.ndarray:
        """Returns the seconds of each update from the first weights on."""
        self.restart()
        seconds = np.empty(updates)
        for i in range(updates):
            start = time.perf_counter()
            self.step()
            seconds[i] = time.perf_counter() - start
        return seconds


# Plain programs of the two optimizers, a second copy of each, and what switches.
PLAIN = ("adam", "sgd")
COPIES = ("adam copy", "sgd copy")
Trainers = dict[str, Trainer]
