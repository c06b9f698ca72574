"""Starts clusters of processes on this machine, and reads what they leave behind."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.harness.processes import (
    Process,
    check_all,
    cluster_environments,
    running,
)


def run_workers(function: Callable, folder: Path, count: int) -> list[dict]:
    """Runs a cluster of equal workers; returns the arrays that each left behind."""
    files = [folder / f"worker{index}.npz" for index in range(count)]
    environments = cluster_environments(worker=count).values()
    check_all(
        [
            Process(function, (index, str(file)), file.with_suffix(".log"), env)
            for index, (file, env) in enumerate(zip(files, environments, strict=True))
        ]
    )
    return [read(file) for file in files]


def run_coordinator(
    function: Callable, serve: Callable, folder: Path, **counts: int
) -> dict:
    """Runs a coordinator with its servers; returns the arrays that it left behind."""
    file = folder / "chief.npz"
    processes = {
        (job, index): Process(
            function if job == "chief" else serve,
            (str(file),) if job == "chief" else (),
            folder / f"{job}{index}.log",
            env,
        )
        for (job, index), env in cluster_environments(chief=1, **counts).items()
    }
    # The servers serve until they are killed.
    with running(list(processes.values())):
        check_all([processes["chief", 0]])
    return read(file)


def read(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)
