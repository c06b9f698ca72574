"""Runs the tests in `strategies/` under each strategy, each in its own process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slow.strategies.conftest import AGGREGATES, STRATEGIES, VARIABLE

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-o", "addopts="]
SECONDS = 600

# A run that collects nothing, or skips everything, must not pass for a success.
AT_LEAST_PASSED = {
    "mirrored-2": 61,
    "mirrored-4": 10,
    "one-device": 49,
    "central-storage": 56 if AGGREGATES else 9,
}


def run(name):
    """Returns the exit code and the output of the tests under a strategy."""
    # The cache belongs to the process that runs this.
    command = [*COMMAND, "-p", "no:cacheprovider", "tests/slow/strategies"]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, VARIABLE: name},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as expired:
        output = (expired.output or b"").decode(errors="replace")
        return None, f"took more than {SECONDS} s:\n{output}"
    return done.returncode, done.stdout


@pytest.mark.parametrize("name", STRATEGIES)
def test_everything_holds_under_the_strategy(name):
    code, output = run(name)
    assert code == 0, output
    passed = re.search(r"(\d+) passed", output)
    assert passed, output
    assert int(passed[1]) >= AT_LEAST_PASSED[name], output
