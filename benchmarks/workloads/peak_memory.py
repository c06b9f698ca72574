"""Measures the memory of one training program, in a separate process.

    python -m benchmarks.workloads.peak_memory adam xla 0    # or the number of children

Prints JSON: the bytes of the model, of the optimizer and of each of its children, and
the peak of the process while it makes steps in each phase.
"""

import json
import subprocess
import sys
from typing import Any

from benchmarks.harness.processes import forget_peak, peak_memory
from benchmarks.workloads.models import Task, mlp
from benchmarks.workloads.programs import Program, make_plain, make_sequence

STEPS = 3


def measure_in_process(optimizer: str, mode: str, tiny: bool) -> dict[str, Any]:
    """Returns what `main` prints in a new process.

    Args:
        optimizer: the name of a plain optimizer, or the number of children.
        mode: `"xla"` or `"graph"`.
        tiny: whether the model is small.
    """
    run = subprocess.run(
        [sys.executable, "-m", __name__, optimizer, mode, str(int(tiny))],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        raise RuntimeError(f"{__name__} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def make_task(tiny: bool) -> Task:
    """Returns the model with so many weights that nothing else matters for memory."""
    return mlp(width=64, hidden=1) if tiny else mlp()


def bytes_of(variables: list[Any]) -> int:
    """Returns the size of the variables."""
    return sum(
        v.value.dtype.size * int(v.value.shape.num_elements()) for v in variables
    )


def main(optimizer: str, mode: str, tiny: str) -> None:
    """Trains, and prints what it took."""
    phases = int(optimizer) if optimizer.isdigit() else 1
    plain = not optimizer.isdigit()
    made = make_plain(optimizer) if plain else make_sequence(phases)
    program = Program(make_task(bool(int(tiny))), made)
    # Compiling takes memory as well, once.
    program.step(mode)
    peaks = []
    for phase in range(phases):
        forget_peak()
        for _ in range(STEPS):
            program.step(mode)
        peaks.append(peak_memory())
        if phase < phases - 1:
            program.advance()
    children = [made] if plain else made.children
    print(
        json.dumps(
            {
                "weights": bytes_of(program.model.variables),
                "optimizer": bytes_of(made.variables),
                "children": [bytes_of(child.variables) for child in children],
                "peaks": peaks,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
