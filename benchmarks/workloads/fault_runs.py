"""Kinds of training runs, started and killed, and what they reported meanwhile."""

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.harness.processes import (
    Process,
    ProcessError,
    cluster_environments,
    running,
)
from benchmarks.workloads import fault_worker
from benchmarks.workloads.fault_worker import Fit, Loop

# Seconds that the other workers get to notice that one is gone.
PATIENCE = 1.0
# The errors of a run that refuses a broken backup: Keras', then fault_worker.py's.
REFUSALS = ("OSError: ", "RuntimeError: BackupAndRestore restored ")


@dataclass
class Life:
    """What a process reported between its start and its end."""

    restored: int = -1
    epoch: int = 0  # the first
    last: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    save_seconds: list[float] = field(default_factory=list)
    is_saving: bool = False
    is_killed: bool = False
    is_finished: bool = False
    _saving_since: float = 0.0

    def note(self, event: str, number: int, text: str) -> None:
        """Takes a report; see fault_worker.py."""
        if event in ("begins", "update"):
            self.digests[f"{event} {number}"] = text
            self.last = number
        if event == "restored":
            self.restored = number
        elif event == "epoch":
            self.epoch = number
        elif event == "refused":
            self.refused.append(text)
        elif event == "finished":
            self.is_finished = True
        elif event == "saving":
            self.is_saving, self._saving_since = True, time.perf_counter()
        elif event == "saved":
            self.is_saving = False
            self.save_seconds.append(time.perf_counter() - self._saving_since)

    def differences(self, expected: dict[str, str]) -> list[str]:
        """Returns the reports of a state that was not the expected one."""
        return [
            event for event, text in self.digests.items() if expected.get(event) != text
        ]


@dataclass(frozen=True)
class Moment:
    """When a run is killed: some time after it reports an event.

    Args:
        event: string.
        number: int, of updates made; the first such event from there on counts.
        delay: seconds.
        victim: int, the index of the process.
    """

    event: str
    number: int
    delay: float = 0.0
    victim: int = 0


@dataclass(frozen=True)
class Kind:
    """A kind of run, and how it is killed.

    Args:
        title: string, for the table.
        share: int, its share of the kills.
        workload: what is trained.
        processes: int.
        event: string, the report after which it is killed.
        is_damaged: bool, whether its newest checkpoint is damaged after the kill.
        goes_back: bool, whether a resumed run sees batches again.
    """

    title: str
    share: int
    workload: Loop | Fit
    processes: int = 1
    event: str = "update"
    is_damaged: bool = False
    goes_back: bool = False

    @property
    def updates(self) -> int:
        """The number of updates of a run that nobody kills."""
        if isinstance(self.workload, Loop):
            return self.workload.updates
        return self.workload.epochs * self.workload.batches

    @property
    def save_every(self) -> int:
        """The largest number of updates between two saves."""
        if isinstance(self.workload, Loop):
            return self.workload.save_every
        return self.workload.batches

    @property
    def function(self) -> Callable:
        """What each process runs."""
        if isinstance(self.workload, Fit):
            return fault_worker.fit
        if self.processes > 1:
            return fault_worker.train_in_cluster
        return fault_worker.train_alone

    def start(self, folder: Path) -> list[Process]:
        """Starts the processes of a run, which continue from what is in the folder."""
        environments: list[dict[str, str]] = [{}]
        if self.processes > 1:
            environments = list(cluster_environments(worker=self.processes).values())
        lives = len(list(folder.glob("*.log")))
        return [
            Process(
                self.function,
                (self.workload, str(folder / "saved"), worker),
                folder / f"{lives}-{worker}.log",
                environment,
            )
            for worker, environment in enumerate(environments)
        ]


LOOP = Loop(updates=48, switches=(16, 32), save_every=3, width=4)
# Large enough that writing takes a while.
BIG_LOOP = Loop(updates=24, switches=(8, 16), save_every=1, width=700)
FIT = Fit(epochs=5, batches=8, switches=(10, 24), save_freq="epoch", width=4)
BIG_FIT = dataclasses.replace(FIT, width=500)

KINDS = {
    "cluster": Kind("a worker of a cluster of two", 3, LOOP, processes=2),
    "fit": Kind("Mirrored `fit`, a backup each epoch", 2, FIT),
    "fit_batches": Kind(
        "Mirrored `fit`, a backup each 3 batches",
        1,
        dataclasses.replace(FIT, save_freq=3),
        goes_back=True,
    ),
    "saving": Kind("while a checkpoint is written", 2, BIG_LOOP, event="saving"),
    "damaged": Kind("and its newest checkpoint damaged", 1, BIG_LOOP, is_damaged=True),
    "backup": Kind("while `fit` writes its backup", 1, BIG_FIT, event="saving"),
}


def live(processes: list[Process], moment: Moment | None = None) -> list[Life]:
    """Follows a run until it is killed, or ends; returns one life per process.

    Raises:
        ProcessError: if it fails before.
    """
    lives = [Life() for _ in processes]
    victim = moment.victim if moment else 0
    with running(processes):
        for event, number, text in processes[victim].reports():
            lives[victim].note(event, number, text)
            if moment and event == moment.event and number >= moment.number:
                time.sleep(moment.delay)
                lives[victim].is_killed = processes[victim].kill()
                moment = None
        if not lives[victim].is_killed:
            for process in processes:
                process.check()
        for process in processes:
            process.wait(PATIENCE)
    for process, life in zip(processes, lives, strict=True):
        for report in process.reports():
            life.note(*report)
    # The victim first: it is the one that was killed.
    return [lives[victim], *lives[:victim], *lives[victim + 1 :]]


def live_again(kind: Kind, folder: Path, moment: Moment | None) -> list[Life]:
    """Starts a run, as a user would who reads its error, and follows it.

    A run that refuses its only backup has to start from the beginning.
    """
    try:
        return live(kind.start(folder), moment)
    except ProcessError as error:
        refusals = [line for line in str(error).splitlines() if is_refusal(line)]
        if not refusals:
            raise
    shutil.rmtree(folder / "saved")
    lives = live(kind.start(folder), moment)
    lives[0].refused = refusals[-1:]
    return lives


def is_refusal(line: str) -> bool:
    """Whether a line of a log is the error of a run that refuses a backup."""
    return line.startswith(REFUSALS)


def reference(kind: Kind, folder: Path) -> Life:
    """Returns the life of a run that nobody kills."""
    folder.mkdir()
    first, *others = live(kind.start(folder))
    for other in others:
        if other.digests != first.digests:
            raise ProcessError(f"{kind.title}: the workers do not agree")
    return first


def reference_going_back(kind: Kind, lives: list[Life], folder: Path) -> Life:
    """Returns the life of a run that goes back as the lives did, without a kill."""
    returns: dict[int, int] = {}
    for life in lives[1:]:
        if life.restored == 0:
            returns.clear()
        else:
            # Two lives may have gone on from the same backup.
            returns[life.restored] = life.epoch
    process = Process(
        fault_worker.fit_going_back,
        (kind.workload, list(returns.items())),
        folder / f"going_back{len(lives)}.log",
    )
    return live([process])[0]


# --- damages -----------------------------------------------------------------------


def cut(suffix: str) -> Callable:
    def damage(path: str, rng: np.random.Generator) -> None:
        os.truncate(path + suffix, int(os.path.getsize(path + suffix) * rng.random()))

    return damage


def lose(suffix: str) -> Callable:
    def damage(path: str, rng: np.random.Generator) -> None:
        os.remove(path + suffix)

    return damage


def flip_a_bit(path: str, rng: np.random.Generator) -> None:
    """Flips a bit somewhere in the data."""
    with open(path + DATA, "r+b") as file:
        place = int(rng.integers(os.path.getsize(path + DATA)))
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


DATA, INDEX = ".data-00000-of-00001", ".index"
DAMAGES: tuple[Callable[[str, Any], None], ...] = (
    cut(DATA),
    flip_a_bit,
    cut(INDEX),
    lose(INDEX),
    lose(DATA),
)


def damage_newest(folder: Path, damage: Callable, rng: np.random.Generator) -> str:
    """Damages the newest checkpoint of a run; returns its name."""
    path = tf.train.latest_checkpoint(str(folder / "saved" / "checkpoints"))
    damage(path, rng)
    return Path(path).name
