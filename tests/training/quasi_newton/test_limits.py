"""The search at the limits of numbers, and where others interfere with it."""

import numpy as np
import pytest
import tensorflow as tf


def minimize(optimizer, weight, loss, calls):
    """Calls the optimizer with the gradients of `loss`, a function of the weight."""
    for _ in range(calls):
        with tf.GradientTape() as tape:
            value = loss(weight)
        optimizer.apply([tape.gradient(value, weight)], [weight])
    optimizer.finalize_variable_values([weight])
    return weight.numpy()


def test_first_step_that_rounding_swallows(make):
    # The first step is as long as the gradient, here less than the distance between
    # 1000 and the next float32: the weight never moved.
    optimizer = make(1e3, gradient_tolerance=1e-9)
    weight = tf.Variable([1000.0])
    found = minimize(optimizer, weight, lambda w: 1e-8 * (w[0] - 2000) ** 2, 10)
    np.testing.assert_allclose(found, [2000], rtol=1e-4)


def test_gradient_whose_square_overflows(make):
    # It counted as not finite, and the weight never moved.
    found = minimize(
        make(0.1), tf.Variable([1.0]), lambda w: 1e20 * (w[0] - 3) ** 2, 80
    )
    np.testing.assert_allclose(found, [3], rtol=1e-6)


def test_weights_set_by_less_than_another_type_rounds(make):
    # What bfloat16 rounds was allowed to the float32 weights beside it: set by half a
    # percent, they were put back.
    weights = [tf.Variable([1.0, 1.0]), tf.Variable([1.0, 1.0], dtype="bfloat16")]
    optimizer = make(0.1)
    for _ in range(3):
        optimizer.apply([w - 3 for w in weights], weights)
    weights[0].assign(weights[0] * 1.005)
    expected = weights[0].numpy()
    optimizer.finalize_variable_values(weights)
    np.testing.assert_array_equal(weights[0].numpy(), expected)


def test_layer_is_frozen_at_a_point_without_a_gradient(make):
    # The gradients of before cannot be compared, so the search starts; but it started
    # at the trial point, which has none, and stayed there.
    a, b = tf.Variable([1.0]), tf.Variable([1.0])
    optimizer = make(1.0)
    optimizer.build([a, b])

    def gradients_of(variables):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.sqrt(a - 0.9) + b**2)
        return tape.gradient(loss, variables)

    optimizer.apply(gradients_of([a, b]), [a, b])
    assert a.numpy() < 0.9
    optimizer.apply(gradients_of([a]), [a])
    np.testing.assert_array_equal([a.numpy(), b.numpy()], [[1], [1]])
    for _ in range(30):
        optimizer.apply(gradients_of([a]), [a])
    optimizer.finalize_variable_values([a, b])
    assert 0.9 < a.numpy() < 0.95
    assert b.numpy() == 1


@pytest.mark.parametrize("learning_rate", [0.0, -0.1])
def test_learning_rate_that_falls_to_zero(make, learning_rate):
    # A negative one made the weights climb.
    weight = tf.Variable([1.0, -2.0])
    optimizer = make(0.05)
    optimizer.apply([weight * 1.0], [weight])
    before = weight.numpy()
    optimizer.learning_rate = learning_rate
    for _ in range(3):
        optimizer.apply([weight * 1.0], [weight])
        np.testing.assert_array_equal(weight.numpy(), before)
    optimizer.learning_rate = 0.05
    for _ in range(2):
        optimizer.apply([weight * 1.0], [weight])
    assert np.all(np.abs(weight) < np.abs(before))
