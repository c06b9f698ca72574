"""Keras' own callbacks act on the active child, never on one that has yet to begin."""

import csv
import functools

import keras
import numpy as np
import pytest

from sequential_optimizer import PhaseLogger, SequentialOptimizer
from tests.helpers.callbacks import compiled_model
from tests.helpers.models import state_of
from tests.helpers.oracle import assert_same, weights_of

EPOCHS = 4
UPDATES_PER_EPOCH = 2
# After 5 and 9 updates: within the third epoch, and after the last one.
BOUNDARIES = [5, 9]

_RNG = np.random.default_rng(0)
X = _RNG.normal(size=(8, 3)).astype(np.float32)
Y = X.sum(axis=1, keepdims=True)


def make_children():
    return [
        keras.optimizers.Adam(0.01),
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.optimizers.RMSprop(0.2),
    ]


def as_it_is(optimizer):
    return optimizer


def with_loss_scaling(optimizer):
    return keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0)


@pytest.fixture(
    params=[as_it_is, pytest.param(with_loss_scaling, marks=pytest.mark.slow)]
)
def wrap(request):
    """Runs a test with the SequentialOptimizer as it is, and wrapped."""
    return request.param


def fit(model, *callbacks, epochs=EPOCHS, y=Y, **kwargs):
    return model.fit(
        X,
        y,
        batch_size=len(X) // UPDATES_PER_EPOCH,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=list(callbacks),
        **kwargs,
    )


def run(wrap, *callbacks, boundaries=BOUNDARIES, use_ema=False, **kwargs):
    """Fits a model; returns it, its SequentialOptimizer and the history."""
    sequence = SequentialOptimizer(make_children(), boundaries, use_ema=use_ema)
    model = compiled_model(wrap(sequence), keras.Sequential, jit_compile=False)
    history = fit(model, *callbacks, **kwargs)
    return model, sequence, history.history


@functools.cache
def state_without_callbacks(wrap, epochs=EPOCHS, use_ema=False):
    model, sequence, _ = run(wrap, epochs=epochs, use_ema=use_ema)
    return state_of(model, *sequence.children)


def rates_of(sequence):
    return [float(child.learning_rate) for child in sequence.children]


def assert_as_when_built(sequence, index):
    """Asserts that the child is one whose phase has not begun."""
    fresh = make_children()[index]
    fresh.build(sequence._trainable_variables)
    child = sequence.children[index]
    assert_same(weights_of(child.variables), weights_of(fresh.variables))


class EachBatch(keras.callbacks.Callback):
    """Keeps what a function returns after each update."""

    def __init__(self, look):
        super().__init__()
        self.look = look
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(self.look())


# --- LearningRateScheduler ---------------------------------------------------


def halve(epoch, learning_rate):
    return learning_rate / 2


def test_learning_rate_scheduler_sets_the_active_child(wrap):
    _, sequence, _ = run(wrap, keras.callbacks.LearningRateScheduler(halve))
    # The third epoch begins in Adam's phase, the fourth in SGD's.
    expected = [0.01 / 2**3, 0.1 / 2, 0.2]
    np.testing.assert_allclose(rates_of(sequence), expected, rtol=1e-6)
    assert_as_when_built(sequence, 2)


def test_learning_rate_scheduler_equals_two_plain_fits():
    scheduler = keras.callbacks.LearningRateScheduler(halve)
    model, sequence, _ = run(as_it_is, scheduler, boundaries=[4, 9])

    adam, sgd, rmsprop = make_children()
    plain = compiled_model(adam, jit_compile=False)
    fit(plain, scheduler, epochs=2)
    plain.compile(sgd, loss="mse", jit_compile=False)
    fit(plain, scheduler, initial_epoch=2)
    rmsprop.build(plain.trainable_variables)
    expected = [weights_of(plain.weights)]
    expected += [weights_of(child.variables) for child in (adam, sgd, rmsprop)]
    assert_same(state_of(model, *sequence.children), expected)


@pytest.mark.slow
def test_rate_at_the_end_of_an_epoch_is_logged(wrap):
    # At the end of the second epoch Keras logs the rate of the next update, SGD's.
    # PhaseLogger, which comes after it, logs the rate of the last update.
    scheduler = keras.callbacks.LearningRateScheduler(halve)
    _, _, alone = run(wrap, scheduler, boundaries=[4, 9])
    _, _, both = run(wrap, scheduler, PhaseLogger(verbose=0), boundaries=[4, 9])
    expected = [0.005, 0.1, 0.05, 0.025]
    np.testing.assert_allclose(alone["learning_rate"], expected, rtol=1e-6)
    expected[1] = 0.0025
    np.testing.assert_allclose(both["learning_rate"], expected, rtol=1e-6)


# --- ReduceLROnPlateau -------------------------------------------------------


def reduce_at_each_epoch_after_the_first():
    # Nothing improves by that much.
    return keras.callbacks.ReduceLROnPlateau(
        monitor="loss", factor=0.5, patience=1, min_delta=1e9
    )


def test_reduce_lr_on_plateau_cuts_the_active_child(wrap):
    _, sequence, _ = run(wrap, reduce_at_each_epoch_after_the_first())
    # After 4 updates it is Adam, after 6 and 8 it is SGD.
    expected = [0.01 / 2, 0.1 / 2**2, 0.2]
    np.testing.assert_allclose(rates_of(sequence), expected, rtol=1e-6)
    assert_as_when_built(sequence, 2)


def test_reduce_lr_on_plateau_cuts_who_makes_the_next_update(wrap):
    # After 4 updates, at the end of the second epoch, Adam's phase is over.
    _, sequence, _ = run(
        wrap, reduce_at_each_epoch_after_the_first(), boundaries=[4, 9], epochs=2
    )
    np.testing.assert_allclose(rates_of(sequence), [0.01, 0.1 / 2, 0.2], rtol=1e-6)


# --- SwapEMAWeights ----------------------------------------------------------


def averages_of(weights, momentum=0.99):
    """Returns the moving average after each update, computed by hand."""
    average, averages = weights[0], []
    for now in weights:
        average = [
            momentum * a + (1 - momentum) * w for a, w in zip(average, now, strict=True)
        ]
        averages.append(average)
    return averages


@pytest.mark.slow
@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_swap_ema_weights_validates_the_average(wrap, swap_on_epoch):
    sequence = SequentialOptimizer(make_children(), BOUNDARIES, use_ema=True)
    model = compiled_model(wrap(sequence), jit_compile=False)
    weights = EachBatch(lambda: weights_of(model.trainable_variables))
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=swap_on_epoch)
    history = fit(model, weights, swap, validation_data=(X, Y)).history

    # Swapping twice rounds, because Keras swaps by adding and subtracting.
    tolerance = 1e-5
    assert_same(
        state_of(model, *sequence.children),
        state_without_callbacks(wrap, use_ema=True),
        atol=tolerance,
    )
    assert_as_when_built(sequence, 2)
    averages = averages_of(weights.seen)[UPDATES_PER_EPOCH - 1 :: UPDATES_PER_EPOCH]
    expected = [np.mean((X @ kernel + bias - Y) ** 2) for kernel, bias in averages]
    np.testing.assert_allclose(history["val_loss"], expected, rtol=1e-4)
    # Which differs from validating the weights themselves.
    last_kernel, last_bias = weights.seen[-1]
    loss = np.mean((X @ last_kernel + last_bias - Y) ** 2)
    assert abs(loss - history["val_loss"][-1]) > 0.1


# --- ModelCheckpoint ---------------------------------------------------------


@pytest.mark.slow
def test_model_checkpoint_of_either_phase_continues(wrap, tmp_path):
    run(wrap, keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"))
    for epochs, phase in ((1, 0), (3, 1)):
        resumed = keras.models.load_model(tmp_path / f"{epochs}.keras")
        sequence = getattr(resumed.optimizer, "inner_optimizer", resumed.optimizer)
        assert int(sequence.iterations) == epochs * UPDATES_PER_EPOCH
        assert int(sequence.phase) == phase
        assert_as_when_built(sequence, 2)
        fit(resumed, initial_epoch=epochs)
        assert_same(
            state_of(resumed, *sequence.children), state_without_callbacks(wrap)
        )


@pytest.mark.slow
def test_model_checkpoint_of_the_best_epoch_keeps_its_phase(wrap, tmp_path):
    path = tmp_path / "best.weights.h5"
    # The best by this rule is the first epoch, whose loss is the highest.
    checkpoint = keras.callbacks.ModelCheckpoint(
        path, monitor="loss", mode="max", save_best_only=True, save_weights_only=True
    )
    _, _, history = run(wrap, checkpoint)
    assert np.argmax(history["loss"]) == 0

    sequence = SequentialOptimizer(make_children(), BOUNDARIES)
    model = compiled_model(wrap(sequence), jit_compile=False)
    model.optimizer.build(model.trainable_variables)
    # The class of the model, and so its name, is another one.
    with pytest.warns(UserWarning, match="told apart by their order"):
        model.load_weights(path)
    assert int(sequence.iterations) == UPDATES_PER_EPOCH
    assert_same(
        state_of(model, *sequence.children), state_without_callbacks(wrap, epochs=1)
    )


# --- EarlyStopping -----------------------------------------------------------


@pytest.mark.slow
def test_early_stopping_restores_weights_not_children(wrap):
    # The first epoch is the best, because nothing improves by that much, and the
    # fourth, in SGD's phase, is the third without improvement.
    stop = keras.callbacks.EarlyStopping(
        "loss", min_delta=1e9, patience=3, restore_best_weights=True
    )
    model, sequence, history = run(wrap, stop, epochs=10)
    assert len(history["loss"]) == 4
    weights, *children = state_of(model, *sequence.children)
    assert_same(weights, state_without_callbacks(wrap, epochs=1)[0])
    assert_same(children, state_without_callbacks(wrap, epochs=4)[1:])
    assert int(sequence.phase) == 1
    assert_as_when_built(sequence, 2)


# --- TerminateOnNaN ----------------------------------------------------------


@pytest.mark.usefixtures("interrupted_fit")
def test_terminate_on_nan_stops_before_the_switch(wrap):
    y = Y.copy()
    y[-1] = np.nan  # in the second batch of each epoch
    model, sequence, history = run(wrap, keras.callbacks.TerminateOnNaN(), y=y)
    assert len(history["loss"]) == 1
    # Loss scaling skips the second update, and then it does not count.
    skips = wrap is with_loss_scaling
    updates = 1 if skips else 2
    counts = [int(child.iterations) for child in sequence.children]
    assert counts == [updates, 0, 0]
    assert int(sequence.iterations) == updates
    finite = [np.isfinite(weight).all() for weight in weights_of(model.weights)]
    assert finite == [skips, skips]
    for index in (1, 2):
        assert_as_when_built(sequence, index)


# --- CSVLogger ---------------------------------------------------------------


def test_csv_logger_writes_phase_and_learning_rate(wrap, tmp_path):
    path = tmp_path / "log.csv"
    _, _, history = run(wrap, PhaseLogger(verbose=0), keras.callbacks.CSVLogger(path))
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2, 3]
    assert [int(row["phase"]) for row in rows] == [0, 0, 1, 1]
    rates = [float(row["learning_rate"]) for row in rows]
    np.testing.assert_allclose(rates, [0.01, 0.01, 0.1, 0.1], rtol=1e-6)
    for column, values in history.items():
        assert [float(row[column]) for row in rows] == values
