"""The question `rivals`: each rival makes our updates, a missing one is left out."""

import dataclasses
import importlib.util

import numpy as np
import pytest

from benchmarks.harness import report
from benchmarks.harness.checks import CheckError
from benchmarks.questions import rivals
from benchmarks.workloads.models import mlp
from benchmarks.workloads.rival import NotAvailableError, Trainer, Work

TINY = dataclasses.replace(rivals.QUICK, width=16, hidden=1, boundary=3, rounds=2)
FRAMEWORKS = {one.name: one for one in rivals.frameworks(compiled=False)}


@pytest.fixture(scope="module")
def work():
    return Work(mlp(width=16, hidden=1, batch=8), boundary=3)


@pytest.fixture(scope="module")
def ours(work):
    trainers = FRAMEWORKS["TensorFlow"].make_trainers(work)
    return rivals.weights_at_checks(trainers, work)


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_rival_makes_the_updates_that_we_make(name, work, ours):
    for module in FRAMEWORKS[name].needs:
        pytest.importorskip(module)
    trainers = FRAMEWORKS[name].make_trainers(work)
    found = rivals.weights_at_checks(trainers, work)
    rows = rivals.compare(name, found, ours, work)
    whens = {"before the switch", "behind the switch", "at the end"}
    for program in rivals.switching(trainers):
        assert {row["when"] for row in rows if row["program"] == program} == whens
    # A small model, so rounding has little to grow on.
    assert max(row["difference_from_ours"] for row in rows) < 1e-4


def test_two_functions_equal_the_sequence_bit_by_bit(ours):
    for when in ("before the switch", "behind the switch", "at the end"):
        for a, b in zip(
            ours[f"{rivals.OURS}, {when}"],
            ours[f"two functions and an if, {when}"],
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("wrong", ["behind the switch", "at the end"])
def test_rival_that_switches_late_is_refused(wrong, work, ours):
    found = dict(ours)
    late = ours[f"{rivals.OURS}, before the switch"]
    found[f"{rivals.OURS}, {wrong}"] = late
    with pytest.raises(CheckError, match=f"{rivals.OURS}, {wrong}"):
        rivals.compare("TensorFlow", found, ours, work)


def test_missing_rival_is_left_out_with_a_line_that_says_so(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report.ask(rivals, TINY, True, tmp_path)
    result = report.read(rivals, tmp_path)
    assert {cell["framework"] for cell in result["cells"]} == {"TensorFlow"}
    assert result["left_out"] == [
        {"framework": "JAX, optax", "reason": "jax and optax not installed"},
        {"framework": "PyTorch, eager", "reason": "torch not installed"},
    ]
    assert "left out: PyTorch, eager: torch not installed" in capsys.readouterr().out


def test_rival_that_does_not_compile_is_left_out(monkeypatch, work):
    torch = pytest.importorskip("torch")

    def fail(function):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)
    *_, compiled = rivals.frameworks(compiled=True)
    with pytest.raises(NotAvailableError, match=r"RuntimeError: no compiler$"):
        compiled.make_trainers(work)


def test_cells_compare_with_plain_optimizers_of_the_framework():
    """Times are given, so the ratios are known."""

    def trainer(first, second):
        made = Trainer(lambda: None, lambda: None, list)
        made.time = lambda updates: np.repeat([first, second], updates // 2)
        return made

    trainers = {
        "adam": trainer(2.0, 2.0),
        "sgd": trainer(1.0, 1.0),
        "adam copy": trainer(2.0, 2.0),
        "sgd copy": trainer(1.1, 1.1),
        "both": trainer(3.0, 4.0),
    }
    rows = rivals.measure_times("framework", trainers, TINY)
    assert [row["switching_over_plain"]["median"] for row in rows] == [1.5, 4.0]
    assert [row["plain_over_itself"]["median"] for row in rows] == [1.0, 1.1]
    assert rows[1]["switch_over_other_steps"]["median"] == 1.0


def test_first_update_of_a_phase_is_not_in_its_time():
    seconds = np.array([[9.0, 1, 2, 3, 8.0, 4, 5, 6]])
    assert rivals.in_phase(seconds, 0) == [2]
    assert rivals.in_phase(seconds, 1) == [5]
