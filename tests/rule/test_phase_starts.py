"""The record of what happened: at which iteration each phase made its first update."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from sequential_optimizer._phases import switches_between
from tests.helpers.oracle import compiled, make_gradients, make_variables, weights_of

optimizers = keras.optimizers


def adam_sgd_adam(boundaries, **kwargs):
    adam = optimizers.Adam(0.01)
    return SequentialOptimizer([adam, optimizers.SGD(0.1), adam], boundaries, **kwargs)


def starts_after_each(optimizer, updates, mode="eager", before_update=()):
    """Returns `phase_starts` after each update; calls a function before some."""
    variables = make_variables()
    optimizer.build(variables)
    step = compiled(lambda *grads: optimizer.apply(list(grads), variables), mode)
    seen = []
    for t, gradients in enumerate(make_gradients(variables, updates)):
        for when, function in before_update:
            if t == when:
                function()
        step(*gradients)
        seen.append(optimizer.phase_starts.tolist())
    if mode != "eager":
        assert step.experimental_get_tracing_count() == 1
    return seen


def test_nothing_has_started_before_the_first_update():
    optimizer = adam_sgd_adam([2, 3])
    assert optimizer.phase_starts.tolist() == [-1, -1, -1]
    assert optimizer.phase_starts.dtype == np.int64
    optimizer.build(make_variables())
    assert optimizer.phase_starts.tolist() == [-1, -1, -1]


def test_written_at_the_first_update_of_a_phase(mode):
    assert starts_after_each(adam_sgd_adam([2, 3]), 5, mode) == [
        [0, -1, -1],
        [0, -1, -1],
        [0, 2, -1],
        [0, 2, 3],
        [0, 2, 3],
    ]


def test_phase_without_an_update_has_none(mode):
    optimizer = adam_sgd_adam([None, None])
    twice = [(3, optimizer.advance), (3, optimizer.advance)]
    seen = starts_after_each(optimizer, 5, mode, twice)
    assert seen[2:] == [[0, -1, -1], [0, -1, 3], [0, -1, 3]]


def test_a_window_of_accumulation_is_one_iteration(mode):
    optimizer = adam_sgd_adam([1, 2], gradient_accumulation_steps=2)
    seen = starts_after_each(optimizer, 6, mode)
    assert seen[0] == [-1, -1, -1]
    assert seen[1::2] == [[0, -1, -1], [0, 1, -1], [0, 1, 2]]


def test_skipped_steps_of_a_loss_scale_start_no_phase():
    sequence = adam_sgd_adam([1, 2])
    optimizer = optimizers.LossScaleOptimizer(sequence)
    variables = make_variables()
    for factor in (1.0, float("inf"), 1.0):
        gradients = [factor * tf.ones_like(v) for v in variables]
        optimizer.apply(gradients, variables)
    assert sequence.phase_starts.tolist() == [0, 1, -1]


def test_raised_boundary_takes_back_what_has_started():
    variables = make_variables()
    optimizer = adam_sgd_adam([1, 2])
    for gradients in make_gradients(variables, 3):
        optimizer.apply(gradients, variables)
    store = {}
    optimizer.save_own_variables(store)
    resumed = adam_sgd_adam([5, 9])
    resumed.build(variables)
    resumed.load_own_variables(store)
    assert resumed.phase_starts.tolist() == [0, 1, 2]
    resumed.apply(make_gradients(variables, 1)[0], variables)
    assert resumed.phase_starts.tolist() == [0, -1, -1]


def test_nested_sequence_counts_its_own_updates():
    inner = SequentialOptimizer(["adam", "sgd"], [2], name="inner")
    optimizer = SequentialOptimizer([optimizers.SGD(0.1, name="first"), inner], [3])
    starts_after_each(optimizer, 7)
    assert optimizer.phase_starts.tolist() == [0, 3]
    assert inner.phase_starts.tolist() == [0, 2]


def test_set_weights_sets_it():
    optimizer, copied = adam_sgd_adam([2, 3]), adam_sgd_adam([2, 3])
    starts_after_each(optimizer, 4)
    copied.build(make_variables())
    copied.set_weights(weights_of(optimizer.variables))
    assert copied.phase_starts.tolist() == [0, 2, 3]


def test_it_cannot_be_set():
    with pytest.raises(AttributeError):
        adam_sgd_adam([2, 3]).phase_starts = [0, 0, 0]


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ([-1, -1], [-1, -1], []),
        ([-1, -1], [0, -1], []),
        ([0, -1], [0, 4], [(4, 0, 1)]),
        ([-1, -1, -1], [0, 2, 3], [(2, 0, 1), (3, 1, 2)]),
        ([0, -1, -1], [0, -1, 5], [(5, 0, 2)]),
        ([0, 3, 4], [0, -1, -1], [(7, 2, 0)]),
        ([0, 3], [0, 3], []),
    ],
)
def test_switches_between_two_looks(before, now, expected):
    assert switches_between(before, now, iterations=7) == expected
