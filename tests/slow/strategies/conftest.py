"""One `tf.distribute` strategy per process; tests/slow/test_strategies.py starts them.

Logical devices must be configured before TensorFlow starts, and two MirroredStrategies
of different size abort in one process. So an environment variable names the strategy,
and without it nothing is collected here.
"""

import os

import keras
import pytest
import tensorflow as tf

VARIABLE = "SEQUENTIAL_OPTIMIZER_STRATEGY"


def _make_one_device(devices):
    return tf.distribute.OneDeviceStrategy(*devices)


# The number of replicas, and how to make the strategy.
STRATEGIES = {
    "mirrored-2": (2, tf.distribute.MirroredStrategy),
    "mirrored-4": (4, tf.distribute.MirroredStrategy),
    "one-device": (1, _make_one_device),
    "central-storage": (2, tf.distribute.experimental.CentralStorageStrategy),
}
NAME = os.environ.get(VARIABLE)

# Keras 3.5 does not tell TensorFlow how its variables are aggregated, without which
# CentralStorageStrategy updates none, not even those of plain SGD (test_limits.py).
AGGREGATES = tuple(int(part) for part in keras.__version__.split(".")[:2]) > (3, 5)


# All that four replicas add to two is longer sums of gradients and more threads that
# meet. The rest is the same, and would take twice the time.
ON_FOUR = (
    "test_loop_equals_plain_optimizers_on_every_replica[graph-settings]",
    "test_loop_equals_plain_optimizers_on_every_replica[eager-settings]",
    "test_loop_equals_plain_optimizers_on_every_replica[range-settings]",
    "test_fit_equals_two_fits_with_plain_optimizers[1]",
    "test_advance_in_every_replica_ends_one_phase[eager]",
    "test_advance_on_a_reduced_loss_is_as_in_eager_python",
    "test_search_on_replicas_equals_that_on_one_device[LBFGS-graph]",
    "test_search_on_replicas_equals_that_on_one_device[SSBroyden-eager]",
    "test_search_on_replicas_equals_that_on_one_device[sequence-graph]",
    "test_fit_on_replicas_equals_that_on_one_device[sequence]",
)


def files_left_out(name):
    """Returns the files here that do not concern a strategy."""
    if name == "one-device":
        return ["test_limits.py"]
    if name == "central-storage":
        # Plain Keras has no loss scaling there (test_limits.py).
        others = [
            f"test_{x}.py" for x in ("equality", "quasi_newton", "saving", "switching")
        ]
        return ["test_loss_scale.py"] + ([] if AGGREGATES else others)
    return []


def pytest_collection_modifyitems(config, items):
    if NAME == "mirrored-4":
        config.hook.pytest_deselected(
            items=[item for item in items if item.name not in ON_FOUR]
        )
        items[:] = [item for item in items if item.name in ON_FOUR]


def _configure(name):
    """Makes one CPU device per replica, and the strategy on them."""
    replicas, make_strategy = STRATEGIES[name]
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * replicas,
    )
    return make_strategy([f"CPU:{i}" for i in range(replicas)])


if NAME is None:
    collect_ignore_glob = ["*"]
else:
    collect_ignore = files_left_out(NAME)
    _strategy = _configure(NAME)


@pytest.fixture(scope="session")
def strategy():
    """The strategy of this process."""
    return _strategy
