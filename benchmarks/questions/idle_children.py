"""What do the children cost that are not at work?

    python -m benchmarks idle_children            # about 8 minutes on two cores
    python -m benchmarks idle_children --quick    # seconds, on small models

Time: sequences of 1 to 8 equal Adams on models with 20 to 400 variables, in their first
and in their last phase, over a plain Adam. Equal, so that nothing but the number of
idle children differs. Each of them adds its variables to what a step is given; from the
growth with their number follows the time per idle variable.

Copies: whether XLA hands the variables of the idle children on without touching them.
harness/hlo.py says what is counted, and benchmarks/README.md what was tried against
it.
"""

import functools
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from benchmarks.harness import hlo, report, timing
from benchmarks.harness.checks import CheckError
from benchmarks.harness.drawing import COLORS, NOISE_COLOR
from benchmarks.harness.terminal import Progress
from benchmarks.workloads.models import Task, many_variables
from benchmarks.workloads.programs import (
    MODES,
    OPTIMIZERS,
    Program,
    check_sequence,
    make_plain,
)
from sequential_optimizer import SequentialOptimizer

# Updates in each phase: more than are ever made, so that a program is set into its
# first or last phase by setting `iterations`, again and again, without a restart.
LONG = 10**6
COST = "Idle children"
PHASES = ("first", "last")


@dataclass(frozen=True)
class Settings:
    """What is measured, and for how long.

    Args:
        grid: for each number of variables of the model the numbers of children. It has
            gaps where tracing and compiling takes minutes; two numbers of children
            above 1 are needed for a slope.
        rounds: rounds of timing.
        steps: timed steps of each program in a round.
        orders: children of the sequences whose copies are counted.
    """

    grid: tuple[tuple[int, tuple[int, ...]], ...] = (
        (20, (1, 2, 4, 8)),
        (100, (1, 2, 8)),
        (400, (1, 2)),
    )
    rounds: int = 25
    steps: int = 10
    orders: tuple[tuple[str, ...], ...] = (
        ("adam", "sgd"),
        ("sgd", "adam"),
        ("adam", "rmsprop", "sgd"),
        ("sgd", "rmsprop", "adam"),
        ("adam", "adam"),
        ("adam",) * 4,
        ("adam",) * 8,
    )


FULL = Settings()
QUICK = Settings(
    grid=((4, (1, 2, 3)),),
    rounds=5,
    steps=5,
    orders=(("adam", "sgd"), ("sgd", "adam")),
)


def measure(settings: Settings) -> dict[str, Any]:
    """Returns one row per timed cell, one per slope, and one per branch."""
    cells, slopes = [], []
    for count, children in settings.grid:
        new_cells, new_slopes = measure_times(count, children, settings)
        cells += new_cells
        slopes += new_slopes
        gc.collect()
    return {"cells": cells, "slopes": slopes, "copies": measure_copies(settings)}


def make_sequence(kinds: Sequence[str]) -> SequentialOptimizer:
    """Returns a sequence with a child of each kind, and very long phases."""
    children = [OPTIMIZERS[k](name=f"{k}_child_{i}") for i, k in enumerate(kinds)]
    return SequentialOptimizer(
        children, [LONG * (i + 1) for i in range(len(kinds) - 1)]
    )


# --- time ----------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A sequence of so many children in one mode and phase."""

    children: int
    mode: str
    phase: str


def measure_times(
    count: int, children: Sequence[int], settings: Settings
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the cells and the slopes of a model with `count` variables."""
    task = many_variables(count)
    plain, copy = (Program(task, make_plain("adam")) for _ in range(2))
    sequences = {n: Program(task, make_sequence(["adam"] * n)) for n in children}
    progress = Progress(len(sequences) * len(MODES), f"{task.name}, compiling")
    for mode in MODES:
        for n, sequence in sequences.items():
            check_sequence(sequence, [plain] * n, mode)
            progress.step(f"{n} children, {mode}")
    calls: dict[Any, Any] = {}
    for mode in MODES:
        for name, program in (("plain", plain), ("copy", copy)):
            calls[name, mode] = functools.partial(
                timing.median_seconds,
                functools.partial(program.step, mode),
                settings.steps,
            )
        for n, sequence in sequences.items():
            for phase in PHASES[: 1 if n == 1 else 2]:
                cell = Cell(n, mode, phase)
                calls[cell] = functools.partial(
                    time_cell, sequence, cell, settings.steps
                )
    for call in calls.values():
        call()
    seconds = timing.in_rounds(calls, settings.rounds, task.name)
    return make_cells(count, seconds), make_slopes(count, seconds)


def time_cell(sequence: Program, cell: Cell, steps: int) -> float:
    """Returns the median seconds of a step in the phase of the cell."""
    phase = 0 if cell.phase == "first" else cell.children - 1
    sequence.optimizer.iterations.assign(LONG * phase)
    return timing.median_seconds(functools.partial(sequence.step, cell.mode), steps)


def idle_variables(children: int, variables: int) -> int:
    """Returns how many optimizer variables the idle Adams of a sequence have."""
    # Two for each variable of the model, a count and a learning rate.
    return (children - 1) * (2 * variables + 2)


def make_cells(count: int, seconds: dict[Any, np.ndarray]) -> list[dict[str, Any]]:
    """Returns the ratios to the plain step."""
    return [
        {
            "variables": count,
            "mode": cell.mode,
            "children": cell.children,
            "phase": cell.phase,
            "idle_variables": idle_variables(cell.children, count),
            "sequence_over_plain": timing.ratio(
                seconds[cell], seconds["plain", cell.mode]
            ),
            "plain_over_itself": timing.ratio(
                seconds["copy", cell.mode], seconds["plain", cell.mode]
            ),
        }
        for cell in seconds
        if isinstance(cell, Cell)
    ]


def make_slopes(count: int, seconds: dict[Any, np.ndarray]) -> list[dict[str, Any]]:
    """Returns what one more idle variable costs, by mode and phase.

    The slope over the sequences of two and more children, round by round. So what the
    switch itself costs is not in it.
    """
    rows = []
    for mode in MODES:
        for phase in PHASES:
            cells = [
                cell
                for cell in seconds
                if isinstance(cell, Cell)
                and (cell.mode, cell.phase) == (mode, phase)
                and cell.children > 1
            ]
            if len(cells) < 2:
                continue
            idle = np.array([idle_variables(cell.children, count) for cell in cells])
            slope = slope_of(idle, np.array([seconds[cell] for cell in cells]))
            plain = seconds["plain", mode]
            rows.append(
                {
                    "variables": count,
                    "mode": mode,
                    "phase": phase,
                    "microseconds": timing.spread(1e6 * slope),
                    "percent_of_plain_step_per_100": timing.spread(1e4 * slope / plain),
                    "plain_step_milliseconds": timing.spread(1e3 * plain),
                }
            )
    return rows


def slope_of(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns the slopes of the columns of `y` over `x`, by least squares."""
    x = x - x.mean()
    return x @ (y - y.mean(axis=0)) / (x @ x)


# --- copies --------------------------------------------------------------------


def measure_copies(settings: Settings) -> list[dict[str, Any]]:
    """Returns one row per branch of each sequence."""
    task = many_variables(settings.grid[0][0])
    rows = []
    progress = Progress(len(settings.orders), "copies")
    for kinds in settings.orders:
        rows += count_copies(task, make_sequence(kinds))
        progress.step("-".join(kinds))
    return rows


def count_copies(task: Task, optimizer: SequentialOptimizer) -> list[dict[str, Any]]:
    """Returns for each child what its branch copies of the idle children.

    Raises:
        CheckError: unless the program has one conditional with a branch per child.
    """
    program = Program(task, optimizer)
    compiled = hlo.Module(optimized_hlo(program.function("xla"), task))
    names = [child.name for child in optimizer.children]
    conditionals = compiled.conditionals()
    if len(conditionals) != 1:
        raise CheckError(f"{names}: {len(conditionals)} conditionals, expected one.")
    by_child = {compiled.scope_of(b, names): b for b in conditionals[0]}
    if set(by_child) != set(names):
        raise CheckError(f"{names}: the branches are those of {list(by_child)}.")
    weights = sum(w.numpy().nbytes for w in program.model.trainable_variables)
    rows = []
    for child in optimizer.children:
        copies = compiled.copies_handed_on(by_child[child.name])
        idle = [
            variable
            for other in optimizer.children
            if other is not child
            for variable in other.variables
        ]
        rows.append(
            {
                "order": names,
                "child": child.name,
                "branch": conditionals[0].index(by_child[child.name]),
                "idle_variables": len(idle),
                "copies": copies.number,
                "copied_bytes": copies.bytes,
                "idle_bytes": sum(variable.numpy().nbytes for variable in idle),
                "weight_bytes": weights,
            }
        )
    return rows


def optimized_hlo(function: Any, task: Task) -> str:
    """Returns the text of the program that XLA runs for a step."""
    batch = tf.constant(task.x), tf.constant(task.y)
    return function.experimental_get_compiler_ir(*batch)(stage="optimized_hlo")


# --- what is shown -------------------------------------------------------------


def tables(result: dict[str, Any]) -> list[report.Table]:
    """Returns the tables of times, slopes and copies."""
    return [
        table_of_times(result["cells"]),
        table_of_slopes(result["slopes"]),
        table_of_copies(result["copies"]),
    ]


def table_of_times(cells: list[dict[str, Any]]) -> report.Table:
    """Returns a row for each number of variables and of children."""
    columns = [(mode, phase) for mode in MODES for phase in PHASES]
    rows = []
    for count, n in dict.fromkeys((c["variables"], c["children"]) for c in cells):
        ratios = {
            (cell["mode"], cell["phase"]): cell["sequence_over_plain"]
            for cell in cells
            if (cell["variables"], cell["children"]) == (count, n)
        }
        texts = [
            timing.as_text(ratios[column]) if column in ratios else "-"
            for column in columns
        ]
        rows.append((str(count), str(n), *texts))
    noise = [cell["plain_over_itself"] for cell in cells]
    caption = (
        "Step of a sequence of Adams over the step of a plain Adam: median (quartiles) "
        f"of {noise[0]['rounds']} rounds. A plain step over its own copy, in the same "
        f"rounds: medians from {min(r['median'] for r in noise):.2f} to "
        f"{max(r['median'] for r in noise):.2f}, quartiles from "
        f"{min(r['low'] for r in noise):.2f} to {max(r['high'] for r in noise):.2f}. "
        "All sequences were checked against plain Adams, one after the other."
    )
    header = [f"{mode}, {phase} phase" for mode, phase in columns]
    return report.Table(caption, ("variables", "children", *header), rows)


def table_of_slopes(slopes: list[dict[str, Any]]) -> report.Table:
    """Returns a row for each number of variables, mode and phase."""
    rows = [
        (
            str(slope["variables"]),
            slope["mode"],
            slope["phase"],
            timing.as_text(slope["percent_of_plain_step_per_100"]) + "%",
            timing.as_text(slope["microseconds"]),
            timing.as_text(slope["plain_step_milliseconds"]),
        )
        for slope in slopes
    ]
    caption = (
        "What idle optimizer variables add to a step, by how it grows from two "
        "children on. The last two columns hold for the machine of this measurement "
        "only."
    )
    header = (
        "variables",
        "mode",
        "phase",
        "100 idle variables, of a plain step",
        "one idle variable, microseconds",
        "plain step, ms",
    )
    return report.Table(caption, header, rows)


def table_of_copies(copies: list[dict[str, Any]]) -> report.Table:
    """Returns a row per branch."""
    rows = [
        (
            order_as_text(row["order"]),
            row["child"],
            str(row["branch"]),
            f"{row['copies']} of {row['idle_variables']}",
            f"{row['copied_bytes']} of {row['idle_bytes']}",
            f"{row['copied_bytes'] / row['weight_bytes']:.2f}",
        )
        for row in copies
    ]
    caption = (
        "Variables of idle children that the branch of the active child copies to hand "
        "them on unchanged, in the program that XLA optimized."
    )
    header = ("children", "active", "branch", "copies", "bytes", "bytes over weights'")
    folded = "What XLA copies of the variables of idle children"
    return report.Table(caption, header, rows, folded)


def order_as_text(names: list[str]) -> str:
    """Returns the names of the children, those of many equal ones in short."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{names[0]} to {names[-1]}"


def headline(result: dict[str, Any]) -> str:
    """Answers the question in one sentence."""
    cells = result["cells"]
    most = max(cell["children"] for cell in cells)
    count = max(cell["variables"] for cell in cells if cell["children"] == most)
    ratios: dict[int, list[float]] = {}
    for cell in cells:
        if cell["variables"] == count and cell["children"] > 1:
            median = cell["sequence_over_plain"]["median"]
            ratios.setdefault(cell["children"], []).append(median)
    texts = [
        f"{timing.from_to(medians)} times as long with {children} Adams"
        for children, medians in ratios.items()
    ]
    return (
        f"Compared with one Adam, a step on a model of {count} tiny variables takes "
        f"{', and '.join(texts)}."
    )


def draw(result: dict[str, Any]) -> Figure:
    """Returns the ratios over the number of children, one panel per mode."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    panels = figure.subplots(1, len(MODES), sharey=True)
    cells = result["cells"]
    counts = list(dict.fromkeys(cell["variables"] for cell in cells))
    for axes, mode in zip(panels, MODES, strict=True):
        for count, color in zip(counts, COLORS, strict=False):
            for phase, style in zip(PHASES, ("o-", "s--"), strict=True):
                draw_line(
                    axes,
                    [
                        cell
                        for cell in cells
                        if (cell["mode"], cell["variables"]) == (mode, count)
                        and (cell["phase"] == phase or cell["children"] == 1)
                    ],
                    style,
                    color,
                    f"{count} variables, {phase} phase",
                )
        axes.axhline(1, color=NOISE_COLOR, linewidth=0.8)
        axes.set_title(mode)
        axes.set_xlabel("children")
        axes.set_xticks(sorted({cell["children"] for cell in cells}))
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("step over that of a plain Adam")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_line(
    axes: Any, cells: list[dict[str, Any]], style: str, color: str, label: str
) -> None:
    """Draws medians and quartiles over the number of children."""
    ratios = [cell["sequence_over_plain"] for cell in cells]
    axes.errorbar(
        [cell["children"] for cell in cells],
        [ratio["median"] for ratio in ratios],
        yerr=[
            [ratio["median"] - ratio["low"] for ratio in ratios],
            [ratio["high"] - ratio["median"] for ratio in ratios],
        ],
        fmt=style,
        markersize=4,
        linewidth=1,
        color=color,
        label=label,
    )
