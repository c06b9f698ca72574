"""Every way of training under a strategy equals the plain optimizers, bit for bit."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers.models import Counting, adam_then_sgd, ran_out_of_data
from tests.helpers.oracle import assert_same
from tests.slow.strategies.conftest import NAME
from tests.slow.strategies.loops import (
    COPIES,
    HAS_AVERAGE_OF_CHILD,
    HAS_BATCH_NORMALIZATION,
    HAS_CONSTRAINTS,
    HAS_SEVERAL_STEPS,
    MODES,
    UPDATES,
    Loop,
    PlainLoops,
    build,
    counts_of,
    make_variables,
    run_plain,
    values_of,
)

optimizers = keras.optimizers
schedules = keras.optimizers.schedules

# One of the variables has no gradient.
pytestmark = pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")


# --- the sequences -----------------------------------------------------------


def make_with_settings():
    """Returns optimizers that together have every setting of a child."""
    average = {"use_ema": True, "ema_momentum": 0.7} if HAS_AVERAGE_OF_CHILD else {}
    children = [
        optimizers.Adam(0.05, clipnorm=0.5, weight_decay=0.1, name="adam", **average),
        optimizers.SGD(
            schedules.ExponentialDecay(0.05, 1, 0.5),
            momentum=0.9,
            global_clipnorm=0.3,
            name="sgd",
        ),
        optimizers.AdamW(
            schedules.CosineDecay(0.05, 4), clipvalue=0.2, name="adamw", **average
        ),
    ]
    for child in children:
        child.exclude_from_weight_decay(var_names=["bias"])
    return children


def make_schedule_free():
    # `build` copies the weights, so it matters when the second phase starts.
    return [adam_then_sgd()[0], optimizers.ScheduleFreeAdamW(0.05, name="free")]


def make_four_phases():
    adam, sgd = adam_then_sgd()
    return [adam, sgd, optimizers.Adam(0.1, name="late"), sgd]


def nest(children):
    """Returns a sequence in a sequence, which does the four phases with boundaries
    2, 3 and 5: the inner one comes back, and continues with its second child.
    """
    inner = SequentialOptimizer(children[:2], [2], name="inner")
    return SequentialOptimizer([inner, children[2], inner], [3, 5])


# name: the plain optimizers of the phases, their boundaries, and the sequence.
CASES = {
    "pair": (adam_then_sgd, [3], lambda pair: SequentialOptimizer(pair, [3])),
    "settings": (
        make_with_settings,
        [2, 4],
        lambda children: SequentialOptimizer(children, [2, 4]),
    ),
    "nested": (make_four_phases, [2, 3, 5], nest),
}
if hasattr(optimizers, "ScheduleFreeAdamW"):
    CASES["schedule-free"] = (
        make_schedule_free,
        [3],
        lambda children: SequentialOptimizer(children, [3]),
    )


@functools.cache
def by_hand(strategy, case, mode):
    """Returns the values of the variables, and those of each optimizer's."""
    make, boundaries, _ = CASES[case]
    with strategy.scope():
        plain = make()
    values = run_plain(strategy, plain, boundaries, mode)
    return values, [values_of(strategy, one.variables) for one in plain]


# --- custom loops ------------------------------------------------------------


def check_loop(strategy, case, mode, built=True):
    """Asserts that a sequence equals the plain optimizers; returns its loop."""
    make, _, make_sequence = CASES[case]
    variables = make_variables(strategy)
    with strategy.scope():
        children = make()
        optimizer = make_sequence(children)
    if built:
        build(strategy, optimizer, variables)
    loop = Loop(strategy, optimizer, variables, mode)
    loop.train()
    # The step of both kinds of graphs is the same.
    values, of_optimizers = by_hand(strategy, case, mode.replace("range", "graph"))
    assert_same(values_of(strategy, variables), values)
    assert {len(replicas) for replicas in values} == {COPIES}
    for child, expected in zip(children, of_optimizers, strict=True):
        assert_same(values_of(strategy, child.variables), expected)
    for (updates,) in counts_of(strategy, [optimizer]):
        assert updates == UPDATES
    return loop


# A loop over a `tf.range` holds the step that is traced without one, so one case will
# do, and the pair is below.
LOOPS = [
    (mode, case) for mode in ("graph", "eager") for case in CASES if case != "pair"
]
LOOPS.append(("range", "settings"))


@pytest.mark.parametrize(("mode", "case"), LOOPS)
def test_loop_equals_plain_optimizers_on_every_replica(strategy, mode, case):
    loop = check_loop(strategy, case, mode)
    if mode != "eager":
        assert loop.function.experimental_get_tracing_count() == 1
        assert loop.replica_calls == strategy.num_replicas_in_sync


@pytest.mark.parametrize("mode", ["graph", "range"])
def test_optimizer_built_in_the_graph_equals_plain(strategy, mode):
    loop = check_loop(strategy, "pair", mode, built=False)
    # A tf.function whose first call creates variables is always traced twice.
    assert loop.function.experimental_get_tracing_count() == 2


# --- the average of all phases -----------------------------------------------

MOMENTUM = 0.7
FREQUENCY = 4


@tf.function
def blend(momentum, averages, values):
    return [
        momentum * average + (1 - momentum) * value
        for average, value in zip(averages, values, strict=True)
    ]


@functools.cache
def average_by_hand(strategy, mode):
    """Returns the variables' values, overwritten by their averages, and the averages.

    As in Keras, the average starts with the weights after the first update.
    """
    with strategy.scope():
        adam, sgd = adam_then_sgd()
    loops = PlainLoops(strategy, mode)
    averages = [tf.zeros(v.shape) for v in loops.variables]
    for update in range(UPDATES):
        loops.train(adam if update < 3 else sgd, update, update + 1)
        values = [tf.constant(v.numpy()) for v in loops.variables]
        averages = blend(tf.constant(MOMENTUM if update else 0.0), averages, values)
        if (update + 1) % FREQUENCY == 0:
            for variable, average in zip(loops.variables, averages, strict=True):
                variable.assign(average)
                if variable.constraint is not None:
                    variable.assign(variable.constraint(average))
    return values_of(strategy, loops.variables), [np.array(a) for a in averages]


@pytest.mark.parametrize("mode", MODES)
def test_average_spans_the_phases_on_every_replica(strategy, mode):
    variables = make_variables(strategy)
    with strategy.scope():
        optimizer = SequentialOptimizer(
            adam_then_sgd(),
            [3],
            use_ema=True,
            ema_momentum=MOMENTUM,
            ema_overwrite_frequency=FREQUENCY,
        )
    build(strategy, optimizer, variables)
    Loop(strategy, optimizer, variables, mode).train()
    values, averages = average_by_hand(strategy, mode.replace("range", "graph"))
    assert_same(values_of(strategy, variables), values)
    of_optimizer = values_of(strategy, optimizer._model_variables_moving_average)
    for replicas, average in zip(of_optimizer, averages, strict=True):
        assert_same(replicas, [average] * len(replicas))
    # As `fit` does at its end.
    optimizer.finalize_variable_values(variables)
    assert_same(values_of(strategy, variables), of_optimizer)


# --- fit ---------------------------------------------------------------------

ROWS = 8  # in a batch
_RNG = np.random.default_rng(0)
X = _RNG.integers(5, size=(UPDATES * ROWS, 3))
Y = _RNG.normal(size=(UPDATES * ROWS, 1)).astype("float32")

# The values of `steps_per_execution`; a MirroredStrategy may have no choice
# (test_limits.py).
STEPS = [1, 3] if HAS_SEVERAL_STEPS else [1]


def make_model(strategy):
    """Returns a model with the same weights at every call."""
    uniform = functools.partial(keras.initializers.RandomUniform, -1, 1)
    constraint = keras.constraints.UnitNorm() if HAS_CONSTRAINTS else None
    with strategy.scope():
        layers = [
            keras.Input((3,), dtype="int32"),
            keras.layers.Embedding(5, 2, uniform(seed=1)),
            keras.layers.Flatten(),
            keras.layers.Dense(
                1, kernel_initializer=uniform(seed=2), kernel_constraint=constraint
            ),
        ]
        if HAS_BATCH_NORMALIZATION:
            # Without `gamma`: on one device TensorFlow rewrites its gradient together
            # with a plain update, and rounds differently; also without a strategy, but
            # not if its "arithmetic_optimization" is turned off (measured).
            layers.insert(3, keras.layers.BatchNormalization(scale=False))
        return Counting(layers)


def fit(strategy, model, optimizer, first, last, **kwargs):
    """Fits the model to the batches from `first` up to `last`."""
    with strategy.scope():
        model.compile(optimizer, loss="mse", **{"jit_compile": False, **kwargs})
    rows = slice(first * ROWS, last * ROWS)
    model.fit(X[rows], Y[rows], batch_size=ROWS, shuffle=False, verbose=0)


def make_for_fit():
    # The average of the first would overwrite the weights at the end of its `fit`.
    average = {"use_ema": True, "ema_momentum": 0.7} if HAS_AVERAGE_OF_CHILD else {}
    return [
        optimizers.Adam(schedules.CosineDecay(0.05, 4), clipnorm=0.5, name="adam"),
        optimizers.SGD(0.05, momentum=0.9, weight_decay=0.1, name="sgd", **average),
    ]


def state_of(strategy, model, children):
    values = [values_of(strategy, model.weights)]
    return values + [values_of(strategy, child.variables) for child in children]


@functools.cache
def fit_plain(strategy):
    """Fits with one plain optimizer per phase; returns the state and the calls."""
    model = make_model(strategy)
    with strategy.scope():
        adam, sgd = make_for_fit()
    fit(strategy, model, adam, 0, 3)
    calls = model.train_steps
    fit(strategy, model, sgd, 3, UPDATES)
    return state_of(strategy, model, [adam, sgd]), calls


def fit_sequence(strategy, **kwargs):
    model = make_model(strategy)
    with strategy.scope():
        children = make_for_fit()
        optimizer = SequentialOptimizer(children, [3])
    fit(strategy, model, optimizer, 0, UPDATES, **kwargs)
    return state_of(strategy, model, children), model.train_steps


@pytest.mark.parametrize("steps_per_execution", STEPS)
def test_fit_equals_two_fits_with_plain_optimizers(strategy, steps_per_execution):
    kwargs = {"steps_per_execution": steps_per_execution}
    state, calls = fit_sequence(strategy, **kwargs)
    expected, expected_calls = fit_plain(strategy)
    assert_same(state, expected)
    if steps_per_execution == 1:
        assert calls == expected_calls


@ran_out_of_data
def test_counts_no_update_at_the_end_of_the_data(strategy):
    # As without a strategy: test_silent_mistakes.py.
    rows = tf.data.Dataset.from_tensor_slices((X, Y)).batch(ROWS)
    model = make_model(strategy)
    with strategy.scope():
        optimizer = SequentialOptimizer(make_for_fit(), [3])
        model.compile(optimizer, loss="mse", jit_compile=False)
    model.fit(rows.filter(lambda x, y: True), epochs=2, shuffle=False, verbose=0)
    counts = [int(child.iterations.numpy()) for child in optimizer.children]
    assert counts == [3, 2 * UPDATES - 3]


@pytest.mark.skipif(NAME != "one-device", reason="several devices: test_limits.py")
def test_compiled_fit_equals_that_without_a_strategy(strategy):
    # Which equals the plain optimizers: ../test_training.py.
    expected, _ = fit_sequence(tf.distribute.get_strategy(), jit_compile=True)
    state, _ = fit_sequence(strategy, jit_compile=True)
    assert_same(state, expected)


# --- accumulation, where there is one replica --------------------------------


@pytest.mark.skipif(NAME != "one-device", reason="refused: test_misuse.py")
def test_accumulation_equals_that_without_a_strategy(strategy):
    def train(strategy):
        variables = make_variables(strategy)
        with strategy.scope():
            optimizer = SequentialOptimizer(
                adam_then_sgd(), [1], gradient_accumulation_steps=2
            )
        build(strategy, optimizer, variables)
        Loop(strategy, optimizer, variables, "graph").train()
        return values_of(strategy, variables + optimizer.variables)

    assert_same(train(strategy), train(tf.distribute.get_strategy()))
