"""What the README's table says to write does what the table says."""

import math
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import PhaseLogger, SequentialOptimizer, SwitchOnPlateau
from tests.helpers.oracle import assert_same

README = (Path(__file__).parents[2] / "README.md").read_text()
(TRAIN_STEP,) = re.findall(
    r"^```python\n([^`]*?def train_step\(x, y\).*?)^```$", README, re.M | re.S
)
(HAS_STALLED,) = re.findall(
    r"^```python\n([^`]*?def has_stalled.*?)^```$", README, re.M | re.S
)
ROWS = dict(re.findall(r"^\| ([^|`]+) \| (.*?) \|$", README, re.M))
Adam, SGD = keras.optimizers.Adam, keras.optimizers.SGD

_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(30, 3)).astype(np.float32)
Y = X.sum(axis=1, keepdims=True)


def code_of(row):
    """Returns the first piece of code in the second column."""
    return re.search("`(.*?)`", ROWS[row]).group(1)


def make_model():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.set_weights([np.zeros((3, 1)), np.zeros(1)])
    return model


def fit(optimizer, epochs, callbacks=()):
    """Returns the phase after each epoch of three full batches and a partial one."""
    model = make_model()
    model.compile(optimizer, "mse")
    callbacks = [*callbacks, PhaseLogger(verbose=0)]
    history = model.fit(
        X, Y, batch_size=9, epochs=epochs, verbose=0, callbacks=callbacks
    )
    return history.history["phase"]


@pytest.mark.parametrize(
    "row",
    [
        "to switch when the gradient is small",
        "a threshold for each phase",
        "to switch when the mean loss stalls",
    ],
)
def test_condition_in_the_graph(row, tmp_path):
    code = TRAIN_STEP.replace("if loss < 0.5", code_of(row))
    assert code != TRAIN_STEP
    path = tmp_path / "example.py"  # AutoGraph reads it there.
    path.write_text(code)
    names = {
        "SequentialOptimizer": SequentialOptimizer,
        "batches": [(X, Y)] * 600,
        "loss_fn": keras.losses.MeanSquaredError(),
        "model": make_model(),
        "tf": tf,
    }
    exec(HAS_STALLED, names)
    exec(compile(code, path, "exec"), names)
    (_, start) = names["optimizer"].phase_starts
    assert 1 < start < 600


def test_boundary_in_epochs():
    code = code_of("to switch after 5 epochs").removeprefix("boundaries=")
    boundaries = eval(code, {"steps_per_epoch": math.ceil(len(X) / 9)})
    assert fit(SequentialOptimizer([Adam(), SGD()], boundaries), 7) == [0] * 5 + [1] * 2


def test_callback_that_switches_at_an_epoch():
    optimizer = SequentialOptimizer([Adam(), SGD()], [None])
    names = {"LambdaCallback": keras.callbacks.LambdaCallback, "optimizer": optimizer}
    callback = eval(code_of("the same, by a callback"), names)
    assert fit(optimizer, 7, [callback]) == [0] * 5 + [1] * 2


def test_advance_between_two_steps_of_a_graph():
    optimizer = SequentialOptimizer([SGD(1.0, name="a"), SGD(10.0, name="b")], [None])
    weight = tf.Variable(0.0)
    optimizer.build([weight])
    step = tf.function(lambda: optimizer.apply([tf.constant(1.0)], [weight]))
    step()
    eval(code_of("to switch between two steps"), {"optimizer": optimizer})
    step()
    assert weight.numpy() == -11.0


def test_another_instance_starts_afresh():
    def start_of_the_last(third):
        optimizer = SequentialOptimizer([adam, sgd, third], [2, 4])
        weight = tf.Variable(1.0)
        for _ in range(5):
            optimizer.apply([tf.constant(1.0)], [weight])
        return int(third.iterations)

    adam, sgd = Adam(1e-2, name="adam"), SGD(name="sgd")
    code = code_of("an optimizer to start afresh")
    names = {"Adam": Adam, "adam": adam, "sgd": sgd}
    assert start_of_the_last(eval(code, names)[2]) == 1
    adam, sgd = Adam(1e-2, name="adam"), SGD(name="sgd")
    assert start_of_the_last(adam) == 3


def test_learning_rate_of_a_phase_to_come():
    optimizer = SequentialOptimizer([SGD(0.1, name="a"), SGD(0.1, name="b")], [1])
    exec(code_of("the learning rate of a phase to come"), {"optimizer": optimizer})
    assert float(optimizer.learning_rate) == np.float32(0.1)
    optimizer.apply([tf.constant(1.0)], [tf.Variable(0.0)])
    assert float(optimizer.learning_rate) == np.float32(1e-3)


def test_second_fit_continues_the_count():
    model = make_model()
    model.compile(SequentialOptimizer([Adam(), SGD()], [6]), "mse")
    for _ in range(2):
        model.fit(X, Y, batch_size=9, verbose=0)
    np.testing.assert_array_equal(model.optimizer.phase_starts, [0, 6])


def test_plateau_in_a_loop_without_fit():
    model = make_model()
    model.compile(SequentialOptimizer([Adam(), SGD()], [None]), "mse")
    plateau = SwitchOnPlateau("val_loss", patience=2)
    callbacks = keras.callbacks.CallbackList([plateau], model=model)
    callbacks.on_train_begin()
    phases = []
    for epoch, loss in enumerate([3.0, 2.0, 2.0, 2.0, 2.0]):
        callbacks.on_epoch_end(epoch, {"val_loss": loss})
        phases.append(int(model.optimizer.phase))
    assert phases == [0, 0, 0, 1, 1]


# --- a frozen backbone -------------------------------------------------------

needs_optimizer_map = pytest.mark.skipif(
    not hasattr(keras.optimizers, "OptimizerMap"),
    reason="this version of Keras has no OptimizerMap",
)


@needs_optimizer_map
def test_frozen_backbone_in_the_first_phase():
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, name="backbone"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(1, name="head"),
        ]
    )
    names = {name: getattr(keras.optimizers, name) for name in dir(keras.optimizers)}
    head_only = eval(code_of("a frozen backbone in the first phase"), names)
    model.compile(SequentialOptimizer([head_only, Adam(1e-2)], [4]), "mse")

    def weights_after_an_epoch():
        model.fit(X, Y, batch_size=9, verbose=0)
        return {
            layer.name: [weight.numpy() for weight in layer.weights]
            for layer in model.layers
        }

    start = {layer.name: layer.get_weights() for layer in model.layers}
    first, second = weights_after_an_epoch(), weights_after_an_epoch()
    assert_same(first["backbone"], start["backbone"])
    assert_same(first["norm"][:2], start["norm"][:2])
    for name, i in (("head", 0), ("norm", 2), ("norm", 3)):
        assert np.abs(first[name][i] - start[name][i]).min() > 0
    assert np.abs(second["backbone"][0] - first["backbone"][0]).min() > 0


@needs_optimizer_map
def test_plain_checkpoint_loses_those_of_a_multi_optimizer(tmp_path):
    # If this fails, TensorFlow saves them now: take the sentence out of the README.
    weight = keras.Variable(1.0)
    make = keras.optimizers.MultiOptimizer
    saved, restored = (make(keras.optimizers.OptimizerMap(Adam(0.1))) for _ in range(2))
    for optimizer in (saved, restored):
        optimizer.build([weight])
    saved.apply([tf.constant(1.0)], [weight])
    path = tf.train.Checkpoint(optimizer=saved).save(tmp_path / "ck")
    tf.train.Checkpoint(optimizer=restored).restore(path)
    assert int(saved.optimizers[0].iterations) == 1
    assert int(restored.optimizers[0].iterations) == 0
