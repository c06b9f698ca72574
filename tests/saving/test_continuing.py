"""Whatever way a run is saved, it continues as if it had never been saved.

A table: each of `CASES`, in each of `WAYS`, saved before, at and after a switch.
"""

import pytest

from tests.helpers.oracle import assert_same
from tests.helpers.saving import (
    BOUNDARY,
    CASES,
    adam_sgd,
    make_model,
    make_runs,
    saves,
    state_of,
    train,
)
from tests.helpers.saving_ways import WAYS, load_weights_h5

# The others make use of these.
COMMON = ["keras", "weights_h5", "checkpoint", "checkpoint_deferred"]
LESS_COMMON = [way for way in WAYS if way not in COMMON]
FEW_CASES = [
    *saves(["adam_sgd", "ended"]),
    ("returning", BOUNDARY + 2),
    ("ended_before_integer", BOUNDARY),
]
# One loads after `build`, one before.
EDITED = ["weights_h5", "checkpoint_deferred"]


def _save(model, folder):
    for save in {way.save for way in WAYS.values()}:
        save(model, folder)


@pytest.fixture(scope="module")
def run_of(tmp_path_factory):
    return make_runs(tmp_path_factory, _save)


@pytest.mark.parametrize("way", COMMON)
@pytest.mark.parametrize(("name", "calls"), saves(CASES))
def test_continues_as_if_never_saved(run_of, name, calls, way):
    run = run_of(name)
    run.assert_continues(WAYS[way].load(run.folder(calls), run.case.make), calls)


@pytest.mark.parametrize("way", LESS_COMMON)
@pytest.mark.parametrize(("name", "calls"), FEW_CASES)
def test_continues_after_less_common_ways(run_of, name, calls, way):
    run = run_of(name)
    run.assert_continues(WAYS[way].load(run.folder(calls), run.case.make), calls)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "calls"), [*saves(["ended"]), ("ended_before_integer", BOUNDARY)]
)
def test_ended_phase_stays_ended(run_of, name, calls, way):
    run = run_of(name)
    model = WAYS[way].load(run.folder(calls), run.case.make)
    assert int(model.optimizer.phase) == int(calls >= run.case.advance_after)


def test_saving_changes_nothing(run_of):
    run = run_of("accumulation")
    without_saving = train(make_model(run.case.make()), 0, run.case.calls)
    assert_same(without_saving, run.states[1:])


def test_copies_share_no_state(run_of):
    run = run_of("adam_sgd")
    for way in ("deepcopy", "clone_model"):
        model = load_weights_h5(run.folder(2), run.case.make)
        (run.folder(2) / way).mkdir(exist_ok=True)
        _save(model, run.folder(2) / way)
        copied = WAYS[way].load(run.folder(2) / way, run.case.make)
        train(copied, 2, 5)
        assert_same(state_of(model), run.states[2])


# --- edited integers -------------------------------------------------------------


@pytest.mark.parametrize("way", EDITED)
@pytest.mark.parametrize(
    ("new_boundary", "calls"), [(5, 2), (5, 3), (5, 4), (2, 3), (1, 2)]
)
def test_obeys_the_integers_of_the_code(run_of, new_boundary, calls, way):
    folder = run_of("adam_sgd").folder(calls)
    model = WAYS[way].load(folder, lambda: adam_sgd([new_boundary]))
    for t in range(calls, 6):
        active = int(t >= new_boundary)
        assert int(model.optimizer.phase) == active
        before = [int(child.iterations) for child in model.optimizer.children]
        train(model, t, t + 1)
        after = [int(child.iterations) for child in model.optimizer.children]
        assert after[active] == before[active] + 1
        assert after[1 - active] == before[1 - active]


# The file is of update 2, the integers of the file and of the code differ.
@pytest.mark.parametrize("way", EDITED)
@pytest.mark.parametrize(("edited", "as_if"), [(5, 5), (1, 2)], ids=["later", "past"])
def test_edited_integer_is_as_if_always_there(run_of, edited, as_if, way):
    expected = train(make_model(adam_sgd([as_if])), 0, 6)
    model = WAYS[way].load(run_of("adam_sgd").folder(2), lambda: adam_sgd([edited]))
    assert_same(train(model, 2, 6), expected[2:])


@pytest.mark.parametrize("way", EDITED)
@pytest.mark.parametrize("boundary", [None, 5, 1000])
def test_ended_phase_stays_ended_under_other_boundaries(run_of, boundary, way):
    run = run_of("ended")
    model = WAYS[way].load(run.folder(3), lambda: adam_sgd([boundary]))
    run.assert_continues(model, 3)
