"""What the benchmarks found, in a few lines for the main README."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import report
from benchmarks.harness.timing import number
from benchmarks.workloads.ways import AROUND

README = Path(__file__).parent.parent.parent / "README.md"


def table(results: Path = report.RESULTS) -> str:
    """Returns the table, a line for each question that has been measured."""
    lines = ["| | measured |", "| --- | --- |"]
    for name, (title, say) in LINES.items():
        if (results / f"{name}.json").exists():
            title = f"[{title}](benchmarks/README.md#{name.replace('_', '-')})"
            lines.append(f"| {title} | {say(report.read(name, results))} |")
    return "\n".join(lines)


def medians(rows: Iterable[dict[str, Any]], key: str) -> list[float]:
    """Returns the medians of a ratio in all rows."""
    return [row[key]["median"] for row in rows]


def from_to(values: list[float]) -> str:
    """Returns the smallest and the largest of the values as text."""
    return " to ".join(dict.fromkeys([number(min(values)), number(max(values))]))


def step_throughput(result: dict[str, Any]) -> str:
    """Returns the line of the question."""
    ratios = medians(result["cells"], "sequence_over_plain")
    noise = medians(result["cells"], "plain_over_itself")
    return (
        f"median of {len(ratios)} cells {number(float(np.median(ratios)))}, from "
        f"{from_to(ratios)} (a plain step over itself: {from_to(noise)})"
    )


def the_switch(result: dict[str, Any]) -> str:
    """Returns the line of the question."""

    def first_step(way: str) -> str:
        rows = [row for row in result["ways"] if row["way"] == way]
        return " and ".join(number(row["steps"][AROUND]["median"]) for row in rows)

    ours = [row for row in result["ways"] if row["way"] == "sequence"]
    traces, compiles = (
        sum(row[f"{what}_at_switch"] for row in ours) for what in ("traces", "compiles")
    )
    models = " and ".join(row["model"] for row in ours)
    return (
        f"{first_step('sequence')} times the median step ({models}), {traces} traces, "
        f"{compiles} compiles; two `tf.function`s {first_step('two functions')}, "
        f"`Model.compile` again {first_step('Model.compile again')}"
    )


def first_call(result: dict[str, Any]) -> str:
    """Returns the line of the question."""
    two = [case for case in result["cases"] if case["children"] == 2]
    most = max(result["cases"], key=lambda case: case["children"])
    return (
        f"two children: {from_to(medians(two, 'both_over_plain'))} times the slowest "
        f"plain child; {most['children']} children: "
        f"{number(most['both_over_plain']['median'])} times"
    )


def memory(result: dict[str, Any]) -> str:
    """Returns the line of the question."""
    two = [row for row in result["sequences"] if row["children"] == 2]
    return (
        "`[Adam, SGD]`, with momentum: "
        f"{two[0]['optimizer_over_adam']:.2f} times Adam's variables, "
        f"{from_to(medians(two, 'peak_over_adam'))} times its peak"
    )


def idle_children(result: dict[str, Any]) -> str:
    """Returns the line of the question."""
    count = 100
    texts = []
    for children in (2, 8):
        cells = [
            cell
            for cell in result["cells"]
            if (cell["variables"], cell["children"]) == (count, children)
        ]
        ratios = from_to(medians(cells, "sequence_over_plain"))
        texts.append(f"{children} Adams {ratios} times the step of one")
    return f"a model of {count} tiny variables: {', '.join(texts)}"


def rivals(result: dict[str, Any]) -> str:
    """Returns the line of the question."""
    programs: dict[tuple[str, str], list[str]] = {}
    for cell in result["cells"]:
        median = number(cell["switching_over_plain"]["median"])
        programs.setdefault((cell["framework"], cell["program"]), []).append(median)
    return "; ".join(
        f"{framework}, {program}: {' and '.join(ratios)}"
        for (framework, program), ratios in programs.items()
    )


def gpu(result: dict[str, Any]) -> str:
    """Returns the line of the question."""
    if result["device"] is None:
        return f"not measured: {result['reason']}"
    ratios = medians(result["cells"], "sequence_over_plain")
    return f"{from_to(ratios)} times a plain step on one {result['device']}"


LINES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "step_throughput": ("A step, over a plain one", step_throughput),
    "the_switch": ("The first step after the switch", the_switch),
    "first_call": ("The first call", first_call),
    "memory": ("Memory", memory),
    "idle_children": ("Idle children", idle_children),
    "rivals": ("Switching elsewhere, over the plain optimizers there", rivals),
    "gpu": ("A step on a GPU", gpu),
}
