"""`advance()`, the callbacks and the learning rate: alike on every replica."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import PhaseLogger, SequentialOptimizer, SwitchOnPlateau
from tests.helpers import callbacks as callback_tools
from tests.helpers.models import adam_then_sgd
from tests.helpers.oracle import assert_same
from tests.slow.strategies.conftest import NAME
from tests.slow.strategies.loops import (
    UPDATES,
    Loop,
    PlainLoops,
    build,
    counts_of,
    gradients_of,
    make_variables,
    replica_id,
    run_plain,
    values_of,
)

# One of the variables has no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")


def make_sequence(strategy, boundaries):
    """Returns variables and a sequence that is built on them."""
    variables = make_variables(strategy)
    with strategy.scope():
        late = keras.optimizers.Adam(0.1, name="late")
        children = [*adam_then_sgd(), late][: len(boundaries) + 1]
        optimizer = SequentialOptimizer(children, boundaries)
    build(strategy, optimizer, variables)
    return variables, optimizer


def assert_counts(strategy, optimizer, counts):
    """Asserts how many updates each child made, on every replica."""
    for replica in counts_of(strategy, optimizer.children):
        assert replica == counts


# --- advance() ---------------------------------------------------------------


def test_advance_between_the_steps_switches_on_every_replica(strategy):
    variables, optimizer = make_sequence(strategy, [None])
    loop = Loop(strategy, optimizer, variables, "graph")
    loop.train(0, 2)
    optimizer.advance()
    assert int(optimizer.phase) == 1
    loop.train(2, UPDATES)
    assert_counts(strategy, optimizer, [2, UPDATES - 2])
    with strategy.scope():
        plain = adam_then_sgd()
    assert_same(
        values_of(strategy, variables), run_plain(strategy, plain, [2], "graph")
    )


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_advance_in_every_replica_ends_one_phase(strategy, mode):
    variables, optimizer = make_sequence(strategy, [None, None])

    def replica(update):
        optimizer.apply(gradients_of(update), variables)
        optimizer.advance()
        return optimizer.phase

    def step(update):
        phases = strategy.run(replica, args=(update,))
        return strategy.experimental_local_results(phases)

    if mode == "graph":
        step = tf.function(step, autograph=False)
    phases = [[int(phase) for phase in step(tf.constant(t))] for t in range(4)]
    replicas = strategy.num_replicas_in_sync
    assert phases == [[phase] * replicas for phase in (1, 2, 2, 2)]
    assert_counts(strategy, optimizer, [1, 1, 2])


# A loss that falls from 5 to 0, and is far from its mean on every replica.
_OFFSETS = {1: [0], 2: [-8, 8], 4: [-8, 8, -4, 4]}
THRESHOLD = 2.5


def losses_of(strategy):
    """Returns the loss of every update, on every replica."""
    offsets = np.array(_OFFSETS[strategy.num_replicas_in_sync], "float32")
    return np.arange(UPDATES - 1, -1, -1, dtype="float32") + offsets[:, None]


def test_advance_on_a_reduced_loss_is_as_in_eager_python(strategy):
    variables, optimizer = make_sequence(strategy, [None])
    table = losses_of(strategy)

    def replica(update):
        optimizer.apply(gradients_of(update), variables)
        return tf.constant(table)[replica_id(), update]

    @tf.function(autograph=False)
    def step(update):
        losses = strategy.run(replica, args=(update,))
        loss = strategy.reduce(tf.distribute.ReduceOp.MEAN, losses, axis=None)
        tf.cond(loss < THRESHOLD, optimizer.advance, lambda: None)

    for update in range(UPDATES):
        step(tf.constant(update))
    assert step.experimental_get_tracing_count() == 1

    with strategy.scope():
        adam, sgd = adam_then_sgd()
    plain, chosen = PlainLoops(strategy, "graph"), adam
    for update in range(UPDATES):
        plain.train(chosen, update, update + 1)
        if np.mean(table[:, update]) < THRESHOLD:
            chosen = sgd
    assert_counts(strategy, optimizer, [4, 2])
    assert_same(values_of(strategy, variables), values_of(strategy, plain.variables))


def make_conditional_step(strategy, action):
    """Returns a step in which each replica decides by itself to call `action`."""

    @tf.function(autograph=False)
    def step(update):
        def replica(update):
            tf.cond(update >= 2, action, lambda: None)

        strategy.run(replica, args=(update,))

    return step


several_replicas = pytest.mark.skipif(NAME == "one-device", reason="one replica")


@several_replicas
@pytest.mark.parametrize("what", ["advance", "learning_rate", "apply"])
def test_replica_that_decides_alone_is_refused(strategy, what):
    variables, optimizer = make_sequence(strategy, [None])

    def action():
        if what == "advance":
            optimizer.advance()
        elif what == "learning_rate":
            optimizer.learning_rate = 0.5
        else:
            optimizer.apply(gradients_of(0), variables)

    step = make_conditional_step(strategy, action)
    with pytest.raises(RuntimeError, match=r"not in a conditional.*strategy\.run\("):
        step(tf.constant(2))
    assert_counts(strategy, optimizer, [0, 0])
    assert int(optimizer.phase) == 0


@pytest.mark.skipif(NAME != "one-device", reason="one of several replicas is refused")
def test_only_replica_may_decide_alone(strategy):
    _, optimizer = make_sequence(strategy, [None, None])
    step = make_conditional_step(strategy, optimizer.advance)
    phases = []
    for update in range(4):
        step(tf.constant(update))
        phases.append(int(optimizer.phase))
    assert phases == [0, 0, 1, 2]


# --- callbacks ---------------------------------------------------------------

# A plateau of two epochs, and an epoch after it.
METRIC = [3.0, 3.0, 3.0, 2.0]


def fit_with_callbacks(strategy, **kwargs):
    """Returns the logs of a `fit` that switches twice, and its optimizer."""
    with strategy.scope():
        optimizer = callback_tools.make_sequence([1, None])
        model = callback_tools.compiled_model(optimizer, **kwargs)
    history = callback_tools.fit(
        model,
        epochs=len(METRIC),
        callbacks=[
            callback_tools.Script(METRIC),
            SwitchOnPlateau("val_loss", patience=2, verbose=1),
            PhaseLogger(),
        ],
    )
    logs = {key: history.history[key] for key in ("phase", "learning_rate")}
    return logs, optimizer


def test_callbacks_switch_and_log_as_without_a_strategy(strategy, capsys):
    expected, _ = fit_with_callbacks(tf.distribute.get_strategy())
    assert expected["phase"] == [1, 1, 1, 2]
    lines = capsys.readouterr().out
    assert len(lines.splitlines()) == 3, lines  # the boundary, and the plateau twice
    logs, optimizer = fit_with_callbacks(strategy, jit_compile=False)
    assert logs == expected
    assert capsys.readouterr().out == lines
    # Two updates per epoch: the boundary is 1, the plateau ends after three epochs.
    assert_counts(strategy, optimizer, [1, 5, 2])


# --- learning_rate -----------------------------------------------------------


def rates_of(strategy, optimizer):
    rates = [child.learning_rate for child in optimizer.children]
    values = values_of(strategy, rates)
    return [[float(rate) for rate in replica] for replica in zip(*values, strict=True)]


@pytest.mark.parametrize("mode", ["graph", "eager"])
def test_learning_rate_set_in_every_replica(strategy, mode):
    variables, optimizer = make_sequence(strategy, [2])

    def replica(update, rate):
        # Each replica computes its own tensor.
        optimizer.learning_rate = rate * 1.0
        optimizer.apply(gradients_of(update), variables)
        return optimizer.learning_rate + 0.0

    def step(update, rate):
        rates = strategy.run(replica, args=(update, rate))
        return strategy.experimental_local_results(rates)

    if mode == "graph":
        step = tf.function(step, autograph=False)
    read = [
        [float(rate) for rate in step(tf.constant(t), tf.constant(2.0**-t))]
        for t in range(4)
    ]
    # Read after the update, when at t = 1 the next child is the active one.
    replicas = strategy.num_replicas_in_sync
    sgd = float(np.float32(0.02))
    assert read == [[rate] * replicas for rate in (1.0, sgd, 0.25, 0.125)]
    for rates in rates_of(strategy, optimizer):
        assert rates == [0.5, 0.125]


def test_learning_rate_set_between_steps_on_every_replica(strategy):
    variables, optimizer = make_sequence(strategy, [3])
    loop = Loop(strategy, optimizer, variables, "graph")
    with strategy.scope():
        adam, sgd = adam_then_sgd()
    plain = PlainLoops(strategy, "graph")
    loop.train(0, 2)
    plain.train(adam, 0, 2)
    optimizer.learning_rate = adam.learning_rate = 0.5
    loop.train(2, 4)
    plain.train(adam, 2, 3)
    plain.train(sgd, 3, 4)
    optimizer.learning_rate = sgd.learning_rate = 0.25
    loop.train(4, UPDATES)
    plain.train(sgd, 4, UPDATES)
    assert_same(values_of(strategy, variables), values_of(strategy, plain.variables))
    for rates in rates_of(strategy, optimizer):
        assert rates == [0.5, 0.25]
    assert loop.function.experimental_get_tracing_count() == 1
