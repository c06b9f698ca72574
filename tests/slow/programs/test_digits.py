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
from benchmarks.workloads.handwritten_digits import TEST_IMAGES, Digits, make_model


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


def check_resumed(run):
    digits.check_resumed(".keras", run, lambda update: (update, None), 60, STATE)


def test_quick_run_succeeds_and_shows_the_switch(quick_run):
    code, output = quick_run
    assert code == 0
    # The oldest supported Keras calls it SGD.
    assert len(re.findall(r"(?m)^iteration 60: adam -> (sgd|SGD)$", output)) == 1


def test_quick_run_resumes_identically_in_both_ways(quick_run):
    _, output = quick_run
    way = "iteration 30 to 88, phase 0 to 1: identical"
    assert re.search(rf"(?m)^\.keras +{way}$", output)
    assert re.search(rf"(?m)^SavedModel +{way}$", output)


def test_quick_run_traces_the_train_step_once(quick_run):
    assert "train step: traced 1x, 1 conditional in its XLA graph" in quick_run[1]


def test_quick_run_has_a_line_per_epoch(quick_run):
    form = r"(?m)^ +(\d+) +(\d+)  (\w+) +(0\.\d+) +[\d.]+ +[\d.]+ +[\d.]+%$"
    # The oldest supported Keras calls it SGD.
    rows = re.findall(form, quick_run[1].replace("SGD ", "sgd "))
    assert rows == [("1", "44", "adam", "0.001"), ("2", "88", "sgd", "0.01")]


# A newcomer sees all of it without scrolling.
def test_output_fits_a_screen(quick_run):
    lines = quick_run[1].splitlines()
    full = len(lines) + digits.Settings.epochs - digits.QUICK.epochs
    assert 24 <= full <= 40
    # The last line holds the path of the picture.
    assert max(map(len, lines[:-1])) <= 80


def test_quick_run_draws_its_loss(quick_run, picture):
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert os.path.relpath(picture) in quick_run[1]


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
    check_resumed(run)
    assert run.updates == 30
    assert "identical" in capsys.readouterr().out


def test_resume_fails_if_one_bit_is_different(capsys):
    with pytest.raises(digits.CheckError, match="1 of 2 variables differ"):
        check_resumed(FakeRun(ONE_BIT_OFF))
    assert "DIFFERENT" in capsys.readouterr().out


def test_resume_fails_unless_it_goes_through_the_switch():
    with pytest.raises(digits.CheckError, match="through the switch"):
        check_resumed(FakeRun(STATE, [(50, 1), (60, 1)]))


def test_command_fails_if_a_check_fails(monkeypatch, capsys):
    monkeypatch.setattr(
        digits, "show", lambda settings, picture: check_resumed(FakeRun(ONE_BIT_OFF))
    )
    assert digits.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("FAILED: the run resumed from .keras is not identical")


def test_loaded_run_with_a_changed_weight_is_different():
    """With the real one, so that its `state` is known to hold the weights."""
    model = make_model()
    model.compile(optimizer=digits.make_optimizer(boundary=1))
    training = digits.Training(model)
    before = training.state()
    kernel = model.trainable_variables[0]
    kernel.assign(np.nextafter(kernel.numpy(), np.float32(9)))
    assert digits.count_different(training.state(), before) == 1
    training.optimizer.variables[-1].assign_add(training.optimizer.variables[-1] + 1)
    assert digits.count_different(training.state(), before) == 2


def test_batches_depend_on_the_seed_and_the_update_only():
    one, two = (Digits.load(seed=3) for _ in range(2))
    for a, b in zip(one.batch(4), two.batch(4), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one.order, Digits.load(seed=4).order)


def test_epochs_share_the_updates_and_repeat_no_image():
    data = Digits.load(seed=0, epochs=2)
    epochs = [data.updates_of(epoch) for epoch in range(2)]
    assert [*epochs[0], *epochs[1]] == list(range(len(data.order)))
    for updates in epochs:
        rows = data.order[updates].ravel()
        assert len(set(rows)) == len(rows)


def test_split_has_every_image_once():
    data = Digits.load(seed=0)
    assert len(data.test[0]) == TEST_IMAGES
    both = np.concatenate([data.train[0], data.test[0]]).reshape(-1, 64)
    assert len(np.unique(both, axis=0)) == len(both) == 1797
    assert both.min() == 0
    assert both.max() == 1
