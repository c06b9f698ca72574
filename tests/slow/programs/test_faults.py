"""Killed runs, once resumed, end bit for bit where they would have ended.

The benchmark `faults` does the same at random moments; benchmarks/README.md says what
was found out.
"""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks.harness.checks import CheckError
from benchmarks.questions import faults
from benchmarks.workloads import fault_worker
from benchmarks.workloads.fault_runs import (
    DAMAGES,
    KINDS,
    Moment,
    damage_newest,
    reference,
)
from sequential_optimizer import SequentialOptimizer
from tests.helpers.oracle import assert_same, weights_of


def kill(name, folder, *moments):
    """Kills a run at the moments; returns a row for each, as the benchmark does."""
    kind = KINDS[name]
    rows = faults.kill_one(
        kind,
        moments,
        np.random.default_rng(0),
        folder / "run",
        reference(kind, folder / "reference"),
    )
    assert all(row["hit"] for row in rows), rows
    assert all(row["survived"] for row in rows), rows
    return rows


def test_cluster_killed_around_the_switch_ends_as_if_not(
    tmp_path,
):
    switch, _ = KINDS["cluster"].workload.switches
    rows = kill(
        "cluster",
        tmp_path,
        Moment("update", 5, victim=1),
        Moment("update", switch, victim=0),
        Moment("update", switch + 8, victim=1),
    )
    assert [row["place"] for row in rows] == ["before", "at", "after"]
    # Saved after every third update.
    assert [row["restored"] for row in rows] == [3, 15, 24]
    assert [row["refused"] for row in rows] == [[], [], []]


def test_fit_killed_in_mid_epoch_ends_as_if_it_had_not_been(tmp_path):
    kind = KINDS["fit"]
    _, by_plateau = kind.workload.switches
    (row,) = kill("fit", tmp_path, Moment("update", by_plateau + 2))
    assert row["restored"] == by_plateau
    assert row["restored"] < row["killed_after"] < by_plateau + kind.workload.batches


def test_killed_run_with_damaged_newest_checkpoint_resumes(
    tmp_path,
):
    (row,) = kill("damaged", tmp_path, Moment("update", 12))
    assert len(row["refused"]) == 1
    assert row["refused"][0].startswith(f"ckpt-{row['restored'] + 1}: ")


# --- broken checkpoints, in this process -----------------------------------------


def make_run(folder):
    """Returns a variable, its optimizer, and the manager of their checkpoints."""
    weight = keras.Variable(np.ones((50, 50)), dtype="float32", name="weight")
    optimizer = SequentialOptimizer(fault_worker.make_children(), [2, 3])
    optimizer.build([weight])
    checkpoint = tf.train.Checkpoint(weight=weight, optimizer=optimizer)
    manager = tf.train.CheckpointManager(
        checkpoint, str(folder / "saved" / "checkpoints"), max_to_keep=3
    )
    return [weight], optimizer, manager


def train(weights, optimizer, manager):
    """Makes an update, and saves; returns the state."""
    optimizer.apply([weight * 2.0 for weight in weights], weights)
    manager.save()
    return state_of(weights, optimizer)


def state_of(weights, optimizer):
    return weights_of([*weights, *optimizer.variables])


class Notes:
    """Takes reports."""

    def __init__(self):
        self.refused = []

    def __call__(self, event, number, text):
        assert event == "refused"
        self.refused.append(text)


@pytest.mark.parametrize("damage", range(len(DAMAGES)))
def test_broken_checkpoint_is_refused_the_one_before_loads(tmp_path, damage):
    run = make_run(tmp_path)
    states = [train(*run) for _ in range(4)]
    name = damage_newest(tmp_path, DAMAGES[damage], np.random.default_rng(damage))
    assert name == "ckpt-4"

    weights, optimizer, manager = make_run(tmp_path)
    before = state_of(weights, optimizer)
    with pytest.raises((tf.errors.OpError, IndexError)):
        manager.restore_or_initialize()
    assert_same(state_of(weights, optimizer), before)

    notes = Notes()
    fault_worker.resume(manager, notes)
    assert [text.split(":")[0] for text in notes.refused] == ["ckpt-4"]
    assert_same(state_of(weights, optimizer), states[2])
    assert_same(train(weights, optimizer, manager), states[3])
    # What was broken has been written anew.
    weights, optimizer, manager = make_run(tmp_path)
    assert manager.restore_or_initialize().endswith("ckpt-4")
    assert_same(state_of(weights, optimizer), states[3])


def test_run_without_a_whole_checkpoint_fails(tmp_path):
    run = make_run(tmp_path)
    for _ in range(2):
        train(*run)
    for path in run[2].checkpoints:
        Path(path + ".index").unlink()
    notes = Notes()
    with pytest.raises(RuntimeError, match="is whole"):
        fault_worker.resume(make_run(tmp_path)[2], notes)
    assert len(notes.refused) == 2


def test_run_without_checkpoints_starts(tmp_path):
    weights, optimizer, manager = make_run(tmp_path)
    before = state_of(weights, optimizer)
    fault_worker.resume(manager, Notes())
    assert_same(state_of(weights, optimizer), before)


def test_broken_backup_fails_rather_than_starts_again(tmp_path):
    # Where Keras falls back on a second file, this is what it does without one.
    def fit(**kwargs):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        optimizer = SequentialOptimizer(fault_worker.make_children(), [2, 3])
        model.compile(optimizer, loss="mse", run_eagerly=True)
        backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
        x = np.ones((4, 3), "float32")
        model.fit(x, x[:, :1], verbose=0, callbacks=[backup], **kwargs)

    fit(epochs=1)
    path = tmp_path / "latest.weights.h5"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(OSError, match="Unable to synchronously open file"):
        fit(epochs=2)


# --- the benchmark -----------------------------------------------------------------


def make_row(**changes):
    row = {
        "kind": "fit",
        "killed_after": 12,
        "place": "at",
        "victim": 0,
        "restored": 8,
        "refused": [],
        "differences": [],
        "survived": True,
    }
    return {**row, **changes}


def test_benchmark_fails_if_a_run_is_not_survived():
    faults.check([make_row()])
    with pytest.raises(CheckError, match="1 of 2 kills not survived"):
        faults.check([make_row(), make_row(survived=False)])


def test_table_and_picture_come_from_the_rows():
    rows = [make_row(kind=name) for name in KINDS]
    rows.append(make_row(kind="damaged", place="after", refused=["ckpt-1: broken"]))
    result = {"kills": rows, "settings": {"seed": 3}}
    (table,) = faults.tables(result)
    count = str(len(rows))
    assert table.rows[-1] == ("all", count, count, "0", "6", "1", "1", "4, 4")
    assert "Seed 3" in table.caption
    assert faults.draw(result).axes


@pytest.mark.parametrize("name", KINDS)
def test_moments_come_from_the_seed_and_leave_some_to_train(name):
    kind = KINDS[name]

    def draw():
        life = faults.Life(save_seconds=[0.1])
        return [
            faults.draw_moments(kind, 3, np.random.default_rng(seed), life)
            for seed in range(20)
        ]

    assert draw() == draw()
    for moments in draw():
        numbers = [moment.number for moment in moments]
        assert numbers == sorted(numbers)
        assert numbers[0] > 0
        assert numbers[-1] + kind.save_every < kind.updates
        assert all(moment.victim < kind.processes for moment in moments)
