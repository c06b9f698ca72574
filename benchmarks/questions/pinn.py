"""What does a quasi-Newton phase gain on physics-informed networks?

    python -m benchmarks pinn            # about 3 hours on two cores, in sittings
    python -m benchmarks pinn --quick    # within a minute, too short to compare

Networks of 1,009 weights learn the solution of an equation (workloads/pinn.py) from
gradients of all points at once; all contenders get equally many. Adam's learning
rate is tuned on other seeds, by the error against the solution; a sequence takes the
rate of Adam alone, and the defaults of `LBFGS` and `SSBroyden`. So nothing is tuned for
the sequences.

Two runs go side by side, each with one thread. What has been measured is in the file
after each run, and is not measured again: stop the command whenever you want to, and
start it again. A rival that is not installed is left out (see `.[bench]`).
"""

import dataclasses
import importlib.util
import itertools
import queue
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import processes, report
from benchmarks.harness.drawing import COLORS
from benchmarks.harness.runs import FAILED, Group, error_of, quantile
from benchmarks.harness.terminal import Progress, say
from benchmarks.workloads.pinn_runs import EPOCH, Cell, Contender, run_cell

ADAM, COSINE = "Adam", "Adam, cosine decay"
SHARES = (0.1, 0.25, 0.5, 0.0)
# SciPy's BFGS multiplies dense matrices in each step.
SLOW = "SciPy BFGS"
RIVALS = {
    "SciPy L-BFGS-B": "scipy",
    SLOW: "scipy",
    "TensorFlow Probability": "tensorflow_probability",
    "PyTorch": "torch",
    "optax": "optax",
}
RIVAL_SHARE = 0.25
GOAL = 0.1  # of the error of the best plain optimizer
PLAIN = [Contender(ADAM), Contender(COSINE)]
ALONE = [Contender("", then) for then in ("LBFGS", "SSBroyden")]
SEQUENCES = [
    Contender(ADAM, then, share) for then in ("LBFGS", "SSBroyden") for share in SHARES
]
# In float32, on the hard problems, and in the picture.
MAIN = [*PLAIN, SEQUENCES[1], SEQUENCES[5]]
AFTER_ADAM = [
    Contender(ADAM, name, RIVAL_SHARE, module) for name, module in RIVALS.items()
]


@dataclass(frozen=True)
class Settings:
    """How long it takes.

    Args:
        problems: keys of `PROBLEMS`.
        hard: those that get `few_seeds`, and the main contenders only.
        steps: gradients of each run, a multiple of 400.
        width: neurons of each hidden layer.
        depth: the number of hidden layers.
        rates: the grid of Adam's learning rates.
        tuning_seeds: runs for each entry of the grid.
        seeds: runs for testing.
        few_seeds: runs for testing what is slow or hard.
        seconds: after which a cell is given up.
    """

    problems: tuple[str, ...] = ("convection 10", "reaction 5", "wave", "Burgers")
    hard: tuple[str, ...] = ("convection 30", "convection 40")
    steps: int = 4000
    width: int = 21
    depth: int = 3
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    tuning_seeds: int = 3
    seeds: int = 10
    few_seeds: int = 3
    seconds: int = 3600


FULL = Settings()
QUICK = Settings(
    problems=("convection 10",),
    hard=(),
    steps=400,
    width=6,
    depth=1,
    rates=(1e-2,),
    tuning_seeds=1,
    seeds=1,
    few_seeds=1,
)
FIRST_TUNING_SEED = 1000
SIDE_BY_SIDE = 2


def measure_in_sittings(
    settings: Settings, earlier: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yields the result after each run: a row for each, and who was left out.

    Args:
        settings: how long it takes.
        earlier: the result of an earlier sitting with these settings, or `{}`.
    """
    left_out = [
        {"rival": name, "reason": f"{module} not installed"}
        for name, module in RIVALS.items()
        if not importlib.util.find_spec(module)
    ]
    for row in left_out:
        say(f"left out: {row['rival']}: {row['reason']}")
    rows = list(earlier.get("runs", []))
    # First the learning rates, of which the others make use.
    for make_cells in (cells_for_tuning, cells_for_testing):
        cells = make_cells(settings, rows)
        for row in run_all(without(cells, rows, left_out), settings.seconds):
            rows.append(row)
            yield {"runs": rows, "left_out": left_out}
    yield {"runs": rows, "left_out": left_out}


# --- what is run ---------------------------------------------------------------


def make_cell(
    settings: Settings,
    problem: str,
    contender: Contender,
    rate: float,
    seeds: range,
    dtype: str = "float64",
) -> Cell:
    """Returns a cell with what all have in common."""
    pictured = problem == settings.problems[0] and contender in MAIN
    return Cell(
        problem,
        contender,
        dtype,
        rate,
        tuple(seeds),
        settings.steps,
        settings.width,
        settings.depth,
        with_curve=pictured and dtype == "float64" and seeds[0] < FIRST_TUNING_SEED,
    )


def cells_for_tuning(settings: Settings, rows: list[dict[str, Any]]) -> list[Cell]:
    """Returns the grid of Adam, without and with a decay."""
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + settings.tuning_seeds)
    return [
        make_cell(settings, problem, contender, rate, seeds)
        for problem in (*settings.problems, *settings.hard)
        for contender in PLAIN
        for rate in settings.rates
    ]


def cells_for_testing(settings: Settings, rows: list[dict[str, Any]]) -> list[Cell]:
    """Returns all contenders, the main ones in both dtypes."""
    cells = []
    for problem, contender in itertools.product(settings.hard, MAIN):
        rate = tuned_rate(rows, problem, contender)
        seeds = range(settings.few_seeds)
        cells.append(make_cell(settings, problem, contender, rate, seeds))
    for problem in settings.problems:
        for contender in [*PLAIN, *ALONE, *SEQUENCES, *AFTER_ADAM]:
            rate = tuned_rate(rows, problem, contender)
            count = settings.few_seeds if contender.then == SLOW else settings.seeds
            cells.append(make_cell(settings, problem, contender, rate, range(count)))
            if contender in MAIN:
                cells.append(
                    make_cell(
                        settings, problem, contender, rate, range(count), "float32"
                    )
                )
    # The slow ones last: there is a result without them before.
    return sorted(cells, key=lambda cell: cell.contender.then == SLOW)


def tuned_rate(rows: list[dict[str, Any]], problem: str, contender: Contender) -> float:
    """Returns the rate with the lowest median error on the seeds for tuning."""
    if not contender.first:
        return 0.0
    errors: dict[float, list[float]] = {}
    for row in rows:
        if is_tuning(row) and (row["problem"], row["contender"]) == (
            problem,
            contender.first,
        ):
            errors.setdefault(row["rate"], []).append(error_of(row))
    return min(errors, key=lambda rate: quantile(errors[rate], 0.5))


def is_tuning(row: dict[str, Any]) -> bool:
    """Returns whether a run was for tuning."""
    return row["seed"] >= FIRST_TUNING_SEED


def without(
    cells: list[Cell], rows: list[dict[str, Any]], left_out: list[dict[str, str]]
) -> list[Cell]:
    """Returns the cells of who is not left out, with the seeds that have no row."""
    rivals = {row["rival"] for row in left_out}
    done = {
        tuple(row[k] for k in ("problem", "contender", "dtype", "rate", "seed"))
        for row in rows
    }
    missing = []
    for cell in cells:
        seeds = tuple(seed for seed in cell.seeds if cell.key(seed) not in done)
        if seeds and cell.contender.then not in rivals:
            missing.append(dataclasses.replace(cell, seeds=seeds))
    return missing


def run_all(missing: list[Cell], seconds: int) -> Iterator[dict[str, Any]]:
    """Yields the rows of all runs, as they come."""
    total = sum(len(cell.seeds) for cell in missing)
    progress = Progress(total, "physics-informed networks")
    found: queue.Queue[Any] = queue.Queue()
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(SIDE_BY_SIDE) as pool,
    ):

        def run(number: int, cell: Cell) -> None:
            log = Path(folder) / f"{number}.log"
            try:
                process = processes.Process(run_cell, (cell,), log, limit=seconds)
                for row in processes.all_reports(process):
                    found.put(row)
            except Exception as error:  # noqa: BLE001 (raised below)
                found.put(error)

        for number, cell in enumerate(missing):
            pool.submit(run, number, cell)
        try:
            for _ in range(total):
                row = found.get()
                if isinstance(row, Exception):
                    raise row
                progress.step(f"{row['problem']}: {row['contender']}")
                yield row
        finally:
            # If this is stopped, those that have not begun do not begin.
            pool.shutdown(wait=False, cancel_futures=True)


# --- what is shown -------------------------------------------------------------

HEADER = (
    "contender",
    "Adam's rate",
    "error: median (quartiles)",
    "failed",
    "loss",
    "gradients",
    "seconds",
    "float32: error",
)


def groups_of(
    result: dict[str, Any], problem: str, dtype: str = "float64"
) -> dict[str, Group]:
    """Returns the tests of all contenders on a problem, by their names."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["runs"]:
        if (row["problem"], row["dtype"]) == (problem, dtype) and not is_tuning(row):
            found.setdefault(row["contender"], []).append(row)
    order = [c.name for c in (*PLAIN, *ALONE, *SEQUENCES, *AFTER_ADAM)]
    return {name: Group(found[name]) for name in order if name in found}


def tested_problems(result: dict[str, Any]) -> list[str]:
    """Returns the problems on which something was tested."""
    runs = (row for row in result["runs"] if not is_tuning(row))
    return list(dict.fromkeys(row["problem"] for row in runs))


def best_of(groups: dict[str, Group], contenders: list[Contender]) -> str | None:
    """Returns the name of the one with the lowest median error."""
    names = [c.name for c in contenders if c.name in groups]
    return min(names, key=lambda name: groups[name].median) if names else None


def tables(result: dict[str, Any]) -> list[report.Table]:
    """Returns the best of each kind, and a table of all for each problem."""
    problems = tested_problems(result)
    if not problems:
        return []
    return [
        table_of_best(result, problems),
        *(table_of_problem(result, problem) for problem in problems),
    ]


def table_of_best(result: dict[str, Any], problems: list[str]) -> report.Table:
    """Returns a row per problem."""
    rows = []
    for problem in problems:
        groups = groups_of(result, problem)
        best = [best_of(groups, kind) for kind in (PLAIN, ALONE, SEQUENCES, AFTER_ADAM)]
        cells = [
            f"{name}: {groups[name].median:.1e}, {groups[name].failed} failed"
            if name
            else "-"
            for name in best
        ]
        plain, _, sequence, rival = best
        share, goals = "-", "-"
        if plain and sequence:
            share = f"{groups[sequence].median / groups[plain].median:.2g}"
            goals = ", ".join(missed(groups, plain, sequence)) or "met"
            if not rival:
                goals += "; no other software was run"
        rows.append((problem, *cells, share, goals))
    caption = (
        "The contender with the lowest median error of each kind, its median, and how "
        f"many of its runs failed: an error above {FAILED:.0%}. Goals: the error of "
        f"the sequence is at most {GOAL} times that of the plain optimizer, and at "
        "most that of any other software, and no more of its runs fail than of any "
        "other contender's. The best was chosen on the seeds that are shown, which "
        f"flatters the {len(SEQUENCES)} sequences a little. Of an even number of runs "
        "the median is the worse of the two in the middle, and sequence / plain is a "
        f"ratio of medians.{left_out_of(result)}{unfinished(result)}"
    )
    kinds = ("plain Adam", "quasi-Newton alone", "sequence", "other software")
    header = ("problem", *kinds, "sequence / plain", "goals")
    return report.Table(caption, header, rows)


def left_out_of(result: dict[str, Any]) -> str:
    """Says which rivals were left out, if any were."""
    said = [f"{row['rival']} ({row['reason']})" for row in result["left_out"]]
    return f" Left out: {', '.join(said)}." if said else ""


def unfinished(result: dict[str, Any]) -> str:
    """Says how many runs are still missing, if any are."""
    settings = Settings(
        **{
            key: tuple(value) if isinstance(value, list) else value
            for key, value in result["settings"].items()
        }
    )
    cells = cells_for_testing(settings, result["runs"])
    missing = without(cells, result["runs"], result["left_out"])
    count = sum(len(cell.seeds) for cell in missing)
    return f" Not finished: {count} runs are still missing." if count else ""


def missed(groups: dict[str, Group], plain: str, sequence: str) -> list[str]:
    """Returns the goals that the best sequence misses."""
    ours = groups[sequence]
    found = []
    if ours.median > GOAL * groups[plain].median:
        found.append(f"ABOVE {GOAL} of plain")
    for contender in AFTER_ADAM:
        rival = groups.get(contender.name)
        if rival and rival.median < ours.median:
            found.append(f"BEHIND {contender.then}")
    share = ours.failures / len(ours.rows)
    if any(share > one.failures / len(one.rows) for one in groups.values()):
        found.append("MORE FAILURES")
    return found


def table_of_problem(result: dict[str, Any], problem: str) -> report.Table:
    """Returns a row per contender."""
    single = groups_of(result, problem, "float32")
    rows = []
    for name, group in groups_of(result, problem).items():
        rate = group.rows[0]["rate"]
        seconds = group.median_of("seconds")
        if "rival_seconds" in group.rows[0]:
            seconds += group.median_of("rival_seconds")
        rows.append(
            (
                name,
                f"{rate:g}" if rate else "-",
                group.text,
                group.failed,
                f"{group.median_of('loss'):.1e}",
                f"{group.median_of('evaluations'):.0f}",
                f"{seconds:.0f}",
                f"{single[name].text}, {single[name].failed} failed"
                if name in single
                else "-",
            )
        )
    settings = result["settings"]
    caption = (
        f"{problem}: relative L2 error on a grid of 100 x 100 points, in float64, "
        f"after {settings['steps']} gradients of a network with {settings['depth']} "
        f"hidden layers of {settings['width']} neurons. Loss, gradients and seconds "
        "are medians. Two runs went side by side; the seconds of ours are without the "
        "first call, on one thread, and those of other software with all that it "
        "imports, traces and compiles, and a call of TensorFlow through Python for "
        "each gradient, so they say little. Other software may give up before it has "
        "used all gradients, and is judged at the lowest loss that it saw; a search of "
        "ours at its last accepted point, and Adam at its last."
    )
    return report.Table(caption, HEADER, rows, f"{problem}: all contenders")


def headline(result: dict[str, Any]) -> str:
    """Answers the question in one sentence."""
    texts = []
    for problem in tested_problems(result):
        groups = groups_of(result, problem)
        best = [best_of(groups, kind) for kind in (PLAIN, ALONE, SEQUENCES)]
        if best[0] and best[2]:
            said = [f"{groups[name].median:.1e}" if name else "-" for name in best]
            texts.append(f"{', '.join(said)} ({problem})")
    if not texts:
        return "Nothing has been compared yet."
    return (
        "With as many gradients, the median errors of the best plain Adam, the best "
        "quasi-Newton method alone and the best sequence are "
        f"{'; '.join(texts)}.{unfinished(result)}"
    )


def draw(result: dict[str, Any]) -> Figure:
    """Returns the errors on the way, on the first problem."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    settings = result["settings"]
    groups = groups_of(result, settings["problems"][0])
    for contender, color in zip(MAIN, COLORS, strict=False):
        group = groups.get(contender.name)
        if group is None:
            continue
        curves = np.array([row["curve"] for row in group.rows], dtype=float)
        curves[np.isnan(curves)] = np.inf
        steps = EPOCH * np.arange(1, curves.shape[1] + 1)
        low, median, high = (
            [quantile(errors, share) for errors in curves.T]
            for share in (0.25, 0.5, 0.75)
        )
        axes.plot(steps, median, color=color, label=contender.name)
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    begins = MAIN[-1].share * settings["steps"]
    axes.axvspan(begins, settings["steps"], color="black", alpha=0.06, linewidth=0)
    axes.set_xlim(0, settings["steps"])
    axes.set_yscale("log")
    axes.set_xlabel("gradient evaluations")
    axes.set_ylabel("relative error of the solution")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.3)
    axes.legend(frameon=False)
    return figure
