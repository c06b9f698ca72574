"""Every Python example in the README and in a docstring runs."""

import doctest
import re
from pathlib import Path

import keras
import matplotlib as mpl
import numpy as np
import pytest
import tensorflow as tf

import sequential_optimizer
from sequential_optimizer import SequentialOptimizer

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the examples take for granted: a model and data."""
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 3)).astype(np.float32)
    y = x.sum(axis=1, keepdims=True)
    return {
        "SequentialOptimizer": SequentialOptimizer,
        "batches": [(x, y)] * 3,
        "loss_fn": keras.losses.MeanSquaredError(),
        "model": keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)]),
        "tf": tf,
        "x": x,
        "y": y,
    }


@pytest.mark.slow
def test_examples_of_the_readme(names):
    blocks = re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    for i, block in enumerate(blocks):
        path = Path(f"block_{i}.py")  # AutoGraph reads it there.
        path.write_text(block)
        exec(compile(block, path, "exec"), names)
    assert {0, 1} == set(names["history"].history["phase"])
    assert int(names["model"].optimizer.phase) == 1
    assert int(names["model"].optimizer.iterations) == 30
    assert list(names["u"].optimizer.phase_starts) == [0, 500]
    # u'' + 4 u' + 400 u = 0 is solved: u swings, and its swing has become smaller.
    t = np.linspace(0, 1, 101)
    exact = np.exp(-2 * t) * (
        np.cos(396**0.5 * t) + 2 * np.sin(396**0.5 * t) / 396**0.5
    )
    np.testing.assert_allclose(names["u"](t[:, None])[:, 0], exact, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "LBFGS",
        "PhaseLogger",
        "SSBroyden",
        "SequentialOptimizer",
        "SwitchOnPlateau",
        "plot_history",
    ],
)
def test_example_of_the_docstring(name):
    mpl.use("agg")
    public = getattr(sequential_optimizer, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(public, name)
    results = doctest.DocTestRunner().run(test)
    assert results.attempted > 0
    assert results.failed == 0


def test_boundary_table_of_the_readme():
    rows = re.findall(
        r"^\| (`optimizer.phase`[^|]*|child that .*?)\s*\|(.*)\|$", README, re.M
    )
    phases, children = ([cell.strip() for cell in row.split("|")] for _, row in rows)
    optimizer = SequentialOptimizer(["adam", "sgd"], [3])
    weight = tf.Variable(1.0)
    for phase, child in zip(phases, children, strict=True):
        assert str(int(optimizer.phase)) == phase
        # The oldest supported Keras calls it SGD.
        assert optimizer.active_child().name.lower() == child
        optimizer.apply([tf.constant(1.0)], [weight])


def test_guarantees_name_tests_that_exist():
    folder = Path(__file__).parents[1]
    tests = "\n".join(path.read_text() for path in folder.rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (folder / "README.md").read_text())
    assert named
    assert [name for name in named if f"def {name}(" not in tests] == []
