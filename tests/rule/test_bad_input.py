"""Bad input gets an error in the house form, before anything is changed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer, _keras
from tests.helpers.errors import refuses
from tests.helpers.oracle import assert_same, make_gradients, make_variables, weights_of


@pytest.mark.parametrize("optimizers", [[], ()])
def test_no_optimizers(optimizers):
    with refuses("`optimizers`", "at least one"):
        SequentialOptimizer(optimizers, [])


@pytest.mark.parametrize("optimizers", ["adam", None, 3])
def test_optimizers_that_are_no_list(optimizers):
    with refuses("`optimizers`", "must be a list"):
        SequentialOptimizer(optimizers, [])


def test_single_optimizer_that_is_no_list():
    with refuses("`optimizers`", "must be a list"):
        SequentialOptimizer(keras.optimizers.Adam(), [])


@pytest.mark.parametrize(
    "entry", [None, 0.1, "no such optimizer", print, {}, tf.Variable(1)]
)
def test_entry_that_is_no_optimizer(entry):
    with refuses("`optimizers`", "keras.optimizers.get"):
        SequentialOptimizer([entry], [])


def test_class_is_taken_or_refused_as_keras_does():
    # `keras.optimizers.get` takes one from Keras 3.16 on.
    try:
        keras.optimizers.get(keras.optimizers.Adam)
    except ValueError:
        with refuses("`optimizers`", "keras.optimizers.get"):
            SequentialOptimizer([keras.optimizers.Adam], [])
    else:
        child = SequentialOptimizer([keras.optimizers.Adam], []).children[0]
        assert type(child) is keras.optimizers.Adam


def test_loss_scale_optimizer_as_a_child():
    child = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
    with refuses("`LossScaleOptimizer`", "scaled once"):
        SequentialOptimizer([child], [])


def test_child_with_a_loss_scale_factor():
    with refuses("`loss_scale_factor`", "scaled once"):
        SequentialOptimizer([keras.optimizers.Adam(loss_scale_factor=2.0)], [])


def test_two_children_with_one_name():
    children = [keras.optimizers.Adam(name="same"), keras.optimizers.SGD(name="same")]
    with refuses("different names"):
        SequentialOptimizer(children, [3])


# Keras numbers the names that it makes in each process: a restarted program that
# dropped the first of two Adams once loaded its state into the second.
@pytest.mark.parametrize("names", [(None, None), ("adam_1", "adam_2"), ("adam", None)])
def test_two_children_that_only_a_number_tells_apart(names):
    children = [keras.optimizers.Adam(name=name) for name in names]
    with refuses("only one may have a name that Keras makes"):
        SequentialOptimizer(children, [3])


def test_child_with_the_name_of_the_parent():
    with refuses("different names"):
        SequentialOptimizer([keras.optimizers.Adam(name="same")], [], name="same")


@pytest.mark.parametrize(
    "setting", ["clipnorm", "clipvalue", "global_clipnorm", "weight_decay"]
)
def test_setting_that_belongs_on_a_child(setting):
    with refuses(f"`{setting}`", "on the children"):
        SequentialOptimizer(["adam"], [], **{setting: 0.1})
    optimizer = SequentialOptimizer(["adam"], [])
    with refuses(f"`{setting}`", "on the children"):
        setattr(optimizer, setting, 0.1)
    assert getattr(optimizer, setting) is None


def test_unknown_argument():
    with pytest.raises(ValueError, match="not recognized"):
        SequentialOptimizer(["adam"], [], patience=3)


def test_learning_rate_of_the_parent():
    with refuses("`learning_rate`", "on the children"):
        SequentialOptimizer(["adam"], [], learning_rate=0.1)


def test_identifiers_are_what_keras_takes():
    config = keras.optimizers.serialize(keras.optimizers.SGD(0.5, momentum=0.9))
    before = repr(config)
    optimizer = SequentialOptimizer(["adam", config, "rmsprop"], [3, 5])
    assert [type(child).__name__ for child in optimizer.children] == [
        "Adam",
        "SGD",
        "RMSprop",
    ]
    assert optimizer.children[1].momentum == 0.9
    assert repr(config) == before


def test_built_child_with_other_variables():
    child = keras.optimizers.Adam()
    child.build(make_variables())
    other = keras.optimizers.SGD(momentum=0.9)
    optimizer = SequentialOptimizer([other, child], [3])
    with refuses("already built"):
        optimizer.build(make_variables())
    assert not optimizer.built
    assert not other.built


def test_gradients_for_unknown_variables():
    variables = make_variables()
    optimizer = SequentialOptimizer(["adam", "sgd"], [3])
    optimizer.build(variables)
    others = make_variables()
    with refuses("`trainable_variables`", "built on"):
        optimizer.apply(make_gradients(others, 1)[0], others)
    assert int(optimizer.iterations) == 0


def test_more_gradients_than_variables():
    variables = make_variables()
    optimizer = SequentialOptimizer(["adam", "sgd"], [3])
    with refuses("`grads`", "one entry for each variable"):
        optimizer.apply(make_gradients(variables, 1)[0], variables[:1])
    assert not optimizer.built


def test_no_gradient_for_any_variable():
    variables = make_variables()
    optimizer = SequentialOptimizer(["adam", "sgd"], [3], gradient_accumulation_steps=2)
    with refuses("`grads`", "at least one"):
        optimizer.apply([None, None], variables)
    assert int(optimizer.iterations) == 0


def test_unbuilt_apply_without_variables():
    optimizer = SequentialOptimizer(["adam", "sgd"], [3])
    with pytest.raises(ValueError, match="Pass `trainable_variables` at"):
        optimizer.apply(make_gradients(make_variables(), 1)[0])


def test_empty_gradients_are_not_counted():
    variables = make_variables()
    optimizer = SequentialOptimizer(["adam", "sgd"], [3])
    optimizer.build(variables)
    before = weights_of(variables)
    optimizer.apply([])
    optimizer.apply([], [])
    assert int(optimizer.iterations) == 0
    assert_same(weights_of(variables), before)


def test_set_weights_that_do_not_fit():
    variables = make_variables()
    optimizer = SequentialOptimizer(["adam", "sgd"], [3])
    with refuses("`set_weights`|must be built"):
        optimizer.set_weights([])
    optimizer.build(variables)
    before = weights_of(optimizer.variables)
    ones = [np.ones_like(value) for value in before]
    for wrong in (ones[:-1], [*ones[:-1], np.ones(7)], [*ones, np.ones(1)]):
        with refuses("`weights`", "array"):
            optimizer.set_weights(wrong)
        assert_same(weights_of(optimizer.variables), before)
    optimizer.set_weights(ones)
    assert_same(weights_of(optimizer.variables), ones)


def test_old_keras_is_refused(monkeypatch):
    monkeypatch.setattr(keras, "__version__", "3.4.1")
    with refuses("Keras >= 3.5", error=ImportError):
        _keras.check_keras()
    monkeypatch.setattr(keras, "__version__", "3.10.0")
    _keras.check_keras()


def test_keras_2_is_refused(monkeypatch):
    # A name that Keras 2 does not have once failed before the message.
    monkeypatch.setattr(keras, "__version__", "2.15.0")
    monkeypatch.delattr(keras.config, "backend")
    with refuses("Keras >= 3.5", error=ImportError):
        _keras.check_keras()


def test_other_backend_is_refused(monkeypatch):
    monkeypatch.setattr(keras.config, "backend", lambda: "jax")
    with refuses("TensorFlow backend", error=ImportError):
        _keras.check_keras()
