"""Any schedule, stopped and saved anywhere, does what ten lines of Python say."""

import tempfile
from collections import Counter
from pathlib import Path

import keras
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sequential_optimizer import SequentialOptimizer
from tests.helpers.oracle import (
    assert_same,
    make_gradients,
    make_variables,
    run_plain,
    weights_of,
)
from tests.helpers.saving import build, make_model
from tests.helpers.saving_ways import WAYS

# The warning is meant for people; here a child may well follow itself.
pytestmark = pytest.mark.filterwarnings("ignore:A boundary between phases of one")

# Two of the same class, which a file tells apart by their names only.
KINDS = {
    "adam": lambda: keras.optimizers.Adam(0.05, name="adam"),
    "sgd": lambda: keras.optimizers.SGD(0.02, momentum=0.9, name="sgd"),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, name="rmsprop"),
    "slow": lambda: keras.optimizers.SGD(0.003, name="slow"),
}


class Expected:
    """What a sequence is to do: which child makes each update."""

    def __init__(self, children, boundaries):
        self.children, self.boundaries = children, boundaries
        self.ended, self.updates_of = 0, Counter()

    def phase(self):
        reached = [b for b in self.boundaries if b and b <= self.updates_of.total()]
        return max(len(reached), self.ended)

    def update(self):
        self.updates_of[self.children[self.phase()]] += 1

    def advance(self):
        self.ended = min(self.phase() + 1, len(self.boundaries))


@st.composite
def schedules(draw, last_update=12):
    """Draws (name of the child of each phase, boundaries)."""
    names = draw(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=6))
    integers = draw(st.sets(st.integers(1, last_update), max_size=len(names) - 1))
    return names, sorted(integers) + [None] * (len(names) - 1 - len(integers))


def make_sequence(names, boundaries):
    """Returns an optimizer with one instance for each name."""
    children = {name: KINDS[name]() for name in names}
    return SequentialOptimizer([children[name] for name in names], boundaries)


class Training(RuleBasedStateMachine):
    """A run that is trained, advanced, saved and loaded in any order.

    Beside it, plain optimizers train their own weights: the one that `Expected` names
    makes each update.
    """

    @initialize(schedule=schedules())
    def start(self, schedule):
        self.schedule = schedule
        self.expected = Expected(*schedule)
        self.model = build(make_model(self.make()))
        self.plain_weights = make_model().trainable_variables
        self.plain = {name: KINDS[name]() for name in set(schedule[0])}
        for optimizer in self.plain.values():
            optimizer.build(self.plain_weights)

    def make(self):
        return make_sequence(*self.schedule)

    @property
    def optimizer(self):
        return self.model.optimizer

    def child_state(self):
        """Returns the variables of each child, by its name."""
        return {c.name: weights_of(c.variables) for c in self.optimizer.children}

    @rule()
    def update(self):
        (gradients,) = make_gradients(
            self.plain_weights, 1, seed=self.expected.updates_of.total()
        )
        before = self.child_state()
        active = self.schedule[0][self.expected.phase()]
        self.optimizer.apply(gradients, self.model.trainable_variables)
        self.plain[active].apply(gradients, self.plain_weights)
        self.expected.update()
        after = self.child_state()
        for name in before.keys() - {active}:
            assert_same(after[name], before[name])

    @rule()
    def advance(self):
        self.expected.advance()
        self.optimizer.advance()
        assert int(self.optimizer.phase) == self.expected.phase()

    @rule(way=st.sampled_from(list(WAYS)))
    def save_and_load(self, way):
        with tempfile.TemporaryDirectory() as folder:
            WAYS[way].save(self.model, Path(folder))
            self.model = WAYS[way].load(Path(folder), self.make)

    @rule()
    def config_makes_the_same(self):
        config = self.optimizer.get_config()
        twin = SequentialOptimizer.from_config(config)
        assert twin.get_config() == config == self.optimizer.get_config()
        # The config is the constructor's arguments, never the state.
        assert int(twin.phase) == int(twin.iterations) == 0

    @invariant()
    def phase_and_counters_are_as_expected(self):
        assert int(self.optimizer.phase) == self.expected.phase()
        assert int(self.optimizer.iterations) == self.expected.updates_of.total()
        for child in self.optimizer.children:
            assert int(child.iterations) == self.expected.updates_of[child.name]

    @invariant()
    def weights_and_state_are_those_of_the_plain_optimizers(self):
        trained = self.model.trainable_variables
        assert_same(weights_of(trained), weights_of(self.plain_weights))
        for name, state in self.child_state().items():
            assert_same(state, weights_of(self.plain[name].variables))


Training.TestCase.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, derandomize=True
)
TestTraining = pytest.mark.slow(Training.TestCase)


@pytest.mark.slow
@given(schedules(), st.sets(st.integers(0, 11), max_size=4))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_compiled_loop_follows_any_schedule(schedule, advanced_before):
    updates = 12
    expected, phases = Expected(*schedule), []
    for t in range(updates):
        if t in advanced_before:
            expected.advance()
        phases.append(expected.phase())
        expected.update()

    optimizer, variables = make_sequence(*schedule), make_variables()
    batches = make_gradients(variables, updates)
    seen = _train_in_a_loop(optimizer, variables, batches, advanced_before)
    assert seen == phases
    assert {child.name: int(child.iterations) for child in optimizer.children} == {
        name: expected.updates_of[name] for name in schedule[0]
    }

    plain = {name: KINDS[name]() for name in schedule[0]}
    names = [schedule[0][phase] for phase in phases]
    # One entry per update, so that the oracle needs no rule.
    history = run_plain(
        [plain[name] for name in names],
        range(1, updates),
        copies := make_variables(),
        batches,
        "xla",
    )
    assert_same(weights_of(copies), history[-1])
    assert_same(weights_of(variables), history[-1])


def _train_in_a_loop(optimizer, variables, batches, advanced_before):
    """Trains in one compiled loop; returns the phase of each update."""
    optimizer.build(variables)
    stacked = [tf.stack(tensors) for tensors in zip(*batches, strict=True)]
    advances = tf.constant([t in advanced_before for t in range(len(batches))])

    def body(t, phases):
        tf.cond(advances[t], optimizer.advance, lambda: None)
        phase = optimizer.phase
        optimizer.apply([tensor[t] for tensor in stacked], variables)
        return t + 1, tf.tensor_scatter_nd_update(phases, [[t]], [phase])

    @tf.function(jit_compile=True, autograph=False)
    def loop():
        phases = tf.zeros([len(batches)], tf.int32)
        return tf.while_loop(
            lambda t, phases: t < len(batches), body, [tf.constant(0), phases]
        )[1]

    phases = loop().numpy().tolist()
    assert loop.experimental_get_tracing_count() == 1
    return phases


@given(schedules())
@settings(max_examples=50, deadline=None, derandomize=True)
def test_config_round_trips(schedule):
    optimizer = make_sequence(*schedule)
    config = optimizer.get_config()
    assert SequentialOptimizer.from_config(config).get_config() == config
    serialized = keras.saving.serialize_keras_object(optimizer)
    loaded = keras.saving.deserialize_keras_object(serialized)
    assert loaded.get_config() == config
    assert [loaded.children[i].name for i in config["child_of_phase"]] == schedule[0]
    assert config["boundaries"] == schedule[1]
