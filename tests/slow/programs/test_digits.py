"""The main job, `python -m benchmarks.digits`, shows what it says, or fails."""

import contextlib
import io
import os
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks import digits
from benchmarks.workloads.handwritten_digits import TEST_IMAGES, Digits


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Where the quick run draws."""
    return tmp_path_factory.mktemp("digits") / "results" / "digits.png"


@pytest.fixture(scope="module")
def quick_run(picture):
    """Exit code and output of the command with `--quick`."""
    # As in a new process, where the names of the children are not numbered.
    keras.utils.clear_session(free_memory=False)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = digits.main(["--quick", "--picture", str(picture)])
    return code, output.getvalue()


class FakeRun:
    """A resumed run that arrives where `state` says."""

    def __init__(self, state, positions=((30, 0), (60, 1))):
        self.state = lambda: state
        self.position = iter(positions).__next__
        self.updates = 0

    def train_step(self, images, labels):
        self.updates += 1
        return 0.0


STATE = [np.float32([[1, 2], [3, 4]]), np.int32(60)]
ONE_BIT_OFF = [np.nextafter(STATE[0], np.float32(9)), STATE[1]]


def check_resume(run):
    data = Digits.load(seed=0, steps=digits.QUICK.steps)
    digits.check_resume(".keras", run, data, digits.QUICK, STATE)


def test_quick_run_succeeds_and_shows_the_switch(quick_run):
    code, output = quick_run
    assert code == 0
    # The oldest supported Keras calls it SGD.
    assert len(re.findall(r"(?m)^iteration 40: adam -> (sgd|SGD)$", output)) == 1


def test_quick_run_resumes_identically_in_both_ways(quick_run):
    _, output = quick_run
    way = "iteration 30 to 60, phase 0 to 1: identical"
    assert re.search(rf"(?m)^\.keras +{way}$", output)
    assert re.search(rf"(?m)^SavedModel +{way}$", output)


def test_quick_run_traces_the_train_step_once(quick_run):
    assert "train step: traced 1x, 1 conditional in its XLA graph" in quick_run[1]


def test_quick_run_draws_its_loss(quick_run, picture):
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in quick_run[1]


def test_quick_run_prints_every_row_of_the_table(quick_run):
    value = r"[\d.]+ \+- [\d.]+"
    ratio = r"[\d.]+ \([\d.]+ to [\d.]+\)"
    for name, steps in {
        "Adam alone": f"{ratio} +-",
        "SGD alone": f"- +{ratio}",
        "Adam -> SGD": f"{ratio} +{ratio}",
    }.items():
        row = rf"(?m)^{name} +{value} +{value} +{steps}$"
        assert len(re.findall(row, quick_run[1])) == 1, name


def test_count_different_sees_one_bit():
    assert digits.count_different(STATE, STATE) == 0
    assert digits.count_different([tf.constant(STATE[0]), STATE[1]], STATE) == 0
    assert digits.count_different(ONE_BIT_OFF, STATE) == 1
    assert digits.count_different([-np.zeros(2)], [np.zeros(2)]) == 1


def test_count_different_sees_shape_type_and_number():
    assert digits.count_different([STATE[0].ravel(), STATE[1]], STATE) == 1
    assert digits.count_different([STATE[0], np.uint32(60)], STATE) == 1
    assert digits.count_different(STATE[:1], STATE) == 1
    assert digits.count_different(STATE, STATE[:1]) == 1


def test_resumed_run_makes_the_missing_updates(capsys):
    run = FakeRun(STATE)
    check_resume(run)
    assert run.updates == 30
    assert "identical" in capsys.readouterr().out


def test_resume_fails_if_one_bit_is_different(capsys):
    with pytest.raises(digits.CheckError, match="1 of 2 variables differ"):
        check_resume(FakeRun(ONE_BIT_OFF))
    assert "DIFFERENT" in capsys.readouterr().out


def test_resume_fails_unless_it_goes_through_the_switch():
    with pytest.raises(digits.CheckError, match="through the switch"):
        check_resume(FakeRun(STATE, [(50, 1), (60, 1)]))


def test_command_fails_if_a_check_fails(monkeypatch, capsys):
    monkeypatch.setattr(
        digits, "run_all", lambda settings, picture: check_resume(FakeRun(ONE_BIT_OFF))
    )
    assert digits.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("FAILED: the run resumed from .keras is not identical")


def test_loaded_run_with_a_changed_weight_is_different():
    """With the real trainer, so that its `state` is known to hold the weights."""
    trainer = digits.Contestant("", digits.make_adam()).trainer
    before = trainer.state()
    kernel = trainer.model.trainable_variables[0]
    kernel.assign(np.nextafter(kernel.numpy(), np.float32(9)))
    assert digits.count_different(trainer.state(), before) == 1
    trainer.optimizer.variables[-1].assign_add(trainer.optimizer.variables[-1] + 1)
    assert digits.count_different(trainer.state(), before) == 2


@pytest.mark.parametrize("off", [1e-3, np.nan])
def test_timing_fails_if_a_program_made_other_updates(off):
    results = {("plain", 0): np.ones(3), ("Adam -> SGD", 0): np.ones(3)}
    digits.check_same_updates(results)
    results["Adam -> SGD", 0] = results["Adam -> SGD", 0] + off
    with pytest.raises(digits.CheckError, match="Adam -> SGD in phase 0"):
        digits.check_same_updates(results)


def test_batches_depend_on_the_seed_and_the_update_only():
    one, two = (Digits.load(seed=3, steps=5) for _ in range(2))
    for a, b in zip(one.batch(4), two.batch(4), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one.order, Digits.load(seed=4, steps=5).order)


def test_split_has_every_image_once():
    data = Digits.load(seed=0, steps=1)
    assert len(data.test[0]) == TEST_IMAGES
    both = np.concatenate([data.train[0], data.test[0]]).reshape(-1, 64)
    assert len(np.unique(both, axis=0)) == len(both) == 1797
    assert both.min() == 0
    assert both.max() == 1


def test_info_lines_stay_off_the_terminal(capfd):
    with digits.without_info_logs():
        # As C++ code does, past `sys.stderr`.
        os.write(2, b"I0000 00:00:1.5 1 port.cc:153] oneDNN\n")
        os.write(2, b"E0000 00:00:1.5 1 port.cc:153] broken\n")
        os.write(2, b"2026-01-01 00:00:00.5: I port.cc:153] oneDNN\n")
    os.write(2, b"after\n")
    shown = capfd.readouterr().err
    assert shown == "E0000 00:00:1.5 1 port.cc:153] broken\nafter\n"
