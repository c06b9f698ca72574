"""What does a quasi-Newton phase gain in DeepXDE?

    python -m benchmarks deepxde            # an hour or two on two cores, in sittings
    python -m benchmarks deepxde --quick    # within two minutes, too short to compare

DeepXDE's own example of Burgers' equation with its TensorFlow backend, in float64
(workloads/deepxde_runs.py). Its documentation trains with Adam, and then again after
`model.compile("L-BFGS")`. Beside that stands a single
`model.compile(SequentialOptimizer([Adam, SSBroyden], ...))`, from the same weights, on
the same points, with as many gradients.

What has been measured is in the file after each seed, and is not measured again.
Without DeepXDE this says so and measures nothing (`pip install -e '.[bench]'`).
"""

import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.harness import processes, report
from benchmarks.harness.drawing import COLORS, new_figure
from benchmarks.harness.runs import Group
from benchmarks.harness.terminal import Progress, say
from benchmarks.workloads.deepxde_runs import ADAM, DOCUMENTED, OURS, run_seed

CONTENDERS = (ADAM, DOCUMENTED, *(f"{ADAM}, then {name}" for name in OURS))


@dataclass(frozen=True)
class Settings:
    """How long it takes.

    Args:
        adam: iterations of Adam before the second phase.
        iterations: the most that DeepXDE's L-BFGS makes.
        seeds: runs of each contender.
        seconds: after which a run is given up.
    """

    adam: int = 5000
    iterations: int = 5000
    seeds: int = 3
    seconds: int = 7200


FULL = Settings()
QUICK = Settings(adam=20, iterations=10, seeds=1, seconds=300)


def measure_in_sittings(
    settings: Settings, earlier: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yields the result after each seed: a row for each contender.

    Args:
        settings: how long it takes.
        earlier: the result of an earlier sitting with these settings, or `{}`.
    """
    if not importlib.util.find_spec("deepxde"):
        reason = "deepxde is not installed"
        say(f"not measured: {reason}")
        yield {"reason": reason, "runs": earlier.get("runs", [])}
        return
    runs = list(earlier.get("runs", []))
    missing = set(range(settings.seeds)) - {row["seed"] for row in runs}
    progress = Progress(len(missing) * len(CONTENDERS), "DeepXDE")
    with tempfile.TemporaryDirectory() as folder:
        for seed in sorted(missing):
            process = processes.Process(
                run_seed,
                (seed, settings.adam, settings.iterations),
                Path(folder) / f"{seed}.log",
                environ={"DDE_BACKEND": "tensorflow"},
                limit=settings.seconds,
            )
            rows = []
            for row in processes.all_reports(process):
                rows.append(row)
                progress.step(row["contender"])
            # Only now, because all contenders of a seed run in one process.
            runs += rows
            yield {"reason": "", "runs": runs}
    yield {"reason": "", "runs": runs}


# --- what is shown -------------------------------------------------------------


def groups_of(result: dict[str, Any]) -> dict[str, Group]:
    """Returns the runs of each contender."""
    return {
        name: Group([row for row in result["runs"] if row["contender"] == name])
        for name in CONTENDERS
    }


def tables(result: dict[str, Any]) -> list[report.Table]:
    """Returns a row for each contender."""
    if not result["runs"]:
        return []
    rows = [
        (
            name,
            group.text,
            group.failed,
            f"{group.median_of('loss'):.1e}",
            f"{group.median_of('evaluations'):.0f}",
        )
        for name, group in groups_of(result).items()
    ]
    settings = result["settings"]
    caption = (
        "Burgers' equation as in DeepXDE's documentation, with 921 weights in float64: "
        f"relative L2 error on a grid of 100 x 100 points, over {settings['seeds']} "
        f"seeds. Adam (1e-3) makes the first {settings['adam']} iterations; then "
        f"DeepXDE's L-BFGS makes at most {settings['iterations']}, and the others get "
        "as many gradients as it asked for. The documentation lets each phase make "
        "15,000. DeepXDE's L-BFGS learns from 100 steps, LBFGS from 50. Loss and "
        "gradients are medians."
    )
    header = ("contender", "error: median (quartiles)", "failed", "loss", "gradients")
    return [report.Table(caption, header, rows)]


def headline(result: dict[str, Any]) -> str:
    """Answers the question in one sentence."""
    if not result["runs"]:
        return f"Not measured: {result['reason']}."
    groups = groups_of(result)
    last = groups[CONTENDERS[-1]]
    return (
        "With as many gradients, the median error of DeepXDE's Burgers example is "
        f"{groups[ADAM].median:.1e} with Adam, {groups[DOCUMENTED].median:.1e} with "
        f"its documented second phase, and {last.median:.1e} with {OURS[-1]} instead."
    )


def draw(result: dict[str, Any]) -> Figure:
    """Returns the errors, a dot for each run."""
    figure, axes = new_figure(7, 2.2)
    groups = groups_of(result)
    for i, group in enumerate(groups.values()):
        axes.plot(group.errors, [i] * len(group.errors), "o", color=COLORS[i])
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set_ylim(len(groups) - 0.5, -0.5)
    if result["runs"]:
        axes.set_xscale("log")
    axes.set_xlabel("relative error of the solution")
    axes.grid(axis="x", linewidth=0.3)
    return figure
