"""What spans the phases: averages, loss scale, accumulation, phase, learning rate."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers.models import adam_then_sgd
from tests.helpers.oracle import (
    assert_same,
    compiled,
    make_gradients,
    make_variables,
    run,
    run_plain,
    weights_of,
)

SGD = keras.optimizers.SGD
Adam = keras.optimizers.Adam


def make_adam(**kwargs):
    return Adam(0.05, **kwargs)


def make_sgd(**kwargs):
    return SGD(0.02, momentum=0.9, **kwargs)


def make_there_and_back():
    adam, sgd = adam_then_sgd()
    return [adam, sgd, adam]


# The optimizer of each phase, and the boundaries.
SEQUENCES = {"a-b": (adam_then_sgd, [3]), "a-b-a": (make_there_and_back, [2, 4])}
UPDATES = 7
INDICES = [0, 3, 3]  # of the rows in a sparse gradient: one row twice


def make_overwritten(shapes=((3, 2), (2,))):
    """Returns variables, the last of which takes its gradient as its new value."""
    variables = make_variables(shapes)
    variables[-1].overwrite_with_gradient = True
    return variables


def values_of(optimizer, *kinds):
    """Returns the values of the optimizer variables of these kinds, by their names.

    Keras names them `w0_average`. The parent's come before those of its children.
    """
    variables = [v for v in optimizer.variables if v.name.endswith(kinds)]
    assert variables, f"{optimizer.name} has no variable of {kinds}"
    return weights_of(variables)


def run_by_hand(
    optimizers,
    boundaries,
    variables,
    gradients,
    mode,
    *,
    window=1,
    momentum=None,
    frequency=None,
):
    """What the settings of the parent mean, for plain optimizers and with an `if`.

    The mean gradient of each window makes one update. As in Keras, the average is
    taken at every call, is the weights themselves in the first window, and overwrites
    the weights at every call of the window that is due.

    Returns:
        The weights after each call, and the averages after the last.
    """
    steps, history = {}, []
    sums = [tf.zeros(v.shape) for v in variables]
    averages = [tf.zeros(v.shape) for v in variables]
    # In the same mode, because graph mode and XLA round differently: they turn a
    # division into a multiplication, and add a product without rounding it first.
    mean = compiled(lambda sums: [s / window for s in sums], mode)
    blend = compiled(
        lambda m, olds, news: [
            m * old + (1 - m) * new for old, new in zip(olds, news, strict=True)
        ],
        mode,
    )
    for call, grads in enumerate(gradients):
        updates = call // window
        optimizer = optimizers[sum(b <= updates for b in boundaries)]
        if id(optimizer) not in steps:
            optimizer.build(variables)
            steps[id(optimizer)] = compiled(
                lambda *grads, o=optimizer: o.apply(list(grads), variables), mode
            )
        sums = [g + s for g, s in zip(grads, sums, strict=True)]
        if (call + 1) % window == 0:
            steps[id(optimizer)](*mean(sums))
            sums = [tf.zeros_like(s) for s in sums]
        if momentum is not None:
            m = tf.constant(momentum if updates else 0.0)
            averages = blend(m, averages, [v.value for v in variables])
            if frequency and (updates + 1) % frequency == 0:
                for variable, value in zip(variables, averages, strict=True):
                    variable.assign(value)
                    if variable.constraint is not None:
                        variable.assign(variable.constraint(variable))
        history.append(weights_of(variables))
    return history, weights_of(averages)


# --- accumulation as in one plain optimizer -------------------------------------


def test_variable_that_is_passed_twice_accumulates_both(mode):
    # Tied layers: the second gradient replaced the first.
    def train(make, variables):
        optimizer = make(gradient_accumulation_steps=3)
        optimizer.build(variables)
        step = compiled(
            lambda *grads: optimizer.apply([*grads, *grads], variables * 2), mode
        )
        for grads in make_gradients(variables, 3):
            step(*grads)
        return weights_of(variables)

    def make_sequence(**kwargs):
        return SequentialOptimizer([SGD(0.1)], [], **kwargs)

    plain = train(lambda **kwargs: SGD(0.1, **kwargs), make_variables())
    assert_same(train(make_sequence, make_variables()), plain)


def test_constraints_hold_while_gradients_are_added_up():
    # They came with the update, and the first gradients were of other weights.
    def train(optimizer):
        (variable,) = make_variables([(3, 2)])
        variable.constraint = keras.constraints.UnitNorm(axis=0)
        optimizer.build([variable])
        history = []
        for gradients in make_gradients([variable], 3):
            optimizer.apply(gradients, [variable])
            history.append(weights_of([variable]))
        return history

    kwargs = {"gradient_accumulation_steps": 2}
    ours = train(SequentialOptimizer([SGD(0.1)], [], **kwargs))
    assert_same(ours, train(SGD(0.1, **kwargs)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_of_numpy_are_added_up(dtype):
    # They kept their dtype, and two dtypes cannot be added.
    variables = make_variables(dtype=dtype)
    optimizer = SequentialOptimizer([SGD(0.5)], [], gradient_accumulation_steps=2)
    before = [np.asarray(w, "float32") for w in weights_of(variables)]
    for _ in range(2):
        optimizer.apply([np.ones(v.shape) for v in variables], variables)
    for variable, start in zip(variables, before, strict=True):
        after = variable.numpy().astype("float32")
        np.testing.assert_allclose(after, start - 0.5, atol=2e-2)


# --- moving averages ---------------------------------------------------------


@pytest.mark.parametrize(("name", "frequency"), [("a-b", None), ("a-b-a", 2)])
def test_average_spans_the_phases(name, frequency, mode):
    make_optimizers, boundaries = SEQUENCES[name]
    ours, theirs = make_variables(), make_variables()
    gradients = make_gradients(ours, UPDATES)
    children, plain = make_optimizers(), make_optimizers()
    optimizer = SequentialOptimizer(
        children,
        boundaries,
        use_ema=True,
        ema_momentum=0.7,
        ema_overwrite_frequency=frequency,
    )
    history = run(optimizer, ours, gradients, mode)
    expected, averages = run_by_hand(
        plain,
        boundaries,
        theirs,
        gradients,
        mode,
        momentum=0.7,
        frequency=frequency,
    )
    assert_same(history, expected)
    assert_same(values_of(optimizer, "average"), averages)
    for child, plain_child in zip(children, plain, strict=True):
        assert_same(weights_of(child.variables), weights_of(plain_child.variables))


AVERAGE = {"use_ema": True, "ema_momentum": 0.7, "ema_overwrite_frequency": 2}


@pytest.mark.parametrize(
    "settings",
    [
        {"use_ema": True, "loss_scale_factor": 3.0},
        AVERAGE,
        {"gradient_accumulation_steps": 3},
        {**AVERAGE, "gradient_accumulation_steps": 2, "loss_scale_factor": 3.0},
    ],
    ids=["average", "overwrite", "accumulation", "all"],
)
def test_settings_with_one_child_equal_those_of_plain_adam(settings, mode):
    ours, theirs = make_variables(), make_variables()
    gradients = make_gradients(ours, UPDATES)
    optimizer = SequentialOptimizer([make_adam()], [], **settings)
    plain = make_adam(**settings)
    # XLA turns the condition at the end of a window, which is small here, into a
    # `select`, but only in plain Adam (as its optimized HLO shows). It then rounds a
    # product that it otherwise adds in one operation: one ulp of the moments.
    accumulates = "gradient_accumulation_steps" in settings
    atol = 2e-7 if mode == "xla" and accumulates else 0
    assert_same(
        run(optimizer, ours, gradients, mode),
        run(plain, theirs, gradients, mode),
        atol,
    )
    kinds = ("momentum", "velocity")
    if "use_ema" in settings:
        kinds += ("average",)
    if accumulates:
        kinds += ("gradient_accumulator",)
    assert_same(values_of(optimizer, *kinds), values_of(plain, *kinds), atol)
    assert int(optimizer.iterations) == int(plain.iterations)


class Grid(keras.constraints.Constraint):
    """Rounds to a grid, which is exact in every mode."""

    def __call__(self, w):
        return tf.round(w * 64) / 64


@pytest.mark.parametrize("boundaries", [[3], [4]])
def test_overwritten_weights_obey_their_constraint(boundaries, mode):
    # The average of two grid points is mostly not on the grid: an overwrite that
    # forgets the constraint shows at once. It is due after updates 2, 4 and 6.
    def make():
        variables = make_variables(((3, 2),))
        variables[0].constraint = Grid()
        return variables

    ours, theirs = make(), make()
    gradients = make_gradients(ours, 6)
    optimizer = SequentialOptimizer(
        adam_then_sgd(),
        boundaries,
        use_ema=True,
        ema_momentum=0.5,
        ema_overwrite_frequency=2,
    )
    history = run(optimizer, ours, gradients, mode)
    for (weight,) in history:
        np.testing.assert_array_equal(weight * 64 % 1, 0)
    expected, averages = run_by_hand(
        adam_then_sgd(),
        boundaries,
        theirs,
        gradients,
        mode,
        momentum=0.5,
        frequency=2,
    )
    assert_same(history, expected)
    assert_same(values_of(optimizer, "average"), averages)


def test_averages_are_not_taken_without_use_ema():
    optimizer = SequentialOptimizer(adam_then_sgd(), [2])
    optimizer.build(make_variables())
    assert not [v.name for v in optimizer.variables if v.name.endswith("average")]


# --- finalize_variable_values ------------------------------------------------


def train(optimizer, updates, variables=None):
    """Returns the variables after that many eager updates."""
    variables = variables or make_variables()
    run(optimizer, variables, make_gradients(variables, updates), "eager")
    return variables


def finalized(optimizer, variables):
    optimizer.finalize_variable_values(variables)
    return weights_of(variables)


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_finalize_gives_the_weights_the_average_of_all_phases(updates):
    optimizer = SequentialOptimizer(
        adam_then_sgd(), [2], use_ema=True, ema_momentum=0.7
    )
    variables = train(optimizer, updates)
    _, averages = run_by_hand(
        adam_then_sgd(),
        [2],
        plain_variables := make_variables(),
        make_gradients(plain_variables, updates),
        "eager",
        momentum=0.7,
    )
    assert_same(finalized(optimizer, variables), averages)


def test_finalize_leaves_a_frozen_weight_and_finds_the_average_of_the_others():
    # `fit` passes what is trainable at its end. Keras pairs that with all averages, so
    # a weight once got the average of the one that was frozen.
    frozen, other = make_variables([(2,), (2,)])
    optimizer = SequentialOptimizer(adam_then_sgd(), [2], use_ema=True)
    optimizer.build([frozen, other])
    for gradients in make_gradients([frozen, other], 4):
        optimizer.apply(gradients, [frozen, other])
    (before,), (_, average) = weights_of([frozen]), values_of(optimizer, "_average")
    optimizer.finalize_variable_values([other, keras.Variable([1.0, 2.0])])
    assert_same(weights_of([frozen, other]), [before, average])


def test_parents_average_goes_before_the_childs_own():
    child = make_adam(use_ema=True, ema_momentum=0.9)
    optimizer = SequentialOptimizer([child], [], use_ema=True, ema_momentum=0.1)
    variables = train(optimizer, 4)
    averages = values_of(optimizer, "average")
    parents, childs = averages[:2], averages[2:]
    assert not np.array_equal(parents[0], childs[0])
    assert_same(finalized(optimizer, variables), parents)


def test_finalize_uses_the_average_of_the_last_child():
    child = make_sgd(use_ema=True, ema_momentum=0.7)
    optimizer = SequentialOptimizer([make_adam(), child], [2])
    variables = train(optimizer, 5)

    plain = make_sgd(use_ema=True, ema_momentum=0.7)
    theirs = make_variables()
    run_plain([make_adam(), plain], [2], theirs, make_gradients(theirs, 5), "eager")
    assert_same(weights_of(variables), weights_of(theirs))
    assert_same(finalized(optimizer, variables), finalized(plain, theirs))


@pytest.mark.parametrize("of_parent", [False, True], ids=["child", "parent"])
def test_finalize_works_in_a_graph(of_parent, mode):
    child = make_sgd(use_ema=not of_parent, ema_momentum=0.7)
    settings = {"use_ema": of_parent, "ema_momentum": 0.7}
    optimizer = SequentialOptimizer([make_adam(), child], [2], **settings)
    variables = train(optimizer, 5)
    averages = values_of(optimizer, "average")
    assert not np.array_equal(averages[0], variables[0].numpy())
    compiled(lambda: optimizer.finalize_variable_values(variables), mode)()
    assert_same(weights_of(variables), averages)


def test_finalize_ignores_an_earlier_child_that_averages():
    optimizer = SequentialOptimizer([make_adam(use_ema=True), make_sgd()], [2])
    variables = train(optimizer, 3)
    before = weights_of(variables)
    assert_same(finalized(optimizer, variables), before)


def test_finalize_at_the_boundary_belongs_to_the_earlier_child():
    # After 2 updates the next phase has begun, but its child has made none.
    earlier = make_adam(use_ema=True, ema_momentum=0.7)
    later = make_sgd(use_ema=True)
    optimizer = SequentialOptimizer([earlier, later], [2])
    variables = train(optimizer, 2)
    assert int(optimizer.phase) == 1
    averages = values_of(earlier, "average")
    assert not np.array_equal(averages[0], variables[0].numpy())
    assert_same(finalized(optimizer, variables), averages)


def test_finalize_ignores_a_later_child_that_averages():
    optimizer = SequentialOptimizer([make_adam(), make_sgd(use_ema=True)], [2])
    variables = train(optimizer, 2)
    before = weights_of(variables)
    assert_same(finalized(optimizer, variables), before)


def test_finalize_after_advance_belongs_to_the_earlier_child():
    earlier = make_adam(use_ema=True, ema_momentum=0.7)
    optimizer = SequentialOptimizer([earlier, make_sgd(use_ema=True)], [None])
    variables = train(optimizer, 3)
    optimizer.advance()
    averages = values_of(earlier, "average")
    assert not np.array_equal(averages[0], variables[0].numpy())
    assert_same(finalized(optimizer, variables), averages)


@pytest.mark.parametrize("boundaries", [[2, None], [2, 5]])
def test_finalize_after_advance_ignores_the_next_child(boundaries):
    # Its average is that of phase 0, and the last update was made in phase 1.
    returning = make_adam(use_ema=True, ema_momentum=0.7)
    optimizer = SequentialOptimizer([returning, make_sgd(), returning], boundaries)
    variables = train(optimizer, 4)
    assert int(optimizer.phase) == 1
    optimizer.advance()
    before = weights_of(variables)
    assert_same(finalized(optimizer, variables), before)


def test_finalize_at_the_boundary_ignores_the_next_child():
    returning = make_adam(use_ema=True, ema_momentum=0.7)
    optimizer = SequentialOptimizer([returning, make_sgd(), returning], [2, 4])
    variables = train(optimizer, 4)
    assert int(optimizer.phase) == 2
    before = weights_of(variables)
    assert_same(finalized(optimizer, variables), before)


@pytest.mark.parametrize("settings", [{}, {"use_ema": True}], ids=["child", "parent"])
def test_finalize_before_any_update_leaves_the_weights(settings):
    # Averages start at zero.
    optimizer = SequentialOptimizer(
        [make_adam(use_ema=True), make_sgd(use_ema=True)], [2], **settings
    )
    variables = make_variables()
    optimizer.build(variables)
    before = weights_of(variables)
    assert_same(finalized(optimizer, variables), before)


def test_loss_scale_optimizer_finalizes_the_parents_average():
    inner = SequentialOptimizer(adam_then_sgd(), [2], use_ema=True, ema_momentum=0.7)
    variables = train(keras.optimizers.LossScaleOptimizer(inner), 3)
    averages = values_of(inner, "average")
    assert not np.array_equal(averages[0], variables[0].numpy())
    outer = keras.optimizers.LossScaleOptimizer(inner)
    assert_same(finalized(outer, variables), averages)


def sparse_gradients(table, factor=1.0):
    """Returns a function that makes a sparse gradient of `table` from three rows."""

    def gradients(values):
        with tf.GradientTape() as tape:
            rows = tf.gather(table[0].value, tf.constant(INDICES))
            loss = factor * tf.reduce_sum(rows * values)
        gradient = tape.gradient(loss, table[0].value)
        assert isinstance(gradient, tf.IndexedSlices)
        return [gradient]

    return gradients


# --- loss_scale_factor -------------------------------------------------------


def test_loss_scale_optimizer_treats_the_factor_as_plain():
    # Keras 3.5 divides by both; newer versions remove the factor.
    factors, values = [], []
    for inner in (
        SGD(1.0, loss_scale_factor=2.0),
        SequentialOptimizer([SGD(1.0)], [], loss_scale_factor=2.0),
    ):
        outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
        variable = keras.Variable([1.0, 2.0])
        outer.apply([tf.constant([8.0, -16.0])], [variable])
        factors.append(inner.loss_scale_factor)
        values.append(variable.numpy())
    assert factors[1] == factors[0]
    assert_same([values[1]], [values[0]])


def test_loss_is_multiplied_by_the_loss_scale_factor(mode):
    optimizer = SequentialOptimizer(adam_then_sgd(), [2], loss_scale_factor=8.0)
    scaled = compiled(optimizer.scale_loss, mode)(tf.constant([1.5, -2.0]))
    np.testing.assert_array_equal(scaled, [12.0, -16.0])


def test_loss_is_left_alone_without_a_loss_scale_factor():
    loss = tf.constant(1.5)
    assert SequentialOptimizer(adam_then_sgd(), [2]).scale_loss(loss) is loss


@pytest.mark.parametrize("name", SEQUENCES)
def test_gradients_are_divided_by_the_loss_scale_factor(name, mode):
    make_optimizers, boundaries = SEQUENCES[name]
    ours, theirs = make_variables(), make_variables()
    gradients = make_gradients(ours, UPDATES)
    # A power of two, so that scaling and dividing is exact.
    scaled = [[8.0 * g for g in grads] for grads in gradients]
    optimizer = SequentialOptimizer(make_optimizers(), boundaries, loss_scale_factor=8)
    assert_same(
        run(optimizer, ours, scaled, mode),
        run_plain(make_optimizers(), boundaries, theirs, gradients, mode),
    )


def test_scaled_loss_and_divided_gradients_cancel_out(mode):
    # As in `Model.train_step`: scale the loss, differentiate, apply.
    def make_step(optimizer, variables):
        def step(x):
            with tf.GradientTape() as tape:
                loss = sum(tf.reduce_sum(x * v * v) for v in variables)
                loss = optimizer.scale_loss(loss)
            weights = [v.value for v in variables]
            optimizer.apply(tape.gradient(loss, weights), variables)

        return step

    xs = [tf.constant(x) for x in (0.5, -1.25, 2.0, 0.75)]
    histories = []
    for factor in (None, 1024.0):
        variables = make_variables()
        optimizer = SequentialOptimizer(adam_then_sgd(), [2], loss_scale_factor=factor)
        optimizer.build(variables)
        step = compiled(make_step(optimizer, variables), mode)
        history = []
        for x in xs:
            step(x)
            history.append(weights_of(variables))
        histories.append(history)
    assert_same(*histories)


def test_values_that_overwrite_a_variable_are_not_divided(mode):
    ours, theirs = make_overwritten(), make_overwritten()
    gradients = make_gradients(ours, 4)
    scaled = [[8.0 * g, value] for g, value in gradients]
    optimizer = SequentialOptimizer(adam_then_sgd(), [2], loss_scale_factor=8.0)
    history = run(optimizer, ours, scaled, mode)
    assert_same(history, run_plain(adam_then_sgd(), [2], theirs, gradients, mode))
    for (_, weight), (_, value) in zip(history, gradients, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_sparse_gradients_are_divided_by_the_loss_scale_factor(mode):
    ours, theirs = make_variables(((5, 2),)), make_variables(((5, 2),))
    batches = [[g[0][:3]] for g in make_gradients(ours, 4)]
    optimizer = SequentialOptimizer(adam_then_sgd(), [2], loss_scale_factor=8.0)
    assert_same(
        run(optimizer, ours, batches, mode, sparse_gradients(ours, factor=8.0)),
        run_plain(
            adam_then_sgd(), [2], theirs, batches, mode, sparse_gradients(theirs)
        ),
    )


# --- gradient_accumulation_steps ---------------------------------------------

WINDOW = 3


@pytest.mark.parametrize(("name", "window"), [("a-b", 3), ("a-b-a", 2)])
def test_window_is_one_update_with_its_mean_gradient(name, window, mode):
    make_optimizers, boundaries = SEQUENCES[name]
    ours, theirs = make_variables(), make_variables()
    gradients = make_gradients(ours, window * (boundaries[-1] + 2))
    children, plain = make_optimizers(), make_optimizers()
    optimizer = SequentialOptimizer(
        children, boundaries, gradient_accumulation_steps=window
    )
    history = run(optimizer, ours, gradients, mode)
    expected, _ = run_by_hand(plain, boundaries, theirs, gradients, mode, window=window)
    assert_same(history, expected)
    for child, plain_child in zip(children, plain, strict=True):
        assert_same(weights_of(child.variables), weights_of(plain_child.variables))
    assert int(optimizer.iterations) == boundaries[-1] + 2


def test_window_equals_that_of_plain_adam_up_to_the_boundary(mode):
    ours, theirs = make_variables(), make_variables()
    gradients = make_gradients(ours, 3 * WINDOW)
    optimizer = SequentialOptimizer(
        adam_then_sgd(), [2], gradient_accumulation_steps=WINDOW
    )
    plain = make_adam(gradient_accumulation_steps=WINDOW)
    history = run(optimizer, ours, gradients, mode)
    expected = run(plain, theirs, gradients[: 2 * WINDOW], mode)
    assert_same(history[: 2 * WINDOW], expected)
    assert not np.array_equal(history[-1][0], expected[-1][0])


def test_boundary_never_splits_or_drops_a_window(mode):
    variables = make_variables(((2,),))
    adam, sgd = make_adam(), SGD(1.0)
    optimizer = SequentialOptimizer([adam, sgd], [1], gradient_accumulation_steps=3)
    optimizer.build(variables)

    def call(gradient):
        optimizer.apply([gradient], variables)
        return optimizer.phase, optimizer.iterations

    call = compiled(call, mode)
    before = weights_of(variables)[0]
    phases, updates, moved = [], [], []
    for gradient in [5.0, 5.0, 5.0, 1.0, 2.0, 6.0, 4.0, 4.0]:
        phase, iterations = call(tf.fill([2], gradient))
        after = weights_of(variables)[0]
        phases.append(int(phase))
        updates.append(int(iterations))
        moved.append(not np.array_equal(before, after))
        before, last = after, before
        if updates[-1] == 2 and moved[-1]:
            # SGD(1.0) subtracts the mean of its window, (1 + 2 + 6) / 3.
            np.testing.assert_array_equal(after, last - np.float32(3))
    assert phases == [0, 0, 1, 1, 1, 1, 1, 1]
    assert updates == [0, 0, 1, 1, 1, 2, 2, 2]
    assert moved == [False, False, True, False, False, True, False, False]
    assert [int(adam.iterations), int(sgd.iterations)] == [1, 1]


def test_window_open_at_advance_goes_to_the_new_child(mode):
    variables = make_variables(((2,),))
    before = weights_of(variables)[0]
    adam, sgd = make_adam(), SGD(1.0)
    optimizer = SequentialOptimizer([adam, sgd], [None], gradient_accumulation_steps=2)
    optimizer.build(variables)
    step = compiled(lambda g: optimizer.apply([g], variables), mode)
    step(tf.constant([1.0, 2.0]))
    optimizer.advance()
    step(tf.constant([3.0, -2.0]))
    # The means, (1 + 3) / 2 and (2 - 2) / 2.
    np.testing.assert_array_equal(weights_of(variables)[0], before - np.float32([2, 0]))
    assert [int(adam.iterations), int(sgd.iterations)] == [0, 1]


def test_childs_schedule_counts_windows(mode):
    schedule = keras.optimizers.schedules.PolynomialDecay(1.0, 4, 0.0)
    variables = make_variables(((1,),))
    optimizer = SequentialOptimizer(
        [SGD(0.0, name="still"), SGD(schedule)], [1], gradient_accumulation_steps=2
    )
    gradients = [[tf.ones(1)]] * 8
    start = weights_of(variables)[0]
    history = run(optimizer, variables, gradients, mode)
    # Learning rates 1, 3/4 and 2/4 in the windows after the first.
    moves = [float((start - weights[0])[0]) for weights in history]
    np.testing.assert_allclose(moves, [0, 0, 0, 1, 1, 1.75, 1.75, 2.25], atol=1e-6)


# Keras warns at each call without a gradient. Children see one update per window.
@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
@pytest.mark.parametrize("missing", range(WINDOW))
def test_missing_gradient_in_a_window_is_as_in_plain_adam(missing):
    def run_windows(optimizer, variables):
        optimizer.build(variables)
        history = []
        for call, (g, h) in enumerate(make_gradients(variables, 2 * WINDOW)):
            optimizer.apply([g, None if call == missing else h], variables)
            history.append(weights_of(variables))
        return history

    optimizer = SequentialOptimizer(
        adam_then_sgd(), [4], gradient_accumulation_steps=WINDOW
    )
    plain = make_adam(gradient_accumulation_steps=WINDOW)
    assert_same(
        run_windows(optimizer, make_variables()), run_windows(plain, make_variables())
    )


def test_variable_left_out_at_the_end_of_a_window(mode):
    # Its gradients of that window are lost, and do not leak into the next one.
    def run_windows(optimizer, variables):
        optimizer.build(variables)
        both = compiled(lambda g, h: optimizer.apply([g, h], variables), mode)
        one = compiled(lambda g: optimizer.apply([g], variables[:1]), mode)
        history = []
        for call, (g, h) in enumerate(make_gradients(variables, 4)):
            one(g) if call == 1 else both(g, h)
            history.append(weights_of(variables))
        return history

    optimizer = SequentialOptimizer([SGD(1.0)], [], gradient_accumulation_steps=2)
    plain = SGD(1.0, gradient_accumulation_steps=2)
    assert_same(
        run_windows(optimizer, make_variables()), run_windows(plain, make_variables())
    )


def test_window_of_sparse_gradients(mode):
    ours, theirs, plains = (make_variables(((5, 2),)) for _ in range(3))
    # Eighths, whose sums are exact whatever their order.
    rng = np.random.default_rng(3)
    values = [
        tf.constant(rng.integers(-16, 16, (3, 2)) / 8, tf.float32) for _ in range(8)
    ]
    dense = [
        [tf.tensor_scatter_nd_add(tf.zeros((5, 2)), [[i] for i in INDICES], value)]
        for value in values
    ]
    optimizer = SequentialOptimizer(adam_then_sgd(), [2], gradient_accumulation_steps=2)
    batches = [[value] for value in values]
    history = run(optimizer, ours, batches, mode, sparse_gradients(ours))
    expected, _ = run_by_hand(adam_then_sgd(), [2], theirs, dense, mode, window=2)
    assert_same(history, expected)

    plain = make_adam(gradient_accumulation_steps=2)
    expected = run(plain, plains, batches[:4], mode, sparse_gradients(plains))
    assert_same(history[:4], expected)


def test_window_of_values_that_overwrite_ends_with_the_largest(mode):
    ours, theirs = make_overwritten(), make_overwritten()
    gradients = [[g, tf.abs(v)] for g, v in make_gradients(ours, 3 * WINDOW)]
    optimizer = SequentialOptimizer(
        adam_then_sgd(), [2], gradient_accumulation_steps=WINDOW, loss_scale_factor=8.0
    )
    scaled = [[8.0 * g, v] for g, v in gradients]
    history = run(optimizer, ours, scaled, mode)
    for end in range(WINDOW - 1, len(history), WINDOW):
        values = [v for _, v in gradients[end + 1 - WINDOW : end + 1]]
        np.testing.assert_array_equal(history[end][1], np.max(values, axis=0))

    plain = make_adam(gradient_accumulation_steps=WINDOW)
    expected = run(plain, theirs, gradients[: 2 * WINDOW], mode)
    assert_same(history[: 2 * WINDOW], expected)


@pytest.mark.parametrize(("name", "frequency"), [("a-b", None), ("a-b-a", 2)])
def test_windows_and_averages_together(name, frequency, mode):
    make_optimizers, boundaries = SEQUENCES[name]
    ours, theirs = make_variables(), make_variables()
    gradients = make_gradients(ours, 2 * UPDATES)
    optimizer = SequentialOptimizer(
        make_optimizers(),
        boundaries,
        use_ema=True,
        ema_momentum=0.7,
        ema_overwrite_frequency=frequency,
        gradient_accumulation_steps=2,
    )
    history = run(optimizer, ours, gradients, mode)
    expected, averages = run_by_hand(
        make_optimizers(),
        boundaries,
        theirs,
        gradients,
        mode,
        window=2,
        momentum=0.7,
        frequency=frequency,
    )
    assert_same(history, expected)
    assert_same(values_of(optimizer, "average"), averages)


def test_skipped_call_does_not_count_in_a_window(mode):
    ours, theirs = make_variables(), make_variables()
    gradients = make_gradients(ours, 8)
    inner = SequentialOptimizer(adam_then_sgd(), [2], gradient_accumulation_steps=2)
    outer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0)
    # The fourth call overflows in the middle of a window, and halves the scale.
    scaled = [[8.0 * g for g in grads] for grads in gradients[:3]]
    scaled += [[tf.fill(g.shape, np.inf) for g in gradients[0]]]
    scaled += [[4.0 * g for g in grads] for grads in gradients[3:]]
    history = run(outer, ours, scaled, mode)
    assert_same(history[3], history[2])
    del history[3]
    expected, _ = run_by_hand(adam_then_sgd(), [2], theirs, gradients, mode, window=2)
    assert_same(history, expected)
    assert int(inner.iterations) == 4


# --- phase, advance, active_child, iterations --------------------------------


def min_phase_of(optimizer):
    (variable,) = [v for v in optimizer.variables if v.name == "min_phase"]
    return int(variable)


def test_phase_is_a_scalar_int32_that_follows_iterations(mode):
    variables = make_variables(((1,),))
    optimizer = SequentialOptimizer(make_there_and_back(), [2, 3])
    optimizer.build(variables)
    phase = compiled(lambda: optimizer.phase, mode)
    phases = [phase()]
    for gradients in make_gradients(variables, 4):
        optimizer.apply(gradients, variables)
        phases.append(phase())
    assert [int(p) for p in phases] == [0, 0, 1, 2, 2]
    assert {(p.dtype, p.shape.rank) for p in phases} == {(tf.int32, 0)}
    assert all(tf.is_tensor(p) for p in phases)


def test_advance_ends_the_phase(mode):
    variables = make_variables()
    plain_variables = make_variables()
    gradients = make_gradients(variables, 6)
    optimizer = SequentialOptimizer(adam_then_sgd(), [None])
    advance = compiled(optimizer.advance, mode)
    history = run(optimizer, variables, gradients[:2], mode)
    advance()
    assert int(optimizer.phase) == 1
    history += run(optimizer, variables, gradients[2:], mode)
    expected = run_plain(adam_then_sgd(), [2], plain_variables, gradients, mode)
    assert_same(history, expected)


def test_advance_before_an_integer_leaves_the_next_one(mode):
    variables = make_variables(((1,),))
    optimizer = SequentialOptimizer(make_there_and_back(), [4, 6])
    optimizer.build(variables)
    advance = compiled(optimizer.advance, mode)
    phases = []
    for update, gradients in enumerate(make_gradients(variables, 8)):
        if update == 1:
            advance()
        phases.append(int(optimizer.phase))
        optimizer.apply(gradients, variables)
    assert phases == [0, 1, 1, 1, 1, 1, 2, 2]


def test_advance_before_the_first_update_skips_the_phase():
    optimizer = SequentialOptimizer(adam_then_sgd(), [2])
    optimizer.advance()
    variables, theirs = make_variables(), make_variables()
    gradients = make_gradients(variables, 3)
    history = run(optimizer, variables, gradients, "graph")
    assert_same(history, run_plain([make_sgd()], [], theirs, gradients, "graph"))


def test_advance_twice_skips_a_phase(mode):
    optimizer = SequentialOptimizer(make_there_and_back(), [None, None])

    def advance_twice():
        optimizer.advance()
        optimizer.advance()

    compiled(advance_twice, mode)()
    assert int(optimizer.phase) == 2


def test_advance_does_nothing_in_the_last_phase(mode):
    variables = make_variables(((1,),))
    reached, advanced = (
        SequentialOptimizer(adam_then_sgd(), boundaries) for boundaries in ([2], [None])
    )
    for gradients in make_gradients(variables, 2):
        reached.build(variables)
        reached.apply(gradients, variables)
    advanced.advance()
    for optimizer, min_phase in ((reached, 0), (advanced, 1)):
        advance = compiled(optimizer.advance, mode)
        for _ in range(2):
            advance()
            assert int(optimizer.phase) == 1
            # Else a file saved now would end a phase that other integers reopen.
            assert min_phase_of(optimizer) == min_phase


def test_advance_does_nothing_with_one_child(mode):
    optimizer = SequentialOptimizer([make_adam()], [])
    compiled(optimizer.advance, mode)()
    assert int(optimizer.phase) == 0
    assert min_phase_of(optimizer) == 0


def test_advance_in_a_cond_takes_effect_only_if_taken(mode):
    optimizer = SequentialOptimizer(adam_then_sgd(), [None])
    advance_if = compiled(
        lambda condition: tf.cond(condition, optimizer.advance, lambda: None),
        mode,
    )
    advance_if(tf.constant(False))
    assert int(optimizer.phase) == 0
    advance_if(tf.constant(True))
    assert int(optimizer.phase) == 1


def test_advance_in_a_while_loop_holds_for_the_next_update(mode):
    variables, theirs = make_variables(((3,),)), make_variables(((3,),))
    gradients = make_gradients(variables, 6)
    stacked = tf.stack([gradient for (gradient,) in gradients])
    optimizer = SequentialOptimizer(adam_then_sgd(), [None])
    optimizer.build(variables)

    def train_loop(last_update_of_first):
        def body(i):
            optimizer.apply([stacked[i]], variables)
            tf.cond(
                tf.equal(i, last_update_of_first),
                optimizer.advance,
                lambda: None,
            )
            return [i + 1]

        tf.while_loop(lambda i: i < 6, body, [tf.constant(0)])
        return optimizer.phase

    assert int(compiled(train_loop, mode)(tf.constant(3))) == 1
    run_plain(adam_then_sgd(), [4], theirs, gradients, mode)
    assert_same(weights_of(variables), weights_of(theirs))


def test_active_child_is_that_of_the_next_update():
    variables = make_variables(((1,),))
    children = make_there_and_back()
    optimizer = SequentialOptimizer(children, [1, None])
    gradients = make_gradients(variables, 2)
    assert optimizer.active_child() is children[0]
    for grads in gradients:
        optimizer.build(variables)
        optimizer.apply(grads, variables)
        assert optimizer.active_child() is children[1]
    optimizer.advance()
    assert optimizer.active_child() is children[0]


def test_active_child_raises_in_a_graph():
    optimizer = SequentialOptimizer(adam_then_sgd(), [2])

    @tf.function(autograph=False)
    def name():
        return optimizer.active_child().name

    with pytest.raises(RuntimeError, match="must be called outside"):
        name()


def test_iterations_count_the_updates_of_all_children(mode):
    variables = make_variables()
    children = make_there_and_back()
    optimizer = SequentialOptimizer(children, [2, 5])
    run(optimizer, variables, make_gradients(variables, 6), mode)
    iterations = compiled(lambda: tf.identity(optimizer.iterations), mode)
    assert int(iterations()) == int(optimizer.iterations) == 6
    # Updates 0, 1 and 5; updates 2 to 4.
    assert [int(child.iterations) for child in children[:2]] == [3, 3]


def test_iterations_do_not_count_an_empty_list_of_gradients(mode):
    variables = make_variables()
    optimizer = SequentialOptimizer(adam_then_sgd(), [2])
    optimizer.build(variables)
    compiled(lambda: optimizer.apply([], []), mode)()
    assert int(optimizer.iterations) == 0


# --- learning_rate -----------------------------------------------------------


def make_rates(**kwargs):
    """Returns an optimizer whose phases differ in their learning rates only."""
    children = [SGD(0.5, name="first"), SGD(0.25, name="second")]
    return SequentialOptimizer(children, [2], **kwargs)


def rates_of(optimizer):
    return [float(child.learning_rate) for child in optimizer.children]


def test_learning_rate_is_the_active_childs(mode):
    variables = make_variables(((1,),))
    optimizer = make_rates()
    optimizer.build(variables)
    get = compiled(lambda: tf.identity(optimizer.learning_rate), mode)
    rates = []
    for gradients in make_gradients(variables, 4):
        rates.append(float(get()))
        optimizer.apply(gradients, variables)
    assert rates == [0.5, 0.5, 0.25, 0.25]


def test_learning_rate_of_a_schedule_starts_at_0_with_its_phase(mode):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.5, 0.125])
    variables = make_variables(((1,),))
    optimizer = SequentialOptimizer([SGD(1.0, name="first"), SGD(schedule)], [3])
    optimizer.build(variables)
    get = compiled(lambda: tf.identity(optimizer.learning_rate), mode)
    rates = []
    for gradients in make_gradients(variables, 6):
        rates.append(float(get()))
        optimizer.apply(gradients, variables)
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.5, 0.125]


@pytest.mark.parametrize("phase", [0, 1])
def test_setting_the_learning_rate_sets_the_active_child(phase, mode):
    optimizer = make_rates()
    set_rate = compiled(lambda rate: setattr(optimizer, "learning_rate", rate), mode)
    if phase:
        optimizer.advance()
    set_rate(tf.constant(0.75))
    assert rates_of(optimizer) == ([0.5, 0.75] if phase else [0.75, 0.25])


def test_number_can_be_set_as_learning_rate(mode):
    optimizer = make_rates()

    def set_rate():
        optimizer.learning_rate = 0.75

    compiled(set_rate, mode)()
    assert rates_of(optimizer) == [0.75, 0.25]


def test_learning_rate_set_between_updates_needs_no_trace(mode):
    variables = make_variables(((2,),))
    optimizer = make_rates()
    optimizer.build(variables)
    step = compiled(lambda: optimizer.apply([tf.ones(2)], variables), mode)
    moves = []
    for rate in (None, 1.0, None, 2.0):
        if rate is not None:
            optimizer.learning_rate = rate
        before = weights_of(variables)[0]
        step()
        moves.append((before - weights_of(variables)[0]).round(3).tolist())
    # The second phase begins at its own rate.
    assert moves == [[0.5] * 2, [1.0] * 2, [0.25] * 2, [2.0] * 2]
    if mode != "eager":
        assert step.experimental_get_tracing_count() == 1


def test_learning_rate_of_a_schedule_cannot_be_set(mode):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 2, 0.5)
    optimizer = SequentialOptimizer([SGD(schedule), SGD(0.25, name="second")], [2])

    def set_rate():
        optimizer.learning_rate = 0.75

    with pytest.raises(TypeError, match="LearningRateSchedule"):
        compiled(set_rate, mode)()
    assert rates_of(optimizer) == [0.5, 0.25]


def test_schedule_can_be_set_outside_of_a_graph():
    optimizer = make_rates()
    optimizer.learning_rate = keras.optimizers.schedules.ExponentialDecay(4.0, 2, 0.5)
    assert rates_of(optimizer) == [4.0, 0.25]
    assert float(optimizer.learning_rate) == 4.0


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_callable_cannot_be_set_as_learning_rate_in_a_graph(mode):
    optimizer = make_rates()
    schedule = keras.optimizers.schedules.ExponentialDecay(4.0, 2, 0.5)

    def set_rate():
        optimizer.learning_rate = schedule

    with pytest.raises(ValueError, match="must be a number or a scalar tensor"):
        compiled(set_rate, mode)()
    assert rates_of(optimizer) == [0.5, 0.25]
