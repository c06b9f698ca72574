"""State that is loaded before `build`, or after the model has changed."""

import copy
import inspect
import pickle
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import PhaseLogger, SequentialOptimizer, SwitchOnPlateau
from tests.helpers.models import needs_schedule_free
from tests.helpers.oracle import assert_same, weights_of
from tests.helpers.saving import (
    BOUNDARY,
    CASES,
    adam_sgd,
    build,
    make_model,
    state_of,
    train,
    warnings_of,
)
from tests.helpers.saving_ways import checkpoint_in, save_checkpoint

optimizers = keras.optimizers
CALLS = BOUNDARY + 1


def trained(make=adam_sgd, calls=CALLS):
    model = make_model(make())
    train(model, 0, calls)
    return model


# --- before `build` --------------------------------------------------------------

HELD = ["adam_sgd", "returning", "ema", "accumulation", "nested", "loss_scaled"]


@pytest.mark.parametrize("name", HELD)
def test_weights_loaded_after_compile_continue(tmp_path, name):
    # What KerasTuner does with its best trials, and any new process; it once raised.
    case = CASES[name]
    model = trained(case.make)
    model.save_weights(tmp_path / "model.weights.h5")
    expected = train(model, CALLS, 6)
    loaded = make_model(case.make())
    if name == "loss_scaled":
        # Keras skips the wrapper itself, with any optimizer inside of it.
        warnings_of(loaded.load_weights, tmp_path / "model.weights.h5")
        expected = [weights for weights, _ in expected]
        assert_same([weights for weights, _ in train(loaded, CALLS, 6)], expected)
        return
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert_same(train(loaded, CALLS, 6), expected)


def test_what_is_held_is_saved(tmp_path):
    model = trained()
    model.save_weights(tmp_path / "model.weights.h5")
    expected = train(model, CALLS, 6)
    held = make_model(adam_sgd())
    held.load_weights(tmp_path / "model.weights.h5")
    held.save_weights(tmp_path / "again.weights.h5")
    loaded = make_model(adam_sgd())
    loaded.load_weights(tmp_path / "again.weights.h5")
    assert_same(train(loaded, CALLS, 6), expected)


@pytest.mark.parametrize("make", [adam_sgd, CASES["nested"].make], ids=["", "nested"])
def test_what_is_set_before_build_comes_after_what_was_loaded(tmp_path, make):
    # `build` once set it back.
    model = trained(make, BOUNDARY - 1)
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = make_model(make())
    loaded.load_weights(tmp_path / "model.weights.h5")
    assert loaded.optimizer.phase_starts.tolist() == [0, -1]
    assert int(loaded.optimizer.iterations) == BOUNDARY - 1
    for each in (model, loaded):
        each.optimizer.advance()
        each.optimizer.learning_rate = 0.005
    loaded.save_weights(tmp_path / "again.weights.h5")
    again = make_model(make())
    again.load_weights(tmp_path / "again.weights.h5")
    expected = train(model, BOUNDARY - 1, 6)
    assert_same(train(again, BOUNDARY - 1, 6), expected)
    assert_same(train(loaded, BOUNDARY - 1, 6), expected)


def test_switches_before_the_file_was_saved_are_not_printed_again(tmp_path, capsys):
    # Until `build` the starts of the phases were not those in the file.
    trained().save_weights(tmp_path / "model.weights.h5")
    loaded = make_model(adam_sgd())
    loaded.load_weights(tmp_path / "model.weights.h5")
    x, y = np.ones((8, 4)), np.ones((8, 1))
    loaded.fit(x, y, verbose=0, callbacks=[PhaseLogger()])
    assert loaded.optimizer.phase_starts.tolist() == [0, BOUNDARY]
    assert "->" not in capsys.readouterr().out


def test_what_is_held_is_applied_while_the_model_is_built():
    # The weights have no values yet, and nor had the variables to load it into.
    def make(optimizer):
        start = keras.initializers.RandomUniform(-0.5, 0.5, seed=1)
        model = keras.Sequential([keras.layers.Dense(1, kernel_initializer=start)])
        model.compile(optimizer, "mse")
        return model

    x, y = np.ones((8, 4)), np.ones((8, 1))
    model = make(adam_sgd())
    model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    other = make(copy.deepcopy(model.optimizer))
    other.fit(x, y, batch_size=8, epochs=1, verbose=0)
    model.fit(x, y, batch_size=8, epochs=1, verbose=0)
    assert int(other.optimizer.iterations) == CALLS + 1
    adam, same_adam = (each.optimizer.children[0] for each in (model, other))
    assert_same(weights_of(same_adam.variables), weights_of(adam.variables))


def test_what_is_held_is_applied_while_the_step_is_traced(tmp_path):
    model = trained()
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = make_model(adam_sgd())
    loaded.load_weights(tmp_path / "model.weights.h5")
    gradients = [tf.ones(weight.shape) for weight in model.trainable_variables]
    model.optimizer.apply(gradients, model.trainable_variables)

    @tf.function(jit_compile=True)
    def step():
        loaded.optimizer.apply(gradients, loaded.trainable_variables)

    step()
    assert_same(state_of(loaded)[1][:4], state_of(model)[1][:4])


def _pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def _through_keras_file(model, folder):
    model.save(folder / "model.keras")
    return keras.saving.load_model(folder / "model.keras")


WHOLE_MODEL = {
    "keras": _through_keras_file,
    "deepcopy": lambda model, _: copy.deepcopy(model),
}


@pytest.mark.parametrize("way", [copy.deepcopy, _pickled])
def test_copy_of_a_built_optimizer_has_its_state(way):
    model = trained()
    copied = way(model.optimizer)
    other = make_model()
    other.set_weights(model.get_weights())
    other.compile(copied, "mse", jit_compile=False)
    assert_same(train(other, CALLS, 6), train(model, CALLS, 6))


@pytest.mark.parametrize(
    "make", [PhaseLogger, lambda: SwitchOnPlateau("loss", restore_best_weights=True)]
)
def test_callback_is_pickled_after_fit(make):
    model = make_model(adam_sgd([None]))
    callback = make()
    x, y = np.ones((8, 4)), np.ones((8, 1))
    model.fit(x, y, verbose=0, callbacks=[callback])
    loaded = pickle.loads(pickle.dumps(callback))
    assert type(loaded) is type(callback)
    # Nor does it need anything from the run that it was in.
    make_model(adam_sgd([None])).fit(x, y, verbose=0, callbacks=[loaded])


@pytest.mark.parametrize("attribute", [{"seed": 1}, [1, 2], tf.Variable(1.0)])
def test_attribute_that_only_the_saved_one_has(tmp_path, attribute):
    # Keras 3.16 makes another in `build`. It was once taken for another optimizer's.
    saved = make_model(adam_sgd())
    saved.optimizer.run_info = attribute
    train(saved, 0, CALLS)
    save_checkpoint(saved, tmp_path)
    for prepare in (lambda model: model, build):
        model = prepare(make_model(adam_sgd()))
        checkpoint = tf.train.Checkpoint(model=model)
        checkpoint.read(checkpoint_in(tmp_path)).expect_partial()
        build(model)
        assert_same(state_of(model), state_of(saved))


class Lookahead(optimizers.Optimizer):
    """A user's wrapper that leaves the variables of its inner optimizer to Keras."""

    def __init__(self, inner, **kwargs):
        super().__init__(learning_rate=0.0, **kwargs)
        self.inner = inner

    def build(self, variables):
        if not self.built:
            super().build(variables)
            self.inner.build(variables)

    def apply(self, grads, trainable_variables=None):
        self.inner.apply(grads, trainable_variables)
        self.assign_add(self._iterations, 1)


class Counting(optimizers.SGD):
    """A user's optimizer that saves an extra number."""

    told = 0

    def save_own_variables(self, store):
        super().save_own_variables(store)
        store["told"] = np.array(self.told)

    def load_own_variables(self, store):
        store = dict(store)
        told = int(store.pop("told"))
        if told < 0:
            raise ValueError("cannot be told so")
        super().load_own_variables(store)
        self.told = told


def _own_classes():
    return SequentialOptimizer(
        [Lookahead(optimizers.Adam(0.05)), Counting(0.02, momentum=0.9)], [BOUNDARY]
    )


@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
def test_what_a_users_class_saves_is_loaded(tmp_path, built):
    model = trained(_own_classes)
    model.optimizer.children[1].told = 7
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = make_model(_own_classes())
    if built:
        build(loaded)
    loaded.load_weights(tmp_path / "model.weights.h5")
    build(loaded)
    for optimizer in (model.optimizer, loaded.optimizer):
        assert int(optimizer.children[0].inner.iterations) == BOUNDARY
        assert optimizer.children[1].told == 7
    inner, inner_loaded = (m.optimizer.children[0].inner for m in (model, loaded))
    assert_same(weights_of(inner_loaded.variables), weights_of(inner.variables))
    assert_same(train(loaded, CALLS, 6), train(model, CALLS, 6))


@pytest.mark.parametrize(
    "holder", [lambda o: o, lambda o: [o], lambda o: (o,), lambda o: {"o": o}]
)
def test_optimizer_in_an_attribute_of_a_child_is_saved_with_it(holder):
    class Holding(optimizers.SGD):
        def build(self, variables):
            if not self.built:
                super().build(variables)
                self.parts = holder(self.inner)
                self.inner.build(variables)

    def make():
        child = Holding(0.1)
        child.inner = optimizers.Adam(0.1)
        sequence = SequentialOptimizer([child], [])
        child.owner = sequence  # A circle must not be walked forever.
        return sequence

    variables = [keras.Variable(np.ones(2), name="w")]
    saved, loaded, store = make(), make(), {}
    for optimizer in (saved, loaded):
        optimizer.build(variables)
    saved.children[0].inner.apply([tf.ones(2)], variables)
    saved.save_own_variables(store)
    loaded.load_own_variables(store)
    inner, inner_loaded = (one.children[0].inner for one in (saved, loaded))
    assert int(inner_loaded.iterations) == 1
    assert_same(weights_of(inner_loaded.variables), weights_of(inner.variables))


@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
def test_optimizer_that_children_share_is_saved_once(built):
    # The layout listed it twice, and the file could never be loaded.
    def make():
        shared = optimizers.Adam(0.05)
        return SequentialOptimizer(
            [Lookahead(shared, name="a"), Lookahead(shared, name="b")], [BOUNDARY]
        )

    variables = [keras.Variable(np.ones(2), name="w")]
    saved, loaded, store = make(), make(), {}
    for _ in range(CALLS):
        saved.apply([tf.ones(2)], variables)
    saved.save_own_variables(store)
    if built:
        loaded.build(variables)
    loaded.load_own_variables(store)
    loaded.build(variables)
    inner, inner_loaded = (one.children[1].inner for one in (saved, loaded))
    assert int(inner_loaded.iterations) == CALLS
    assert_same(weights_of(inner_loaded.variables), weights_of(inner.variables))


def test_file_from_before_build_resets_what_has_trained(tmp_path):
    # Its counters were once loaded, and the moments stayed.
    kwargs = {"use_ema": True}
    model = make_model(adam_sgd(**kwargs))
    model.save_weights(tmp_path / "start.weights.h5")
    expected = train(model, 0, 6)
    model.load_weights(tmp_path / "start.weights.h5")
    assert_same(train(model, 0, 6), expected)


def test_checkpoint_from_before_build_after_training(tmp_path):
    save_checkpoint(make_model(adam_sgd()), tmp_path)
    model = trained()
    before = state_of(model)
    checkpoint = tf.train.Checkpoint(model=model)
    with pytest.raises(ValueError, match="saved before the optimizer was built"):
        checkpoint.read(checkpoint_in(tmp_path))
    assert_same(state_of(model), before)
    fresh = build(make_model(adam_sgd()))
    tf.train.Checkpoint(model=fresh).read(checkpoint_in(tmp_path))
    assert_same(train(fresh, 0, 6), train(make_model(adam_sgd()), 0, 6))


def test_child_that_says_no_to_what_was_held_is_not_trained(tmp_path):
    model = trained(_own_classes)
    model.optimizer.children[1].told = "x"
    store = {}
    model.optimizer.save_own_variables(store)
    loaded = make_model(_own_classes())
    loaded.optimizer.load_own_variables(store)
    for _ in range(2):
        with pytest.raises(Exception, match=r"invalid literal|Create a new optimizer"):
            train(loaded, 0, 1)


def test_child_that_says_no_leaves_the_others(tmp_path):
    model = trained(_own_classes)
    model.optimizer.children[1].told = -1
    model.save_weights(tmp_path / "model.weights.h5")
    loaded = trained(_own_classes, calls=1)
    before = state_of(loaded)
    inner = weights_of(loaded.optimizer.children[0].inner.variables)
    with pytest.raises(ValueError, match="cannot be told so"):
        loaded.load_weights(tmp_path / "model.weights.h5")
    assert_same(state_of(loaded)[1], before[1])
    after = weights_of(loaded.optimizer.children[0].inner.variables)
    assert_same(after, inner)


def test_unregistered_class_is_named_in_full():
    # All that Keras leaves us to say when the package is not imported.
    config = keras.saving.serialize_keras_object(adam_sgd())
    assert config["registered_name"] == "sequential_optimizer>SequentialOptimizer"
    assert config["module"].startswith("sequential_optimizer")


# --- other variables -----------------------------------------------------------------


def two_layers(optimizer, frozen=()):
    """Returns a model, the first layers of which may be frozen."""
    keras.utils.clear_session(free_memory=False)
    starts = [keras.initializers.GlorotUniform(seed=i) for i in range(3)]
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(4, "tanh", kernel_initializer=starts[0]),
            keras.layers.Dense(4, "tanh", kernel_initializer=starts[1]),
            keras.layers.Dense(1, kernel_initializer=starts[2]),
        ]
    )
    for i in frozen:
        model.layers[i].trainable = False
    model.compile(optimizer, "mse", jit_compile=False)
    return model


def _freeze(model):
    model.layers[0].trainable = False
    return model


def _unfreeze(model):
    model.layers[0].trainable = True
    return model


CHANGES = {
    # name: (frozen layers at first, what happens after the training)
    "frozen": ((), _freeze),
    "unfrozen": ((0,), _unfreeze),
}


@pytest.mark.parametrize("kwargs", [{}, {"use_ema": True}], ids=["plain", "ema"])
@pytest.mark.parametrize("change", CHANGES)
def test_model_that_was_frozen_after_the_training_loads(tmp_path, change, kwargs):
    # It once failed, after the training, where plain Keras warns.
    frozen, edit = CHANGES[change]
    model = two_layers(adam_sgd(**kwargs), frozen)
    train(model, 0, CALLS)
    model = edit(model)
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match=r"`compile=False`") as caught:
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    message = next(str(w.message) for w in caught if "compile=False" in str(w.message))
    counts = re.findall(r"(\d) variables", message)
    assert counts == (["6", "4"] if change == "frozen" else ["4", "6"])
    optimizer = loaded.optimizer
    assert int(optimizer.iterations) == CALLS
    assert int(optimizer.phase) == 1
    assert optimizer.phase_starts.tolist() == [0, BOUNDARY]
    assert [int(child.iterations) for child in optimizer.children] == [0, 0]
    assert not any(np.any(v) for v in optimizer.children[1].variables[2:])
    # As if the child had just come: nothing of the old state is left.
    fresh = two_layers(optimizers.SGD(0.02, momentum=0.9))
    fresh.set_weights(loaded.get_weights())
    for mine, theirs in zip(loaded.layers, fresh.layers, strict=True):
        theirs.trainable = mine.trainable
    states, expected = train(loaded, 0, 2), train(fresh, 0, 2)
    assert_same([s[0] for s in states], [s[0] for s in expected])
    if kwargs:
        # The average continues from the weights, not from zero.
        optimizer.finalize_variable_values(loaded.trainable_variables)
        for averaged, weight in zip(loaded.get_weights(), states[-1][0], strict=True):
            np.testing.assert_allclose(averaged, weight, atol=0.2)
    bare = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    assert_same(weights_of(bare.weights), weights_of(model.weights))


def test_nothing_is_finalized_before_the_first_update_afresh(tmp_path):
    # The average of the child that had made the last update is zero then, and became
    # the weights.
    children = [optimizers.Adam(0.01), optimizers.SGD(0.02, use_ema=True)]
    model = two_layers(SequentialOptimizer(children, [BOUNDARY]))
    train(model, 0, CALLS)
    _freeze(model).save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="every child starts afresh"):
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    before = loaded.get_weights()
    loaded.optimizer.finalize_variable_values(loaded.trainable_variables)
    assert_same(loaded.get_weights(), before)


def test_keras_file_of_a_checkpoint_that_was_restored_before_build(tmp_path):
    # The file has what was there before `build`: the count of Adam's updates was loaded
    # without its moments.
    path = tf.train.Checkpoint(model=trained()).write(str(tmp_path / "checkpoint"))
    restored = make_model(adam_sgd())
    tf.train.Checkpoint(model=restored).read(path)
    restored.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="every child starts afresh"):
        loaded = keras.saving.load_model(tmp_path / "model.keras").optimizer
    assert int(loaded.iterations) == CALLS
    assert [int(child.iterations) for child in loaded.children] == [0, 0]


@needs_schedule_free
def test_plain_checkpoint_before_build_loses_copies_of_weights(tmp_path):
    # If this fails, Keras keeps them now: take the sentence out of the README.
    weight = keras.Variable([1.0, 2.0])
    saved, restored = (optimizers.ScheduleFreeAdamW(0.1) for _ in range(2))
    for _ in range(2):
        saved.apply([tf.ones(2)], [weight])
    path = tf.train.Checkpoint(optimizer=saved).write(str(tmp_path / "ck"))
    tf.train.Checkpoint(optimizer=restored).read(path)
    restored.build([weight])
    assert int(restored.iterations) == 2
    assert np.all(saved.variables[2].numpy() != weight.numpy())
    assert_same(restored.variables[2].numpy(), weight.numpy())


@needs_schedule_free
def test_child_that_copies_weights_is_loaded_once(tmp_path):
    # Keras found it a second time, with the copies, and loaded it by its position, also
    # after the sequence had refused the file.
    def make(first):
        free = optimizers.ScheduleFreeAdamW(0.1, name="free")
        return build(make_model(SequentialOptimizer([first, free], [1])))

    saved, other = make(optimizers.SGD(0.1)), make(optimizers.Adam(0.1))
    train(saved, 0, 3)
    saved.save_weights(tmp_path / "model.weights.h5")
    before = weights_of(other.optimizer.variables)
    with pytest.raises(ValueError, match="same order"):
        other.load_weights(tmp_path / "model.weights.h5")
    assert_same(weights_of(other.optimizer.variables), before)


def test_notes_that_do_not_fit_are_refused_before_build(tmp_path):
    # `build` once loaded the rest of the file, although loading it had raised.
    model = trained()
    model.optimizer.notes["note"] = np.zeros(2)
    model.save_weights(tmp_path / "model.weights.h5")
    other = make_model(adam_sgd())
    other.optimizer.notes["note"] = np.zeros(3)
    with pytest.raises(ValueError, match="dtype and shape"):
        other.load_weights(tmp_path / "model.weights.h5")
    build(other)
    assert int(other.optimizer.iterations) == 0


def test_number_of_numpy_is_saved(tmp_path):
    # `gradient_accumulation_steps=dataset.cardinality().numpy()` could not be saved.
    model = build(make_model(adam_sgd(gradient_accumulation_steps=np.int64(4))))
    model.save_weights(tmp_path / "model.weights.h5")
    model.load_weights(tmp_path / "model.weights.h5")
    tf.train.Checkpoint(model.optimizer).write(tmp_path / "ck")


def test_file_in_several_shards_loads(tmp_path):
    # Its layout once came after the notes of callbacks, in a shard that was not read.
    if "max_shard_size" not in inspect.signature(keras.Model.save_weights).parameters:
        pytest.skip("this version of Keras writes one file")
    model = make_model(adam_sgd())
    train(model, 0, CALLS)
    model.optimizer.notes.update(a=np.arange(1000.0), b=np.ones(1000))
    model.save_weights(tmp_path / "model.weights.json", max_shard_size=1e-5)
    assert len(list(tmp_path.glob("*.h5"))) > 1
    loaded = build(make_model(adam_sgd()))
    loaded.optimizer.notes.update(a=np.zeros(1000), b=np.zeros(1000))
    loaded.load_weights(tmp_path / "model.weights.json")
    assert_same(state_of(loaded), state_of(model))
    assert_same(loaded.optimizer.notes["a"], np.arange(1000.0))


def test_trained_optimizer_starts_afresh_too(tmp_path):
    model = two_layers(adam_sgd())
    train(model, 0, CALLS)
    model.save_weights(tmp_path / "model.weights.h5")
    frozen = two_layers(adam_sgd(), frozen=(0,))
    train(frozen, 0, 2)
    messages = warnings_of(frozen.load_weights, tmp_path / "model.weights.h5")
    assert any("every child starts afresh" in message for message in messages)
    fresh = build(two_layers(adam_sgd(), frozen=(0,)))
    for child, other in zip(
        frozen.optimizer.children, fresh.optimizer.children, strict=True
    ):
        assert_same(weights_of(child.variables), weights_of(other.variables))
    assert int(frozen.optimizer.iterations) == CALLS


def test_window_of_accumulation_starts_afresh_too(tmp_path):
    model = two_layers(adam_sgd(gradient_accumulation_steps=2))
    train(model, 0, 5)
    model.save_weights(tmp_path / "model.weights.h5")
    frozen = two_layers(adam_sgd(gradient_accumulation_steps=2), frozen=(0,))
    train(frozen, 0, 1)
    warnings_of(frozen.load_weights, tmp_path / "model.weights.h5")
    assert int(frozen.optimizer.iterations) == 2
    before = weights_of(frozen.weights)
    train(frozen, 5, 6)
    assert_same(weights_of(frozen.weights), before)
    train(frozen, 6, 7)
    assert int(frozen.optimizer.iterations) == 3


def test_checkpoint_of_other_variables_is_refused(tmp_path):
    model = two_layers(adam_sgd())
    train(model, 0, CALLS)
    save_checkpoint(model, tmp_path)
    frozen = two_layers(adam_sgd(), frozen=(0,))
    train(frozen, 0, 1)
    before = state_of(frozen)
    checkpoint = tf.train.Checkpoint(model=frozen)
    with pytest.raises(ValueError, match="by which TensorFlow tells them apart"):
        checkpoint.read(checkpoint_in(tmp_path))
    assert_same(state_of(frozen), before)


def test_children_start_afresh_if_nothing_trained_is_the_same(tmp_path):
    # First the lower layer, then the upper one: it was refused, where Keras warns.
    model = two_layers(adam_sgd(), frozen=(1, 2))
    train(model, 0, CALLS)
    model.save_weights(tmp_path / "model.weights.h5")
    other = build(two_layers(adam_sgd(), frozen=(0, 1)))
    messages = warnings_of(other.load_weights, tmp_path / "model.weights.h5")
    assert any("every child starts afresh" in message for message in messages)
    assert int(other.optimizer.iterations) == CALLS
    assert [int(child.iterations) for child in other.optimizer.children] == [0, 0]


@pytest.mark.parametrize("rate", [None, 0.002], ids=["of the code", "set since"])
def test_rates_of_children_that_start_afresh_are_not_those_of_the_file(tmp_path, rate):
    # A lower rate for fine-tuning; those of the file are set until `build`.
    model = two_layers(adam_sgd())
    train(model, 0, BOUNDARY - 1)
    model.save_weights(tmp_path / "model.weights.h5")
    adam = optimizers.Adam(0.001, name="adam")
    frozen = two_layers(SequentialOptimizer([adam, "sgd"], [BOUNDARY]), frozen=(0,))
    frozen.load_weights(tmp_path / "model.weights.h5")
    if rate:
        frozen.optimizer.learning_rate = rate
    with pytest.warns(UserWarning, match="every child starts afresh"):
        build(frozen)
    assert float(adam.learning_rate) == np.float32(rate or 0.001)
    assert int(frozen.optimizer.iterations) == BOUNDARY - 1


def test_children_start_afresh_if_variables_are_in_another_order():
    def variables():
        return [keras.Variable(np.ones(2), name=name) for name in "ab"]

    optimizer, other, store = adam_sgd(), adam_sgd(), {}
    optimizer.apply([tf.ones(2), 5 * tf.ones(2)], variables())
    optimizer.save_own_variables(store)
    other.build(variables()[::-1])
    with pytest.warns(UserWarning, match="every child starts afresh"):
        other.load_own_variables(store)
    assert int(other.iterations) == 1
    assert int(other.children[0].iterations) == 0


@pytest.mark.parametrize("now", [("dense_1", "dense"), ("dense", "dense_3")])
def test_layers_that_numbers_alone_tell_apart_go_by_their_order(now):
    # A program that creates its layers in another order, or a notebook whose cell was
    # run twice: the state went to the other layer, or was lost.
    def make(names):
        optimizer = adam_sgd()
        variables = [keras.Variable(np.ones(2), name=name) for name in names]
        optimizer.build(variables)
        return optimizer, variables

    optimizer, variables = make(["dense", "dense_1"])
    (other, _), store = make(now), {}
    optimizer.apply([tf.ones(2), 5 * tf.ones(2)], variables)
    optimizer.save_own_variables(store)
    with pytest.warns(UserWarning, match="told apart by their order") as caught:
        other.load_own_variables(store)
    assert len(caught) == 1
    assert_same(weights_of(other.variables), weights_of(optimizer.variables))


@pytest.mark.parametrize("now", [("stage_1",), ("stage_2", "stage_3")])
def test_numbers_in_names_of_the_user_are_no_numbers_of_keras(now):
    # `stage_1` was taken for the `stage_2` in the file.
    def make(names):
        optimizer = adam_sgd()
        optimizer.build([keras.Variable(np.ones(2), name=name) for name in names])
        return optimizer

    store = {}
    make(["stage_2", "stage_1"][: len(now)]).save_own_variables(store)
    with pytest.warns(UserWarning, match="every child starts afresh"):
        make(now).load_own_variables(store)


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """Has a layer inside, as the blocks of most models do."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = keras.layers.Dense(4)

    def build(self, input_shape):
        self.inner.build(input_shape)

    def call(self, inputs):
        return self.inner(inputs)


@pytest.mark.parametrize("way", [*WHOLE_MODEL, "checkpoint"])
def test_layers_in_a_block_are_numbered_for_themselves(tmp_path, way):
    # Loaded once more, the layer inside is `dense_2`, and the one after it `dense_1`
    # as in the file: all state was lost, or the checkpoint refused.
    model = keras.Sequential([keras.Input((4,)), Block(), keras.layers.Dense(1)])
    model.compile(SequentialOptimizer(["adam", "sgd"], [9]), "mse")
    model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)
    if way == "checkpoint":
        loaded = keras.models.clone_model(model)
        loaded.compile(SequentialOptimizer(["adam", "sgd"], [9]), "mse")
        loaded.optimizer.build(loaded.trainable_variables)
        path = tf.train.Checkpoint(model.optimizer).write(str(tmp_path / "ck"))
        tf.train.Checkpoint(loaded.optimizer).read(path)
    else:
        loaded = WHOLE_MODEL[way](model, tmp_path)
    paths = [[v.path for v in m.trainable_variables] for m in (model, loaded)]
    assert paths[0] != paths[1]
    assert_same(
        weights_of(loaded.optimizer.variables), weights_of(model.optimizer.variables)
    )


def test_layer_with_layers_inside_is_not_taken_for_another_silently(tmp_path):
    # A beginning that all paths share was once left out, and so the layer's name.
    def make(trained, optimizer):
        lower = keras.layers.LSTM(2, name="lower", return_sequences=True)
        upper = keras.layers.LSTM(2, name="upper")
        model = keras.Sequential([keras.Input((3, 2)), lower, upper])
        lower.trainable, upper.trainable = trained == "lower", trained == "upper"
        model.compile(optimizer, "mse", jit_compile=False)
        return model

    model = make("lower", adam_sgd())
    model.fit(np.ones((4, 3, 2)), np.ones((4, 2)), verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    other = build(make("upper", adam_sgd()))
    messages = warnings_of(other.load_weights, tmp_path / "model.weights.h5")
    assert any("told apart by their order" in message for message in messages)


def _quantized(mode):
    model = two_layers(adam_sgd())
    train(model, 0, CALLS)
    # Keras warns of the input layer.
    warnings_of(model.quantize, mode)
    return model


@pytest.fixture
def _can_quantize():
    if not hasattr(keras.Model, "quantize"):
        pytest.skip("Keras is too old to quantize")


@pytest.mark.usefixtures("_can_quantize")
def test_model_that_was_quantized_after_the_training_loads(tmp_path):
    model = _quantized("int8")
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="every child starts afresh"):
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.iterations) == CALLS


@pytest.mark.slow
@pytest.mark.usefixtures("_can_quantize")
def test_model_that_is_trained_in_float8_starts_afresh(tmp_path):
    # Keras lists the variables in another order when it loads such a model.
    model = _quantized("float8")
    model.compile(adam_sgd(), "mse", jit_compile=False)
    x, y = np.ones((8, 4)), np.ones((8, 1))
    model.fit(x, y, epochs=CALLS, verbose=0)
    model.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="every child starts afresh"):
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert int(loaded.optimizer.iterations) == CALLS
    loaded.fit(x, y, verbose=0)


# --- what a child makes late, and what it keeps --------------------------------------


class Late(optimizers.SGD):
    """A user's optimizer that makes its variables in its first update."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.previous = []

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        if index == len(self.previous):
            slot = self.add_variable_from_reference(variable, "previous")
            self.previous.append(slot)
        previous = self.previous[index]
        super().update_step(gradient + 0.5 * previous.value, variable, learning_rate)
        self.assign(previous, gradient)


def adam_late():
    return SequentialOptimizer([optimizers.Adam(0.05), Late(0.1)], [BOUNDARY])


def test_variables_that_are_made_late_are_refused(tmp_path):
    # They look like those of a child that was created with other arguments.
    model = trained(adam_late)
    save_checkpoint(model, tmp_path)
    model.save_weights(tmp_path / "model.weights.h5")

    def load_weights(model):
        model.load_weights(tmp_path / "model.weights.h5")

    def restore(model):
        tf.train.Checkpoint(model=model).read(checkpoint_in(tmp_path))

    for load in (load_weights, restore):
        built, unbuilt = (make_model(adam_late()) for _ in range(2))
        before = weights_of(build(built).optimizer.variables)
        with pytest.raises(ValueError, match="and all variables in `build`"):
            load(built)
        assert_same(weights_of(built.optimizer.variables), before)
        load(unbuilt)
        with pytest.raises(ValueError, match="and all variables in `build`"):
            build(unbuilt)


def test_checkpoint_of_an_unbuilt_optimizer_does_not_reset_a_run(tmp_path):
    # It has the counters, and nothing of the children.
    save_checkpoint(make_model(adam_late()), tmp_path)
    model = trained(adam_late)
    before = state_of(model)
    with pytest.raises(ValueError, match="must be of the same variables"):
        tf.train.Checkpoint(model=model).read(checkpoint_in(tmp_path))
    assert_same(state_of(model), before)


class Counts(optimizers.SGD):
    """A user's optimizer that lists a variable of TensorFlow."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.count = tf.Variable(0, trainable=False)

    @property
    def variables(self):
        return [*super().variables, self.count]


def test_integer_variable_of_tensorflow_is_loaded():
    # Saving it worked; loading ended in "Invalid integer data type 'O'".
    saved, loaded = (SequentialOptimizer([Counts(0.1)], []) for _ in range(2))
    variables, store = [keras.Variable([1.0])], {}
    for optimizer in (saved, loaded):
        optimizer.build(variables)
    saved.children[0].count.assign(7)
    saved.save_own_variables(store)
    loaded.load_own_variables(store)
    assert int(loaded.children[0].count) == 7
    arrays = weights_of(saved.variables)
    loaded.set_weights([*arrays[:-1], np.array(8)])
    assert int(loaded.children[0].count) == 8
    with pytest.raises(ValueError, match="must have integers"):
        loaded.set_weights([*arrays[:-1], np.array(8.5)])


class Keeping(optimizers.SGD):
    """A user's optimizer that keeps something of Keras."""

    def __init__(self, kept, **kwargs):
        super().__init__(0.1, **kwargs)
        self.kept = kept


def _dense():
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")
    layer.build((None, 1))
    return layer


KEPT = {
    "layer": _dense,
    "model": lambda: keras.Sequential([keras.Input((1,)), _dense()]),
    "metric": lambda: keras.metrics.Mean(),
    "list": lambda: [_dense(), keras.metrics.Mean()],
}


@pytest.mark.parametrize("built", [True, False], ids=["built", "unbuilt"])
@pytest.mark.parametrize("name", KEPT)
def test_what_a_child_keeps_in_keras_is_saved_with_it(name, built):
    # A resumed run silently continued with fresh values.
    saved, loaded = (SequentialOptimizer([Keeping(KEPT[name]())], []) for _ in "ab")
    variables, store = [keras.Variable([1.0])], {}
    saved.build(variables)
    kept, kept_loaded = (
        [v for one in tf.nest.flatten(o.children[0].kept) for v in one.variables]
        for o in (saved, loaded)
    )
    for variable in kept:
        variable.assign(variable + 2.0)
    saved.save_own_variables(store)
    if built:
        loaded.build(variables)
    loaded.load_own_variables(store)
    loaded.build(variables)
    assert kept
    assert_same(weights_of(kept_loaded), weights_of(kept))


def test_weights_that_are_trained_are_not_saved_with_a_child():
    layer, store = _dense(), {}
    optimizer = SequentialOptimizer([Keeping(layer)], [])
    optimizer.build([layer.kernel])
    optimizer.save_own_variables(store)
    assert not any("kept" in key for key in store)


# A classifier on a pretrained base could not be resumed: Keras drops the names of
# nested models from the paths when it loads them.
def test_model_in_a_model_continues(tmp_path):
    base = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)], name="base")
    model = keras.Sequential([keras.Input((2,)), base, keras.layers.Dense(1)])
    model.compile(SequentialOptimizer(["adam", "sgd"], [9]), "mse")
    model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    paths = [[v.path for v in m.trainable_variables] for m in (model, loaded)]
    assert paths[0] != paths[1]
    assert_same(
        weights_of(loaded.optimizer.variables), weights_of(model.optimizer.variables)
    )
