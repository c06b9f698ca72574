"""The oracle: plain optimizers, called by hand, switched with a Python `if`.

Nothing in here knows SequentialOptimizer. A test runs the same gradients through
`run_plain` and through `run`, and compares what the two left behind.
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf


def compiled(function: Callable, mode: str) -> Callable:
    """Returns `function` as eager code, as a graph or compiled by XLA."""
    if mode == "eager":
        return function
    return tf.function(function, autograph=False, jit_compile=mode == "xla")


def weights_of(variables: Sequence[Any]) -> list[np.ndarray]:
    return [np.array(v.numpy()) for v in variables]


def as_they_are(*gradients: Any) -> tuple[Any, ...]:
    return gradients


def run(
    optimizer: Any,
    variables: Sequence[Any],
    batches: Sequence[Sequence[Any]],
    mode: str,
    gradients: Callable = as_they_are,
) -> list[list[np.ndarray]]:
    """Applies `gradients(*batch)` of each batch; returns the weights after each."""
    optimizer.build(variables)
    step = _step(optimizer, variables, mode, gradients)
    history = []
    for batch in batches:
        step(*batch)
        history.append(weights_of(variables))
    if mode != "eager":
        assert step.experimental_get_tracing_count() == 1
    return history


def run_plain(
    optimizers: Sequence[Any],
    boundaries: Sequence[int],
    variables: Sequence[Any],
    batches: Sequence[Sequence[Any]],
    mode: str,
    gradients: Callable = as_they_are,
) -> list[list[np.ndarray]]:
    """Does what `run` does, with one plain optimizer per phase.

    Each optimizer is built when its phase starts, on the weights of that moment, as if
    a user created it then.
    """
    steps: dict[int, Callable] = {}
    history = []
    for t, batch in enumerate(batches):
        optimizer = optimizers[sum(boundary <= t for boundary in boundaries)]
        if id(optimizer) not in steps:
            optimizer.build(variables)
            steps[id(optimizer)] = _step(optimizer, variables, mode, gradients)
        steps[id(optimizer)](*batch)
        history.append(weights_of(variables))
    return history


def _step(
    optimizer: Any, variables: Sequence[Any], mode: str, gradients: Callable
) -> Callable:
    def step(*batch: Any) -> None:
        optimizer.apply(list(gradients(*batch)), list(variables))

    return compiled(step, mode)


def make_variables(shapes=((3, 2), (2,)), dtype="float32", **kwargs):
    """Returns Keras variables with the same random values at every call."""
    rng = np.random.default_rng(1)
    return [
        keras.Variable(rng.normal(size=shape), dtype=dtype, name=f"w{i}", **kwargs)
        for i, shape in enumerate(shapes)
    ]


def make_gradients(variables, steps, seed=2):
    """Returns for each step a list of gradients, one tensor per variable."""
    rng = np.random.default_rng(seed)
    return [
        [tf.constant(rng.normal(size=v.shape), v.dtype) for v in variables]
        for _ in range(steps)
    ]


def assert_same(actual, expected, atol=0.0):
    """Asserts that nested lists of arrays are equal, bitwise unless `atol` is set."""
    assert len(actual) == len(expected)
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if isinstance(a, list):
            assert_same(a, b, atol)
        elif atol:
            # float64, because NumPy cannot compare bfloat16 with a tolerance.
            np.testing.assert_allclose(
                a.astype(np.float64),
                b.astype(np.float64),
                rtol=0,
                atol=atol,
                err_msg=f"at {index}",
            )
        else:
            np.testing.assert_array_equal(a, b, err_msg=f"at {index}")
