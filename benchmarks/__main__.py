"""Asks all questions, one after the other, each in a process of its own.

    python -m benchmarks                       # everything: have patience
    python -m benchmarks --quick               # within 3 minutes on two cores
    python -m benchmarks --only the_switch memory

The full run of a question also writes its part of benchmarks/README.md anew.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import QUESTIONS
from benchmarks.harness.terminal import say


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="+", choices=QUESTIONS, metavar="NAME")
    parser.add_argument("--results", type=Path, help="as for each question")
    arguments = parser.parse_args(argv)
    options = ["--quick"] if arguments.quick else []
    if arguments.results:
        options += ["--results", str(arguments.results)]
    failed = [
        name
        for name in arguments.only or QUESTIONS
        # In a process of its own nothing of another question is in memory.
        if subprocess.run(
            [sys.executable, "-m", f"benchmarks.questions.{name}", *options]
        ).returncode
    ]
    if failed:
        say(f"FAILED: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
