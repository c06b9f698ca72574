"""How much memory does a sequence take, by the number of its children?

    python -m benchmarks memory            # about 8 minutes on two cores
    python -m benchmarks memory --quick    # seconds, on a tiny model

The bytes of the optimizer variables over the sum of the children's, which is exact,
and the peak of a process that trains an MLP of 30 million weights, measured in
workloads/peak_memory.py. All children's variables exist from the start, so in each
phase the peak cannot be less than that of the plain child plus the variables of the
other children. The measured peak is compared with that sum.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import report, timing
from benchmarks.harness.drawing import draw_ratios, new_figure
from benchmarks.workloads.peak_memory import make_task, measure_in_process
from benchmarks.workloads.programs import (
    MODES,
    OPTIMIZERS,
    Program,
    check_sequence,
    make_plain,
    make_sequence,
)

COST = "Memory"
ADAM, COPY = "adam", "copy"


@dataclass(frozen=True)
class Settings:
    """How long it takes: numbers of children, modes, and rounds of processes."""

    tiny_models: bool = False
    children: tuple[int, ...] = (1, 2, 3, 4)
    modes: tuple[str, ...] = MODES
    rounds: int = 3


FULL = Settings()
QUICK = Settings(tiny_models=True, children=(2,), modes=("xla",), rounds=1)


def measure(settings: Settings) -> dict[str, Any]:
    """Returns one row per mode and number of children, and one per plain process."""
    differences = check(settings)
    plains = list(OPTIMIZERS)[: max(settings.children)]
    sizes: dict[str, dict[str, Any]] = {}
    calls = {
        (mode, optimizer): functools.partial(
            peaks_of, sizes, optimizer, mode, settings.tiny_models
        )
        for mode in settings.modes
        # One of them twice, which shows how far apart two equal processes are.
        for optimizer in (*plains, COPY, *map(str, settings.children))
    }
    peaks = timing.in_rounds(calls, settings.rounds, "memory")
    return {
        "sequences": [
            row(mode, children, peaks, sizes)
            | {"difference_of_weights": differences[mode, children]}
            for mode in settings.modes
            for children in settings.children
        ],
        "plain": [
            {
                "mode": mode,
                "child": name,
                "weights_bytes": sizes[name]["weights"],
                "optimizer_bytes": sizes[name]["optimizer"],
                "peak_over_adam": timing.ratio(
                    peaks[mode, name][:, 0], peaks[mode, ADAM][:, 0]
                ),
            }
            for mode in settings.modes
            for name in (*plains, COPY)
        ],
    }


def check(settings: Settings) -> dict[tuple[str, int], float]:
    """Checks that every sequence does what its children do."""
    task = make_task(settings.tiny_models)
    names = list(OPTIMIZERS)[: max(settings.children)]
    plains = [Program(task, make_plain(name)) for name in names]
    differences = {}
    for n in settings.children:
        sequence = Program(task, make_sequence(n))
        for mode in settings.modes:
            differences[mode, n] = check_sequence(sequence, plains[:n], mode)
    return differences


def peaks_of(sizes: dict[str, Any], optimizer: str, mode: str, tiny: bool) -> list[int]:
    """Returns the peak of a process in each phase; what else it says goes to `sizes`.

    Args:
        sizes: dict by optimizer.
        optimizer: the name of a plain optimizer, or the number of children.
        mode: `"xla"` or `"graph"`.
        tiny: whether the model is small.
    """
    name = ADAM if optimizer == COPY else optimizer
    sizes[optimizer] = measure_in_process(name, mode, tiny)
    return sizes[optimizer]["peaks"]


def row(
    mode: str,
    children: int,
    peaks: dict[tuple[str, str], np.ndarray],
    sizes: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Returns the row of a sequence.

    Args:
        mode: `"xla"` or `"graph"`.
        children: the number of children.
        peaks: dict by mode and optimizer of arrays; rows are rounds, columns phases.
        sizes: dict by optimizer of what its process said.
    """
    own = sizes[str(children)]
    plains = list(OPTIMIZERS)[:children]
    needed = np.stack(
        [
            peaks[mode, name][:, 0] + own["optimizer"] - sizes[name]["optimizer"]
            for name in plains
        ],
        axis=1,
    )
    beyond = (peaks[mode, str(children)] - needed) / own["weights"]
    worst = int(np.argmax(np.median(beyond, axis=0)))
    adam = peaks[mode, ADAM][:, 0]
    return {
        "mode": mode,
        "children": children,
        "optimizer_bytes": own["optimizer"],
        "own_bytes": own["optimizer"] - sum(own["children"]),
        "optimizer_over_children": own["optimizer"] / sum(own["children"]),
        "optimizer_over_adam": own["optimizer"] / sizes[ADAM]["optimizer"],
        "peak_over_adam": timing.ratio(peaks[mode, str(children)].max(axis=1), adam),
        "needed_over_adam": timing.ratio(needed.max(axis=1), adam),
        "worst_phase": worst,
        "beyond_needed_over_weights": timing.spread(beyond[:, worst]),
    }


def tables(result: dict[str, Any]) -> list[report.Table]:
    """Returns the table of all sequences."""
    header = (
        "mode",
        "children",
        "variables / sum of the children's",
        "variables / Adam's",
        "peak / Adam's",
        "needed peak / Adam's",
        "peak beyond that, in weights",
    )
    rows = [
        (
            row["mode"],
            str(row["children"]),
            f"{row['optimizer_over_children']:.6f} (+ {row['own_bytes']} bytes)",
            f"{row['optimizer_over_adam']:.2f}",
            timing.as_text(row["peak_over_adam"]),
            timing.as_text(row["needed_over_adam"]),
            f"{timing.as_text(row['beyond_needed_over_weights'])}, "
            f"phase {row['worst_phase']}",
        )
        for row in result["sequences"]
    ]
    return [report.Table(caption(result), header, rows)]


def caption(result: dict[str, Any]) -> str:
    """Returns what the table says, in sentences."""
    plain = result["plain"]
    names = dict.fromkeys(row["child"] for row in plain if row["child"] != COPY)
    noise = "; ".join(
        f"{row['mode']} {timing.as_text(row['peak_over_adam'], 3)}"
        for row in plain
        if row["child"] == COPY
    )
    megabytes = plain[0]["weights_bytes"] / 1e6
    rounds = result["sequences"][0]["peak_over_adam"]["rounds"]
    return (
        f"The first of [{', '.join(names)}] on an MLP of {megabytes:.3g} MB. "
        "Variables: the bytes of the optimizer's, exactly. Peak: the most that a "
        "separate process had in memory while it made steps, median (quartiles) of "
        f"{rounds} processes. Needed: the peak of the plain child's process, plus the "
        "variables of the other children. The last column is for the phase where it is "
        "largest, in multiples of the weights' bytes. Noise, plain Adam's peak over "
        f"itself: {noise}."
    )


def headline(result: dict[str, Any]) -> str:
    """Answers the question in one sentence."""
    two = [row for row in result["sequences"] if row["children"] == 2]
    return (
        "`[Adam, SGD with momentum]` holds "
        f"{two[0]['optimizer_over_adam']:.2f} times the optimizer variables of Adam, "
        "and its process peaks at "
        f"{timing.from_to(timing.medians(two, 'peak_over_adam'))} times the memory."
    )


def draw(result: dict[str, Any]) -> Figure:
    """Returns the picture of the table."""
    figure, axes = new_figure(7, 1.5 + 0.4 * len(result["sequences"]))
    rows = [
        (
            f"{row['mode']}, {row['children']} child{'ren' * (row['children'] > 1)}",
            {
                "peak": row["peak_over_adam"],
                "plain child's peak, and the variables of the others": row[
                    "needed_over_adam"
                ],
            },
        )
        for row in result["sequences"]
    ]
    draw_ratios(axes, rows)
    axes.set_xlabel("memory of the process over that with plain Adam")
    return figure
