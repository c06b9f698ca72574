"""What cannot work under a strategy is refused, with the reason and the remedy."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers.models import adam_then_sgd
from tests.slow.strategies.conftest import NAME

CREATED_ELSEWHERE = r"created and built under.*Received: `\w+`, created elsewhere"


def make_variable(strategy):
    with strategy.scope():
        return keras.Variable([1.0, 2.0], name="v")


def make_sequence(strategy, where):
    """Returns a sequence, parts of which were created outside of the scope."""
    scopes = [
        contextlib.nullcontext() if part in where else strategy.scope()
        for part in ("children", "parent")
    ]
    with scopes[0]:
        children = adam_then_sgd()
    with scopes[1]:
        return SequentialOptimizer(children, [2])


def step_of(strategy, optimizer, variable):
    @tf.function(autograph=False)
    def step():
        strategy.run(lambda: optimizer.apply([tf.ones(2)], [variable]))

    return step


several_replicas = pytest.mark.skipif(NAME == "one-device", reason="no copies")


@several_replicas
@pytest.mark.parametrize("outside", ["parent", "children", "parent, children"])
def test_optimizer_created_outside_of_the_scope_is_refused(strategy, outside):
    optimizer = make_sequence(strategy, outside)
    variable = make_variable(strategy)
    with pytest.raises(ValueError, match=CREATED_ELSEWHERE):
        step_of(strategy, optimizer, variable)()
    with strategy.scope(), pytest.raises(ValueError, match=CREATED_ELSEWHERE):
        optimizer.build([variable])
    np.testing.assert_array_equal(variable.numpy(), [1, 2])


@several_replicas
def test_fit_with_an_optimizer_from_outside_is_refused(strategy):
    with strategy.scope():
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(make_sequence(strategy, "parent, children"), loss="mse")
    with pytest.raises(ValueError, match=CREATED_ELSEWHERE):
        model.fit(np.ones((8, 1)), np.ones((8, 1)), batch_size=4, verbose=0)


# Keras trains a plain optimizer this way: on one device there is nothing to mirror.
@pytest.mark.skipif(NAME != "one-device", reason="has copies")
def test_optimizer_from_outside_of_one_device_trains(strategy):
    def fit(make_optimizer):
        keras.utils.set_random_seed(0)
        with strategy.scope():
            model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        optimizer = make_optimizer()
        optimizer.build(model.trainable_variables)
        model.compile(optimizer, loss="mse")
        model.fit(np.ones((8, 1)), np.ones((8, 1)), batch_size=4, verbose=0)
        return model.get_weights()

    actual = fit(lambda: SequentialOptimizer(adam_then_sgd(), [9]))
    for weight, expected in zip(actual, fit(lambda: adam_then_sgd()[0]), strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_build_outside_of_the_scope_is_refused(strategy):
    optimizer = make_sequence(strategy, "")
    with pytest.raises(ValueError, match=f"{CREATED_ELSEWHERE}.* without a strategy"):
        optimizer.build([make_variable(strategy)])


def test_apply_in_cross_replica_context_is_refused(strategy):
    optimizer = make_sequence(strategy, "")
    variable = make_variable(strategy)
    message = "`apply` must be called in each replica.*`strategy.run"
    with strategy.scope():
        optimizer.build([variable])
        with pytest.raises(ValueError, match=message):
            optimizer.apply([tf.ones(2)], [variable])
    assert optimizer.iterations.numpy() == 0


@pytest.mark.skipif(NAME == "one-device", reason="works there: test_equality.py")
def test_accumulation_in_several_replicas_is_refused(strategy):
    message = "`gradient_accumulation_steps` must be `None`.*steps=2.*a larger batch"
    with strategy.scope(), pytest.raises(ValueError, match=message):
        SequentialOptimizer(adam_then_sgd(), [2], gradient_accumulation_steps=2)
