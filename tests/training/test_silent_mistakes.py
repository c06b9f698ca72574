"""What a user may do by mistake, or rightly expect to work, and what happens then."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers.errors import refuses
from tests.helpers.models import adam_then_sgd, make_model, ran_out_of_data
from tests.helpers.oracle import (
    assert_same,
    compiled,
    make_gradients,
    make_variables,
    run,
    run_plain,
    weights_of,
)

optimizers = keras.optimizers


# --- what cannot be changed --------------------------------------------------


# `optimizer.boundaries = [100]` in the middle of a run was accepted, and the switch
# came at the old boundary; a child that was put into `children` made no update.
def test_boundaries_and_children_cannot_be_set():
    optimizer = SequentialOptimizer(adam_then_sgd(), [4])
    with refuses("`boundaries`", "cannot be changed", error=AttributeError):
        optimizer.boundaries = [100]
    with refuses("`children`", "cannot be changed", error=AttributeError):
        optimizer.children = adam_then_sgd()
    with pytest.raises(TypeError):
        optimizer.children[1] = optimizers.SGD(0.2)
    assert optimizer.boundaries == (4,)
    assert [child.name for child in optimizer.children] == ["adam", "sgd"]


# Keras' trainer calls `apply_gradients`, and a sequence the child's `apply`, so the
# override of this class was ignored.
def test_child_that_overrides_apply_gradients_is_refused():
    class Halving(optimizers.SGD):
        def apply_gradients(self, grads_and_vars):
            return super().apply_gradients([(g / 2, v) for g, v in grads_and_vars])

    with refuses("`apply_gradients`"):
        SequentialOptimizer([Halving(0.1), "adam"], [2])


# Nothing called its `scale_loss`, and its `apply` divided all the same.
def test_child_that_overrides_scale_loss_is_refused():
    class Scaled(optimizers.SGD):
        def scale_loss(self, loss):
            return 8 * loss

    with refuses("`LossScaleOptimizer`", "`scale_loss`"):
        SequentialOptimizer([Scaled(0.1), "adam"], [2])


# The branches shared the lists: the next one to be traced missed what was deleted.
def test_child_that_changes_its_lists_leaves_those_of_others():
    class Freezing(optimizers.SGD):
        def build(self, variables):
            del variables[1:]
            super().build(variables)

        def apply(self, grads, trainable_variables=None):
            del grads[1:], trainable_variables[1:]
            super().apply(grads, trainable_variables)

    ours, theirs = make_variables(), make_variables()
    gradients = make_gradients(ours, 4)
    optimizer = SequentialOptimizer([Freezing(0.1), optimizers.Adam(0.1)], [2])
    first, adam = optimizers.SGD(0.1), optimizers.Adam(0.1)
    run(optimizer, ours, gradients, "graph")
    for grads in gradients[:2]:
        first.apply(grads[:1], theirs[:1])
    run(adam, theirs, gradients[2:], "graph")
    assert_same(weights_of(ours), weights_of(theirs))


# What it returned was taken for the result of a branch.
def test_child_whose_finalize_returns_something(mode):
    class Returning(optimizers.SGD):
        def finalize_variable_values(self, var_list):
            super().finalize_variable_values(var_list)
            return var_list[0] + 1.0

    variables = make_variables()
    optimizer = SequentialOptimizer([Returning(0.1), optimizers.Adam(0.1)], [2])
    history = run(optimizer, variables, make_gradients(variables, 1), mode)
    compiled(lambda: optimizer.finalize_variable_values(variables), mode)()
    assert_same(weights_of(variables), history[-1])


# A class whose `build` does not call that of Keras knows no variables.
def test_child_that_keeps_its_own_list_may_be_built_before():
    class Own(optimizers.SGD):
        def build(self, variables):
            self.built = True

        def apply(self, grads, trainable_variables=None):
            trainable_variables[0].assign_sub(grads[0])

    variable, own = tf.Variable([1.0, 2.0]), Own(0.1)
    own.build([variable])
    SequentialOptimizer([own, "adam"], [2]).apply([tf.ones(2)], [variable])
    np.testing.assert_array_equal(variable, [0.0, 1.0])


# Keras made `r_adam_2` of the first and `r_adam_2_1` of the second.
def test_number_at_the_end_of_a_class_name():
    class RAdam_2(optimizers.SGD):  # noqa: N801
        pass

    store, variable = {}, tf.Variable([1.0, 2.0])
    saved, loaded = (SequentialOptimizer([RAdam_2(0.1)], []) for _ in range(2))
    saved.apply([tf.ones(2)], [variable])
    saved.save_own_variables(store)
    loaded.build([variable])
    loaded.load_own_variables(store)
    assert int(loaded.iterations) == 1


# The number of rows became int64, where the indices are int32.
def test_rows_of_a_sparse_gradient_keep_their_dtype():
    class Scattering(optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            indices = gradient.indices[:, None]
            dense = tf.scatter_nd(indices, gradient.values, gradient.dense_shape)
            super().update_step(dense, variable, learning_rate)

    ours, theirs = (tf.Variable([[1.0], [2.0], [3.0]]) for _ in range(2))
    for optimizer, variable in (
        (SequentialOptimizer([Scattering(0.1)], []), ours),
        (Scattering(0.1), theirs),
    ):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(variable, [0, 2, 2]))
        optimizer.apply([tape.gradient(loss, variable)], [variable])
    assert_same(weights_of([ours]), weights_of([theirs]))


# The remedy that the error names.
def test_child_that_overrides_apply_equals_plain(mode):
    class Halving(optimizers.SGD):
        def apply(self, grads, trainable_variables=None):
            super().apply([g / 2 for g in grads], trainable_variables)

    ours, theirs = make_variables(), make_variables()
    gradients = make_gradients(ours, 4)
    optimizer = SequentialOptimizer([Halving(0.1), optimizers.Adam(0.1)], [2])
    expected = run_plain(
        [Halving(0.1), optimizers.Adam(0.1)], [2], theirs, gradients, mode
    )
    assert_same(run(optimizer, ours, gradients, mode), expected)


# The sequence scales the loss, by its own factor; the child would divide by this one.
@pytest.mark.parametrize("when", ["before build", "after build"])
def test_loss_scale_factor_set_on_a_child_later_is_refused(when):
    variables = make_variables(((1,),))
    children = adam_then_sgd()
    optimizer = SequentialOptimizer(children, [2])
    if when == "after build":
        optimizer.apply([tf.ones(1)], variables)
    before = weights_of(variables)
    children[1].loss_scale_factor = 4.0
    with refuses("`loss_scale_factor`"):
        optimizer.apply([tf.ones(1)], variables)
    assert_same(weights_of(variables), before)


def test_unknown_variables_are_named_by_their_paths():
    layers = [keras.layers.Dense(1, name=name) for name in ("known", "unknown")]
    for layer in layers:
        layer.build((1, 1))
    optimizer = SequentialOptimizer(adam_then_sgd(), [4])
    optimizer.build(layers[0].trainable_variables)
    gradients = [tf.ones(v.shape) for v in layers[1].trainable_variables]
    with refuses("`trainable_variables`") as error:
        optimizer.apply(gradients, layers[1].trainable_variables)
    assert "['unknown/kernel', 'unknown/bias']" in str(error.value)


def test_same_instance_twice_in_a_row_warns():
    adam, sgd = adam_then_sgd()
    with pytest.warns(UserWarning, match=r"changes nothing\. Received: `sgd` twice"):
        SequentialOptimizer([adam, sgd, sgd], [1, 2])
    SequentialOptimizer([adam, sgd, adam], [1, 2])


# --- advance(to=...) ---------------------------------------------------------


# An epoch that is resumed runs its callbacks again, and a second `advance()` there
# ended a second phase.
def test_advance_to_a_phase_may_run_twice(mode):
    optimizer = SequentialOptimizer(["adam", "sgd", "lion"], [None, None])
    advance = compiled(lambda: optimizer.advance(to=1), mode)
    for _ in range(2):
        assert advance() is None
        assert int(optimizer.phase) == 1


def test_advance_to_ends_every_phase_before():
    optimizer = SequentialOptimizer(["adam", "sgd", "lion"], [3, None])
    optimizer.advance(to=2)
    assert int(optimizer.phase) == 2
    optimizer.advance(to=0)
    assert int(optimizer.phase) == 2


# Else a file saved now would keep phase 1 when the boundary is raised.
def test_advance_to_a_phase_that_has_begun_changes_nothing():
    variables = make_variables(((1,),))
    optimizer = SequentialOptimizer(adam_then_sgd(), [1])
    optimizer.apply([tf.ones(1)], variables)
    before = weights_of(optimizer.variables)
    optimizer.advance(to=np.int64(1))
    assert_same(weights_of(optimizer.variables), before)


@pytest.mark.parametrize("to", [-1, 2, 0.5, True, "sgd"])
def test_advance_to_no_phase(to):
    optimizer = SequentialOptimizer(adam_then_sgd(), [4])
    with refuses("`to`", "from 0 to 1"):
        optimizer.advance(to=to)
    assert int(optimizer.phase) == 0


# `advance` returned the phase, so `tf.cond` wanted one from the other branch as well.
@pytest.mark.parametrize("spelling", ["cond", "if"])
def test_advance_under_a_condition(spelling):
    optimizer = SequentialOptimizer(adam_then_sgd(), [None])

    @tf.function(autograph=spelling == "if")
    def advance_if(condition):
        if spelling == "cond":
            tf.cond(condition, optimizer.advance, lambda: None)
        elif condition:
            optimizer.advance()

    phases = []
    for condition in (False, True):
        advance_if(tf.constant(condition))
        phases.append(int(optimizer.phase))
    assert phases == [0, 1]


# --- repr --------------------------------------------------------------------


def test_repr_shows_children_and_boundaries():
    adam, sgd = adam_then_sgd()
    inner = SequentialOptimizer([sgd, "lion"], [None], name="inner")
    optimizer = SequentialOptimizer([adam, inner, adam], [100, None])
    assert repr(optimizer) == (
        "SequentialOptimizer([Adam(name='adam'), SequentialOptimizer([SGD(name='sgd'), "
        "Lion(name='lion')], boundaries=[None]), Adam(name='adam')], "
        "boundaries=[100, None])"
    )


# --- a subclass --------------------------------------------------------------


@keras.saving.register_keras_serializable("test_silent_mistakes")
class AdamThenSGD(SequentialOptimizer):
    def __init__(self, boundary, name=None):
        super().__init__([optimizers.Adam(), optimizers.SGD()], [boundary], name)

    def get_config(self):
        return {"boundary": self.boundaries[0], "name": self.name}


# Keras documents this way to write an optimizer, and makes it again from its config.
def test_subclass_with_its_own_config_is_loaded(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(AdamThenSGD(3), "mse")
    model.fit(np.ones((4, 2)), np.ones((4, 1)), epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is AdamThenSGD
    assert_same(loaded.optimizer.variables, model.optimizer.variables)


class Tagged(SequentialOptimizer):
    def __init__(self, tag, optimizers, boundaries, **kwargs):
        super().__init__(optimizers, boundaries, **kwargs)
        self.tag = tag

    def get_config(self):
        return {**super().get_config(), "tag": self.tag}


# The children were passed by position, in the place of the new argument.
def test_subclass_may_put_an_argument_first():
    optimizer = Tagged("a", [optimizers.Adam(), optimizers.SGD()], [3])
    again = Tagged.from_config(optimizer.get_config())
    assert again.tag == "a"
    assert again.boundaries == optimizer.boundaries
    assert [type(child) for child in again.children] == [
        optimizers.Adam,
        optimizers.SGD,
    ]


# --- compile-time constants --------------------------------------------------


class OfConstants(optimizers.SGD):
    """Needs the values of eager constants when XLA compiles the update."""

    def __init__(self, what, **kwargs):
        super().__init__(0.1, **kwargs)
        self.what = what
        self.constants = {
            "axis": tf.constant(0),
            "perm": tf.constant([1, 0]),
            "shape": tf.constant([6]),
            "multiples": tf.constant([2, 1]),
            "range": tf.constant(3),
        }

    def update_step(self, gradient, variable, learning_rate):
        constant = self.constants[self.what]
        if self.what == "axis":
            gradient -= tf.reduce_mean(gradient, axis=constant, keepdims=True)
        elif self.what == "perm":
            gradient = tf.transpose(tf.transpose(gradient, constant) * 2.0, constant)
        elif self.what == "shape":
            flat = tf.reshape(gradient, constant)
            gradient = tf.reshape(flat - tf.reduce_max(flat), gradient.shape)
        elif self.what == "multiples":
            gradient = tf.tile(gradient, constant)[: gradient.shape[0]]
        else:
            gradient *= tf.cast(tf.range(constant), gradient.dtype)[:, None]
        super().update_step(gradient, variable, learning_rate)


# XLA said "must be a compile-time constant" of what is one in a plain optimizer.
@pytest.mark.parametrize("what", ["axis", "perm", "shape", "multiples", "range"])
def test_child_may_need_a_constant_at_compile_time(what):
    ours, theirs = make_variables(((3, 2),)), make_variables(((3, 2),))
    gradients = make_gradients(ours, 4)

    def make_phases():
        return [OfConstants(what, name="of_constants"), optimizers.Adam(0.1)]

    optimizer = SequentialOptimizer(make_phases(), [2])
    expected = run_plain(make_phases(), [2], theirs, gradients, "xla")
    assert_same(run(optimizer, ours, gradients, "xla"), expected)


class Centered(keras.constraints.Constraint):
    def __init__(self):
        self.axis = tf.constant(0)

    def __call__(self, w):
        w = tf.convert_to_tensor(w)
        return w - tf.reduce_mean(w, axis=self.axis, keepdims=True)


class Mean(optimizers.schedules.LearningRateSchedule):
    def __init__(self):
        self.rates, self.axis = tf.constant([0.1, 0.3]), tf.constant(0)

    def __call__(self, step):
        return tf.reduce_mean(self.rates, axis=self.axis)

    def get_config(self):
        return {}


def test_schedule_and_constraint_may_need_one_too():
    def make():
        return make_variables(((3, 2),), trainable=True)

    def make_phases():
        return [optimizers.SGD(Mean()), optimizers.Adam(Mean())]

    ours, theirs = make(), make()
    for variable in (*ours, *theirs):
        variable.constraint = Centered()
    gradients = make_gradients(ours, 4)
    optimizer = SequentialOptimizer(make_phases(), [2])
    expected = run_plain(make_phases(), [2], theirs, gradients, "xla")
    assert_same(run(optimizer, ours, gradients, "xla"), expected)


# The constant is of the graph of the step, and not an eager one.
def test_constant_of_the_outer_graph_is_one_in_a_branch():
    @tf.function(jit_compile=True)
    def summed(x):
        axis = tf.constant(1)
        optimizer = children[0]
        optimizer.axis = axis
        sequence.apply([x], variables)

    class Summing(optimizers.SGD):
        def update_step(self, gradient, variable, learning_rate):
            gradient = tf.reduce_sum(gradient, axis=self.axis, keepdims=True)
            super().update_step(gradient, variable, learning_rate)

    variables = make_variables(((3, 1),))
    children = [Summing(0.1, name="summing"), optimizers.Adam(0.1)]
    sequence = SequentialOptimizer(children, [2])
    sequence.build(variables)
    before = weights_of(variables)[0]
    summed(tf.ones((3, 1)))
    np.testing.assert_allclose(variables[0].numpy(), before - 0.1, rtol=1e-6)


# A child that changes only the gradients of matrices mixed two graphs, and TensorFlow
# refuses to reduce such gradients.
def test_child_may_change_some_of_the_gradients(mode):
    class Centralising(optimizers.Adam):
        def apply(self, grads, trainable_variables=None):
            grads = [
                g - tf.reduce_mean(g, axis=0, keepdims=True) if len(g.shape) > 1 else g
                for g in grads
            ]
            super().apply(grads, trainable_variables)

    def make_phases():
        return [Centralising(0.1), optimizers.SGD(0.1)]

    ours, theirs = make_variables(), make_variables()
    gradients = make_gradients(ours, 4)
    optimizer = SequentialOptimizer(make_phases(), [2])
    expected = run_plain(make_phases(), [2], theirs, gradients, mode)
    assert_same(run(optimizer, ours, gradients, mode), expected)


# --- odd shapes --------------------------------------------------------------


def make_two_sgd():
    """Returns optimizers without variables of the weights' shapes."""
    return [optimizers.SGD(0.1, name="first"), optimizers.SGD(0.2, name="second")]


# XLA needs to know the number of rows; where nobody does, the gradient stays as it is.
def test_sparse_gradients_of_a_variable_with_unknown_rows(mode):
    def train(make_optimizer):
        weight = tf.Variable([[1.0], [2.0], [3.0]], shape=[None, 1])
        optimizer = make_optimizer()
        optimizer.build([weight])

        def step():
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.gather(weight, [0, 0, 2]))
            optimizer.apply([tape.gradient(loss, weight)], [weight])

        step = compiled(step, mode)
        for _ in range(3):
            step()
        return weight.numpy()

    actual = train(lambda: SequentialOptimizer(make_two_sgd(), [9]))
    np.testing.assert_array_equal(actual, train(lambda: optimizers.SGD(0.1)))


def test_sparse_gradients_of_plain_numbers():
    # Keras' own tests pass such gradients: an update can wait for tensors only.
    variable = keras.Variable([1.0, 2.0])
    optimizer = SequentialOptimizer([keras.optimizers.SGD(1.0)], [])
    optimizer.apply([tf.IndexedSlices(np.ones(1, "float32"), (1,), (2,))], [variable])
    np.testing.assert_equal(variable.numpy(), [1.0, 1.0])


def test_variable_of_unknown_rank_is_trained_and_saved(tmp_path):
    weight = tf.Variable([[1.0], [2.0]], shape=tf.TensorShape(None))
    optimizer = SequentialOptimizer(make_two_sgd(), [1])
    store = {}
    for _ in range(2):
        optimizer.apply([tf.ones((2, 1))], [weight])
    optimizer.save_own_variables(store)
    checkpoint = tf.train.Checkpoint(optimizer=optimizer, weight=weight)
    path = checkpoint.write(tmp_path / "checkpoint")
    optimizer.apply([tf.ones((2, 1))], [weight])
    optimizer.load_own_variables(store)
    assert int(optimizer.iterations) == 2
    optimizer.apply([tf.ones((2, 1))], [weight])
    checkpoint.read(path).assert_consumed()
    assert int(optimizer.iterations) == 2


# Keras' `add` takes such a sum for that of a bias, which has another rank.
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_empty_variable_with_gradient_accumulation(shape, mode):
    def make():
        return make_variables((shape, (2,)))

    ours, theirs = make(), make()
    gradients = make_gradients(ours, 4)
    optimizer = SequentialOptimizer(adam_then_sgd(), [9], gradient_accumulation_steps=2)
    plain = optimizers.Adam(0.05, gradient_accumulation_steps=2)
    expected = run_plain([plain], [], theirs, gradients, mode)
    assert_same(run(optimizer, ours, gradients, mode), expected)


# --- the learning rate -------------------------------------------------------


@pytest.mark.skipif(
    not hasattr(optimizers, "MultiOptimizer"), reason="this Keras has none"
)
def test_learning_rate_in_a_graph_beside_a_multi_optimizer():
    # The child in the other branch has no rate, and reading the active one's raised.
    multi = optimizers.MultiOptimizer(optimizers.OptimizerMap(optimizers.SGD(0.2)))
    optimizer = SequentialOptimizer([optimizers.Adam(0.5), multi], [None])
    rate = tf.function(lambda: tf.convert_to_tensor(optimizer.learning_rate))
    assert float(rate()) == 0.5
    optimizer.advance()
    assert math.isnan(float(rate()))


# --- datasets of unknown size ------------------------------------------------


def batches_of_unknown_number():
    x = np.ones((6, 3), np.float32)
    pairs = tf.data.Dataset.from_tensor_slices((x, x[:, :1])).batch(2)
    return pairs.filter(lambda x, y: True)


def fit_on_unknown_size(optimizer, jit_compile, size=None):
    """Returns all that training leaves behind; `size`, if any, is told to Keras."""
    keras.utils.set_random_seed(0)
    model = make_model(1)
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    data = batches_of_unknown_number()
    if size is not None:
        data = data.apply(tf.data.experimental.assert_cardinality(size))
    model.fit(data, epochs=4, shuffle=False, verbose=0)
    return weights_of([*model.trainable_variables, *optimizer.variables])


# Only the step that finds no more data knows that it is the end. Its gradients failed,
# but the counters did not wait for them, so that the switch came too early.
@ran_out_of_data
@pytest.mark.parametrize(
    "jit_compile", [False, pytest.param(True, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, {"use_ema": True}],
    ids=["plain", "accumulation", "average"],
)
def test_counts_no_update_at_the_end_of_the_data(settings, jit_compile):
    def make():
        return SequentialOptimizer(adam_then_sgd(), [3], **settings)

    optimizer = make()
    actual = fit_on_unknown_size(optimizer, jit_compile)
    updates = 12 // settings.get("gradient_accumulation_steps", 1)
    assert int(optimizer.iterations) == updates
    assert [int(child.iterations) for child in optimizer.children] == [3, updates - 3]
    assert optimizer.phase_starts.tolist() == [0, 3]
    assert_same(actual, fit_on_unknown_size(make(), jit_compile, size=3))


# A step on a large MLP took a tenth longer while it waited for every gradient: no
# weight was updated before the whole backward pass was over.
def test_step_waits_for_one_gradient_if_it_tells_of_the_others():
    model = make_model(1)
    (*_, bias) = model.trainable_variables
    optimizer = SequentialOptimizer(adam_then_sgd(), [3])
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        gradients = tape.gradient(loss, model.trainable_variables)
        for gradient, variable in zip(
            gradients, model.trainable_variables, strict=True
        ):
            waited_for[variable.path] = gradient.op
        optimizer.apply(gradients, model.trainable_variables)

    waited_for = {}
    graph = step.get_concrete_function(tf.TensorSpec([2, 3])).graph
    waiting = {op for gate in graph.get_operations() for op in gate.control_inputs}
    assert waited_for.pop(bias.path) in waiting
    assert not waiting & set(waited_for.values())


# A gradient without data, or one that a check stops, says nothing of the others.
@pytest.mark.parametrize("checked", [False, True])
def test_step_without_all_gradients_is_not_counted(checked):
    weights = [tf.Variable(1.0), tf.Variable(1.0)]
    optimizer = SequentialOptimizer(adam_then_sgd(), [3])
    optimizer.build(weights)
    iterator = iter(tf.data.Dataset.from_tensors(float("nan" if checked else 1)))

    @tf.function
    def step():
        x = next(iterator)
        with tf.GradientTape() as tape:
            loss = weights[0] * x + weights[1] ** 2 + (0.0 * x if checked else 0.0)
        gradients = tape.gradient(loss, weights)
        if checked:
            gradients[0] = tf.debugging.check_numerics(gradients[0], "gradient")
        optimizer.apply(gradients, weights)

    if not checked:
        step()
    error = tf.errors.InvalidArgumentError if checked else tf.errors.OutOfRangeError
    with pytest.raises(error):
        step()
    updates = 0 if checked else 1
    assert int(optimizer.iterations) == updates
    assert int(optimizer.children[0].iterations) == updates


@ran_out_of_data
def test_plain_adam_still_counts_one_update_too_many():
    # If this fails, Keras counts as we do, and the README need not mention it.
    optimizer = optimizers.Adam(0.1)
    fit_on_unknown_size(optimizer, jit_compile=False)
    assert int(optimizer.iterations) == 16


# --- rounding ----------------------------------------------------------------


@pytest.mark.parametrize("mode", ["graph", "xla"])
def test_fused_gradients_differ_by_rounding_only(mode):
    # A plain update in one graph with `x * 0.1` is compiled into one loop, where the
    # product need not be rounded before it is used. Across a switch it is. Gradients
    # that exist before give the same bits, as they do wherever nothing is fused.
    ours, theirs = make_variables(((64,),)), make_variables(((64,),))
    batches = make_gradients(ours, 5)
    same = make_variables(((64,),)), make_variables(((64,),))

    def fused(x):
        return [x * 0.1]

    def sequence():
        return SequentialOptimizer(
            [optimizers.SGD(0.1, name="sgd"), optimizers.Adam(name="adam")], [9]
        )

    plain = optimizers.SGD(0.1)
    actual = run(sequence(), ours, batches, mode, gradients=fused)
    expected = run_plain([plain], [], theirs, batches, mode, gradients=fused)
    assert_same(actual, expected, atol=2 * np.spacing(np.float32(4.0)))
    scaled = [[x * 0.1] for (x,) in batches]
    expected = run_plain([optimizers.SGD(0.1)], [], same[1], scaled, mode)
    assert_same(run(sequence(), same[0], scaled, mode), expected)
