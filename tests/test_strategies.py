"""Runs the tests in `strategies/` under each strategy, in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.strategies.conftest import AGGREGATES, STRATEGIES, VARIABLE

ROOT = Path(__file__).parent.parent
COMMAND = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-o", "addopts="]
SECONDS = 240

# A run that collects nothing, or skips everything, must not pass for a success.
AT_LEAST_PASSED = {
    "mirrored-2": 50,
    "mirrored-4": 6,
    "one-device": 40,
    "central-storage": 45 if AGGREGATES else 9,
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_everything_holds_under_the_strategy(name):
    # The cache belongs to the process that runs this.
    command = [*COMMAND, "-p", "no:cacheprovider", "tests/strategies"]
    try:
        run = subprocess.run(
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
        pytest.fail(f"took more than {SECONDS} s:\n{output}", pytrace=False)
    assert run.returncode == 0, run.stdout
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed, run.stdout
    assert int(passed[1]) >= AT_LEAST_PASSED[name], run.stdout
