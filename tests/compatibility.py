"""Runs the tests with a TensorFlow and a Keras of your choice, and keeps the outcome.

    python -m tests.compatibility 2.17:3.6 2.18:3.8    # minutes each
    python -m tests.compatibility nightly:nightly      # what comes next

Each pair gets its own virtual environment. The outcome goes to
compatibility.json, and from there into the table of README.md. These are the quick
tests; `.ci/run` runs the slow ones, too: with the newest pair, and all but the
benchmarks with the oldest.
"""

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "tests" / "README.md"
OUTCOMES = Path(__file__).with_suffix(".json")
_TABLE = re.compile(r"(?<=<!-- begin compatibility -->\n).*?(?=<!-- end)", re.DOTALL)
_VERSIONS = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow, keras, numpy
print(tensorflow.__version__, keras.__version__, numpy.__version__)
"""


def run(command: Sequence[str | Path]) -> str:
    """Returns what a command prints; raises if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stdout[-2000:]}{done.stderr}")
    return done.stdout


def outcome_of(tensorflow: str, keras: str) -> dict[str, Any]:
    """Installs a pair, runs the tests, and returns what came out.

    Args:
        tensorflow: string, the first two numbers of a version, or "nightly".
        keras: string, likewise.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        install = [python, "-m", "pip", "install", "-q"]
        if tensorflow == "nightly":
            # Under names that no dependency asks for.
            project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            tests = project["optional-dependencies"]["test"]
            run([*install, "tf-nightly", "keras-nightly", *tests])
            run([*install, "--no-deps", "-e", ROOT])
        else:
            pair = [f"tensorflow=={tensorflow}.*", f"keras=={keras}.*"]
            run([*install, "-e", f"{ROOT}[test]", *pair])
        versions = run([python, "-c", _VERSIONS]).split()
        done = subprocess.run(
            [python, "-m", "pytest", "-q"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest failed:\n{done.stdout[-2000:]}{done.stderr}")
    return {
        **dict(zip(("tensorflow", "keras", "numpy"), versions, strict=True)),
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "commit": run(["git", "rev-parse", "--short", "HEAD"]).strip(),
        **counts(done.stdout),
    }


def counts(output: str) -> dict[str, Any]:
    """Returns what the last lines of pytest say."""
    summary = output.strip().splitlines()[-1]
    number = {name: int(n) for n, name in re.findall(r"(\d+) (\w+)", summary)}
    return {
        "passed": number.get("passed", 0),
        "skipped": number.get("skipped", 0),
        "failed": re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE),
    }


def table(outcomes: Sequence[dict[str, Any]]) -> str:
    """Returns the table of README.md."""
    lines = ["| TensorFlow | Keras | tests | date |", "| --- | --- | --- | --- |"]
    for one in sorted(outcomes, key=order):
        failed = f", {len(one['failed'])} failed" if one["failed"] else ""
        lines.append(
            f"| {one['tensorflow']} | {one['keras']} "
            f"| {one['passed']} passed{failed} | {one['date']} |"
        )
    return "\n".join(lines)


def order(outcome: dict[str, Any]) -> list[list[int]]:
    """Returns what outcomes are sorted by: the versions, as numbers."""
    return [
        [int(n) for n in re.findall(r"\d+", outcome[name])]
        for name in ("tensorflow", "keras")
    ]


def write(outcomes: Sequence[dict[str, Any]]) -> None:
    """Writes the file and the table."""
    OUTCOMES.write_text(json.dumps(sorted(outcomes, key=order), indent=1) + "\n")
    text = README.read_text()
    README.write_text(_TABLE.sub(lambda _: f"\n{table(outcomes)}\n\n", text))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit code: 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pairs", nargs="+", metavar="TENSORFLOW:KERAS")
    failed = False
    for pair in parser.parse_args(argv).pairs:
        new = outcome_of(*pair.split(":"))
        print(pair, new)
        failed = failed or bool(new["failed"])
        known = json.loads(OUTCOMES.read_text()) if OUTCOMES.exists() else []
        write([one for one in known if order(one) != order(new)] + [new])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
