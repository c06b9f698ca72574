"""In Keras: `fit`, loops, children, odd gradients, dtypes."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import (
    LBFGS,
    SequentialOptimizer,
    SSBroyden,
    SwitchOnPlateau,
)
from tests.helpers.models import make_model, ran_out_of_data
from tests.helpers.oracle import assert_same, compiled, make_variables, weights_of

METHODS = {"LBFGS": LBFGS, "SSBroyden": SSBroyden}
# What is tested here is the search, which they share, so one will do most of the time.
SOME = ["LBFGS", pytest.param("SSBroyden", marks=pytest.mark.slow)]
# Float32, whose rounding differs from mode to mode, over 12 steps.
ATOL = 1e-4


@pytest.fixture(params=SOME)
def make(request):
    """Makes one of the two optimizers."""
    return METHODS[request.param]


def make_data(rows=16, dtype="float32"):
    x = np.random.default_rng(3).normal(size=(rows, 3)).astype(dtype)
    return x, np.sin(x.sum(-1, keepdims=True))


def train_in_loop(model, optimizer, calls):
    """Trains as `fit` does with "mse", eagerly."""
    x, y = make_data()
    for _ in range(calls):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
            loss = optimizer.scale_loss(loss)
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply(gradients, model.trainable_variables)
    return float(loss)


def pairs_of(optimizer):
    """Returns how many steps the search has learned from."""
    return next(int(v) for v in optimizer.variables if v.name == "pairs")


WAYS = {
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "several steps": {"jit_compile": True, "steps_per_execution": 4},
    "eager": {"run_eagerly": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_fit_does_what_a_loop_does(make, way):
    by_hand = make_model(4, 1)
    optimizer = make()
    train_in_loop(by_hand, optimizer, 12)
    optimizer.finalize_variable_values(by_hand.trainable_variables)
    model = make_model(4, 1)
    model.compile(make(), "mse", **WAYS[way])
    x, y = make_data()
    data = tf.data.Dataset.from_tensors((x, y)).repeat(12)
    model.fit(data, epochs=1, verbose=0, shuffle=False)
    assert_same(model.get_weights(), by_hand.get_weights(), ATOL)
    assert int(model.optimizer.iterations) == 12
    # However a mode rounds, the search recognizes the weights that it has set.
    assert pairs_of(model.optimizer) == pairs_of(optimizer) >= 8


@pytest.mark.slow
def test_many_steps_in_one_loop_of_a_graph(make):
    by_hand, model = make_model(4, 1), make_model(4, 1)
    train_in_loop(by_hand, make(), 12)
    optimizer = make()
    optimizer.build(model.trainable_variables)
    x, y = make_data()

    @tf.function(jit_compile=True)
    def train():
        for _ in tf.range(12):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x) - y))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables)

    train()
    assert_same(model.get_weights(), by_hand.get_weights(), ATOL)


def sgd(name):
    return keras.optimizers.SGD(0.05, name=name)


def plain_phases(phases, variables, loss):
    """Runs optimizers by hand, each for its number of calls."""
    for optimizer, calls in phases:
        for _ in range(calls):
            with tf.GradientTape() as tape:
                value = loss()
            optimizer.apply(tape.gradient(value, variables), variables)


def bowl(variables):
    """A function with a minimum at 1, whose curvature differs by direction."""
    return lambda: sum(
        tf.reduce_sum(tf.square(v - 1.0) * tf.range(1.0, 1.0 + v.shape[0]))
        for v in variables
    )


PLACES = {"first": (0,), "middle": (1,), "last": (2,), "comes back": (0, 2)}


@pytest.mark.parametrize(
    "place",
    [
        *(pytest.param(place, marks=pytest.mark.slow) for place in ("first", "middle")),
        "last",
        "comes back",
    ],
)
@pytest.mark.parametrize("way", ["eager", "xla"])
def test_child_does_what_it_does_alone(make, place, way):
    # Weights that another child has moved are no trial point of the search.
    def children():
        method = make(name="method")
        own = PLACES[place]
        return [method if i in own else sgd(f"sgd{i}") for i in range(3)]

    expected = make_variables([(3,), (4,)])
    plain_phases(zip(children(), (4, 3, 6), strict=True), expected, bowl(expected))
    variables = make_variables([(3,), (4,)])
    optimizer = SequentialOptimizer(children(), [4, 7])
    optimizer.build(variables)
    loss = bowl(variables)

    def step():
        with tf.GradientTape() as tape:
            value = loss()
        optimizer.apply(tape.gradient(value, variables), variables)

    step = compiled(step, way)
    for _ in range(13):
        step()
    if way == "eager":
        assert_same(weights_of(variables), weights_of(expected))
    else:
        assert step.experimental_get_tracing_count() == 1
        assert_same(weights_of(variables), weights_of(expected), 1e-5)


@pytest.mark.slow
def test_switch_is_one_conditional_and_copies_no_matrix(make):
    # To set one row of S, as a ring buffer would, XLA copies S twice in a branch.
    weights = make_variables([(61,)])
    # A vector that is read after it was written is copied where it is not written, too.
    kept = ["f32[50,61]", "f32[61]"] if make is LBFGS else ["f32[61,61]"]
    optimizer = SequentialOptimizer([sgd("sgd"), make()], [2])
    optimizer.build(weights)

    @tf.function(jit_compile=True, autograph=False)
    def step():
        optimizer.apply([weights[0] * 2.0], weights)

    step()
    hlo = step.experimental_get_compiler_ir()(stage="optimized_hlo")
    assert hlo.count(" conditional(") == 1
    copies = [line for line in hlo.splitlines() if " copy(" in line]
    assert not [line for line in copies if any(shape in line for shape in kept)]


def test_works_deep_inside_of_other_optimizers(make):
    expected, variables = make_variables([(3,), (4,)]), make_variables([(3,), (4,)])
    alone = make()
    plain_phases([(sgd("a"), 2), (alone, 8)], expected, bowl(expected))
    inner = SequentialOptimizer([sgd("b"), make(name="method")], [2], name="inner")
    outer = SequentialOptimizer([inner, sgd("c")], [10], name="outer")
    scaled = keras.optimizers.LossScaleOptimizer(outer, initial_scale=8.0)
    scaled.build(variables)
    loss = bowl(variables)
    for _ in range(10):
        with tf.GradientTape() as tape:
            value = scaled.scale_loss(loss())
        scaled.apply(tape.gradient(value, variables), variables)
    assert_same(weights_of(variables), weights_of(expected), 1e-5)


@pytest.mark.slow
def test_plateau_starts_the_phase():
    model = make_model(4, 1)
    optimizer = SequentialOptimizer([sgd("sgd"), LBFGS()], [None])
    model.compile(optimizer, "mse", jit_compile=False)
    x, y = make_data()
    plateau = SwitchOnPlateau("loss", patience=2, min_delta=0.2)
    losses = model.fit(
        x, y, batch_size=16, epochs=30, verbose=0, callbacks=[plateau]
    ).history["loss"]
    started = int(optimizer.phase_starts[1])
    assert 0 < started < 10
    assert losses[-1] < losses[started] / 2


def test_learning_rate_callbacks_limit_the_steps(make):
    model = make_model(4, 1)
    model.compile(make(), "mse", jit_compile=False)
    x, y = make_data()
    lengths = []

    class Measure(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.before = np.concatenate([w.ravel() for w in model.get_weights()])

        def on_epoch_end(self, epoch, logs=None):
            after = np.concatenate([w.ravel() for w in model.get_weights()])
            lengths.append(np.sqrt(np.mean(np.square(after - self.before))))

    schedule = keras.callbacks.LearningRateScheduler(lambda epoch: 2.0**-6 / 2**epoch)
    model.fit(x, y, batch_size=16, epochs=4, verbose=0, callbacks=[schedule, Measure()])
    # Far from the optimum the first steps are as long as they may be.
    np.testing.assert_allclose(
        lengths[:3], [2**-6, 2**-7, 2**-8], rtol=1e-3, err_msg=str(lengths)
    )


@pytest.mark.slow
def test_window_of_mini_batches_is_one_full_batch(make):
    # What the search needs when the data do not fit into memory.
    whole, parts = make_model(4, 1), make_model(4, 1)
    x, y = make_data()
    whole.compile(make(), "mse", jit_compile=False)
    whole.fit(x, y, batch_size=16, epochs=10, verbose=0, shuffle=False)
    parts.compile(make(gradient_accumulation_steps=4), "mse", jit_compile=False)
    parts.fit(x, y, batch_size=4, epochs=10, verbose=0, shuffle=False)
    assert_same(parts.get_weights(), whole.get_weights(), ATOL)


@pytest.mark.slow
def test_child_sees_full_batches_after_stochastic_ones(make):
    x, y = make_data()
    expected = make_model(4, 1)
    expected.compile(sgd("sgd"), "mse", jit_compile=False)
    expected.fit(x, y, batch_size=4, epochs=2, verbose=0, shuffle=False)
    expected.compile(make(), "mse", jit_compile=False)
    expected.fit(x, y, batch_size=16, epochs=5, verbose=0, shuffle=False)
    model = make_model(4, 1)
    children = [sgd("sgd2"), make(gradient_accumulation_steps=4)]
    model.compile(SequentialOptimizer(children, [8]), "mse", jit_compile=False)
    model.fit(x, y, batch_size=4, epochs=7, verbose=0, shuffle=False)
    assert_same(model.get_weights(), expected.get_weights(), ATOL)


@ran_out_of_data
def test_windows_keep_to_the_epochs_of_a_dataset_of_unknown_size(make):
    # In a graph, Keras counts the step that finds no more data: the windows of later
    # epochs ended in mid-epoch.
    x, y = make_data()
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).batch(4, drop_remainder=True)
    dataset = dataset.filter(lambda *_: True)
    model = make_model(1)
    model.compile(make(gradient_accumulation_steps=4), "mse", jit_compile=False)
    model.fit(dataset, epochs=3, verbose=0, shuffle=False)
    expected = make_model(1)
    expected.compile(make(), "mse", jit_compile=False)
    expected.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0)
    assert int(model.optimizer.iterations) == 3
    assert_same(model.get_weights(), expected.get_weights(), ATOL)


def test_loss_scaling_hides_a_trial_point_without_a_gradient():
    # If this fails, Keras passes on gradients that are not finite: take the warning out
    # of the docstring of LBFGS.
    def final_weight(wrap):
        weight, optimizer = tf.Variable([1.0]), wrap(LBFGS(1.0))
        for _ in range(30):
            with tf.GradientTape() as tape:
                loss = optimizer.scale_loss(tf.reduce_sum(tf.sqrt(weight - 0.9)))
            optimizer.apply([tape.gradient(loss, weight)], [weight])
        return float(weight[0])

    np.testing.assert_allclose(final_weight(lambda search: search), 0.9, rtol=1e-6)
    assert abs(final_weight(keras.optimizers.LossScaleOptimizer)) < 1e-6


@pytest.mark.parametrize(
    "learning_rate", [pytest.param(0.05, marks=pytest.mark.slow), 1e3]
)
def test_fits_of_one_step_move(make, learning_rate):
    # Each once went back to where it had begun. With the longer steps, trial points are
    # rejected, too.
    model = make_model(4, 1)
    model.compile(make(learning_rate), "mse", jit_compile=False)
    x, y = make_data()
    losses = [
        model.fit(x, y, batch_size=16, shuffle=False, verbose=0).history["loss"][0]
        for _ in range(60)
    ]
    assert losses[-1] < 0.1 * losses[0]


def test_fit_with_nothing_left_to_do(make):
    # It once failed, where plain Keras returns.
    model = make_model(1)
    model.compile(make(), "mse")
    model.fit(*make_data(), initial_epoch=5, epochs=5, verbose=0)
    assert not model.optimizer.built


def test_nothing_is_learned_when_a_layer_is_frozen_or_unfrozen(make):
    # Its gradient, of which nothing was known before, was once taken for a change.
    a, b = tf.Variable([1.0, 1.0]), tf.Variable([5.0, 5.0])
    optimizer = make(0.05)
    optimizer.build([a, b])
    factor, pairs = tf.constant([1.0, 2.0]), []
    for variables in [[a, b], [a, b], [a], [a], [a, b], [a, b]]:
        optimizer.apply([factor * variable for variable in variables], variables)
        pairs.append(pairs_of(optimizer))
    assert pairs == [0, 1, 1, 2, 2, 3]


def test_curvature_of_one_last_bit_is_not_learned(make):
    weight = tf.Variable([0.0, 0.0])
    optimizer = make(1e-2, gradient_tolerance=0.0)
    optimizer.apply([tf.constant([-1.0, -1.0])], [weight])
    optimizer.apply([tf.constant([0.0, -2.0 + 2.0**-23])], [weight])
    assert pairs_of(optimizer) == 0


def test_tiny_weights_in_float16(make):
    # Below 2**-14 the distance between numbers no longer shrinks with the numbers, so
    # the search once did not recognize its own trial points.
    values, goal = (
        tf.constant([large, *tiny], "float16")
        for large, tiny in ((1.0, np.linspace(1e-5, 2e-5, 9)), (3.0, [1.5e-5] * 9))
    )
    weight, optimizer = tf.Variable(values), make(0.05)
    for _ in range(8):
        optimizer.apply([weight - goal], [weight])
    assert pairs_of(optimizer) > 3


def test_layer_that_is_frozen_in_mid_training_stays(make, mode):
    # It once moved on, by what the search had learned before.
    shapes = [(3,), (2, 2)]
    curvatures = [tf.constant([1.0, 2.0, 3.0]), tf.constant([[4.0, 5.0], [6.0, 7.0]])]
    frozen, other = variables = make_variables(shapes)
    optimizer = make(0.1)
    optimizer.build(variables)

    def both():
        mean = tf.reduce_mean(frozen)  # makes the curvature one of all weights
        pairs = zip(curvatures, variables, strict=True)
        optimizer.apply([c * v + mean for c, v in pairs], variables)

    def one():
        optimizer.apply([curvatures[1] * other], [other])

    both, one = compiled(both, mode), compiled(one, mode)
    for _ in range(6):
        both()
    assert pairs_of(optimizer) > 0
    (before,) = weights_of([frozen])
    for _ in range(40):
        one()
        assert_same(weights_of([frozen]), [before])
    np.testing.assert_allclose(other, 0, atol=1e-5)


def test_limit_of_the_next_step_outlasts_a_second_finalize(make):
    # After a rejected trial point the next search begins with a shorter step.
    weight, optimizer = tf.Variable([1.0]), make(1.0)
    for gradient in (1.0, -2.0):
        optimizer.apply([tf.constant([gradient])], [weight])
    named = {variable.name: variable for variable in optimizer.variables}
    assert int(named["rejected"]) == 1
    due = float(named["step"])
    for _ in range(2):
        optimizer.finalize_variable_values([weight])
        assert weight.numpy() == 1.0
        assert float(named["step"]) == -due
    optimizer.apply([tf.constant([1.0])], [weight])
    assert float(named["step"]) == due
    assert int(named["rejected"]) == -1


def test_missing_gradients_count_as_zero(make, mode):
    # Missing as `None`, as rows of a table, or as a variable that is not passed.
    shapes = [(4, 2), (3,), (2,)]
    expected, variables = make_variables(shapes), make_variables(shapes)
    full, sparse = make(), make()
    full.build(expected)
    sparse.build(variables)
    rows = tf.constant([1, 3, 1])

    def apply_full(table, vector):
        slices = tf.math.unsorted_segment_sum(table, rows, 4)
        full.apply([slices, vector, tf.zeros(2)], expected)

    def apply_sparse(table, vector):
        slices = tf.IndexedSlices(table, rows, tf.constant([4, 2]))
        sparse.apply([vector, slices], [variables[1], variables[0]])

    apply_full, apply_sparse = compiled(apply_full, mode), compiled(apply_sparse, mode)
    for _ in range(6):
        arguments = [
            tf.gather(expected[0], rows) * tf.constant([[0.5], [1.0], [0.5]]),
            expected[1] * tf.constant([1.0, 2.0, 3.0]),
        ]
        apply_full(*arguments)
        apply_sparse(*arguments)
    assert_same(weights_of(variables), weights_of(expected), 1e-6)
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        sparse.apply([None, tf.ones(3), None], variables)


@pytest.mark.parametrize(
    ("dtypes", "searched"),
    [
        (("float32", "float32"), "float32"),
        (("float64", "float32"), "float64"),
        (("bfloat16", "bfloat16"), "float32"),
        (("float16", "float32"), "float32"),
    ],
)
def test_searches_in_the_widest_type(make, dtypes, searched):
    variables = [
        tf.Variable([3.0, -2.0], dtype=dtype, name=f"w{i}")
        for i, dtype in enumerate(dtypes)
    ]
    optimizer = make(learning_rate=0.5)
    optimizer.build(variables)
    state = {v.name: v.dtype for v in optimizer.variables}
    assert state["point"] == state["gradient"] == searched
    for _ in range(40):
        gradients = [(v - 1) * tf.constant([1, 3], v.dtype) for v in variables]
        optimizer.apply(gradients, variables)
    for variable in variables:
        np.testing.assert_allclose(tf.cast(variable, "float32"), 1, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy", ["mixed_bfloat16", "mixed_float16", "float64"], indirect=True
)
def test_policies(make, policy):
    model = make_model(4, 1)
    model.compile(make(), "mse", jit_compile=False)
    x, y = make_data()
    losses = model.fit(x, y, batch_size=16, epochs=30, verbose=0).history["loss"]
    assert losses[-1] < losses[0] / 2
