"""Does a train step with a sequence take longer than one with the plain optimizer?

    python -m benchmarks step_throughput            # about 15 minutes on two cores
    python -m benchmarks step_throughput --quick    # seconds, on tiny models

The step of [Adam, SGD with momentum] in each of its phases, over the step of the plain
optimizer of that phase, on three models, compiled by XLA and in graph mode. Goal: the
median of all cells at most 1.02, and no cell above 1.05.

Beside that the network of the example, whose steps are too short for this goal.
"""

import dataclasses
import functools
import gc
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import report, timing
from benchmarks.harness.drawing import draw_ratios, new_figure
from benchmarks.workloads.handwritten_digits import make_task as digits_task
from benchmarks.workloads.models import Task, make_tasks
from benchmarks.workloads.programs import (
    MODES,
    Program,
    check_sequence,
    make_plain,
    make_sequence,
)

COST = "A step"
CHILDREN = ("adam", "sgd")
TYPICAL_GOAL = 1.02
WORST_GOAL = 1.05


@dataclass(frozen=True)
class Settings:
    """How long it takes: rounds, and timed steps of each program in a round.

    The same for short steps, whose times are the noisiest.
    """

    tiny_models: bool = False
    rounds: int = 40
    steps: int = 5
    short_rounds: int = 60
    short_steps: int = 20


FULL = Settings()
QUICK = Settings(tiny_models=True, rounds=5, steps=5, short_rounds=5, short_steps=5)


def measure(settings: Settings) -> dict[str, Any]:
    """Returns one row per model, mode and phase."""
    cells = []
    for task in make_tasks(settings.tiny_models):
        cells += measure_task(task, settings)
        # What Keras and TensorFlow make refers to itself.
        gc.collect()
    short = dataclasses.replace(
        settings, rounds=settings.short_rounds, steps=settings.short_steps
    )
    return {"cells": cells, "short_steps": measure_task(digits_task(), short)}


def measure_task(task: Task, settings: Settings) -> list[dict[str, Any]]:
    """Returns the rows of a model."""
    plains = [Program(task, make_plain(name)) for name in CHILDREN]
    copies = [Program(task, make_plain(name)) for name in CHILDREN]
    sequence = Program(task, make_sequence(len(CHILDREN)))
    timed = {}
    differences = {}
    for mode in MODES:
        differences[mode] = check_sequence(sequence, plains, mode)
        for phase in range(len(CHILDREN)):
            timed["plain", mode, phase] = (plains[phase], 0)
            timed["copy", mode, phase] = (copies[phase], 0)
            timed["sequence", mode, phase] = (sequence, phase)
    calls = {
        key: functools.partial(time_steps, program, phase, key[1], settings.steps)
        for key, (program, phase) in timed.items()
    }
    # Traces and compiles the copies.
    for call in calls.values():
        call()
    seconds = timing.in_rounds(calls, settings.rounds, task.name)
    return [
        {
            "model": task.name,
            "mode": mode,
            "phase": phase,
            "child": child,
            "sequence_over_plain": timing.ratio(
                seconds["sequence", mode, phase], seconds["plain", mode, phase]
            ),
            "plain_over_itself": timing.ratio(
                seconds["copy", mode, phase], seconds["plain", mode, phase]
            ),
            "plain_milliseconds": timing.spread(1e3 * seconds["plain", mode, phase]),
            "difference_of_weights": differences[mode],
        }
        for mode in MODES
        for phase, child in enumerate(CHILDREN)
    ]


def time_steps(program: Program, phase: int, mode: str, steps: int) -> float:
    """Returns the median seconds of a step in a phase, from the first weights on."""
    program.restart(phase)
    return timing.median_seconds(functools.partial(program.step, mode), steps)


def tables(result: dict[str, Any]) -> list[report.Table]:
    """Returns the table of all cells, and that of short steps."""
    found = [table_of_cells(result["cells"])]
    # What was measured before 2026-11-25 does not have them.
    if "short_steps" in result:
        found.append(table_of_short_steps(result["short_steps"]))
    return found


def table_of_cells(cells: list[dict[str, Any]]) -> report.Table:
    """Returns a row per model, mode and phase."""
    rows = [
        (
            cell["model"],
            cell["mode"],
            f"{cell['phase']}, {cell['child']}",
            timing.as_text(cell["sequence_over_plain"], 3),
            timing.as_text(cell["plain_over_itself"], 3),
            "yes" if cell["sequence_over_plain"]["median"] <= WORST_GOAL else "NO",
        )
        for cell in cells
    ]
    header = ("model", "mode", "phase", "sequence / plain", "plain / plain (noise)")
    return report.Table(caption(cells), (*header, f"at most {WORST_GOAL}"), rows)


def table_of_short_steps(cells: list[dict[str, Any]]) -> report.Table:
    """Returns a row per mode and phase."""
    rows = [
        (
            cell["mode"],
            f"{cell['phase']}, {cell['child']}",
            timing.as_text(cell["sequence_over_plain"]),
            timing.as_text(cell["plain_over_itself"]),
            timing.as_text(cell["plain_milliseconds"]),
        )
        for cell in cells
    ]
    text = (
        "The same for the network of `python -m benchmarks.digits`, whose steps are so "
        f"short that the switch shows: {cells[0]['sequence_over_plain']['rounds']} "
        "rounds. The last column holds for this machine only."
    )
    header = ("mode", "phase", "sequence / plain", "plain / plain (noise)")
    return report.Table(text, (*header, "plain step, ms"), rows)


def caption(cells: list[dict[str, Any]]) -> str:
    """Returns what the table says, in sentences."""
    medians = [cell["sequence_over_plain"]["median"] for cell in cells]
    typical, worst = float(np.median(medians)), max(medians)
    rounds = cells[0]["sequence_over_plain"]["rounds"]
    same = sum(cell["difference_of_weights"] == 0 for cell in cells)
    differ = same < len(cells)
    return (
        f"Time of a step over a plain step: median (quartiles) of {rounds} rounds. "
        f"Goal: median of all cells at most {TYPICAL_GOAL}: {typical:.3f}, "
        f"{verdict(typical, TYPICAL_GOAL)}; no cell above {WORST_GOAL}: {worst:.3f}, "
        f"{verdict(worst, WORST_GOAL)}. Before the timing, the weights after both "
        "phases were compared with those of the plain optimizers: the same bit for bit "
        f"in {same} of {len(cells)} cells{', within rounding in the others' * differ}."
    )


def verdict(value: float, goal: float) -> str:
    """Returns whether a value reaches its goal."""
    return "met" if value <= goal else "missed"


def headline(result: dict[str, Any]) -> str:
    """Answers the question in one sentence."""
    ratios = timing.medians(result["cells"], "sequence_over_plain")
    noise = timing.medians(result["cells"], "plain_over_itself")
    return (
        f"A step takes {timing.number(float(np.median(ratios)))} times as long as a "
        f"plain one: the median of {len(ratios)} cells, from {timing.from_to(ratios)} "
        f"(a plain step over itself: {timing.from_to(noise)})."
    )


def draw(result: dict[str, Any]) -> Figure:
    """Returns the picture of the table."""
    figure, axes = new_figure(7, 5)
    rows = [
        (
            f"{cell['model']}, {cell['mode']}, {cell['child']}",
            {
                "noise": cell["plain_over_itself"],
                "sequence": cell["sequence_over_plain"],
            },
        )
        for cell in result["cells"]
    ]
    draw_ratios(axes, rows, {f"goal {WORST_GOAL}": WORST_GOAL})
    axes.set_xlabel("time of a step over that of the plain optimizer")
    return figure
