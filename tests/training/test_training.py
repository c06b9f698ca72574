"""Every way of training a model equals the oracle, in one trace and one compile."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers.models import Counting, adam_then_sgd, make_model, state_of
from tests.helpers.oracle import assert_same, compiled, weights_of

SGD = keras.optimizers.SGD
Adam = keras.optimizers.Adam

BATCH = 4
UPDATES = 6
# Inside of the second window of `steps_per_execution=3`.
BOUNDARY = 4

_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(UPDATES * BATCH, 3)).astype("float32")
Y = _RNG.normal(size=(UPDATES * BATCH, 1)).astype("float32")
BATCHES = [
    (tf.constant(X[i : i + BATCH]), tf.constant(Y[i : i + BATCH]))
    for i in range(0, len(X), BATCH)
]


def make_tiny():
    return make_model(5, 1, model_class=Counting)


# --- fit and train_on_batch --------------------------------------------------

FIT_MODES = {
    "jit_compile=True": {"jit_compile": True},
    "jit_compile=False": {"jit_compile": False},
    "jit_compile=auto": {"jit_compile": "auto"},
    "run_eagerly": {"run_eagerly": True},
    "steps_per_execution=3": {"jit_compile": False, "steps_per_execution": 3},
    "steps_per_execution=3, jit_compile=True": {
        "jit_compile": True,
        "steps_per_execution": 3,
    },
}


def fit(model, optimizer, first, last, **kwargs):
    """Fits the model to the batches from `first` up to `last`."""
    model.compile(optimizer, loss="mse", **kwargs)
    part = slice(first * BATCH, last * BATCH)
    model.fit(X[part], Y[part], batch_size=BATCH, shuffle=False, verbose=0)


@functools.cache
def fit_plain(**kwargs):
    """Fits with one plain optimizer up to the boundary, and another from there."""
    model, optimizers = make_tiny(), adam_then_sgd()
    fit(model, optimizers[0], 0, BOUNDARY, **kwargs)
    fit(model, optimizers[1], BOUNDARY, UPDATES, **kwargs)
    return state_of(model, *optimizers)


@pytest.mark.parametrize("mode", FIT_MODES)
def test_fit_equals_two_fits_with_plain_optimizers(mode):
    kwargs = FIT_MODES[mode]
    model, children = make_tiny(), adam_then_sgd()
    optimizer = SequentialOptimizer(children, [BOUNDARY])
    fit(model, optimizer, 0, UPDATES, **kwargs)
    # The windows of `steps_per_execution` would not end at the boundary.
    plain = {k: v for k, v in kwargs.items() if k != "steps_per_execution"}
    assert_same(state_of(model, *children), fit_plain(**plain))
    assert int(optimizer.iterations) == UPDATES


# mixed_float16, with its loss scaling, is in test_switch_on_plateau.py.
# Compiled by XLA it is in tests/slow.
POLICIES = ["float16", "bfloat16", "mixed_bfloat16", "float64"]


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES, indirect=True)
def test_fit_under_a_dtype_policy_equals_two_fits(policy):
    check_fit_under(policy, jit_compile=False)


def check_fit_under(policy, jit_compile, atol=0):
    model, children = make_tiny(), adam_then_sgd()
    assert model.layers[-1].dtype_policy.name == policy
    fit(
        model,
        SequentialOptimizer(children, [BOUNDARY]),
        0,
        UPDATES,
        jit_compile=jit_compile,
    )
    plain = fit_plain.__wrapped__(jit_compile=jit_compile)
    assert_same(state_of(model, *children), plain, atol)


@pytest.mark.slow
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("order", [0, 1])
def test_model_built_by_fit_trains_as_one_built_before(order, jit_compile):
    # Without an `Input` the weights have no values yet while the step is traced. The
    # first of the two copies them when it is built.
    copies = getattr(keras.optimizers, "ScheduleFreeAdamW", Adam)

    def train(*inputs):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([*inputs, keras.layers.Dense(1)])
        children = [copies(0.05, name="copies"), SGD(0.1, name="sgd")][:: 1 - 2 * order]
        optimizer = SequentialOptimizer(children, [BOUNDARY])
        if inputs:
            optimizer.build(model.trainable_variables)
        fit(model, optimizer, 0, UPDATES, jit_compile=jit_compile)
        return state_of(model, *children)

    assert_same(train(), train(keras.Input(X.shape[1:])))


def test_frozen_layer_stays_and_the_rest_equals_plain():
    def make_frozen_model():
        model = make_tiny()
        model.layers[1].trainable = False
        return model

    model, children = make_frozen_model(), adam_then_sgd()
    frozen = weights_of(model.layers[1].weights)
    fit(model, SequentialOptimizer(children, [BOUNDARY]), 0, UPDATES)
    plain, optimizers = make_frozen_model(), adam_then_sgd()
    fit(plain, optimizers[0], 0, BOUNDARY)
    fit(plain, optimizers[1], BOUNDARY, UPDATES)
    assert_same(state_of(model, *children), state_of(plain, *optimizers))
    assert_same(weights_of(model.layers[1].weights), frozen)


@pytest.mark.parametrize("jit_compile", [True, False])
def test_train_on_batch_equals_plain_optimizers(jit_compile):
    model, children = make_tiny(), adam_then_sgd()
    optimizer = SequentialOptimizer(children, [BOUNDARY])
    model.compile(optimizer, loss="mse", jit_compile=jit_compile)
    for x, y in BATCHES:
        model.train_on_batch(x, y)
    assert_same(state_of(model, *children), fit_plain(jit_compile=jit_compile))


def test_fit_ends_with_the_average_of_both_phases():
    model = make_tiny()
    optimizer = SequentialOptimizer(adam_then_sgd(), [BOUNDARY], use_ema=True)
    fit(model, optimizer, 0, UPDATES, jit_compile=False)
    averages = [v for v in optimizer.variables if v.name.endswith("average")]
    assert_same(weights_of(model.trainable_variables), weights_of(averages))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kwargs",
    [{"jit_compile": True}, {"jit_compile": False, "steps_per_execution": 3}],
    ids=["jit_compile", "steps_per_execution"],
)
def test_fit_traces_as_often_as_plain_adam(kwargs):
    plain = make_tiny()
    fit(plain, Adam(0.05), 0, 3, **kwargs)
    assert plain.train_steps > 0

    model = make_tiny()
    optimizer = SequentialOptimizer(adam_then_sgd(), [BOUNDARY])
    fit(model, optimizer, 0, 3, **kwargs)
    assert int(optimizer.phase) == 0
    assert model.train_steps == plain.train_steps
    # Another `fit`, across the switch, with what the first one traced.
    model.fit(X, Y, batch_size=BATCH, shuffle=False, verbose=0)
    assert int(optimizer.phase) == 1
    assert model.train_steps == plain.train_steps


# --- custom loops ------------------------------------------------------------


def make_step(model, optimizer):
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        weights = model.trainable_variables
        grads = tape.gradient(loss, weights)
        optimizer.apply_gradients(zip(grads, weights, strict=True))
        return loss

    return step


def run_loop(optimizer, model, batches, mode, built):
    """Trains in a Python loop over a step; returns the step and the losses."""
    if built:
        optimizer.build(model.trainable_variables)
    step = compiled(make_step(model, optimizer), mode)
    return step, [float(step(x, y)) for x, y in batches]


def traces_of_a_run(built):
    """A tf.function whose first call creates variables is always traced twice."""
    return 1 if built else 2


@pytest.mark.parametrize("built", [True, False], ids=["built", "lazy"])
def test_custom_loop_equals_plain_optimizers(mode, built):
    model, children = make_tiny(), adam_then_sgd()
    optimizer = SequentialOptimizer(children, [BOUNDARY])
    step, losses = run_loop(optimizer, model, BATCHES, mode, built)

    plain, (adam, sgd) = make_tiny(), adam_then_sgd()
    plain_step, expected = run_loop(adam, plain, BATCHES[:BOUNDARY], mode, built)
    expected += run_loop(sgd, plain, BATCHES[BOUNDARY:], mode, built)[1]
    assert losses == expected
    assert_same(state_of(model, *children), state_of(plain, adam, sgd))
    if mode != "eager":
        traces = traces_of_a_run(built)
        assert plain_step.experimental_get_tracing_count() == traces
        assert step.experimental_get_tracing_count() == traces


def make_while_loop(model, optimizer, mode, built=True):
    step = make_step(model, optimizer)
    xs, ys = (tf.stack(parts) for parts in zip(*BATCHES, strict=True))

    def loop(first, last):
        def body(i):
            step(xs[i], ys[i])
            return [i + 1]

        tf.while_loop(lambda i: i < last, body, [first])

    if built:
        optimizer.build(model.trainable_variables)
    return compiled(loop, mode)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "built"), [("graph", True), ("xla", True), ("xla", False)]
)
def test_while_loop_over_the_boundary_equals_plain_optimizers(mode, built):
    model, children = make_tiny(), adam_then_sgd()
    optimizer = SequentialOptimizer(children, [BOUNDARY])
    loop = make_while_loop(model, optimizer, mode, built)
    loop(tf.constant(0), tf.constant(UPDATES))

    plain, (adam, sgd) = make_tiny(), adam_then_sgd()
    middle = tf.constant(BOUNDARY)
    plain_loop = make_while_loop(plain, adam, mode, built)
    plain_loop(tf.constant(0), middle)
    make_while_loop(plain, sgd, mode, built)(middle, tf.constant(UPDATES))
    assert_same(state_of(model, *children), state_of(plain, adam, sgd))
    traces = traces_of_a_run(built)
    assert plain_loop.experimental_get_tracing_count() == traces
    assert loop.experimental_get_tracing_count() == traces


# --- one graph, one compile --------------------------------------------------


def make_children(order):
    """Returns an optimizer for each letter of `order`, one for all equal letters."""
    kinds = {
        "a": lambda: Adam(0.05),
        "b": lambda: SGD(0.1, momentum=0.9),
        "c": lambda: keras.optimizers.RMSprop(0.01),
        "d": lambda: keras.optimizers.Adagrad(0.1),
        "e": lambda: SGD(0.01, name="plain_sgd"),
    }
    children = {letter: kinds[letter]() for letter in sorted(set(order))}
    return [children[letter] for letter in order]


@pytest.fixture(params=["a", "ab", "abc", "abcde", "aba"])
def phases(request):
    """The children of the phases, one letter each."""
    return request.param


def make_sequence(order):
    return SequentialOptimizer(make_children(order), list(range(2, len(order) + 1)))


def test_compiled_step_holds_exactly_one_conditional(phases):
    step, _ = run_loop(make_sequence(phases), make_tiny(), [], "xla", built=True)
    hlo = step.experimental_get_compiler_ir(*BATCHES[0])(stage="hlo")
    assert hlo.startswith("HloModule")
    assert hlo.count("conditional(") == (0 if phases == "a" else 1)


def test_graph_holds_one_case_with_a_branch_for_each_child(phases):
    step, _ = run_loop(make_sequence(phases), make_tiny(), [], "graph", built=True)
    graph = step.get_concrete_function(*BATCHES[0]).graph.as_graph_def()
    nodes = list(graph.node)
    for function in graph.library.function:
        nodes.extend(function.node_def)
    switches = ("Case", "StatelessCase", "If", "StatelessIf", "While", "StatelessWhile")
    branches = [
        (node.op, len(node.attr["branches"].list.func))
        for node in nodes
        if node.op in switches
    ]
    assert branches == ([] if phases == "a" else [("Case", len(set(phases)))])
