"""Physics-informed networks: the solutions are right, and so is what is measured."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import tensorflow as tf

from benchmarks.harness import readme, report
from benchmarks.harness.runs import Group
from benchmarks.questions import pinn
from benchmarks.workloads.pinn import PROBLEMS, Burgers, Oscillator, draw_points
from benchmarks.workloads.pinn_rivals import FlatLoss, SpentError, search
from benchmarks.workloads.pinn_runs import Cell, Contender, Training

TINY = pinn.Settings(
    problems=("convection 10",),
    hard=(),
    steps=400,
    width=4,
    depth=1,
    rates=(1e-3, 1e-2),
    tuning_seeds=1,
    seeds=2,
    few_seeds=1,
)


def numeric_derivatives(function, at, h):
    """First and second derivatives by each input, by central differences."""
    first, second = [], []
    for i in range(at.shape[1]):
        e = h * np.eye(at.shape[1])[i]
        before, here, after = function(at - e), function(at), function(at + e)
        first.append((after - before) / (2 * h))
        second.append((after - 2 * here + before) / h**2)
    return function(at), first, second


class Exact:
    """Stands for a network that is the solution."""

    def __init__(self, problem, step):
        self.problem = problem
        self.step = step
        for name in ("beta", "rho", "nu"):
            if hasattr(problem, name):
                setattr(self, name, getattr(problem, name))

    def __call__(self, at):
        at = np.asarray(at)
        return self.problem.solution(*at.T)[:, np.newaxis]

    def first_derivatives(self, at):
        return numeric_derivatives(self, np.asarray(at), self.step)[:2]

    def second_derivatives(self, at):
        return numeric_derivatives(self, np.asarray(at), self.step)


# A solution of something else would make every contender look bad, or the wrong one
# good.
@pytest.mark.parametrize("name", PROBLEMS)
def test_solution_solves_the_equation(name):
    problem = PROBLEMS[name]
    points = draw_points(problem, 0, "float64")
    # Where the quadrature for Burgers' equation has what it needs: t - h > 0.
    inside = points["inside"]
    points["inside"] = tf.boolean_mask(inside, inside[:, 1] > 1e-2)
    residuals = problem.residuals(Exact(problem, 1e-4), points)
    sizes = [float(np.abs(r).max()) for r in residuals]
    # The largest of u_t: 10, 30, ...; its shock costs Burgers' equation digits.
    assert max(sizes) < (0.5 if problem is Burgers else 2e-3), sizes


def test_oscillation_solves_its_equation():
    points = {"inside": np.linspace(0, 1, 60)[:, None], "start": np.zeros((1, 1))}
    residuals = Oscillator.residuals(Exact(Oscillator, 1e-4), points)
    assert max(float(np.abs(r).max()) for r in residuals) < 1e-5


# Basdevant et al. (1986), table 1: the steepest slope at x = 0, and when.
def test_slope_of_burgers_solution_is_the_published_one():
    h, t = 1e-6, np.full(2, 1.6037 / np.pi)
    before, after = Burgers.solution(np.array([-h, h]), t)
    assert (before - after) / (2 * h) == pytest.approx(152.00516, rel=1e-5)


def test_derivatives_are_those_of_the_network():
    model = Burgers(width=5, depth=2, inputs=2, dtype="float64")
    at = tf.constant([[0.1, 0.2], [-0.5, 0.9]], tf.float64)
    _, first, second = numeric_derivatives(lambda x: model(x).numpy(), at.numpy(), 1e-4)
    u, ours, ours_twice = model.second_derivatives(at)
    np.testing.assert_array_equal(u, model(at))
    np.testing.assert_allclose(ours, first, rtol=1e-6)
    np.testing.assert_allclose(ours_twice, second, rtol=1e-4)


# --- the measurement ---------------------------------------------------------


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The JSON of a run with few contenders, as the command writes it."""
    folder = tmp_path_factory.mktemp("pinn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pinn, "ALONE", [])
        patch.setattr(pinn, "SEQUENCES", [pinn.SEQUENCES[1], pinn.SEQUENCES[3]])
        patch.setattr(pinn, "AFTER_ADAM", pinn.AFTER_ADAM[:1])
        patch.setattr(pinn, "MAIN", [pinn.PLAIN[0], pinn.SEQUENCES[0]])
        report.ask(pinn, TINY, True, folder)
        yield report.read(pinn, folder)


def test_every_contender_gets_as_many_gradients(result):
    assert {row["evaluations"] for row in result["runs"]} == {TINY.steps}
    tests = [row for row in result["runs"] if not pinn.is_tuning(row)]
    # Two plain, two sequences and a rival, with two seeds; two of them in float32.
    assert len(tests) == 5 * 2 + 2 * 2
    assert all(0 < row["error"] < 10 for row in tests)


def test_sequences_switch_when_they_should(result):
    at = {row["contender"]: [] for row in result["runs"]}
    for row in result["runs"]:
        at[row["contender"]].append(row["switched_at"])
    assert set(at["Adam, then LBFGS at 25%"]) == {100}
    assert set(at["Adam"]) == {None}


# Each seed is a run with its own points and weights, and a fresh optimizer.
def test_runs_do_not_depend_on_those_before():
    cell = Cell("wave", pinn.SEQUENCES[1], "float64", 1e-2, (3, 4, 3), 400, 4, 1)
    training = Training(cell)
    first, other, again = (training.run(seed) for seed in cell.seeds)
    assert (first["error"], first["loss"]) == (again["error"], again["loss"])
    assert first["error"] != other["error"]


# Three hours are too long for one sitting.
def test_second_sitting_repeats_nothing(result, monkeypatch):
    started = []
    monkeypatch.setattr(pinn.processes, "Process", started.append)
    for name in ("ALONE", "SEQUENCES", "AFTER_ADAM", "MAIN"):
        kept = [c for c in getattr(pinn, name) if c.name in names_of(result)]
        monkeypatch.setattr(pinn, name, kept)
    parts = list(pinn.measure_in_sittings(TINY, result))
    assert not started
    assert parts[-1]["runs"] == result["runs"]


def names_of(result):
    """The contenders that were tested in both dtypes, or in one."""
    return {row["contender"] for row in result["runs"]}


def test_sitting_with_other_settings_begins_anew(result, tmp_path):
    assert report.earlier_result(pinn, TINY, tmp_path) == {}
    (tmp_path / "pinn.json").write_text(json.dumps(result))
    others = dataclasses.replace(TINY, steps=800)
    assert report.earlier_result(pinn, TINY, tmp_path)["runs"] == result["runs"]
    assert report.earlier_result(pinn, others, tmp_path) == {}


# All runs seemed to be of the day of the last.
def test_origin_names_each_sitting(result):
    here = {**result["environment"], "uncommitted_changes": False}
    first = {**here, "commit": "1234567890", "cpu": "one CPU"}
    later = {**here, "commit": "abcdefghij", "cpu": "another CPU"}
    sittings = report.sittings_of({"environment": first})
    sittings = report.sittings_of({"earlier_sittings": sittings, "environment": later})
    assert sittings == [first, later]
    text = readme.origin(sittings)
    for part in (
        "at commit 1234567, ",
        "at commit abcdefg: ",
        "one CPU",
        "another CPU",
    ):
        assert text.count(part) == 1


def test_tables_headline_and_picture(result):
    best, every = pinn.tables(result)
    for table in (best, every):
        assert {len(row) for row in table.rows} == {len(table.header)}
    assert [row[0] for row in every.rows][:2] == ["Adam", "Adam, cosine decay"]
    assert pinn.headline(result).endswith("(convection 10).")
    (axes,) = pinn.draw(result).axes
    assert len(axes.lines) == 2


def test_caption_says_what_is_missing(result):
    assert pinn.unfinished(result) == ""
    fewer = {**result, "runs": result["runs"][:-2]}
    assert "2 runs are still missing" in pinn.unfinished(fewer)
    assert "2 runs are still missing" in pinn.tables(fewer)[0].caption


def test_goals_are_judged():
    def group(*errors):
        return Group([{"error": error} for error in errors])

    rival = pinn.AFTER_ADAM[0]
    groups = {
        "plain": group(0.04, 0.04),
        "sequence": group(0.001, 0.003),
        rival.name: group(0.003, 0.003),
    }
    assert pinn.missed(groups, "plain", "sequence") == []
    groups["sequence"] = group(0.5, 0.5)
    assert pinn.missed(groups, "plain", "sequence") == [
        "ABOVE 0.1 of plain",
        f"BEHIND {rival.then}",
        "MORE FAILURES",
    ]


def test_diverged_run_is_a_failure(result):
    rows = [dict(row, error=None, loss=None) for row in result["runs"]]
    group = Group(rows[:3])
    assert group.failed == "3 of 3"
    assert group.median == np.inf


# The lower quartile of three runs was their median.
def test_quartiles_do_not_hide_the_spread():
    group = Group([{"error": error} for error in (1e-3, 1e-2, 1e-1)])
    assert group.text == "1.0e-02 (1.0e-03 to 1.0e-01)"


# The table showed the lower of two middle runs, while their mean chose the best.
def test_half_diverged_is_a_diverged_median(result):
    good = result["runs"][0]
    group = Group([good, dict(good, error=None)])
    assert group.median == np.inf
    assert group.text.startswith("inf (")


# --- rivals --------------------------------------------------------------------


def make_function(budget=60):
    model = PROBLEMS["convection 10"](4, 1, inputs=2, dtype="float64")
    points = draw_points(PROBLEMS["convection 10"], 0, "float64")
    return model, points, FlatLoss(model, points, budget)


def test_flat_loss_counts_and_keeps_the_best():
    model, points, function = make_function(budget=2)
    first = float(model.compute_residual_loss(points))
    loss, gradient = function(function.first)
    assert loss == pytest.approx(first)
    function(function.first + gradient)  # uphill
    with pytest.raises(SpentError):
        function(function.first)
    function.go_to_best()
    assert float(model.compute_residual_loss(points)) == pytest.approx(first)


# TensorFlow Probability 0.25 triggers warnings while it is imported.
@pytest.mark.filterwarnings("ignore:distutils Version classes:DeprecationWarning")
@pytest.mark.parametrize("name", pinn.RIVALS)
def test_rival_lowers_the_loss_within_its_budget(name):
    if not importlib.util.find_spec(pinn.RIVALS[name]):
        pytest.skip(f"{pinn.RIVALS[name]} is not installed")
    _, _, function = make_function()
    first, _ = function(function.first)
    search(name, function)
    assert function.evaluations <= function.budget
    function.go_to_best()
    assert function._best[0] < first


def test_contender_says_what_it_does():
    assert Contender("Adam", "LBFGS", 0.1).name == "Adam, then LBFGS at 10%"
    assert Contender("Adam", "LBFGS").name == "Adam, then LBFGS on a plateau"
    assert Contender("", "LBFGS").name == "LBFGS"
