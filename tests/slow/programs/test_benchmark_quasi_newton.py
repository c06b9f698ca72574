"""The question about LBFGS and SSBroyden: quick, and it refuses a wrong direction."""

import importlib.util
import json

import pytest

from benchmarks.harness.checks import CheckError
from benchmarks.questions import quasi_newton
from benchmarks.questions.quasi_newton import Case, Update, check_search

SETTINGS = quasi_newton.Settings(
    sizes=(100,), histories=(3,), dense_sizes=(20,), rounds=2, steps=1
)


@pytest.fixture(scope="module")
def result():
    return json.loads(json.dumps(quasi_newton.measure(SETTINGS)))


def test_row_has_every_ratio(result):
    lbfgs, dense = result["cases"]
    ours = {"update_over_copy", "in_sequence_over_alone", "idle_over_idle_adam"}
    assert ours < lbfgs.keys()
    assert ours < dense.keys()
    left_out = {row["rival"] for row in result["left_out"]}
    for name in quasi_newton.RIVALS:
        assert (f"{name}_over_ours" in lbfgs) == (name not in left_out)


def test_rival_that_is_missing_is_told(result, capsys):
    missing = {
        name
        for name, needs in quasi_newton.RIVALS.items()
        if not all(importlib.util.find_spec(module) for module in needs)
    }
    assert {row["rival"] for row in result["left_out"]} == missing
    quasi_newton.find_rivals()
    shown = capsys.readouterr().out
    assert all(f"left out: {name}: " in shown for name in missing)


def test_table_and_picture(result):
    (table,) = quasi_newton.tables(result)
    assert {len(row) for row in table.rows} == {len(table.header)}
    assert quasi_newton.draw(result).axes
    assert "An update takes " in quasi_newton.headline(result)


@pytest.mark.parametrize("case", [Case(20, 3), Case(20)])
def test_wrong_direction_is_found(case):
    update = Update(case.size, case.make())
    for _ in range(case.warm_up):
        update.step()
    check_search(case, update)
    (direction,) = (v for v in update.optimizer.variables if v.name == "direction")
    direction.assign(1.1 * direction)
    with pytest.raises(CheckError, match="direction differs from that of NumPy"):
        check_search(case, update)


def test_bytes_are_those_of_the_matrices():
    # Two passes over two matrices; three over one.
    assert Case(1000, 10).moved_bytes == 2 * 2 * 10 * 1000 * 4
    assert Case(1000).moved_bytes == 3 * 1000**2 * 4
