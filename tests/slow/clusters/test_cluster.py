"""In clusters of processes, every worker equals plain optimizers bit for bit."""

import numpy as np
import pytest
import tensorflow as tf

from tests.slow import full_batch
from tests.slow.clusters import cases, parameter_server_cases
from tests.slow.clusters.cases import CASES, ENDED, UPDATES, WORKERS
from tests.slow.clusters.parameter_server_cases import (
    BOUNDARY,
    IN_STEP,
    MANY,
    SAVED_AFTER,
)
from tests.slow.clusters.processes import run_coordinator, run_workers


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """What each worker of a MultiWorkerMirroredStrategy left behind of every case."""
    folder = tmp_path_factory.mktemp("workers")
    return run_workers(cases.work, folder, WORKERS)


@pytest.fixture(scope="module")
def chief(tmp_path_factory):
    """What the coordinator of a ParameterServerStrategy left behind of every case."""
    return run_coordinator(
        parameter_server_cases.coordinate,
        parameter_server_cases.serve,
        tmp_path_factory.mktemp("servers"),
        worker=parameter_server_cases.WORKERS,
        ps=1,
    )


def arrays_of(results, name):
    """Returns the arrays under a name; fails with the error if there was one."""
    prefix = f"{name}/"
    arrays = {
        key.removeprefix(prefix): array
        for key, array in results.items()
        if key.startswith(prefix)
    }
    assert arrays, name
    if "error" in arrays:
        pytest.fail(str(arrays["error"]), pytrace=False)
    return arrays


def assert_equals_plain(results, name):
    """Asserts that a sequence left behind what plain optimizers did, in one trace.

    That is each weight and how many updates each optimizer has made, after every
    update, and all optimizer variables at the end.
    """
    ours = arrays_of(results, f"{name}/sequence")
    expected = arrays_of(results, f"{name}/plain")
    np.testing.assert_array_equal(ours.pop("traces"), [1])
    np.testing.assert_array_equal(ours.pop("iterations"), range(1, UPDATES + 1))
    assert {"table", "kernel", "unused", "made by adam"} < expected.keys()
    for key in expected.keys() - {"traces"}:
        np.testing.assert_array_equal(ours[key], expected[key], err_msg=key)


# --- MultiWorkerMirroredStrategy -------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_workers_equal_plain_optimizers(workers, name):
    for results in workers:
        assert_equals_plain(results, name)


@pytest.mark.parametrize("name", ENDED)
def test_phase_ended_by_any_worker_ends_on_all(workers, name):
    for results in workers:
        assert_equals_plain(results, name)


@pytest.mark.parametrize("name", [*CASES, *ENDED])
def test_workers_agree(workers, name):
    first, second = (arrays_of(results, f"{name}/sequence") for results in workers)
    assert first.keys() == second.keys()
    for key, array in first.items():
        np.testing.assert_array_equal(array, second[key], err_msg=key)


def test_oracle_sees_the_batches_of_all_workers(workers):
    # Were the gradients not added up, the workers' weights would drift apart.
    first, second = (arrays_of(results, "adam, sgd/plain") for results in workers)
    np.testing.assert_array_equal(first["table"], second["table"])
    assert all(len(set(first["table"][:, row, 0])) > 1 for row in range(5))


@pytest.mark.parametrize("name", full_batch.MAKE)
def test_search_on_workers_equals_that_on_one_device(workers, name):
    expected = full_batch.train(tf.distribute.get_strategy(), name)
    first, second = (arrays_of(results, f"full batch, {name}") for results in workers)
    assert len(first) == len(expected)
    for index, (values,) in enumerate(expected):
        found = first[f"{index}"]
        np.testing.assert_allclose(found, values, rtol=0, atol=full_batch.ATOL)
        np.testing.assert_array_equal(found, second[f"{index}"])


def error_of(results, name):
    return str(results.get(f"{name}/error", "none"))


def test_advance_in_a_conditional_of_a_replica_is_refused(workers):
    for results in workers:
        error = error_of(results, "advance in a conditional")
        assert error.startswith("RuntimeError: The replicas of a `tf.distribute`")
        assert "Put the condition or the loop around `strategy.run(...)`" in error


def test_workers_refuse_gradient_accumulation(workers):
    for results in workers:
        error = error_of(results, "accumulation")
        assert error.startswith("ValueError: `gradient_accumulation_steps` must be")


def test_fit_with_plain_adam_fails_on_workers(workers):
    # https://github.com/keras-team/keras/issues/20585. When this fails, a new Keras
    # can do it: then promise it, and test it.
    for results in workers:
        error = error_of(results, "fit with plain Adam")
        assert error.startswith("ValueError: Attempt to convert a value (PerReplica:")


# --- ParameterServerStrategy -----------------------------------------------------


@pytest.mark.parametrize("name", IN_STEP)
def test_workers_in_step_equal_plain_optimizers(chief, name):
    assert_equals_plain(chief, name)


def test_asynchronous_workers_lose_no_count_of_the_parent(chief):
    arrays = arrays_of(chief, "asynchronous")
    assert arrays["iterations"] == MANY
    assert arrays["ended/iterations"] == 2 * UPDATES


def test_asynchronous_workers_switch(chief):
    arrays = arrays_of(chief, "asynchronous")
    assert arrays["phase"] == 1
    assert np.isfinite(arrays["kernel"]).all()
    # Keras' own counting, in the children, reads and then writes: two workers that
    # do so at once count one update.
    first, second = arrays["made"]
    assert 0 < first <= BOUNDARY + parameter_server_cases.WORKERS
    assert 0 < second <= MANY - BOUNDARY
    before, after = arrays["ended/before"], arrays["ended/after"]
    assert before[1] == 0
    assert after[0] == before[0]
    assert after[1] > 0


@pytest.mark.parametrize("calls", SAVED_AFTER)
def test_coordinator_continues_from_its_checkpoint(chief, calls):
    expected = arrays_of(chief, "saved/uninterrupted")
    resumed = arrays_of(chief, f"saved/resumed after {calls}")
    assert resumed.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(resumed[key], array, err_msg=key)


def test_coordinator_refuses_gradient_accumulation(chief):
    error = error_of(chief, "accumulation")
    assert error.startswith("ValueError: `gradient_accumulation_steps` must be")


def test_coordinator_refuses_a_search(chief):
    error = error_of(chief, "full batch")
    assert error.startswith("ValueError: `LBFGS` needs the gradient of all data")


def test_fit_with_plain_adam_fails_on_parameter_servers(chief):
    # When this fails, a new Keras can do it: then promise it, and test it.
    error = error_of(chief, "fit with plain Adam")
    assert error.startswith("ValueError: To use this dataset, you need to pass")
