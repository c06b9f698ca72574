"""What TensorBoard will show, read back from the files that it reads."""

import collections

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import PhaseLogger, SequentialOptimizer

EPOCHS = 3
UPDATES_PER_EPOCH = 2
# Within the second epoch.
BOUNDARY = 3

X = np.linspace(-1, 1, 8, dtype=np.float32)[:, None]


def adam_then_sgd():
    children = [keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1)]
    return SequentialOptimizer(children, [BOUNDARY])


def with_loss_scaling():
    return keras.optimizers.LossScaleOptimizer(adam_then_sgd())


def fit(optimizer, *callbacks):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(optimizer, loss="mse", jit_compile=False)
    return model.fit(
        X,
        X,
        batch_size=len(X) // UPDATES_PER_EPOCH,
        epochs=EPOCHS,
        verbose=0,
        callbacks=list(callbacks),
    ).history


def scalars_in(folder):
    """Returns the steps and values of each tag in the event files of a folder."""
    found = collections.defaultdict(list)
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(path)):
            event = tf.compat.v1.Event.FromString(record.numpy())
            for value in event.summary.value:
                # A tag says what it is at its first step only.
                kind = value.metadata.plugin_data.plugin_name
                if kind == "scalars" or value.tag in found:
                    scalar = float(tf.make_ndarray(value.tensor))
                    found[value.tag].append((event.step, scalar))
    return dict(found)


def values_of(points):
    return [value for _, value in points]


@pytest.fixture(
    params=[adam_then_sgd, pytest.param(with_loss_scaling, marks=pytest.mark.slow)]
)
def optimizer(request):
    return request.param()


def test_epochs_show_phase_and_learning_rate(optimizer, tmp_path):
    history = fit(
        optimizer, PhaseLogger(verbose=0), keras.callbacks.TensorBoard(tmp_path)
    )
    scalars = scalars_in(tmp_path / "train")
    shown = {"epoch_loss", "epoch_phase", "epoch_learning_rate", "epoch_iterations"}
    assert set(scalars) == shown
    for points in scalars.values():
        assert [step for step, _ in points] == [0, 1, 2]
    assert values_of(scalars["epoch_phase"]) == history["phase"] == [0, 1, 1]
    assert values_of(scalars["epoch_learning_rate"]) == history["learning_rate"]
    np.testing.assert_allclose(history["learning_rate"], [0.01, 0.1, 0.1], rtol=1e-6)


@pytest.mark.slow
def test_batches_show_phase_and_learning_rate(optimizer, tmp_path):
    fit(
        optimizer,
        PhaseLogger(per_batch=True, verbose=0),
        keras.callbacks.TensorBoard(tmp_path / "ours", update_freq=1),
    )
    fit("adam", keras.callbacks.TensorBoard(tmp_path / "plain", update_freq=1))
    scalars = scalars_in(tmp_path / "ours" / "train")
    plain = scalars_in(tmp_path / "plain" / "train")
    # The steps are Keras' own: counted from 1, and in old versions 0 for each.
    steps = [step for step, _ in plain["batch_loss"]]
    assert len(steps) == EPOCHS * UPDATES_PER_EPOCH
    for tag in ("batch_phase", "batch_learning_rate", "batch_loss"):
        assert [step for step, _ in scalars[tag]] == steps
    assert values_of(scalars["batch_phase"]) == [0, 0, 0, 1, 1, 1]
    np.testing.assert_allclose(
        values_of(scalars["batch_learning_rate"]), [0.01] * 3 + [0.1] * 3, rtol=1e-6
    )
    # The epochs are there as well.
    assert values_of(scalars["epoch_phase"]) == [0, 1, 1]


def test_tensorboard_alone_shows_the_rate_of_the_active_child(optimizer, tmp_path):
    fit(optimizer, keras.callbacks.TensorBoard(tmp_path))
    scalars = scalars_in(tmp_path / "train")
    assert set(scalars) == {"epoch_loss", "epoch_learning_rate"}
    np.testing.assert_allclose(
        values_of(scalars["epoch_learning_rate"]), [0.01, 0.1, 0.1], rtol=1e-6
    )


def test_keras_shows_the_rate_of_the_next_update(tmp_path):
    # TensorBoard overwrites `learning_rate` in the epoch's logs with the rate of the
    # optimizer at this moment; the phase stays that of the last update.
    optimizer = SequentialOptimizer(["adam", "sgd"], [2 * UPDATES_PER_EPOCH])
    history = fit(
        optimizer, PhaseLogger(verbose=0), keras.callbacks.TensorBoard(tmp_path)
    )
    scalars = scalars_in(tmp_path / "train")
    assert values_of(scalars["epoch_phase"]) == [0, 0, 1]
    adam, sgd = 0.001, 0.01
    np.testing.assert_allclose(
        values_of(scalars["epoch_learning_rate"]), [adam, sgd, sgd], rtol=1e-6
    )
    np.testing.assert_allclose(history["learning_rate"], [adam, adam, sgd], rtol=1e-6)
