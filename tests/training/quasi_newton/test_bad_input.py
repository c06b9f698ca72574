"""What cannot work is refused, with the reason and the remedy."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import LBFGS, SSBroyden


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clipnorm", 1.0),
        ("clipvalue", 1.0),
        ("global_clipnorm", 1.0),
        ("use_ema", True),
        ("ema_overwrite_frequency", 3),
        ("weight_decay", 0.01),
    ],
)
def test_settings_that_would_mislead_the_search(make, name, value):
    with pytest.raises(
        ValueError, match=rf"`{name}` must not be set.*Received: {name}"
    ):
        make(**{name: value})
    # Nor later: the base class would obey a setting that is changed then.
    optimizer = make()
    setattr(optimizer, name, value)
    with pytest.raises(ValueError, match=f"`{name}` must not be set"):
        optimizer.apply([tf.ones(2)], [tf.Variable([1.0, 2.0])])


def test_settings_that_are_not_set(make):
    make(clipnorm=None, use_ema=False, ema_momentum=0.9, weight_decay=None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": -0.1}, "`learning_rate` must not be negative"),
        ({"learning_rate": np.nan}, "`learning_rate` must not be negative"),
        ({"gradient_tolerance": -1.0}, "`gradient_tolerance` must be a float >= 0"),
        ({"gradient_tolerance": "1"}, "`gradient_tolerance` must be a float >= 0"),
        ({"gradient_accumulation_steps": 1}, "`gradient_accumulation_steps`"),
        ({"momentum": 0.9}, "momentum"),
    ],
)
def test_bad_arguments(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
def test_bad_history_size(size):
    with pytest.raises(ValueError, match="`history_size` must be an integer >= 1"):
        LBFGS(history_size=size)


@pytest.mark.parametrize("dtype", ["complex64", "int32"])
def test_weights_that_are_no_floats(make, dtype):
    variable = tf.Variable([1, 2], dtype=dtype)
    with pytest.raises(ValueError, match=f"float64 that.*of type {dtype}"):
        make().build([variable])


def test_weights_with_a_constraint(make):
    kernel = keras.Variable([1.0, 2.0], name="kernel")
    kernel.constraint = keras.constraints.NonNeg()
    with pytest.raises(ValueError, match=r"constraint.*Received: `kernel` with"):
        make().build([kernel])


def test_weights_of_unknown_shape(make):
    variable = tf.Variable([1.0, 2.0], shape=[None])
    with pytest.raises(ValueError, match="the shape of each variable"):
        make().build([variable])


def test_matrix_that_cannot_fit():
    # 8 bytes times 50,000 squared; the kernel alone is small.
    variable = tf.Variable(np.zeros(50_000))
    with pytest.raises(ValueError, match=r"50000 weights.*20000000000 bytes.*`LBFGS`"):
        SSBroyden().build([variable])


@pytest.mark.parametrize("gradient", [tf.ones(()), tf.ones((2, 1)), tf.ones(3)])
@pytest.mark.parametrize("steps", [None, 2])
def test_gradients_of_another_shape(make, gradient, steps):
    # Most of the arithmetic would broadcast these to the variable.
    variable = keras.Variable([1.0, 2.0], name="kernel")
    optimizer = make(gradient_accumulation_steps=steps)
    with pytest.raises(ValueError, match=r"for `kernel` of shape \(2,\)"):
        optimizer.apply([gradient], [variable])


def test_variable_that_is_passed_twice(make):
    # Only its last gradient counted.
    variable = keras.Variable([1.0, 2.0], name="kernel")
    with pytest.raises(ValueError, match=r"once.*Received: `kernel` twice\. Add up"):
        make().apply([tf.ones(2), tf.ones(2)], [variable, variable])


def test_rows_of_another_width(make):
    table = tf.Variable(tf.ones((4, 2)))
    rows = tf.IndexedSlices(tf.ones((1, 3)), tf.constant([1]), tf.constant([4, 3]))
    with pytest.raises(ValueError, match=r"\(4, 3\) for .* of shape \(4, 2\)"):
        make().apply([rows], [table])


def test_more_gradients_than_variables(make):
    with pytest.raises(ValueError, match="`grads` must have one entry for each"):
        make().apply([tf.ones(2), tf.ones(2)], [tf.Variable([1.0, 2.0])])
