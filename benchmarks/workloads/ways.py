"""Ways to change the optimizer in the middle of training: ours, and what people do.

Each has `restart()`, `step(update)` that makes the update of that number, `weights()`
and `traces()`, the number of traces since the restart. Adam makes the first `boundary`
updates and SGD the others. Every train step is compiled by XLA.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.workloads.models import LOSS, Task, mlp, transformer
from benchmarks.workloads.programs import Program, make_plain, make_sequence

AROUND = 5  # updates that are looked at on each side of the switch
LEAD = 3  # updates before those: the first may compile, the others warm the caches
BOUNDARY = LEAD + AROUND
UPDATES = BOUNDARY + AROUND


def make_tasks(tiny: bool) -> list[Task]:
    """Returns the models: one with many weights, one that takes long to compile."""
    return [mlp(width=64, hidden=1)] if tiny else [mlp(), transformer()]


class OneFunction:
    """One train step, with an optimizer that knows by itself what to do."""

    def __init__(self, task: Task, optimizer: Any):
        self._program = Program(task, optimizer)
        self._before = 0

    def restart(self) -> None:
        self._program.restart()
        self._before = self._program.traces()

    def step(self, update: int) -> Any:
        return self._program.step()

    def weights(self) -> list[np.ndarray]:
        return self._program.weights()

    def traces(self) -> int:
        # It may have been traced before, and is not for a restart.
        return self._program.traces() - self._before


class TwoFunctions:
    """A train step for each optimizer, and a Python `if`.

    Args:
        task: the model and its data.
        boundary: int, the number of updates before the switch.
        both_at_start: bool, whether both are traced and compiled before training, for
            which a program that is not a benchmark has to undo the update that it
            takes to compile.
    """

    def __init__(self, task: Task, boundary: int, both_at_start: bool):
        self._boundary = boundary
        self._both_at_start = both_at_start
        adam = Program(task, make_plain("adam"))
        sgd = Program(task, make_plain("sgd"), model=adam.model)
        self._programs = (adam, sgd)
        self._used: set[int] = set()
        if both_at_start:
            for program in self._programs:
                program.step()

    def restart(self) -> None:
        self._used.clear()
        for program in self._programs:
            program.restart()
            if not self._both_at_start:
                program.forget()

    def step(self, update: int) -> Any:
        i = int(update >= self._boundary)
        self._used.add(i)
        return self._programs[i].step()

    def weights(self) -> list[np.ndarray]:
        return self._programs[0].weights()

    def traces(self) -> int:
        if self._both_at_start:
            return 0
        return sum(self._programs[i].traces() for i in self._used)


class CompileAgain:
    """`Model.compile` with the other optimizer, in the middle of training.

    Args:
        task: the model and its data.
        optimizers: dict from the update that an optimizer begins with to its name.
    """

    def __init__(self, task: Task, optimizers: dict[int, str]):
        self._task = task
        self._optimizers = optimizers
        self._model = task.new_model()
        self._first = self._model.get_weights()
        self._count_traces(self._model.train_step)
        self._compile(0)

    def _count_traces(self, train_step: Callable[[Any], Any]) -> None:
        """Keras does not show its `tf.function`; but what it traces is `train_step`."""
        self._traces = 0

        def counted(data: Any) -> Any:
            self._traces += 1
            return train_step(data)

        self._model.train_step = counted

    def _compile(self, update: int) -> None:
        optimizer = make_plain(self._optimizers[update])
        self._model.compile(optimizer=optimizer, loss=LOSS, jit_compile=True)

    def restart(self) -> None:
        self._model.set_weights(self._first)
        self._traces = 0
        # Without a switch there is no reason to compile anew.
        if len(self._optimizers) > 1:
            self._compile(0)

    def step(self, update: int) -> Any:
        if update and update in self._optimizers:
            self._compile(update)
        return self._model.train_on_batch(self._task.x, self._task.y)

    def weights(self) -> list[np.ndarray]:
        return [np.array(v.numpy()) for v in self._model.variables]

    def traces(self) -> int:
        return self._traces


class BothAndSelect:
    """An optimizer that computes the updates of both children, and takes one.

    What was computed with the other child, its optimizer variables included, is thrown
    away; otherwise its state would not be that of an optimizer that did not run.
    """

    def __init__(self, children: list[keras.optimizers.Optimizer], boundary: int):
        self._children = children
        self._boundary = boundary

    def build(self, variables: list[Any]) -> None:
        for child in self._children:
            child.build(variables)
        self._iterations = tf.Variable(0)
        self.variables = [self._iterations]
        for child in self._children:
            self.variables += child.variables

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        return loss

    def apply(self, gradients: list[Any], variables: list[Any]) -> None:
        active = tf.cast(self._iterations >= self._boundary, tf.int32)
        before = values(variables)
        after = before
        for i, child in enumerate(self._children):
            own_before = values(child.variables)
            child.apply(gradients, variables)
            take = tf.equal(active, i)
            after = select(take, values(variables), after)
            assign(child.variables, select(take, values(child.variables), own_before))
            assign(variables, before)
        assign(variables, after)
        self._iterations.assign_add(1)


def values(variables: list[Any]) -> list[tf.Tensor]:
    """Returns what the variables are at this point of the graph."""
    return [tf.identity(tf.convert_to_tensor(variable)) for variable in variables]


def select(
    take: tf.Tensor, one: list[tf.Tensor], other: list[tf.Tensor]
) -> list[tf.Tensor]:
    """Returns one list of tensors or the other."""
    return [tf.where(take, a, b) for a, b in zip(one, other, strict=True)]


def assign(variables: list[Any], tensors: list[tf.Tensor]) -> None:
    """Sets the variables."""
    for variable, tensor in zip(variables, tensors, strict=True):
        variable.assign(tensor)


def make_ways(task: Task, boundary: int = BOUNDARY) -> dict[str, Any]:
    """Returns every way to switch, by its name."""
    children = [make_plain("adam"), make_plain("sgd")]
    return {
        "sequence": OneFunction(task, make_sequence(2, [boundary])),
        "two functions": TwoFunctions(task, boundary, both_at_start=False),
        "two functions, compiled at the start": TwoFunctions(task, boundary, True),
        "both updates, then tf.where": OneFunction(
            task, BothAndSelect(children, boundary)
        ),
        "Model.compile again": CompileAgain(task, {0: "adam", boundary: "sgd"}),
    }


def make_controls(task: Task) -> dict[str, Any]:
    """Returns plain optimizers, without a switch, in the same two kinds of loop."""
    return {
        "plain adam": OneFunction(task, make_plain("adam")),
        "plain sgd": OneFunction(task, make_plain("sgd")),
        "train_on_batch adam": CompileAgain(task, {0: "adam"}),
        "train_on_batch sgd": CompileAgain(task, {0: "sgd"}),
    }


# The ways that compile at every restart, and so take too long to repeat often.
COMPILING = ("two functions", "Model.compile again")


def controls_of(way: str) -> tuple[str, str]:
    """Returns the names of the plain loops with Adam and SGD that a way belongs to."""
    loop = "train_on_batch" if way == "Model.compile again" else "plain"
    return f"{loop} adam", f"{loop} sgd"
