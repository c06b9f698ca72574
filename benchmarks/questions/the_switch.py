"""Is the step slower in which the optimizer changes, and is anything traced again?

    python -m benchmarks the_switch            # about 11 minutes on two cores
    python -m benchmarks the_switch --quick    # seconds, on a tiny model

The time of each of the five steps before and the five after the switch from Adam to
SGD, over the median step of the same optimizer in the same run, for the sequence and
for what people do today (workloads/ways.py). Traces and compilations are counted in a
separate process (workloads/compilations.py). Goal: no step above 1.5, no trace, no
compilation.
"""

import functools
import gc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from benchmarks.harness import report, timing
from benchmarks.harness.checks import check_same
from benchmarks.harness.drawing import COLORS, NOISE_COLOR
from benchmarks.workloads.compilations import count_at_switch
from benchmarks.workloads.models import Task
from benchmarks.workloads.programs import Program, make_plain, plain_weights
from benchmarks.workloads.ways import (
    AROUND,
    BOUNDARY,
    COMPILING,
    LEAD,
    UPDATES,
    controls_of,
    make_controls,
    make_tasks,
    make_ways,
)

COST = "The first step after the switch"
GOAL = 1.5
CONTROL = "plain adam"


@dataclass(frozen=True)
class Settings:
    """How long it takes; `compiling_rounds` are those of ways that compile in each."""

    tiny_models: bool = False
    rounds: int = 20
    compiling_rounds: int = 5


FULL = Settings()
QUICK = Settings(tiny_models=True, rounds=5, compiling_rounds=1)


def measure(settings: Settings) -> dict[str, Any]:
    """Returns one row per model and way, and one per model without a switch."""
    rows, controls = [], []
    tiny = settings.tiny_models
    for i, task in enumerate(make_tasks(tiny)):
        counts = count_at_switch(i, tiny)
        seconds = time_all(task, settings)
        rows += [row(task, way, seconds) | counts[way] for way in counts]
        steps = over_median(seconds[CONTROL])
        controls.append({"model": task.name, "steps": spreads(steps)})
        # What Keras and TensorFlow make refers to itself.
        gc.collect()
    return {"ways": rows, "without_switch": controls}


def time_all(task: Task, settings: Settings) -> dict[str, np.ndarray]:
    """Returns the seconds of the steps around the switch by way, a row per round."""
    ways, controls = make_ways(task), make_controls(task)
    check(task, ways)
    for control in controls.values():
        time_steps(control)
    seconds: dict[str, np.ndarray] = {}
    for rounds, names in (
        (settings.compiling_rounds, COMPILING),
        (settings.rounds, [name for name in ways if name not in COMPILING]),
    ):
        used = {control for name in names for control in controls_of(name)}
        calls = {
            name: functools.partial(time_steps, program)
            for name, program in {**ways, **controls}.items()
            if name in names or name in used
        }
        measured = timing.in_rounds(calls, rounds, f"{task.name}, the switch")
        for name in names:
            adam, sgd = (measured[control] for control in controls_of(name))
            seconds[name] = np.stack([measured[name], adam, sgd])
        seconds[CONTROL] = measured["plain adam"]
    return seconds


def check(task: Task, ways: Mapping[str, Any]) -> None:
    """Checks that every way ends with the weights of the plain optimizers."""
    plains = [Program(task, make_plain(name)) for name in ("adam", "sgd")]
    plains[0].restart()
    first = plains[0].weights()
    expected = plain_weights(plains, (BOUNDARY, AROUND), "xla")
    for name, way in ways.items():
        time_steps(way)
        check_same(name, way.weights(), expected, first)


def time_steps(way: Any) -> np.ndarray:
    """Returns the seconds of the steps around the switch, in a separate run."""
    way.restart()
    seconds = [
        timing.seconds_of(functools.partial(way.step, update))
        for update in range(UPDATES)
    ]
    return np.array(seconds[LEAD:])


def over_median(seconds: np.ndarray) -> np.ndarray:
    """Returns each step over the median step of its optimizer, in the same round."""
    halves = np.split(seconds, [AROUND], axis=1)
    return np.concatenate(
        [half / np.median(half, axis=1, keepdims=True) for half in halves], axis=1
    )


def spreads(steps: np.ndarray) -> list[dict[str, float | int]]:
    """Returns the spread over the rounds of each step."""
    return [timing.spread(step) for step in steps.T]


def row(task: Task, way: str, seconds: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns the row of a way."""
    own, adam, sgd = seconds[way]
    before, after = np.split(own, [AROUND], axis=1)
    return {
        "model": task.name,
        "way": way,
        "steps": spreads(over_median(own)),
        "adam_over_plain": timing.ratio(
            np.median(before, axis=1), np.median(adam, axis=1)
        ),
        "sgd_over_plain": timing.ratio(
            np.median(after, axis=1), np.median(sgd, axis=1)
        ),
    }


def worst(steps: list[dict[str, float]]) -> float:
    """Returns the largest median of a step."""
    return max(step["median"] for step in steps)


def tables(result: dict[str, Any]) -> list[report.Table]:
    """Returns the table of all ways."""
    header = (
        "model",
        "way",
        "first step after / median",
        "worst of the 10",
        "traces",
        "compiles",
        "Adam step / plain",
        "SGD step / plain",
    )
    rows = [
        (
            row["model"],
            row["way"],
            timing.as_text(row["steps"][AROUND]),
            timing.number(worst(row["steps"])),
            str(row["traces_at_switch"]),
            str(row["compiles_at_switch"]),
            timing.as_text(row["adam_over_plain"]),
            timing.as_text(row["sgd_over_plain"]),
        )
        for row in result["ways"]
    ]
    rows += [
        (
            row["model"],
            "no switch: plain Adam (noise)",
            timing.as_text(row["steps"][AROUND]),
            timing.number(worst(row["steps"])),
            *["-"] * 4,
        )
        for row in result["without_switch"]
    ]
    return [report.Table(caption(result), header, rows)]


def caption(result: dict[str, Any]) -> str:
    """Returns what the table says, in sentences."""
    ours = [row for row in result["ways"] if row["way"] == "sequence"]
    slowest = max(worst(row["steps"]) for row in ours)
    again = sum(row["traces_at_switch"] + row["compiles_at_switch"] for row in ours)
    rounds = ours[0]["steps"][0]["rounds"]
    met = slowest <= GOAL and again == 0
    return (
        "Each of the 5 steps before and the 5 after the switch, over the median step "
        f"of the same optimizer in the same run: medians (quartiles) of {rounds} runs, "
        f"fewer for those that compile in every run ({', '.join(COMPILING)}). Traces "
        "and compiles are those after the switch. The last two columns are the steps "
        "away from it, over those of a plain optimizer in the same kind of loop. Goal "
        f"for the sequence: no step above {GOAL}, no trace, no compile: {slowest:.2f}, "
        f"{again}; {'met' if met else 'missed'}. Before the timing, the weights at the "
        "end of every way were compared with those of the plain optimizers."
    )


def headline(result: dict[str, Any]) -> str:
    """Answers the question in one sentence."""

    def first_step(way: str) -> str:
        rows = [row for row in result["ways"] if row["way"] == way]
        return " and ".join(
            timing.number(row["steps"][AROUND]["median"]) for row in rows
        )

    ours = [row for row in result["ways"] if row["way"] == "sequence"]
    traces, compiles = (
        sum(row[f"{what}_at_switch"] for row in ours) for what in ("traces", "compiles")
    )
    models = " and ".join(row["model"] for row in ours)
    return (
        f"The first step after the switch takes {first_step('sequence')} times as long "
        f"as the median step ({models}), with {traces} traces and {compiles} compiles; "
        f"with two `tf.function`s {first_step('two functions')} times, with "
        f"`Model.compile` again {first_step('Model.compile again')} times."
    )


def draw(result: dict[str, Any]) -> Figure:
    """Returns the picture: the steps around the switch, one panel per model."""
    panels = result["without_switch"]
    figure = Figure(figsize=(4.2 * len(panels) + 1, 4), layout="constrained")
    for axes, panel in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0],
        panels,
        strict=True,
    ):
        lines = {"no switch (noise)": panel["steps"]} | {
            row["way"]: row["steps"]
            for row in result["ways"]
            if row["model"] == panel["model"]
        }
        draw_steps(axes, lines)
        axes.set_title(panel["model"])
    axes.figure.axes[0].set_ylabel("time of a step over the median step")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def draw_steps(axes: Any, lines: Mapping[str, list[dict[str, float]]]) -> None:
    """Draws medians and quartiles of the steps of each way."""
    places = np.arange(2 * AROUND) - AROUND
    for (name, steps), color in zip(
        lines.items(), (NOISE_COLOR, *COLORS), strict=False
    ):
        medians = [step["median"] for step in steps]
        # Ours above the others, which it would not be seen below.
        ours = {"zorder": 3, "linewidth": 3} if name == "sequence" else {}
        axes.plot(places, medians, "o-", markersize=3, color=color, label=name, **ours)
        axes.fill_between(
            places,
            [step["low"] for step in steps],
            [step["high"] for step in steps],
            color=color,
            alpha=0.2,
            linewidth=0,
        )
    axes.axvline(-0.5, color="black", linewidth=0.8)
    axes.axhline(GOAL, color="black", linewidth=0.8, linestyle="--", label="goal")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_xticks(places)
    axes.set_xlabel("update, counted from the switch")
    axes.spines[["top", "right"]].set_visible(False)
