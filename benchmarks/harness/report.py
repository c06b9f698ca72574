"""Runs a question: measures, writes JSON and a picture, prints the tables.

A question is a module of this package, listed in `benchmarks.QUESTIONS`, with

    FULL, QUICK         two instances of a frozen dataclass: how long it takes
    measure(settings)   measures, checks results, returns what JSON can hold: a dict of
                        lists of rows, a row being a dict
    tables(result)      makes a list of `Table` from what was written to the JSON file
    draw(result)        makes a matplotlib `Figure` from the same

`tables` and `draw` see nothing but the file, so benchmarks/README.md can be made again
without measuring again.
"""

import argparse
import dataclasses
import importlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from benchmarks.harness.checks import CheckError
from benchmarks.harness.environment import environment
from benchmarks.harness.terminal import say, text_table, without_info_logs

RESULTS = Path(__file__).resolve().parent.parent / "results"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text, for the terminal and for Markdown."""

    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def as_text(self) -> str:
        """Returns it for the terminal."""
        return f"{text_table(self.header, self.rows)}\n\n{self.caption}"

    def as_markdown(self) -> str:
        """Returns it for benchmarks/README.md."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"{table}\n\n{self.caption}"


def question(name: str) -> Any:
    """Returns the module that asks the question."""
    return importlib.import_module(f"benchmarks.questions.{name}")


def read(name: str, results: Path = RESULTS) -> dict[str, Any]:
    """Returns the newest result of a question."""
    return json.loads((results / f"{name}.json").read_text())


def write(name: str, result: dict[str, Any], results: Path) -> None:
    """Writes the result of a question, as JSON and as a picture."""
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1, allow_nan=False)
    (results / f"{name}.json").write_text(text + "\n")
    draw(name, results)


def draw(name: str, results: Path = RESULTS) -> None:
    """Draws the picture of a question from its JSON file."""
    figure = question(name).draw(read(name, results))
    # Without the version of matplotlib in it, equal pictures are equal files.
    figure.savefig(results / f"{name}.png", dpi=120, metadata={"Software": None})


def measure(name: str, quick: bool) -> dict[str, Any]:
    """Asks the question, and returns the result as it goes to the JSON file."""
    module = question(name)
    settings = module.QUICK if quick else module.FULL
    measured = module.measure(settings)
    return {
        "question": name,
        "environment": environment(quick),
        "settings": dataclasses.asdict(settings),
        **measured,
    }


def parse(name: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line of a question."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=(question(name).__doc__ or "").partition("\n")[0],
    )
    parser.add_argument(
        "--quick", action="store_true", help="small models and few rounds"
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="folder for the JSON file and the picture (default: benchmarks/results, "
        "or a temporary one with --quick)",
    )
    return parser.parse_args(argv)


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Runs the command of a question, and returns its exit code."""
    # It needs `run` itself for its own command.
    from benchmarks.harness import readme

    arguments = parse(name, argv)
    results = arguments.results or RESULTS
    if arguments.quick and not arguments.results:
        results = Path(tempfile.mkdtemp(prefix="benchmarks-"))
    say(f"== {name}: {question(name).__doc__.partition(chr(10))[0]}")
    compile_something()
    try:
        result = measure(name, arguments.quick)
    except CheckError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    write(name, result, results)
    for table in question(name).tables(result):
        say(f"\n{table.as_text()}")
    say(f"\nwritten: {results / name}.json and .png\n")
    if results.resolve() == RESULTS:
        readme.update([name])
    return 0


def compile_something() -> None:
    """Lets XLA start, which it does with lines of log on the terminal."""
    with without_info_logs():
        tf.function(lambda x: x + 1, jit_compile=True)(tf.constant(1))
