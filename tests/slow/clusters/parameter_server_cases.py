"""What the processes of the parameter server cluster run.

The coordinator compares nothing: it trains with the sequence and with the oracle of
cases.py, and leaves arrays behind. Two workers share each variable and update
it without waiting for each other. Only where the coordinator waits for each update
(`in_step`) is the outcome determined, and then it has to be that of the oracle.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.slow.clusters.cases import (
    ENDED,
    Training,
    accumulate,
    adam_sgd,
    attempt,
    fit_with_plain_adam,
    is_sequence_of,
    make_batches,
    run_both,
    search,
    with_settings,
)

WORKERS = 2
# Whose batches and calls of `advance()` the cases are given.
WORKER = 1
MANY = 200
BOUNDARY = 80
SAVED_AFTER = (2, 5)

IN_STEP = {
    "settings of the children": is_sequence_of(with_settings, [3]),
    "ended by the coordinator": ENDED["by one worker"],
    "ended in the step": ENDED["by one worker's condition around the replicas"],
    "ended in the replica": ENDED["in the replica of one"],
}


def resolver() -> tf.distribute.cluster_resolver.ClusterResolver:
    return tf.distribute.cluster_resolver.TFConfigClusterResolver()


def serve(report: Callable) -> None:
    """Runs a worker or a parameter server, until it is killed."""
    me = resolver()
    server = tf.distribute.Server(
        me.cluster_spec(), me.task_type, me.task_id, protocol="grpc"
    )
    server.join()


class Coordinator:
    """Runs steps on the workers."""

    def __init__(self) -> None:
        self.strategy = tf.distribute.ParameterServerStrategy(resolver())
        self._coordinator = tf.distribute.coordinator.ClusterCoordinator(self.strategy)

    def schedule(self, step: Callable, batch: tuple[tf.Tensor, ...]) -> None:
        self._coordinator.schedule(step, args=batch)

    def join(self) -> None:
        self._coordinator.join()

    def in_step(self, step: Callable, batch: tuple[tf.Tensor, ...]) -> None:
        """Runs a step, and waits for it."""
        self.schedule(step, batch)
        self.join()


def start(coordinator: Coordinator, make: Callable, boundaries: list) -> Any:
    """Returns the training of a sequence, the sequence and its step."""
    training = Training(coordinator.strategy, WORKER, coordinator.in_step)
    with coordinator.strategy.scope():
        optimizer = SequentialOptimizer(make(), boundaries)
    return training, optimizer, training.make_step([optimizer])


def run_asynchronously(coordinator: Coordinator) -> dict[str, np.ndarray]:
    """Lets the workers run free, twice: over a boundary, and after `advance()`."""
    training, optimizer, step = start(coordinator, adam_sgd, [BOUNDARY])
    _, ended, step_of_ended = start(coordinator, adam_sgd, [None])
    batches = make_batches(WORKER)
    for t in range(MANY):
        coordinator.schedule(step, batches[t % len(batches)])
    coordinator.join()
    for phase in range(2):
        for batch in batches:
            coordinator.schedule(step_of_ended, batch)
        coordinator.join()
        if phase == 0:
            before = [child.iterations.numpy() for child in ended.children]
            ended.advance()
    return {
        "iterations": optimizer.iterations.numpy(),
        "phase": optimizer.phase.numpy(),
        "made": [child.iterations.numpy() for child in optimizer.children],
        "kernel": training.variables["kernel"].numpy(),
        "ended/iterations": ended.iterations.numpy(),
        "ended/before": before,
        "ended/after": [child.iterations.numpy() for child in ended.children],
    }


def run_saved(coordinator: Coordinator, folder: Path) -> dict[str, np.ndarray]:
    """Continues from checkpoints, in new variables."""

    def checkpoint(training: Training, optimizer: Any) -> tf.train.Checkpoint:
        return tf.train.Checkpoint(optimizer=optimizer, **training.variables)

    def state(name: str, training: Training, optimizer: Any) -> dict[str, np.ndarray]:
        variables = [*training.variables.values(), *optimizer.variables]
        return {f"{name}/{i}": v.numpy() for i, v in enumerate(variables)}

    training, optimizer, step = start(coordinator, with_settings, [3])
    paths = {}
    batches = make_batches(WORKER)
    for t, batch in enumerate(batches):
        training.call(step, batch)
        if t + 1 in SAVED_AFTER:
            path = str(folder / f"after{t + 1}")
            paths[t + 1] = checkpoint(training, optimizer).write(path)
    results = state("uninterrupted", training, optimizer)
    for calls, path in paths.items():
        training, optimizer, step = start(coordinator, with_settings, [3])
        checkpoint(training, optimizer).read(path).assert_consumed()
        for batch in batches[calls:]:
            training.call(step, batch)
        results |= state(f"resumed after {calls}", training, optimizer)
    return results


def coordinate(report: Callable, file: str) -> None:
    """Runs all cases, and writes what they leave behind."""
    coordinator = Coordinator()
    strategy = coordinator.strategy
    results = run_both(IN_STEP, strategy, WORKER, coordinator.in_step)
    results |= attempt("asynchronous", run_asynchronously, coordinator)
    results |= attempt("saved", run_saved, coordinator, Path(file).parent)
    results |= attempt("accumulation", accumulate, strategy)
    results |= attempt("full batch", search, strategy, "LBFGS")
    results |= attempt("fit with plain Adam", fit_with_plain_adam, strategy)
    np.savez(file, **results)
