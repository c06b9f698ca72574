"""Training of a physics-informed network by one contender, seed after seed.

A contender makes all of its steps inside of `Model.fit(jit_compile=True)`, or is a
rival that takes over the weights from Adam (workloads/pinn_rivals.py).
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.workloads.pinn import PINN, PROBLEMS, draw_points, make_error
from sequential_optimizer import LBFGS, SequentialOptimizer, SSBroyden, SwitchOnPlateau

OURS = {"LBFGS": LBFGS, "SSBroyden": SSBroyden}
EPOCH = 100  # steps; each epoch is one execution
# Epochs without a loss that is lower by this share of the first epoch's.
PATIENCE, MIN_DELTA = 5, 1e-3


@dataclass(frozen=True)
class Contender:
    """How a network is trained.

    Args:
        first: string, what begins: "Adam", "Adam, cosine decay", or "" for nothing.
        then: string, what takes over: "LBFGS", "SSBroyden", a rival, or "".
        share: float, the share of the steps before that; 0 on a plateau of the loss.
        rival: string, the module that `then` needs, or "" for one of ours.
    """

    first: str
    then: str = ""
    share: float = 0.0
    rival: str = ""

    @property
    def name(self) -> str:
        """How it is called in tables."""
        if not (self.first and self.then):
            return self.first or self.then
        return f"{self.first}, then {self.then} {self.when}"

    @property
    def when(self) -> str:
        """When the second takes over."""
        return f"at {self.share:.0%}" if self.share else "on a plateau"


@dataclass(frozen=True)
class Cell:
    """Runs that differ in their seed only.

    Args:
        problem: string, a key of `PROBLEMS`.
        contender: how it is trained.
        dtype: string.
        rate: float, the learning rate of Adam.
        seeds: the seed of each run: of its points and its first weights.
        steps: int, gradients.
        width: int, neurons of each hidden layer.
        depth: int, the number of hidden layers.
        with_curve: whether to keep the errors on the way.
    """

    problem: str
    contender: Contender
    dtype: str
    rate: float
    seeds: tuple[int, ...]
    steps: int
    width: int
    depth: int
    with_curve: bool = False

    def key(self, seed: int) -> tuple[Any, ...]:
        """Returns what tells a run from the others of these settings."""
        return (self.problem, self.contender.name, self.dtype, self.rate, seed)


def run_cell(report: Callable[[Any], None], cell: Cell) -> None:
    """Reports a row for each seed. To be called in a separate process."""
    # Two cells run side by side on two cores.
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    training = Training(cell)
    for seed in cell.seeds:
        report(training.run(seed))


class Training:
    """A compiled model, trained again and again without a new trace."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.problem = PROBLEMS[cell.problem]
        self.error = make_error(self.problem, cell.dtype)
        self.model = self.make_model()
        optimizer = make_optimizer(cell)
        self.model.compile(
            optimizer=optimizer, jit_compile=True, steps_per_execution=EPOCH
        )
        optimizer.build(self.model.trainable_variables)
        self._fresh = [np.array(v.numpy()) for v in optimizer.variables]
        # Traces and compiles, so that no run is timed with it.
        points = draw_points(self.problem, 0, cell.dtype)
        self.model.fit_points(points, EPOCH, EPOCH)

    def make_model(self) -> PINN:
        """Returns a new network."""
        cell = self.cell
        return self.problem(cell.width, cell.depth, inputs=2, dtype=cell.dtype)

    @property
    def steps_in_fit(self) -> int:
        """How many steps belong to Keras."""
        contender = self.cell.contender
        share = contender.share if contender.rival else 1.0
        return round(share * self.cell.steps)

    def run(self, seed: int) -> dict[str, Any]:
        """Makes a whole run, and returns its row."""
        cell = self.cell
        points = draw_points(self.problem, seed, cell.dtype)
        keras.utils.set_random_seed(seed)
        self.model.set_weights(self.make_model().get_weights())
        optimizer = self.model.optimizer
        for variable, value in zip(optimizer.variables, self._fresh, strict=True):
            variable.assign(value)
        record = Record(self.error)
        callbacks: list[keras.callbacks.Callback] = [record]
        if cell.contender.first and cell.contender.then and not cell.contender.share:
            loss = float(self.model.compute_residual_loss(points))
            callbacks.append(
                SwitchOnPlateau("loss", patience=PATIENCE, min_delta=MIN_DELTA * loss)
            )
        self.model.fit_points(points, self.steps_in_fit, EPOCH, callbacks)
        row = {
            "problem": cell.problem,
            "contender": cell.contender.name,
            "dtype": cell.dtype,
            "rate": cell.rate,
            "seed": seed,
            "evaluations": self.steps_in_fit,
            "seconds": round(record.seconds, 3),
            "switched_at": switched_at(optimizer),
        }
        if cell.contender.rival:
            row |= self.run_rival(points)
        loss = float(self.model.compute_residual_loss(points))
        row["error"] = as_json(self.error(self.model))
        row["loss"] = as_json(loss)
        if cell.with_curve:
            row["curve"] = record.curve
        return row

    def run_rival(self, points: Any) -> dict[str, Any]:
        """Lets a rival make the other steps, and returns what it says."""
        rivals = importlib.import_module("benchmarks.workloads.pinn_rivals")
        function = rivals.FlatLoss(
            self.model, points, self.cell.steps - self.steps_in_fit
        )
        begun = time.perf_counter()
        rivals.search(self.cell.contender.then, function)
        seconds = time.perf_counter() - begun
        function.go_to_best()
        return {
            "evaluations": self.steps_in_fit + function.evaluations,
            "rival_seconds": round(seconds, 3),
        }


class Record(keras.callbacks.Callback):
    """Notes the error after each epoch, and adds up the time between them."""

    def __init__(self, error: Callable[[PINN], float]) -> None:
        super().__init__()
        self._error = error
        self.seconds = 0.0
        self.curve: list[float | None] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self._begun = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        float(logs["loss"])  # waits for it
        self.seconds += time.perf_counter() - self._begun

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.curve.append(as_json(self._error(self.model)))


def as_json(value: float) -> float | None:
    """Returns four digits, and `None` for what JSON cannot hold."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def switched_at(optimizer: keras.optimizers.Optimizer) -> int | None:
    """Returns the number of steps before the second phase, if there is one."""
    if not isinstance(optimizer, SequentialOptimizer):
        return None
    return int(optimizer.phase_starts[1])


def make_optimizer(cell: Cell) -> keras.optimizers.Optimizer:
    """Returns a new optimizer; that of a rival makes the steps before it."""
    contender = cell.contender
    rate: Any = cell.rate
    if contender.first == "Adam, cosine decay":
        rate = keras.optimizers.schedules.CosineDecay(cell.rate, cell.steps)
    children = [keras.optimizers.Adam(rate)] if contender.first else []
    if contender.then and not contender.rival:
        children.append(OURS[contender.then]())
    if len(children) == 1:
        return children[0]
    boundary = round(contender.share * cell.steps) if contender.share else None
    return SequentialOptimizer(children, [boundary])
