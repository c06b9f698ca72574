"""The question `does_it_help`: fair to all contenders, honest about its findings."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import stats

from benchmarks.harness import report
from benchmarks.harness.checks import CheckError
from benchmarks.questions import does_it_help
from benchmarks.workloads import learning_tasks

TINY = does_it_help.Settings(
    teacher_epochs=2, rates=(3e-3, 3e-2), tuning_seeds=1, seeds=2, patience=1
)


def small_task(epochs=2):
    """The teacher's task with little data: its steps compile in no time."""
    task = learning_tasks.teacher_task(epochs)

    def load(seed):
        split = task.load(seed)
        return dataclasses.replace(
            split, train=tuple(array[:320] for array in split.train)
        )

    return dataclasses.replace(task, load=load)


@pytest.fixture(scope="module")
def contenders():
    task = small_task()
    return {
        name: does_it_help.Contender(name, task, updates=20, patience=1)
        for name in does_it_help.CONTENDERS
    }


# --- data --------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["digits_task", "teacher_task"])
def test_data_of_a_seed_are_apart_and_the_same_again(make):
    task = getattr(learning_tasks, make)(epochs=1)
    split, again = task.load(3), task.load(3)
    parts = [split.train[0], split.validation[0], split.test[0]]
    for part, same in zip(
        parts, (again.train[0], again.validation[0], again.test[0]), strict=True
    ):
        np.testing.assert_array_equal(part, same)
    rows = np.concatenate([part.reshape(len(part), -1) for part in parts])
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert not np.array_equal(parts[0], task.load(4).train[0])


def test_student_can_be_the_teacher():
    task = learning_tasks.teacher_task(epochs=1)
    model = task.make_model()
    model.set_weights([np.eye(learning_tasks.NEURONS)])
    x, y = task.load(0).test
    outputs = model(x).numpy()
    np.testing.assert_allclose(outputs, y, rtol=1e-5)
    assert task.judge(outputs, y) < 1e-6


def test_run_that_diverged_is_judged_as_the_mean():
    task = learning_tasks.teacher_task(epochs=1)
    _, y = task.load(0).test
    assert task.judge(np.full_like(y, y.mean()), y) == pytest.approx(100)
    for bad in (np.nan, np.inf, 1e30):
        assert task.judge(np.full_like(y, bad), y) == 100


# --- runs --------------------------------------------------------------------------


def test_all_contenders_start_from_the_same_weights(contenders):
    weights = []
    for contender in contenders.values():
        contender.restart(5, (1e-3,) * len(contender.children))
        weights.append(contender.model.get_weights())
    for others in weights[1:]:
        for a, b in zip(weights[0], others, strict=True):
            np.testing.assert_array_equal(a, b)


def test_run_is_the_same_again_with_the_same_seed_and_rates(contenders):
    contender = contenders[does_it_help.HALFWAY]
    runs = [contender.train(5, (3e-3, 1e-2)) for _ in range(2)]
    assert runs[0] == runs[1]
    assert contender.train(6, (3e-3, 1e-2)) != runs[0]
    assert contender.train(5, (3e-3, 3e-2)) != runs[0]


def test_sequence_switches_halfway(contenders):
    run = contenders[does_it_help.HALFWAY].train(0, (3e-3, 1e-2))
    assert run["updates_by_child"] == [10, 10]


def test_plateau_switches_when_nothing_improves(contenders):
    # So small a rate that no epoch is better by 1% of the first loss; the first counts
    # as better than none.
    contender = contenders[does_it_help.PLATEAU]
    contender.task = small_task(epochs=4)
    run = contender.train(0, (1e-9, 1e-2))
    assert run["updates_by_child"] == [20, 20]


def test_lowered_rate_is_a_tenth_from_halfway_on(contenders):
    contender = contenders[does_it_help.LOWERED]
    contender.train(0, (1e-2,))
    assert float(contender.optimizer.learning_rate) == pytest.approx(1e-3)
    assert contender.train(0, (1e-2,))["updates_by_child"] == [20]


def test_rule_of_thumb_continues_with_steps_of_the_same_length():
    adam = keras.optimizers.Adam(1e-2)
    weight = keras.Variable(np.zeros(3, "float32"))
    gradient = np.float32([0.5, -2.0, 8.0])
    for _ in range(3):
        adam.apply([tf.constant(gradient)], [weight])
    # A gradient that does not change: each weight moves by the learning rate, and the
    # first moment is 1 - 0.9^3 of it.
    expected = 0.1 * 1e-2 * 3**0.5 / ((1 - 0.9**3) * np.linalg.norm(gradient))
    assert does_it_help.rate_by_rule(adam, 0.9) == pytest.approx(expected, rel=1e-4)


def test_run_by_rule_of_thumb_says_its_rate(contenders):
    contender = contenders[does_it_help.RULE]
    run = contender.train(0, (3e-3,))
    assert run["updates_by_child"] == [10, 10]
    assert float(contender.children[1].learning_rate) == pytest.approx(
        run["rate_by_rule"]
    )
    assert run["rate_by_rule"] > 0


def test_sequence_that_does_something_else_is_refused(contenders, monkeypatch):
    task = small_task()
    does_it_help.check(list(contenders.values()), task)
    plateau = contenders[does_it_help.PLATEAU]
    monkeypatch.setattr(type(plateau.optimizer), "advance", lambda self: None)
    with pytest.raises(CheckError, match="sequence"):
        does_it_help.check(list(contenders.values()), task)


# --- what is made of them ------------------------------------------------------------


def test_mean_and_interval_are_those_of_student():
    found = does_it_help.mean_and_interval([1.0, 2.0, 4.0])
    # The quantile of 2 degrees of freedom, from a table.
    assert found["mean"] == pytest.approx(7 / 3)
    assert found["half_width"] == pytest.approx(4.303 * 1.5275 / 3**0.5, rel=1e-3)


def test_runs_that_diverged_are_never_the_best():
    runs = [{"validation_loss": 1.0}, {"validation_loss": np.nan}]
    assert does_it_help.mean_loss(runs) == np.inf


@pytest.mark.parametrize(
    ("mean", "says"), [(-2.0, "better"), (2.0, "worse"), (0.5, "neither")]
)
def test_difference_whose_interval_contains_zero_is_none(mean, says):
    assert does_it_help.verdict({"mean": mean, "half_width": 1.0}) == says


def test_differences_are_taken_seed_by_seed():
    values = {"Adam": [1.0, 5.0], "SGD": [0.0, 0.0]}
    values |= {name: [2.0, 6.0] for name in does_it_help.CONTENDERS[2:]}
    rows = [
        {"task": "t", "metric": "m", "contender": name, "values": v}
        for name, v in values.items()
    ]
    halfway_and_adam = does_it_help.compare(rows)[0]
    # Far apart from seed to seed, but the difference is the same.
    assert halfway_and_adam["mean"] == 1
    assert halfway_and_adam["half_width"] == 0


def test_quick_run_tunes_and_tests_on_different_seeds(monkeypatch, tmp_path, capsys):
    seeds = {name: [] for name in does_it_help.CONTENDERS}
    train = does_it_help.Contender.train

    def noting(self, seed, rates):
        seeds[self.name].append((seed, rates))
        return train(self, seed, rates)

    monkeypatch.setattr(does_it_help.Contender, "train", noting)
    monkeypatch.setattr(does_it_help, "teacher_task", small_task)
    other = dataclasses.replace(small_task(), name="other")
    monkeypatch.setattr(does_it_help, "digits_task", lambda epochs: other)
    report.ask(does_it_help, TINY, True, tmp_path)
    result = report.read(does_it_help, tmp_path)
    assert len(result["contenders"]) == 2 * len(does_it_help.CONTENDERS)
    assert len(result["differences"]) == 2 * 7
    for row in result["contenders"]:
        runs = seeds[row["contender"]]
        tested = {seed for seed, _ in runs if seed < does_it_help.FIRST_TUNING_SEED}
        assert tested == {0, 1}
        tuned = {rates for seed, rates in runs if seed not in tested}
        assert len(tuned) == 2 ** len(row["rates"])
        assert tuple(row["rates"]) in tuned
        assert row["mean"] == pytest.approx(np.mean(row["values"]))
        quantile = stats.t.ppf(0.975, 1)
        assert row["half_width"] == pytest.approx(quantile * stats.sem(row["values"]))
    # What `python -m benchmarks.digits` showed before this question did.
    for row in result["untuned"]:
        assert tuple(row["rates"]) == does_it_help.DEFAULT_RATES[row["contender"]]
        assert len(row["values"]) == 2
        assert np.isfinite(row["loss"]["mean"])
    untuned = does_it_help.tables(result)[2]
    assert len(untuned.rows) == len(result["untuned"]) == 12
    assert [row[-2:] == ("-", "-") for row in untuned.rows] == 2 * [
        *[True] * 2,
        *[False] * 2,
        *[True] * 2,
    ]
    shown = capsys.readouterr().out
    assert "neither" in shown or "better" in shown or "worse" in shown
