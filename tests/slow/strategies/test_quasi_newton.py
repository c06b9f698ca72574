"""A full batch that is spread over devices: the search equals that on one device.

Within rounding, because the sums of the gradients are in another order.
"""

import functools

import keras
import pytest
import tensorflow as tf

from sequential_optimizer import LBFGS, SSBroyden
from tests.helpers.oracle import assert_same
from tests.slow.full_batch import ATOL, MAKE, ROWS, UPDATES, X, Y, train
from tests.slow.strategies.conftest import NAME

default = tf.distribute.get_strategy()


@functools.cache
def on_one_device(name):
    return train(default, name)


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
    assert_same(fit(strategy, name), fit(default, name), 1e-5)


@pytest.mark.skipif(NAME == "one-device", reason="one replica has nothing to lose")
@pytest.mark.parametrize("make", [LBFGS, SSBroyden])
def test_accumulation_on_replicas_is_refused(strategy, make):
    # Plain optimizers fail in a graph there, and lose what the others have if saved.
    with strategy.scope(), pytest.raises(ValueError, match="several replicas"):
        make(gradient_accumulation_steps=2)
