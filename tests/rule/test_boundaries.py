"""The boundary rule: which phase update number t runs in."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from sequential_optimizer import SequentialOptimizer
from sequential_optimizer._phases import Phases
from tests.helpers.errors import refuses
from tests.helpers.oracle import make_gradients, make_variables


def phases_of(optimizer, updates):
    variables = make_variables()
    optimizer.build(variables)
    seen = []
    for gradients in make_gradients(variables, updates):
        seen.append(int(optimizer.phase))
        optimizer.apply(gradients, variables)
    return seen


def test_switches_at_boundary_not_after():
    optimizer = SequentialOptimizer(["adam", "sgd"], [2])
    assert phases_of(optimizer, 4) == [0, 0, 1, 1]
    assert [int(child.iterations) for child in optimizer.children] == [2, 2]


def test_piecewise_constant_decay_switches_one_update_later():
    # The docstring says so; whoever mixes the two must be able to rely on it.
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.0, 1.0])
    assert [int(schedule(t)) for t in range(4)] == [0, 0, 0, 1]


def test_single_optimizer_has_one_phase():
    optimizer = SequentialOptimizer(["adam"], [])
    assert phases_of(optimizer, 2) == [0, 0]
    optimizer.advance()
    assert int(optimizer.phase) == 0


@st.composite
def boundaries(draw):
    integers = draw(st.lists(st.integers(1, 60), unique=True, max_size=6))
    return sorted(integers) + [None] * draw(st.integers(0, 3))


@given(boundaries(), st.integers(0, 70), st.integers(0, 9))
@settings(deadline=None, derandomize=True)
def test_phase_is_the_number_of_boundaries_reached(values, iterations, ended):
    ended = min(ended, len(values))
    phases = Phases.parse(values, tuple(range(len(values) + 1)))
    reached = sum(b is not None and b <= iterations for b in values)
    assert int(phases.phase(iterations, ended)) == max(reached, ended)


@given(boundaries(), st.data())
@settings(deadline=None, derandomize=True, max_examples=50)
def test_advance_ends_one_phase_at_a_time(values, data):
    # The rule in plain Python: a phase is left at its integer or by `advance()`.
    phases = Phases.parse(values, tuple(range(len(values) + 1)))
    min_phase = phase = 0
    for t in range(20):
        while phase < len(values) and (values[phase] or t + 1) <= t:
            phase += 1
        if data.draw(st.booleans()):
            min_phase = phase = min(phase + 1, len(values))
        assert int(phases.phase(t, min_phase)) == phase


def test_phase_stays_the_last_when_fewer_phases_are_left():
    assert int(Phases((5,), (0, 1)).phase(0, 7)) == 1


def test_largest_integers_are_exact():
    largest = 2**63 - 1
    phases = Phases.parse([largest - 1, largest], (0, 1, 2))
    assert [int(phases.phase(largest - 2 + i, 0)) for i in range(3)] == [0, 1, 2]


def test_child_of_a_repeated_phase():
    phases = Phases((1, 2, 3), (0, 1, 0, 2))
    assert [int(phases.child(tf.constant(k))) for k in range(4)] == [0, 1, 0, 2]


# One message has all parts of the rule.
RULE = "one entry fewer .* strictly increasing integers >= 1 .* int64, then .* `None`"


@pytest.mark.parametrize(
    "values",
    [[1, 2], [], 3, None, "3", [1.0], ["1"], [True], [0], [-4], [2**63]],
    ids=str,
)
def test_bad_boundary_is_refused(values):
    with refuses("`boundaries`", RULE):
        SequentialOptimizer(["adam", "sgd"], values)


@pytest.mark.parametrize("values", [[5, 5], [5, 4], [None, 5]], ids=str)
def test_boundaries_out_of_order_are_refused(values):
    with refuses("`boundaries`", RULE):
        SequentialOptimizer(["adam", "sgd", "rmsprop"], values)


def test_numpy_integers_are_boundaries():
    optimizer = SequentialOptimizer(["adam", "sgd", "lion"], np.array([3, 5]))
    assert optimizer.get_config()["boundaries"] == [3, 5]
    assert {type(b) for b in optimizer.get_config()["boundaries"]} == {int}
