"""Children that copy the weights in `build` act as if built when their phase starts."""

import random
import threading
import time
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers.models import needs_schedule_free
from tests.helpers.oracle import (
    assert_same,
    make_gradients,
    make_variables,
    run,
    run_plain,
    weights_of,
)

optimizers = keras.optimizers


class Lookahead(optimizers.SGD):
    """Keeps slow weights under its own names, as many users write it."""

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.slow = [self.slow_of(i, v) for i, v in enumerate(variables)]

    def slow_of(self, i, variable, dtype=None):
        dtype = dtype or variable.dtype
        slow = self.add_variable(variable.shape, dtype=dtype, name=f"slow_{i}")
        self.assign(slow, variable)
        return slow

    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient, variable, learning_rate)
        slow = self.slow[self._get_variable_index(variable)]
        if slow is not None:
            fast = tf.cast(tf.convert_to_tensor(variable), slow.dtype)
            self.assign(slow, (fast + tf.convert_to_tensor(slow)) / 2)
            self.assign(variable, (fast + tf.convert_to_tensor(slow)) / 2)


class Masters(Lookahead):
    """Keeps them in another dtype than the model's."""

    def slow_of(self, i, variable):
        return super().slow_of(i, variable, "float32")


class OfKernels(Lookahead):
    """Tells by the name which weights it copies."""

    def slow_of(self, i, variable):
        name = getattr(variable, "path", variable.name)
        return super().slow_of(i, variable) if "dense/kernel" in name else None


class OfRank4(Lookahead):
    """Tells by the shape."""

    def slow_of(self, i, variable):
        return super().slow_of(i, variable) if len(variable.shape) == 4 else None


class Reversed(Lookahead):
    """Makes them in another order than that of the weights."""

    def build(self, variables):
        if not self.built:
            optimizers.SGD.build(self, variables)
            pairs = list(enumerate(variables))
            self.slow = [self.slow_of(i, v) for i, v in pairs[::-1]][::-1]


class Untracked(Lookahead):
    """Makes them with `tf.Variable`, which Keras does not list."""

    def slow_of(self, i, variable):
        return tf.Variable(variable)


class InContainers(Lookahead):
    """Keeps them in a dict of lists."""

    def build(self, variables):
        if not self.built:
            optimizers.SGD.build(self, variables)
            self.kept = {"slow": [tf.Variable(v) for v in variables]}

    @property
    def slow(self):
        return self.kept["slow"]


class Uncounted(Lookahead):
    """Overrides `apply`, and leaves the counter where it is."""

    def apply(self, grads, trainable_variables=None):
        for gradient, variable in zip(grads, trainable_variables, strict=True):
            self.update_step(gradient, variable, 0.1)


class Wrapper(optimizers.Optimizer):
    """Has an optimizer make the update, and no config that says so."""

    def __init__(self, optimizers, **kwargs):
        super().__init__(learning_rate=0.1, **kwargs)
        self.optimizers = optimizers

    @property
    def inner(self):
        return keras.tree.flatten(self.optimizers)[0]

    def build(self, variables):
        if not self.built:
            self.inner.build(variables)
            super().build(variables)

    def apply(self, grads, trainable_variables=None):
        self.inner.apply([g / 2 for g in grads], trainable_variables)
        self.assign_add(self._iterations, 1)


class CountsElsewhere(optimizers.Optimizer):
    """Has the iterations of what it wraps, as Keras' `LossScaleOptimizer` does."""

    def __init__(self, **kwargs):
        super().__init__(learning_rate=0.1, **kwargs)
        self.inner = optimizers.SGD(0.1)

    @property
    def iterations(self):
        return self.inner.iterations

    def build(self, variables):
        if not self.built:
            self.inner.build(variables)
            super().build(variables)
            self.slow = [self.add_variable_from_reference(v, "slow") for v in variables]
            for slow, variable in zip(self.slow, variables, strict=True):
                self.assign(slow, variable)

    def apply(self, grads, trainable_variables=None):
        self.inner.apply(grads, trainable_variables)
        for slow, variable in zip(self.slow, trainable_variables, strict=True):
            self.assign(slow, (variable + slow) / 2)
            self.assign(variable, (variable + slow) / 2)

    def get_config(self):
        return {"name": self.name}


def check(make_child, make_variables=make_variables, mode="eager"):
    """Compares a run whose second phase is the child's with plain optimizers."""
    ours, theirs = make_variables(), make_variables()
    gradients = make_gradients(ours, 3)
    optimizer = SequentialOptimizer([optimizers.Adam(0.3), make_child()], [1])
    assert_same(
        run(optimizer, ours, gradients, mode),
        run_plain([optimizers.Adam(0.3), make_child()], [1], theirs, gradients, mode),
    )


# --- which weights ---------------------------------------------------------------


def raw(*values):
    """Returns variables that TensorFlow all calls `Variable:0`."""
    return lambda: [tf.Variable(value) for value in values]


def keras_variables(*scopes_and_names, shapes=((3, 2), (2,)), dtype="float32"):
    def make():
        variables = []
        for i, (scope, name) in enumerate(scopes_and_names):
            with keras.name_scope(scope):
                value = np.random.default_rng(i).normal(size=shapes[i % len(shapes)])
                variables.append(keras.Variable(value, dtype=dtype, name=name))
        return variables

    return make


DENSE = [("dense", "kernel"), ("dense", "bias")]

CASES = {
    # Copies were found by name, and of several with one name only the last counted.
    "raw": (Lookahead, raw([1.0, 2.0], [30.0, 40.0])),
    "raw shapes": (Lookahead, raw([1.0, 2.0], [[3.0]], 4.0)),
    "two models": (Lookahead, keras_variables(*DENSE, *DENSE)),
    "joined names": (
        Lookahead,
        keras_variables(("x", "y_z"), ("x_y", "z"), shapes=((2,),)),
    ),
    "equal weights": (Lookahead, raw([0.0, 0.0], [0.0, 0.0], 1.0, 1.0)),
    "many scalars": (Lookahead, raw(*np.linspace(0.0, 1.0, 130, dtype=np.float32))),
    # Not found at all, as they have another name, dtype, rank or owner.
    "named by the user": (Lookahead, make_variables),
    "other order": (Reversed, raw([1.0, 2.0], [30.0, 40.0])),
    "masters": (Masters, keras_variables(*DENSE, dtype="bfloat16")),
    "only kernels": (OfKernels, keras_variables(*DENSE)),
    "only kernels of tf": (
        OfKernels,
        lambda: [
            tf.Variable([1.0], name="dense/kernel"),
            tf.Variable([2.0], name="bias"),
        ],
    ),
    "only rank 4": (
        OfRank4,
        keras_variables(*DENSE, shapes=((3, 3, 1, 2), (2,))),
    ),
    "not tracked": (Untracked, raw([1.0, 2.0], [[3.0]])),
    "in containers": (InContainers, raw([1.0, 2.0], [[3.0]])),
    # Taken again before every update.
    "not counted": (Uncounted, raw([1.0, 2.0], [[3.0]])),
    "sizes 0 and 1": (Lookahead, raw(np.ones((0, 3), np.float32), [[1.0], [2.0]])),
}


@pytest.mark.parametrize("case", CASES)
def test_each_copy_is_taken_again_from_its_weight(case):
    make_child, variables = CASES[case]
    check(lambda: make_child(0.1), variables)


def test_masters_in_each_mode(mode):
    # `tf.where` mixed dtypes.
    check(lambda: Masters(0.1), CASES["masters"][1], mode)


@needs_schedule_free
def test_raw_variables_in_a_schedule_free_phase():
    # The first one went to 29.65, 39.65: the weights of the other.
    variables = raw([1.0, 2.0], [30.0, 40.0])()
    sequence = SequentialOptimizer(
        [optimizers.SGD(0.1), optimizers.ScheduleFreeAdamW(0.1)], [2]
    )
    for _ in range(4):
        sequence.apply([tf.ones(2)] * 2, variables)
    np.testing.assert_allclose(variables[0], [0.65, 1.65], rtol=1e-6)


@needs_schedule_free
def test_copied_weights_are_copied_again_at_the_phase_start():
    optimizer = SequentialOptimizer(
        [optimizers.SGD(0.3), optimizers.ScheduleFreeAdamW(0.0)], [1]
    )
    variables = make_variables()
    optimizer.build(variables)
    first, second = make_gradients(variables, 2)
    optimizer.apply(first, variables)
    weights = weights_of(variables)
    # Without a learning rate the weights stay those of the copy.
    optimizer.apply(second, variables)
    for now, before in zip(weights_of(variables), weights, strict=True):
        np.testing.assert_allclose(now, before, rtol=1e-6)


def test_first_child_copies_the_weights_at_the_start():
    # Someone builds the optimizer, and only then loads the weights to start from.
    ours, theirs = make_variables(), make_variables()
    sequence = SequentialOptimizer([Lookahead(0.1), optimizers.Adam(0.1)], [2])
    sequence.build(ours)
    for variable in [*ours, *theirs]:
        variable.assign(variable + 1.0)
    gradients = make_gradients(ours, 2)
    assert_same(
        run(sequence, ours, gradients, "eager"),
        run_plain([Lookahead(0.1)], [], theirs, gradients, "eager"),
    )


def test_schedule_that_is_set_after_build():
    # Keras then forgets the variable of the learning rate: copies were shifted by one.
    def train(optimizer, variables):
        for gradients in make_gradients(variables, 2):
            optimizer.apply(gradients, variables)

    schedule = optimizers.schedules.CosineDecay(0.1, 10)
    ours, theirs = make_variables(), make_variables()
    sequence = SequentialOptimizer([optimizers.Adam(0.3), Lookahead(0.1)], [2])
    sequence.build(ours)
    sequence.children[1].learning_rate = schedule
    for optimizer in (optimizers.Adam(0.3), Lookahead(schedule)):
        train(sequence, ours)
        train(optimizer, theirs)
    assert_same(weights_of(ours), weights_of(theirs))


# --- optimizers in a child -------------------------------------------------------


@pytest.mark.parametrize(
    "holder", [lambda o: o, lambda o: [o], lambda o: {"all": o}, lambda o: (o,)]
)
def test_copies_of_an_optimizer_that_a_child_holds(holder):
    # The copies stayed those from before training; a dict called `optimizers` raised.
    check(lambda: Wrapper(holder(Lookahead(0.1))))


def test_copies_of_a_child_that_counts_elsewhere(mode):
    # They were once taken again before every update.
    check(CountsElsewhere, mode=mode)


def test_count_that_is_set_back_leaves_the_copies(mode):
    # A warm restart of a schedule once took them again.
    def train(sequence_or_plain, count, variables):
        gradients = make_gradients(variables, 4)
        run(sequence_or_plain, variables, gradients[:2], mode)
        count.assign(0)
        return run(sequence_or_plain, variables, gradients[2:], mode)

    ours, theirs = make_variables(), make_variables()
    sequence, plain = SequentialOptimizer([Lookahead(0.1)], []), Lookahead(0.1)
    assert_same(
        train(sequence, sequence.children[0].iterations, ours),
        train(plain, plain.iterations, theirs),
    )


def test_build_that_is_interrupted_can_be_repeated():
    # The next update once found a half-built optimizer.
    class Interrupted(Lookahead):
        builds = 0

        def build(self, variables):
            Interrupted.builds += 1
            if Interrupted.builds == 2:  # of the twin
                raise KeyboardInterrupt
            super().build(variables)

    optimizer = SequentialOptimizer([Interrupted(0.1)], [])
    variables = make_variables()
    with pytest.raises(KeyboardInterrupt):
        optimizer.build(variables)
    optimizer.apply(make_gradients(variables, 1)[0], variables)
    assert int(optimizer.iterations) == 1


def test_builds_in_two_threads_leave_the_filters_of_warnings():
    # Each sets and restores them; overlapping, they once left all warnings ignored.
    class Slow(optimizers.SGD):
        def build(self, variables):
            time.sleep(float(self.learning_rate))
            super().build(variables)

    before = list(warnings.filters)
    # The second begins and ends its twin after the first.
    threads = [
        threading.Thread(target=SequentialOptimizer([Slow(s)], []).build, args=[[v]])
        for s, v in zip((0.2, 0.3), make_variables([(2,), (2,)]), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


def test_copies_inside_a_multi_optimizer(mode):
    if not hasattr(optimizers, "MultiOptimizer"):
        pytest.skip("this Keras has none")

    def make_child():
        # A function, so that no MultiOptimizer can be made from the config.
        slow, rest = Lookahead(0.1), optimizers.SGD(0.05)
        return optimizers.MultiOptimizer(lambda v: slow if v.path == "w0" else rest)

    check(make_child, mode=mode)


def test_attributes_that_say_nothing_of_copies():
    # A circle, a sibling, and keys that cannot be sorted.
    child, sibling = Lookahead(0.1, name="slow"), optimizers.Adam(0.3, name="sibling")
    sequence = SequentialOptimizer([sibling, child], [1])
    child.owner, child.held = sequence, {1: sibling, "two": child, None: [{}]}
    ours, theirs = make_variables(), make_variables()
    gradients = make_gradients(ours, 3)
    plain = [optimizers.Adam(0.3), Lookahead(0.1)]
    assert_same(
        run(sequence, ours, gradients, "eager"),
        run_plain(plain, [1], theirs, gradients, "eager"),
    )


@pytest.mark.parametrize("order", [1, -1])
def test_copies_inside_a_sequence(order):
    def make_inner():
        return [Lookahead(0.1, name="slow"), optimizers.Adam(0.05)][::order]

    ours, theirs = make_variables(), make_variables()
    gradients = make_gradients(ours, 6)
    inner = SequentialOptimizer(make_inner(), [2], name="inner")
    optimizer = SequentialOptimizer([optimizers.SGD(0.3), inner], [2])
    plain = [optimizers.SGD(0.3), *make_inner()]
    assert_same(
        run(optimizer, ours, gradients, "eager"),
        run_plain(plain, [2, 4], theirs, gradients, "eager"),
    )


# --- saved runs ------------------------------------------------------------------


def _through_store(saved, loaded, _):
    store = {}
    saved.save_own_variables(store)
    loaded.load_own_variables(store)


def _through_checkpoint(saved, loaded, folder):
    path = tf.train.Checkpoint(saved).write(str(folder / "saved"))
    assert not any("copies" in name for name, _ in tf.train.list_variables(path))
    tf.train.Checkpoint(loaded).read(path).assert_consumed()


@pytest.mark.parametrize("way", [_through_store, _through_checkpoint])
@pytest.mark.parametrize("updates", [1, 4])
def test_run_resumed_around_the_copying(updates, way, tmp_path):
    def make():
        return SequentialOptimizer([optimizers.Adam(0.3), Lookahead(0.1)], [2])

    variables, others = make_variables(), make_variables()
    saved, loaded = make(), make()
    gradients = make_gradients(variables, 6)
    run(saved, variables, gradients[:updates], "eager")
    loaded.build(others)
    way(saved, loaded, tmp_path)
    for variable, other in zip(variables, others, strict=True):
        other.assign(variable)
    assert_same(
        run(loaded, others, gradients[updates:], "eager"),
        run(saved, variables, gradients[updates:], "eager"),
    )


# --- what cannot be taken again --------------------------------------------------


class Derived(optimizers.SGD):
    """Computes something from the weights when it is built."""

    def build(self, variables):
        super().build(variables)
        self.computed = [self.add_variable((), name="scale"), *self.compute(variables)]

    def compute(self, variables):
        slots = [self.add_variable_from_reference(v, "half") for v in variables]
        for slot, variable in zip(slots, variables, strict=True):
            self.assign(slot, tf.convert_to_tensor(variable) / 2)
        return slots


class Norm(Derived):
    def compute(self, variables):
        norm = self.add_variable((), name="norm")
        self.assign(
            norm, tf.linalg.global_norm(list(map(tf.convert_to_tensor, variables)))
        )
        return [norm]


class WithoutConfig(Lookahead):
    def __init__(self, rate):
        super().__init__(rate)


class OnlyLarge(Lookahead):
    """Makes other variables on other sizes."""

    def slow_of(self, i, variable):
        return super().slow_of(i, variable) if variable.shape[0] > 2 else None


@pytest.mark.parametrize(
    ("make_child", "received"),
    [
        (Derived, r"computes something else .* 2 .* \['w0_half', 'w1_half'\]"),
        (Norm, r"computes something else .* 1 .* \['norm'\]"),
        (WithoutConfig, r"from its config \(TypeError.* 2 .* \['slow_0', 'slow_1'\]"),
        (OnlyLarge, r"from its config \(ValueError.* 1 .* \['slow_0'\]"),
    ],
)
def test_stale_variables_are_warned_of_once(make_child, received):
    # They silently stayed those of the weights before training.
    child = make_child(0.1)
    optimizer = SequentialOptimizer([optimizers.Adam(), child], [2])
    with pytest.warns(UserWarning, match=f"`{child.name}`.*{received}") as warned:
        optimizer.build(make_variables())
    assert len(warned) == 1
    # As the first child, it starts with the weights that it was built on.
    SequentialOptimizer([make_child(0.1), optimizers.Adam()], [2]).build(
        make_variables()
    )


# Only the sequence that holds it looks at it, and there it is the first child.
@pytest.mark.parametrize("levels", [1, 2])
def test_first_child_of_an_inner_sequence_is_warned_of(levels):
    def inside(child, name="inner"):
        return SequentialOptimizer([child, optimizers.RMSprop()], [9], name=name)

    inner = inside(Norm(0.1)) if levels == 1 else inside(inside(Norm(0.1)), "outer")
    with pytest.warns(UserWarning, match=r"1 of its variables .* \['norm'\]") as warned:
        SequentialOptimizer([optimizers.Adam(), inner], [2]).build(make_variables())
    assert len(warned) == 1
    SequentialOptimizer([inside(Norm(0.1)), optimizers.Adam()], [2]).build(
        make_variables()
    )


# Under this strategy, a first trace creates variables without values, as without one.
def test_copies_of_weights_that_a_graph_creates_under_one_device():
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        model = keras.Sequential([keras.layers.Dense(1, kernel_initializer="ones")])
        children = [optimizers.SGD(0.5, name="sgd"), Lookahead(0.5)]
        optimizer = SequentialOptimizer(children, [1])

    def train_step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x))
        weights = model.trainable_variables
        optimizer.apply(tape.gradient(loss, weights), weights)

    step = tf.function(lambda x: strategy.run(train_step, (x,)), autograph=False)
    for expected in [0.5, 0.125]:
        step(tf.ones((1, 1)))
        np.testing.assert_array_equal(model.get_weights()[0], [[expected]])


# Looking whether they are the same everywhere compared no value with rows of three.
def test_child_without_config_and_a_weight_without_elements():
    weights = [tf.Variable(tf.zeros((0, 3))), tf.Variable([1.0, 2.0])]
    first = optimizers.SGD(lambda: 0.5, momentum=0.9)
    optimizer = SequentialOptimizer([first, optimizers.Adam()], [2])
    optimizer.apply([tf.zeros((0, 3)), tf.ones(2)], weights)
    np.testing.assert_array_equal(weights[1], [0.5, 1.5])


def test_child_without_config_whose_variables_are_constant():
    class Momentum(optimizers.SGD):
        def __init__(self, rate):
            super().__init__(rate, momentum=0.9)

    check(lambda: Momentum(0.1))


# --- random numbers --------------------------------------------------------------


class Noisy(optimizers.SGD):
    def build(self, variables):
        super().build(variables)
        draws = [
            keras.random.normal((3,)),
            keras.initializers.RandomNormal()((3,)),
            tf.random.normal((3,)),
            np.random.normal(size=3),
            np.random.default_rng().normal(size=3),
        ]
        for draw in draws:
            self.assign(self.add_variable((3,), name="noise"), draw)


@pytest.mark.parametrize("make_child", [Noisy, Lookahead])
def test_build_draws_no_more_random_numbers_than_a_plain_one(make_child):
    # Looking for copies drew from Keras' global seed, which changed dropout masks.
    def drawn(make_optimizers):
        keras.utils.clear_session(free_memory=False)
        keras.utils.set_random_seed(0)
        for optimizer in make_optimizers(optimizers.Adam(), make_child(0.1)):
            optimizer.build(make_variables())
        global_state = np.random.get_state()[1].tolist()
        return float(keras.random.uniform(())), random.random(), global_state

    ours = drawn(lambda *children: [SequentialOptimizer(children, [2])])
    assert ours == drawn(lambda *children: children)


# Building twins of large models takes time, and most optimizers start from zeros.
def test_optimizer_that_starts_from_zeros_gets_one_twin():
    class Counted(keras.optimizers.Adam):
        builds = 0

        def build(self, variables):
            Counted.builds += not self.built
            super().build(variables)

    SequentialOptimizer([Counted(), keras.optimizers.SGD()], [1]).build(
        make_variables()
    )
    assert Counted.builds == 2
