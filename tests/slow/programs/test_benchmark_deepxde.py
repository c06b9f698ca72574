"""The question `deepxde`: what it shows, and that all of its runs are of one kind."""

import importlib.util

import numpy as np
import pytest

from benchmarks.harness import report
from benchmarks.questions import deepxde

ERRORS = {name: 10.0 ** -(i + 1) for i, name in enumerate(deepxde.CONTENDERS)}
ROWS = [
    {"contender": name, "seed": seed, "evaluations": 30, "error": error, "loss": error}
    for seed in range(3)
    for name, error in ERRORS.items()
]
RESULT = {"reason": "", "runs": ROWS, "settings": {**vars(deepxde.FULL)}}


def test_without_deepxde_one_line_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report.ask(deepxde, deepxde.QUICK, True, tmp_path)
    result = report.read(deepxde, tmp_path)
    assert deepxde.tables(result) == []
    assert "Not measured: deepxde is not installed." in capsys.readouterr().out


def test_second_sitting_repeats_nothing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    (result,) = deepxde.measure_in_sittings(deepxde.FULL, RESULT)
    assert result == {"reason": "", "runs": ROWS}


# It was named among those that measured the table.
def test_sitting_with_nothing_left_to_measure_is_not_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    earlier = {**RESULT, "environment": {"commit": "1234567"}}
    report.write(deepxde, earlier, tmp_path)
    report.ask(deepxde, deepxde.FULL, False, tmp_path)
    assert report.read(deepxde, tmp_path) == earlier


def test_table_and_headline_name_each_contender():
    (table,) = deepxde.tables(RESULT)
    assert [row[0] for row in table.rows] == list(deepxde.CONTENDERS)
    assert {len(row) for row in table.rows} == {len(table.header)}
    headline = deepxde.headline(RESULT)
    assert "1.0e-01 with Adam, 1.0e-02 with its documented" in headline
    assert headline.endswith("1.0e-04 with SSBroyden instead.")


def test_picture_has_a_dot_for_each_run():
    (axes,) = deepxde.draw(RESULT).axes
    assert [len(line.get_xdata()) for line in axes.lines] == [3] * 4


def test_contenders_start_alike_and_get_as_many_gradients():
    if not importlib.util.find_spec("deepxde"):
        pytest.skip("deepxde is not installed")
    *_, result = deepxde.measure_in_sittings(deepxde.QUICK, {})
    rows = result["runs"]
    assert [row["contender"] for row in rows] == [
        deepxde.DOCUMENTED,
        deepxde.ADAM,
        *deepxde.CONTENDERS[2:],
    ]
    assert len({row["evaluations"] for row in rows}) == 1
    assert rows[0]["evaluations"] > deepxde.QUICK.adam
    assert len({row["loss"] for row in rows}) == len(rows)
    assert all(0 < row["error"] < np.inf for row in rows)
