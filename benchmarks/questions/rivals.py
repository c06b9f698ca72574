"""What does switching cost in other frameworks, each against its own plain optimizers?

    python -m benchmarks rivals            # about 5 minutes on two cores
    python -m benchmarks rivals --quick    # seconds, on a small model

The same dense layers, first weights, batch and settings everywhere: some updates with
Adam, then some with SGD with momentum. The time of a step is divided by that of the
same framework with the plain optimizer, so that what is compared is the switching and
not the frameworks. All weights are compared with ours: after the last update before the
switch, after the first one behind it, and at the end.

A rival that is not installed is left out (`pip install -e '.[bench]'` has them all).
"""

import functools
import importlib
import importlib.util
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import report, timing
from benchmarks.harness.checks import check_same
from benchmarks.harness.drawing import draw_ratios, new_figure
from benchmarks.harness.terminal import say
from benchmarks.workloads.models import mlp
from benchmarks.workloads.rival import COPIES, PLAIN, NotAvailableError, Trainers, Work

COST = "Switching elsewhere"
OURS = "SequentialOptimizer"
# Each framework adds up in its own order, and has its own `exp` and division. What that
# does to the change of a variable grows with the updates, and Adam enlarges it where a
# gradient is nearly zero. With another rule, a count that is off by one or a lost
# momentum, the weights are off by more than a tenth.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Settings:
    """What is measured, and for how long.

    Args:
        width: neurons in each of the hidden layers.
        hidden: number of hidden layers.
        boundary: updates with Adam in a run; as many with SGD follow.
        rounds: runs of each program.
        compiled: whether PyTorch is measured compiled as well, which takes long.
    """

    width: int = 1024
    hidden: int = 4
    boundary: int = 10
    rounds: int = 30
    compiled: bool = True


FULL = Settings()
QUICK = Settings(width=128, hidden=2, boundary=5, rounds=3, compiled=False)


@dataclass(frozen=True)
class Framework:
    """A framework, the module with its programs, and what that needs."""

    name: str
    module: str
    needs: tuple[str, ...] = ()
    options: dict[str, bool] = field(default_factory=dict)

    def make_trainers(self, work: Work) -> Trainers:
        """Returns its programs.

        Raises:
            NotAvailableError: if it is not installed, or does not work here.
        """
        missing = [name for name in self.needs if not importlib.util.find_spec(name)]
        if missing:
            raise NotAvailableError(f"{' and '.join(missing)} not installed")
        module = importlib.import_module(f"benchmarks.workloads.{self.module}")
        return module.make_trainers(work, **self.options)


def frameworks(compiled: bool) -> list[Framework]:
    """Returns all, ours first."""
    found = [
        Framework("TensorFlow", "rival_keras"),
        Framework("JAX, optax", "rival_optax", ("jax", "optax")),
        Framework("PyTorch, eager", "rival_torch", ("torch",)),
    ]
    if compiled:
        options = {"compiled": True}
        found.append(Framework("PyTorch, compiled", "rival_torch", ("torch",), options))
    return found


def measure(settings: Settings) -> dict[str, Any]:
    """Returns a row per program and phase, one per check, and what was left out."""
    work = Work(mlp(settings.width, settings.hidden, batch=32), settings.boundary)
    cells, checks, left_out = [], [], []
    ours: dict[str, list[np.ndarray]] = {}
    for framework in frameworks(settings.compiled):
        try:
            trainers = framework.make_trainers(work)
        except NotAvailableError as reason:
            say(f"left out: {framework.name}: {reason}")
            left_out.append({"framework": framework.name, "reason": str(reason)})
            continue
        found = weights_at_checks(trainers, work)
        ours = ours or found
        checks += compare(framework.name, found, ours, work)
        cells += measure_times(framework.name, trainers, settings)
    return {"cells": cells, "checks": checks, "left_out": left_out}


# --- the results -----------------------------------------------------------------


def switching(trainers: Trainers) -> list[str]:
    """Returns the names of the programs that switch."""
    return [name for name in trainers if name not in (*PLAIN, *COPIES)]


def weights_at_checks(trainers: Trainers, work: Work) -> dict[str, list[np.ndarray]]:
    """Returns the weights of each program at what is checked, by what that is."""
    found = {f"plain {name}": trainers[name].train(work.boundary) for name in PLAIN}
    for name in switching(trainers):
        for when, updates in (
            ("before the switch", work.boundary),
            ("behind the switch", work.boundary + 1),
            ("at the end", 2 * work.boundary),
        ):
            found[f"{name}, {when}"] = trainers[name].train(updates)
    return found


def compare(
    framework: str,
    found: dict[str, list[np.ndarray]],
    ours: dict[str, list[np.ndarray]],
    work: Work,
) -> list[dict[str, Any]]:
    """Returns how far the weights are from ours.

    Raises:
        CheckError: if they are further than `TOLERANCE`.
    """
    rows = []
    for what, weights in found.items():
        name, _, when = what.partition(", ")
        expected = ours[f"{OURS}, {when}" if when else what]
        difference = check_same(
            f"{framework}, {what}", weights, expected, work.first_weights(), TOLERANCE
        )
        rows.append(
            {
                "framework": framework,
                "program": name,
                "when": when or "at the end",
                "difference_from_ours": difference,
            }
        )
    return rows


# --- the times -------------------------------------------------------------------


def measure_times(
    framework: str, trainers: Trainers, settings: Settings
) -> list[dict[str, Any]]:
    """Returns the rows of the programs of a framework that switch."""
    calls = {
        name: functools.partial(trainer.time, 2 * settings.boundary)
        for name, trainer in trainers.items()
    }
    for call in calls.values():
        call()
    seconds = timing.in_rounds(calls, settings.rounds, framework)
    rows = []
    for name in switching(trainers):
        for phase in range(2):
            plain = in_phase(seconds[PLAIN[phase]], phase)
            rows.append(
                {
                    "framework": framework,
                    "program": name,
                    "phase": phase,
                    "optimizer": PLAIN[phase],
                    "switching_over_plain": timing.ratio(
                        in_phase(seconds[name], phase), plain
                    ),
                    "plain_over_itself": timing.ratio(
                        in_phase(seconds[COPIES[phase]], phase), plain
                    ),
                    "switch_over_other_steps": timing.ratio(
                        seconds[name][:, settings.boundary],
                        in_phase(seconds[name], 1),
                    ),
                }
            )
    return rows


def in_phase(seconds: np.ndarray, phase: int) -> np.ndarray:
    """Returns the median of each run over a phase, its first update left out."""
    halves = np.split(seconds, 2, axis=1)
    return np.median(halves[phase][:, 1:], axis=1)


# --- what is shown ---------------------------------------------------------------


def tables(result: dict[str, Any]) -> list[report.Table]:
    """Returns the table of times, and the one of checks."""
    return [table_of_times(result), table_of_checks(result)]


def table_of_times(result: dict[str, Any]) -> report.Table:
    """Returns a row per program and phase."""
    cells = result["cells"]
    rows = [
        (
            cell["framework"],
            cell["program"],
            f"{cell['phase']}, {cell['optimizer']}",
            timing.as_text(cell["switching_over_plain"]),
            timing.as_text(cell["plain_over_itself"]),
            timing.as_text(cell["switch_over_other_steps"]) if cell["phase"] else "-",
        )
        for cell in cells
    ]
    work = result["settings"]
    left_out = "".join(
        f" Left out: {row['framework']}: {row['reason']}." for row in result["left_out"]
    )
    caption = (
        "Step of a program that switches over the step of the plain optimizer in the "
        f"same framework: median (quartiles) of {work['rounds']} runs of "
        f"{work['boundary']} updates with Adam and {work['boundary']} with SGD, "
        f"{work['hidden']} hidden layers of {work['width']}, everything traced and "
        "compiled before. Last column: the first step after the switch over the steps "
        f"that follow it.{left_out}"
    )
    header = ("framework", "program", "phase", "switching / plain")
    return report.Table(
        caption, (*header, "plain / plain (noise)", "step at the switch"), rows
    )


def table_of_checks(result: dict[str, Any]) -> report.Table:
    """Returns a row per program, with its largest difference."""
    worst: dict[tuple[str, str], float] = {}
    for row in result["checks"]:
        key = row["framework"], row["program"]
        worst[key] = max(worst.get(key, 0.0), row["difference_from_ours"])
    rows = [(*key, f"{difference:.1e}") for key, difference in worst.items()]
    caption = (
        "How far the weights are from those of the same optimizers in Keras, over how "
        "far these are from the first weights; for what switches, the largest of right "
        "before the switch, right after it and long after it. Allowed: "
        f"{TOLERANCE:g}."
    )
    header = ("framework", "program", "difference from ours")
    folded = "How far the weights are from ours"
    return report.Table(caption, header, rows, folded)


def headline(result: dict[str, Any]) -> str:
    """Answers the question in one sentence."""
    cells = result["cells"]
    ours = [cell for cell in cells if cell["program"] == OURS]
    others = [cell for cell in cells if cell["program"] != OURS]
    adam, sgd = map(timing.number, timing.medians(ours, "switching_over_plain"))
    return (
        f"A step with {OURS} takes {adam} (Adam) and {sgd} (SGD) times as long as a "
        "plain one, and with the other ways to switch, each over a plain step in its "
        "framework, "
        f"{timing.from_to(timing.medians(others, 'switching_over_plain'))} times."
    )


def draw(result: dict[str, Any]) -> Figure:
    """Returns the picture of the times."""
    rows = [
        (
            f"{cell['framework']}:\n{cell['program']}, {cell['optimizer']}",
            {
                "noise": cell["plain_over_itself"],
                "switching": cell["switching_over_plain"],
            },
        )
        for cell in result["cells"]
    ]
    figure, axes = new_figure(7, 1 + 0.55 * len(rows))
    draw_ratios(axes, rows)
    axes.set_xlabel("time of a step over that of the plain optimizer in that framework")
    return figure
