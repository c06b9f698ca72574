"""A full batch that is spread over devices: the search equals that on one device.

Within rounding, because the sums of the gradients are in another order.
"""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import LBFGS, SequentialOptimizer, SSBroyden
from tests.reference import assert_same
from tests.strategies.conftest import NAME
from tests.strategies.loops import build, replica_id, values_of

UPDATES = 15
ROWS = 16
ATOL = 1e-9  # of weights of about 1, in float64
FLOAT32_ATOL = 1e-5

RNG = np.random.default_rng(3)
X = RNG.normal(size=(ROWS, 3))
Y = np.sin(2 * X.sum(-1, keepdims=True))
WEIGHTS = [RNG.normal(size=shape) / 2 for shape in ((3, 4), (4, 1))]


def make_sequence():
    # Without an epsilon the scale of the loss, which `fit` of Keras 3.5 multiplies by
    # the number of replicas, does not matter.
    adam = keras.optimizers.Adam(0.05, epsilon=1e-12, name="adam")
    return SequentialOptimizer([adam, LBFGS(0.25, history_size=4)], [3])


MAKE = {
    "LBFGS": lambda: LBFGS(0.25, history_size=4),
    "SSBroyden": lambda: SSBroyden(0.25),
    "sequence": make_sequence,
}
default = tf.distribute.get_strategy()


def train(strategy, name, mode):
    """Trains on all rows in a loop; returns the values of all variables."""
    with strategy.scope():
        weights = [keras.Variable(value, dtype="float64") for value in WEIGHTS]
        optimizer = MAKE[name]()
    build(strategy, optimizer, weights)
    x, y = (
        tf.reshape(a, (strategy.num_replicas_in_sync, -1, a.shape[1])) for a in (X, Y)
    )

    @tf.autograph.experimental.do_not_convert
    def replica():
        own = replica_id()
        with tf.GradientTape() as tape:
            outputs = tf.tanh(x[own] @ weights[0].value) @ weights[1].value
            loss = tf.reduce_sum((outputs - y[own]) ** 2) / ROWS
        optimizer.apply(tape.gradient(loss, [w.value for w in weights]), weights)

    def step():
        strategy.run(replica)

    if mode == "graph":
        step = tf.function(step, autograph=False)
    for _ in range(UPDATES):
        step()
    if mode == "graph":
        assert step.experimental_get_tracing_count() == 1
    return values_of(strategy, [*weights, *optimizer.variables])


@functools.cache
def on_one_device(name):
    return train(default, name, "graph")


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize("name", MAKE)
def test_search_on_replicas_equals_that_on_one_device(strategy, name, mode):
    values = train(strategy, name, mode)
    for copies, (expected,) in zip(values, on_one_device(name), strict=True):
        assert_same(copies, [expected] * len(copies), ATOL)
        # The same update everywhere, not only nearly.
        assert_same(copies, [copies[0]] * len(copies))


def fit(strategy, name):
    with strategy.scope():
        initializer = keras.initializers.GlorotUniform(seed=1)
        model = keras.Sequential(
            [
                keras.Input((3,)),
                keras.layers.Dense(4, "tanh", kernel_initializer=initializer),
                keras.layers.Dense(1, kernel_initializer=initializer),
            ]
        )
        model.compile(MAKE[name](), "mse", jit_compile=False)
    model.fit(X, Y, batch_size=ROWS, epochs=UPDATES, shuffle=False, verbose=0)
    return model.get_weights()


@pytest.mark.parametrize("name", MAKE)
def test_fit_on_replicas_equals_that_on_one_device(strategy, name):
    assert_same(fit(strategy, name), fit(default, name), FLOAT32_ATOL)


@pytest.mark.skipif(NAME == "one-device", reason="one replica has nothing to lose")
@pytest.mark.parametrize("make", [LBFGS, SSBroyden])
def test_accumulation_on_replicas_is_refused(strategy, make):
    # Plain optimizers fail in a graph there, and lose what the others have if saved.
    with strategy.scope(), pytest.raises(ValueError, match="several replicas"):
        make(gradient_accumulation_steps=2)
