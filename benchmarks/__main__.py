"""Asks the questions by which this package is measured.

    python -m benchmarks                      # all of them: have patience
    python -m benchmarks the_switch memory    # some of them
    python -m benchmarks --quick              # within 3 minutes on two cores
    python -m benchmarks --tables             # measures nothing

A full run writes a JSON file and a picture to benchmarks/results, and the tables of
both READMEs; `--tables` writes all pictures and tables again from the JSON files.
"""

import argparse
import dataclasses
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import readme, report
from benchmarks.harness.checks import CheckError
from benchmarks.harness.terminal import say
from benchmarks.questions import QUESTIONS


def question(name: str) -> Any:
    """Returns the module that asks a question."""
    return importlib.import_module(f"benchmarks.questions.{name}")


def measured() -> list[Any]:
    """Returns the questions for which there is a result."""
    return [
        question(name)
        for name in QUESTIONS
        if (report.RESULTS / f"{name}.json").exists()
    ]


def ask(name: str, quick: bool, changes: Iterable[str], results: Path | None) -> int:
    """Asks a question in this process, and returns the exit code."""
    asked = question(name)
    settings = asked.QUICK if quick else asked.FULL
    changed = dict(change.split("=") for change in changes)
    settings = dataclasses.replace(settings, **{k: int(v) for k, v in changed.items()})
    if results is None:
        results = report.RESULTS
        if quick:
            results = Path(tempfile.mkdtemp(prefix="benchmarks-"))
    try:
        report.ask(asked, settings, quick, results)
    except CheckError as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    if results.resolve() == report.RESULTS:
        readme.write([asked], measured(), results)
    return 0


def ask_all(names: Sequence[str], options: Sequence[str]) -> int:
    """Asks questions one after the other, and returns the exit code."""
    failed = [
        name
        for name in names
        # In a separate process, nothing of another question is in memory.
        if subprocess.run(
            [sys.executable, "-m", "benchmarks", name, *options]
        ).returncode
    ]
    if failed:
        say(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


def write_tables() -> None:
    """Writes the pictures and tables of all that was measured."""
    questions = measured()
    for one in questions:
        report.draw(one, report.RESULTS)
    readme.write(questions, questions, report.RESULTS)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__.partition("\n")[0],
        epilog=f"The questions: {', '.join(QUESTIONS)}.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument(
        "--quick", action="store_true", help="small models and few rounds"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="SETTING=NUMBER",
        help="change settings of the question, such as `faults --set kills=100 seed=7`",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="folder for the JSON file and the picture (default: benchmarks/results, "
        "or a temporary one with --quick)",
    )
    parser.add_argument(
        "--tables", action="store_true", help="write the tables, and measure nothing"
    )
    arguments = parser.parse_args(argv)
    unknown = set(arguments.names) - set(QUESTIONS)
    if unknown:
        parser.error(f"no question: {', '.join(sorted(unknown))}")
    if arguments.tables:
        write_tables()
        return 0
    if len(arguments.names) == 1:
        (name,) = arguments.names
        return ask(name, arguments.quick, arguments.set, arguments.results)
    options = ["--quick"] if arguments.quick else []
    if arguments.set:
        options += ["--set", *arguments.set]
    if arguments.results:
        options += ["--results", str(arguments.results)]
    return ask_all(arguments.names or QUESTIONS, options)


if __name__ == "__main__":
    sys.exit(main())
