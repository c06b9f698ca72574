"""Fixtures that several test files share."""

import gc
import os
import zlib
from collections import Counter
from pathlib import Path

# Less noise on the screen; must be set before TensorFlow is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest

# Keras is imported by the fixtures that need it: pytest-xdist reads this file before it
# starts its workers, which would wait for that.

MODES = ("eager", "graph", "xla")
SLOW = Path(__file__).parent / "slow"
# Of a test with parameters, in the quick tests.
COMBINATIONS = 3
# Compiling takes most of the time: the quick tests use mode "xla" in these only.
COMPILED = ("test_training.py", "test_reference.py", "test_phase_starts.py")
# Besides what is in the folder `slow`.
LONGEST = (
    "test_continuing.py",
    "test_keras.py",
    "test_known_answers.py",
    "test_parent_settings.py",
    "test_saving.py",
    "test_training.py",
)


def pytest_collection_modifyitems(items):
    """Marks as slow what is in the folder `slow`, and most of what has parameters.

    Of a test with parameters, the quick tests have at most `COMBINATIONS`, each with a
    value that those before do not have. All others are slow, and so is what XLA
    compiles elsewhere than in `COMPILED`. Tests that take seconds are marked where they
    are.
    """
    seen, combinations = set(), Counter()
    # In an order of chance, the same each time, so that values meet various others.
    for item in sorted(items, key=lambda item: zlib.crc32(item.nodeid.encode())):
        params = item.callspec.params if hasattr(item, "callspec") else {}
        values = {(item.function, name, repr(value)) for name, value in params.items()}
        mode = params.get("mode")
        is_compiled = mode == "xla" and item.path.name not in COMPILED
        is_covered = values <= seen or combinations[item.function] == COMBINATIONS
        if is_compiled or (params and is_covered) or item.path.is_relative_to(SLOW):
            item.add_marker(pytest.mark.slow)
        if not item.get_closest_marker("slow"):
            seen |= values
            combinations[item.function] += 1
    # First what takes longest, so that no worker is left with it at the end.
    items.sort(
        key=lambda item: (
            SLOW in item.path.parents,
            item.path.parent == SLOW,
            item.path.name in LONGEST,
        ),
        reverse=True,  # which leaves tests with the same key in their order
    )


@pytest.fixture(params=MODES)
def mode(request):
    """Runs a test as eager code, as a graph and compiled by XLA."""
    return request.param


@pytest.fixture
def policy(request):
    """Sets the dtype policy for a test."""
    import keras

    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


@pytest.fixture(autouse=True)
def _same_start():
    """Starts every test from the same seeds and the same automatic names."""
    import keras

    # Collecting garbage takes half a second.
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@pytest.fixture
def interrupted_fit():
    """For a test that ends `fit` in mid-epoch: frees the iterator over its data.

    In TensorFlow 2.21 this waits for a thread that sleeps for longer the older the
    iterator is: if a later test collects the garbage, for up to a minute.
    """
    yield
    gc.collect()
