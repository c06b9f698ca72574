"""Files that callbacks and a `CheckpointManager` write in the middle of training."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.oracle import assert_same, weights_of
from tests.helpers.saving import (
    adam_sgd,
    build,
    gradients_of,
    make_data,
    make_model,
    state_of,
    train,
)

# --- callbacks ---------------------------------------------------------------------


def _fit(model, batches, epochs=1, initial_epoch=0, callbacks=()):
    """Fits on these batches, in their order, in every epoch."""
    x, y = make_data()
    rows = x.shape[1]
    x, y = (np.concatenate([array[b] for b in batches]) for array in (x, y))
    return model.fit(
        x,
        y,
        batch_size=rows,
        shuffle=False,
        epochs=epochs,
        initial_epoch=initial_epoch,
        callbacks=list(callbacks),
        verbose=0,
    )


@pytest.mark.slow
def test_model_checkpoint_continues_as_if_never_saved(tmp_path):
    model = make_model(adam_sgd(), jit_compile=True)
    # One batch per epoch, so each epoch's file is one update later.
    save = [
        keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras"),
        keras.callbacks.ModelCheckpoint(
            tmp_path / "{epoch}.weights.h5", save_weights_only=True
        ),
    ]
    _fit(model, [0], epochs=6, callbacks=save)
    expected = state_of(model)
    loaded = keras.saving.load_model(tmp_path / "3.keras")
    assert loaded.jit_compile
    assert int(loaded.optimizer.iterations) == 3
    _fit(loaded, [0], epochs=6, initial_epoch=3)
    assert_same(state_of(loaded), expected)
    for epoch in (2, 3, 4):
        for trained in (model, loaded):
            trained.load_weights(tmp_path / f"{epoch}.weights.h5")
            assert int(trained.optimizer.iterations) == epoch
            _fit(trained, [0], epochs=6, initial_epoch=epoch)
            assert_same(state_of(trained), expected)


class _Crash(keras.callbacks.Callback):
    """Ends the process, as it were, after some updates; `advance()`s before."""

    def __init__(self, updates, advance_after=None):
        super().__init__()
        self.updates, self.advance_after = updates, advance_after

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == self.advance_after:
            self.model.optimizer.advance()
        if int(self.model.optimizer.iterations) == self.updates:
            raise KeyboardInterrupt


def _backup(tmp_path):
    return keras.callbacks.BackupAndRestore(tmp_path / "backup", save_freq=1)


@pytest.mark.usefixtures("interrupted_fit")
@pytest.mark.slow
@pytest.mark.parametrize(("updates", "in_epoch"), [(2, 0), (3, 0), (4, 1)])
def test_backup_and_restore_continues_after_a_crash(tmp_path, updates, in_epoch):
    epoch = [0, 1, 2]
    crashed, resumed, uninterrupted = (
        make_model(adam_sgd(), run_eagerly=True) for _ in range(3)
    )
    with pytest.raises(KeyboardInterrupt):
        _fit(crashed, epoch, 2, callbacks=[_backup(tmp_path), _Crash(updates)])
    _fit(resumed, epoch, 2, callbacks=[_backup(tmp_path)])
    # Keras begins the interrupted epoch again.
    batches = (epoch + epoch)[:updates] + epoch * (2 - in_epoch)
    _fit(uninterrupted, batches)
    assert int(resumed.optimizer.iterations) == len(batches)
    assert_same(state_of(resumed), state_of(uninterrupted))


@pytest.mark.usefixtures("interrupted_fit")
def test_backup_keeps_a_phase_ended(tmp_path):
    crashed, resumed = (
        make_model(adam_sgd([None]), run_eagerly=True) for _ in range(2)
    )
    crash = _Crash(updates=4, advance_after=2)
    with pytest.raises(KeyboardInterrupt):
        _fit(crashed, [0, 1, 2, 3, 4], callbacks=[_backup(tmp_path), crash])
    _fit(resumed, [0, 1], callbacks=[_backup(tmp_path)])
    uninterrupted = make_model(adam_sgd([2]), run_eagerly=True)
    _fit(uninterrupted, [0, 1, 2, 3, 0, 1])
    assert int(resumed.optimizer.phase) == 1
    ours, theirs = (
        [weights_of(model.weights)]
        + [weights_of(child.variables) for child in model.optimizer.children]
        for model in (resumed, uninterrupted)
    )
    assert_same(ours, theirs)


# --- managers of checkpoints ----------------------------------------------------


def _traced_step(model):
    """Returns a traced train step, the way a user's own loop has one."""
    x, y = (tf.constant(array) for array in make_data())

    @tf.function(autograph=False)
    def step(t):
        gradients = gradients_of(model, model.optimizer, x[t], y[t])
        model.optimizer.apply(gradients, model.trainable_variables)

    def run(start, stop):
        for t in range(start, stop):
            step(tf.constant(t))
        return state_of(model)

    run.step = step
    return run


@pytest.mark.slow
def test_manager_rolls_a_traced_step_back_without_a_retrace(tmp_path):
    model = build(make_model(adam_sgd()))
    step = _traced_step(model)
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(model=model), str(tmp_path), max_to_keep=3
    )
    states = [None]
    for t in range(6):
        states.append(step(t, t + 1))
        if t + 1 in (2, 3, 4):
            manager.save()
    assert len(manager.checkpoints) == 3
    for calls, path in zip((2, 3, 4), manager.checkpoints, strict=True):
        manager.checkpoint.restore(path).assert_consumed()
        assert_same(state_of(model), states[calls])
        assert_same(step(calls, 6), states[6])
    assert step.step.experimental_get_tracing_count() == 1

    # A new process finds the newest, with nothing built and nothing traced yet.
    resumed = make_model(adam_sgd())
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(model=resumed), str(tmp_path), max_to_keep=3
    )
    assert manager.restore_or_initialize() == manager.latest_checkpoint
    assert_same(_traced_step(resumed)(4, 6), states[6])


def test_manager_starts_afresh_without_a_checkpoint(tmp_path):
    model = make_model(adam_sgd())
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(model=model), str(tmp_path), max_to_keep=1
    )
    assert manager.restore_or_initialize() is None
    assert_same(train(model, 0, 6), train(make_model(adam_sgd()), 0, 6))
