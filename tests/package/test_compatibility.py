"""The tables of versions and libraries in tests/README.md are what was run."""

import json
import re

import pytest

from tests import compatibility, works_with
from tests.compatibility import ROOT

OUTCOMES = json.loads(compatibility.OUTCOMES.read_text())


def test_readme_has_the_table():
    assert f"\n{compatibility.table(OUTCOMES)}\n" in compatibility.README.read_text()


def test_readme_has_the_table_of_libraries():
    outcomes = json.loads(works_with.OUTCOMES.read_text())
    table = works_with.table(outcomes)
    assert [one["library"] for one in outcomes] == list(works_with.PROGRAMS)
    assert f"\n{table}\n" in works_with.README.read_text()


@pytest.mark.parametrize("name", ["TensorFlow", "Keras"])
def test_readme_names_the_oldest_supported_versions(name):
    readme = compatibility.README.read_text()
    oldest = re.search(rf"with the oldest\s+pair,.*?{name} (\d+\.\d+)", readme)[1]
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'"{name.lower()}>={oldest}"' in pyproject
    assert f"{name.lower()}=={oldest}.*" in (ROOT / ".ci" / "run").read_text()


def test_every_outcome_says_what_was_run_when():
    for one in OUTCOMES:
        assert one["failed"] == []
        assert one["passed"] > 500
        assert one["date"]
        assert one["commit"]


def test_counts_are_those_of_the_last_line():
    output = (
        "12 failed in the text\n"
        "FAILED tests/test_a.py::test_b[c] - AssertionError\n"
        "ERROR tests/test_d.py\n"
        "= 1 failed, 30 passed, 2 skipped, 4 deselected, 1 error in 5.00s =\n"
    )
    assert compatibility.counts(output) == {
        "passed": 30,
        "skipped": 2,
        "failed": ["tests/test_a.py::test_b[c]", "tests/test_d.py"],
    }


def test_versions_are_sorted_as_numbers():
    outcomes = [
        {"tensorflow": tensorflow, "keras": "3.5.0", "passed": 1, "failed": []}
        | {"date": "2026-01-01"}
        for tensorflow in ("2.20.0", "2.9.1")
    ]
    assert compatibility.table(outcomes).splitlines()[2:] == [
        "| 2.9.1 | 3.5.0 | 1 passed | 2026-01-01 |",
        "| 2.20.0 | 3.5.0 | 1 passed | 2026-01-01 |",
    ]
