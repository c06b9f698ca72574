"""A search that is saved continues from there, bit for bit."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import LBFGS, SequentialOptimizer, SSBroyden
from tests.helpers.oracle import assert_same
from tests.helpers.saving import build, make_model, state_of
from tests.helpers.saving_ways import WAYS

MAKE = {
    "LBFGS": lambda: LBFGS(learning_rate=0.25, history_size=4),
    "SSBroyden": lambda: SSBroyden(learning_rate=0.25),
    "child": lambda: SequentialOptimizer(
        [keras.optimizers.SGD(0.05), LBFGS(learning_rate=0.25, history_size=4)], [2]
    ),
}
# They share most of what they do, so two will do most of the time.
SOME = ["LBFGS", "child", pytest.param("SSBroyden", marks=pytest.mark.slow)]
CALLS = 18
# For each number of points rejected in a row, as not finite: when to save.
SAVED_AFTER = {0: 8, 1: 11, 2: 12}


def train(model, calls):
    """Makes calls of one run, eagerly; returns the state after each."""
    x, y = make_data()
    states = []
    for _ in range(calls):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
        gradients = tape.gradient(loss, model.trainable_variables)
        if int(model.optimizer.iterations) in (10, 11):
            gradients = [gradient * np.inf for gradient in gradients]
        model.optimizer.apply(gradients, model.trainable_variables)
        states.append(state_of(model))
    return states


def make_data():
    x = np.random.default_rng(3).normal(size=(16, 4)).astype("float32")
    return x, 3 * np.sin(2 * x.sum(-1, keepdims=True))


def value_of(name, optimizer):
    """Returns a number in the state of the search, which may be a child."""
    optimizers = [optimizer, *getattr(optimizer, "children", ())]
    return next(int(v) for o in optimizers for v in o.variables if v.name == name)


@functools.cache
def run_of(name):
    return train(make_model(MAKE[name]()), CALLS)


@pytest.mark.parametrize(
    "rejections", [*(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1)), 2]
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", SOME)
def test_continues_as_if_never_saved(tmp_path, name, way, rejections):
    calls = SAVED_AFTER[rejections]
    model = make_model(MAKE[name]())
    train(model, calls)
    assert value_of("rejected", model.optimizer) == rejections
    WAYS[way].save(model, tmp_path)
    loaded = WAYS[way].load(tmp_path, MAKE[name])
    assert_same(train(loaded, CALLS - calls), run_of(name)[calls:])


@pytest.mark.parametrize("name", MAKE)
def test_fit_ends_at_the_last_accepted_point(name):
    # The last point was only tried: nobody has evaluated it.
    model = make_model(MAKE[name](), jit_compile=False)
    train(model, 9)
    weights, optimizer_state = state_of(model)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    final = state_of(model)[0]
    assert any((a != b).any() for a, b in zip(weights, final, strict=True))
    # A second time changes nothing, and what the search has learned is kept.
    model.optimizer.finalize_variable_values(model.trainable_variables)
    assert_same(state_of(model)[0], final)
    assert [v.shape for v in optimizer_state] == [v.shape for v in state_of(model)[1]]


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_later_fit_starts_from_there(name):
    model = make_model(MAKE[name](), jit_compile=False)
    data = make_data()
    best = np.inf
    for _ in range(3):
        model.fit(*data, batch_size=16, epochs=10, verbose=0)
        loss = model.evaluate(*data, batch_size=16, verbose=0)
        assert loss < best
        best = loss


@pytest.mark.parametrize("name", ["LBFGS", "SSBroyden"])
def test_weights_that_others_set_are_where_the_search_starts(name):
    # A loaded file, or the best weights that a callback restores.
    model = make_model(MAKE[name]())
    train(model, 9)
    others = [np.full_like(w, 0.3) for w in model.get_weights()]
    model.set_weights(others)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    assert_same(model.get_weights(), others)
    train(model, 1)
    step = np.concatenate(
        [(a - b).ravel() for a, b in zip(model.get_weights(), others, strict=True)]
    )
    assert 0 < np.sqrt(np.mean(step**2)) <= 0.25 * 1.001
    # And not a step from a point before, nor a pair that spans the jump.
    run = make_model(MAKE[name]())
    train(run, 9)
    assert value_of("pairs", model.optimizer) == value_of("pairs", run.optimizer)


@pytest.mark.parametrize("name", MAKE)
def test_config_makes_the_same_optimizer(name):
    optimizer = MAKE[name]()
    again = type(optimizer).from_config(optimizer.get_config())
    assert again.get_config() == optimizer.get_config()


@pytest.mark.parametrize("make", [LBFGS, SSBroyden])
def test_schedule_survives_in_the_config(make):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 1, 0.5)
    optimizer = make(schedule, gradient_tolerance=1e-3, gradient_accumulation_steps=2)
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(optimizer)
    )
    assert again.get_config() == optimizer.get_config()
    build(make_model(again))
    assert float(again.learning_rate) == 0.5
