"""Threads and forked processes: optimizers share nothing but the code."""

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import pytest

from sequential_optimizer import SequentialOptimizer
from tests.helpers.oracle import assert_same
from tests.helpers.saving import make_data, make_model, state_of

BATCHES = 12
# A test that waits for a thread that never comes should fail, not hang.
PATIENCE = 120


def compile_model(seed, jit_compile):
    """Returns a compiled model; the seed decides where its optimizer switches."""
    optimizer = SequentialOptimizer(
        [
            keras.optimizers.Adam(0.01 * (seed + 1), name="adam"),
            keras.optimizers.SGD(0.02, momentum=0.9, name="sgd"),
        ],
        [5 + 2 * seed],
        name=f"sequence_{seed}",
    )
    return make_model(optimizer, jit_compile=jit_compile)


def fit(model, epochs=2, before=None):
    """Trains over the switch; returns the state at the end."""
    if before is not None:
        before()
    x, y = make_data(BATCHES)
    x, y = (array.reshape(-1, array.shape[-1]) for array in (x, y))
    model.fit(
        x, y, batch_size=len(x) // BATCHES, epochs=epochs, shuffle=False, verbose=0
    )
    return state_of(model)


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_two_models_train_in_two_threads_as_alone(jit_compile):
    alone = [fit(compile_model(seed, jit_compile)) for seed in range(2)]
    models = [compile_model(seed, jit_compile) for seed in range(2)]
    # Both trace their train step at the same time.
    start = threading.Barrier(2, timeout=PATIENCE)
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(fit, model, before=start.wait) for model in models]
        together = [run.result(timeout=PATIENCE) for run in runs]
    assert_same(together, alone)
    for seed, model in enumerate(models):
        assert int(model.optimizer.phase) == 1
        counts = [int(child.iterations) for child in model.optimizer.children]
        assert counts == [5 + 2 * seed, 2 * BATCHES - 5 - 2 * seed]


def test_model_is_evaluated_while_another_trains():
    expected = fit(compile_model(0, False))
    evaluated, trained = compile_model(1, False), compile_model(0, False)
    fit(evaluated)
    before = state_of(evaluated)
    x, y = (array[0] for array in make_data())
    loss = evaluated.evaluate(x, y, verbose=0)
    with ThreadPoolExecutor(1) as threads:
        run = threads.submit(fit, trained)
        losses = [evaluated.evaluate(x, y, verbose=0)]
        while not run.done():
            losses.append(evaluated.evaluate(x, y, verbose=0))
        after_training = run.result(timeout=PATIENCE)
    assert set(losses) == {loss}
    assert_same(state_of(evaluated), before)
    assert_same(after_training, expected)


def test_another_thread_ends_the_phase():
    optimizer = SequentialOptimizer(
        [keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.02)], [None]
    )
    model = make_model(optimizer)
    x, y = (array[0] for array in make_data())
    model.train_on_batch(x, y)
    ended = threading.Event()

    def end_phase():
        optimizer.advance()
        ended.set()

    thread = threading.Thread(target=end_phase)
    updates = 1
    thread.start()
    while not ended.is_set():
        model.train_on_batch(x, y)
        updates += 1
    thread.join(PATIENCE)
    model.train_on_batch(x, y)
    updates += 1
    assert int(optimizer.phase) == 1
    assert int(optimizer.iterations) == updates
    first, second = (int(child.iterations) for child in optimizer.children)
    assert first + second == updates
    assert second >= 1


# --- fork ----------------------------------------------------------------------


class ForkedLoader(keras.utils.PyDataset):
    """Batches that are loaded in processes that Keras forks from this one."""

    def __init__(self):
        super().__init__(workers=2, use_multiprocessing=True)
        self._trainer = os.getpid()
        self.loaded_elsewhere = multiprocessing.Value("i", 0)

    def __len__(self):
        return BATCHES

    def __getitem__(self, i):
        if os.getpid() != self._trainer:
            with self.loaded_elsewhere.get_lock():
                self.loaded_elsewhere.value += 1
        x, y = make_data(BATCHES)
        return x[i], y[i]


@pytest.mark.skipif(
    multiprocessing.get_start_method(allow_none=False) != "fork", reason="needs fork"
)
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
# JAX, if a test of the rivals has imported it in this process.
@pytest.mark.filterwarnings("ignore:os.fork.. was called:RuntimeWarning")
def test_data_from_forked_processes():
    expected = fit(compile_model(0, False))
    model = compile_model(0, False)
    # The loader of the second call is forked when everything is traced and running.
    for _ in range(2):
        loader = ForkedLoader()
        model.fit(loader, shuffle=False, verbose=0)
        # Keras takes a look at the first ones itself.
        assert loader.loaded_elsewhere.value >= BATCHES - 2
    assert_same(state_of(model), expected)
