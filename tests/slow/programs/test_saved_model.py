"""A train step in a SavedModel trains on where this package is not installed."""

import functools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.oracle import assert_same, weights_of
from tests.helpers.saving import (
    BOUNDARY,
    CASES,
    FEATURES,
    ROWS,
    adam_sgd,
    gradients_of,
    make_data,
    make_model,
)

# Runs in a separate process, without this repository on its path.
SCRIPT = """
import json, sys

sys.modules["sequential_optimizer"] = None  # an import of it fails

import numpy as np
import tensorflow as tf

jobs, data = sys.argv[1:]
data = np.load(data)
x, y = data["x"], data["y"]
for job in json.load(open(jobs)):
    trainer = tf.saved_model.load(job["model"])
    arrays = {}

    def note(t):
        for i, array in enumerate(trainer.state()):
            arrays[f"{t}/{i}"] = array.numpy()
        arrays[f"phase/{t}"] = trainer.phase().numpy()

    note(job["start"])
    for t in range(job["start"], job["stop"]):
        trainer.train_step(x[t], y[t])
        if t + 1 == job["advance_after"]:
            trainer.advance()
        note(t + 1)
    np.savez(job["result"], **arrays)
"""

ROW_SPECS = [
    tf.TensorSpec((ROWS, FEATURES), tf.float32),
    tf.TensorSpec((ROWS, 1), tf.float32),
]


class Trainer(tf.Module):
    """What a user saves: the model, the optimizer and the step that joins them."""

    def __init__(self, optimizer, jit_compile):
        super().__init__()
        self.model = make_model()
        self.optimizer = optimizer
        self.optimizer.build(self.model.trainable_variables)
        self.train_step = tf.function(
            self._train_step, input_signature=ROW_SPECS, jit_compile=jit_compile
        )
        self.advance = tf.function(lambda: self.optimizer.advance(), input_signature=[])
        self.phase = tf.function(lambda: self.optimizer.phase, input_signature=[])
        self.state = tf.function(
            lambda: [tf.identity(v) for v in self._all_variables()], input_signature=[]
        )

    def _train_step(self, x, y):
        gradients = gradients_of(self.model, self.optimizer, x, y)
        self.optimizer.apply(gradients, self.model.trainable_variables)

    def _all_variables(self):
        return self.model.weights + self.optimizer.variables


# Name of the case, whether its step is compiled, the calls it is saved after. A
# SavedModel costs a second, so the later cases are saved where they differ.
RUNS = {
    "adam_sgd-graph": ("adam_sgd", False, (2, 3, 4)),
    "adam_sgd-xla": ("adam_sgd", True, (2, 3, 4)),
    "returning": ("returning", False, (3, 5)),
    "mid-window": ("accumulation", False, (5, 7)),
    "ended": ("ended", False, (2, 3)),
    "ended_before_integer": ("ended_before_integer", False, (3,)),
}


def _save_runs(folder):
    """Trains without a stop; returns the states, and saved models to continue from."""
    x, y = make_data()
    states, jobs = {}, []
    for run, (name, jit_compile, saved_after) in RUNS.items():
        case = CASES[name]
        trainer = Trainer(case.make(), jit_compile)
        states[run] = [None]
        for t in range(case.calls):
            trainer.train_step(x[t], y[t])
            if t + 1 == case.advance_after:
                trainer.advance()
            states[run].append(weights_of(trainer._all_variables()))
            if t + 1 in saved_after:
                path = folder / run / str(t + 1)
                tf.saved_model.save(trainer, str(path))
                jobs.append(
                    {
                        "model": str(path),
                        "result": str(folder / f"{run}-{t + 1}.npz"),
                        "start": t + 1,
                        "stop": case.calls,
                        "advance_after": case.advance_after,
                    }
                )
    return states, jobs


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The states of the uninterrupted runs, and a function to those of the others."""
    folder = tmp_path_factory.mktemp("saved_models")
    states, jobs = _save_runs(folder)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "script.py").write_text(SCRIPT)
    np.savez(folder / "data.npz", **dict(zip("xy", make_data(), strict=True)))
    subprocess.run(
        [sys.executable, "-I", "script.py", "jobs.json", "data.npz"],
        cwd=folder,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        check=True,
    )

    @functools.cache
    def load(run, calls):
        with np.load(folder / f"{run}-{calls}.npz") as file:
            return dict(file)

    return states, load


SAVES = [
    (run, calls) for run, (_, _, saved_after) in RUNS.items() for calls in saved_after
]


@pytest.mark.parametrize(("run", "calls"), SAVES)
def test_continues_in_a_process_without_the_package(results, run, calls):
    states, load = results
    arrays = load(run, calls)
    for t in range(calls, len(states[run])):
        expected = states[run][t]
        assert_same([arrays[f"{t}/{i}"] for i in range(len(expected))], expected)
    # One phase and one state for each call, no more.
    assert sum(key.startswith("phase/") for key in arrays) == len(states[run]) - calls


@pytest.mark.parametrize("run", ["adam_sgd-graph", "adam_sgd-xla"])
def test_switches_at_boundary_in_the_other_process(results, run):
    _, load = results
    for calls in (2, 3, 4):
        arrays = load(run, calls)
        phases = [int(arrays[f"phase/{t}"]) for t in range(calls, 7)]
        assert phases == [int(t >= BOUNDARY) for t in range(calls, 7)]


def test_phase_is_ended_and_stays_ended_in_the_other_process(results):
    _, load = results
    # Saved before: `advance()` is called over there. Saved after: it is not.
    assert [int(load("ended", 2)[f"phase/{t}"]) for t in (2, 3, 4)] == [0, 1, 1]
    for run in ("ended", "ended_before_integer"):
        assert [int(load(run, 3)[f"phase/{t}"]) for t in (3, 4, 5, 6)] == [1] * 4


def test_compiled_model_with_its_optimizer_is_saved_too(tmp_path):
    model = make_model(adam_sgd())
    x, y = make_data()

    class Compiled(tf.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        @tf.function(input_signature=ROW_SPECS)
        def train_step(self, x, y):
            gradients = gradients_of(model, model.optimizer, x, y)
            model.optimizer.apply(gradients, model.trainable_variables)
            return [tf.identity(v) for v in model.weights]

    model.optimizer.build(model.trainable_variables)
    module = Compiled()
    for t in range(2):
        module.train_step(x[t], y[t])
    tf.saved_model.save(module, str(tmp_path / "compiled"))
    loaded = tf.saved_model.load(str(tmp_path / "compiled"))
    for t in range(2, 5):
        ours = [weight.numpy() for weight in loaded.train_step(x[t], y[t])]
        theirs = [weight.numpy() for weight in module.train_step(x[t], y[t])]
        assert_same(ours, theirs)
