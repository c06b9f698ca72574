"""Counts what is traced and compiled when the optimizer changes.

There is no public counter of XLA's compilations, but XLA writes a file for each if it
is told to with `--xla_dump_to`, before it starts: hence a separate process.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.report import compile_something
from benchmarks.harness.terminal import Progress
from benchmarks.workloads import ways

# The dump of a module before XLA has changed anything.
_MODULE = re.compile(r"module_(\d+)\..*before_optimizations\.txt")


def count_at_switch(task: int, tiny: bool) -> dict[str, dict[str, int]]:
    """Returns by way how many traces and compilations the switch takes.

    Args:
        task: int, which of `ways.make_tasks`.
        tiny: bool, whether of the tiny ones.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
        run = subprocess.run(
            [sys.executable, "-m", __name__, folder, str(task), str(int(tiny))],
            env={**os.environ, "XLA_FLAGS": flags},
            # Its progress bar may go to the terminal.
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(run.stdout.splitlines()[-1])


def modules_in(folder: Path) -> int:
    """Returns how many modules XLA has compiled."""
    found = (_MODULE.fullmatch(path.name) for path in folder.iterdir())
    return len({match[1] for match in found if match})


def count(way: Any, compiled: Callable[[], int]) -> dict[str, int]:
    """Returns what a way traces and compiles before the switch, and from there on."""
    before = compiled()
    way.restart()
    for update in range(ways.BOUNDARY):
        way.step(update)
    at_switch, traces = compiled(), way.traces()
    for update in range(ways.BOUNDARY, ways.UPDATES):
        way.step(update)
    return {
        "traces_before": traces,
        "compiles_before": at_switch - before,
        "traces_at_switch": way.traces() - traces,
        "compiles_at_switch": compiled() - at_switch,
    }


def main(folder: str, task: str, tiny: str) -> None:
    """Prints the counts of all ways."""
    compile_something()
    made = ways.make_ways(ways.make_tasks(bool(int(tiny)))[int(task)])
    progress = Progress(len(made), "counting compilations")
    counts = {}
    for name, way in made.items():
        counts[name] = count(way, lambda: modules_in(Path(folder)))
        progress.step(name)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
