"""The picture of a history: curves, spans of the phases, switches, learning rate."""

import sys

import keras
import matplotlib
import numpy as np
import pytest
import tensorflow as tf
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sequential_optimizer import PhaseLogger, SequentialOptimizer, plot_history

matplotlib.use("Agg")

import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def refuses(argument, received):
    """Expects the house form: the argument in backticks, then what was received."""
    return pytest.raises(ValueError, match=f"^{argument} must .* Received: {received}")


def columns_of(phases, **more):
    """Returns a history dict with a loss that falls from epoch to epoch."""
    loss = [1 / (epoch + 1) for epoch in range(len(phases))]
    return {"loss": loss, "phase": list(phases), **more}


def curves_of(ax):
    """Returns the points of each curve in the legend."""
    handles, labels = ax.get_legend_handles_labels()
    return {
        label: [tuple(map(float, point)) for point in line.get_xydata()]
        for line, label in zip(handles, labels, strict=True)
        if isinstance(line, Line2D)
    }


def legend_of(ax):
    """Returns the texts of the legend."""
    return [text.get_text() for text in ax.get_legend().get_texts()]


def spans_of(ax):
    """Returns the left and right edge of each shaded span, in order."""
    boxes = [patch.get_extents() for patch in ax.patches]
    inverse = ax.transData.inverted()
    edges = [
        (inverse.transform((box.x0, 0))[0], inverse.transform((box.x1, 0))[0])
        for box in boxes
    ]
    return [(round(float(a), 6), round(float(b), 6)) for a, b in edges]


def marks_of(ax):
    """Returns where the dashed vertical lines are."""
    lines = [line for line in ax.lines if line.get_linestyle() == "--"]
    for line in lines:
        # From the bottom of the axes to their top.
        assert list(line.get_ydata()) == [0, 1]
        assert line.get_xdata()[0] == line.get_xdata()[1]
    return [float(line.get_xdata()[0]) for line in lines]


def names_of(ax):
    """Returns the name of each span: what the legend says its color means."""
    handles, labels = ax.get_legend_handles_labels()
    names = {
        handle.get_facecolor(): label
        for handle, label in zip(handles, labels, strict=True)
        if not isinstance(handle, Line2D)
    }
    return [names[span.get_facecolor()] for span in ax.patches]


def right_axis_of(ax):
    """Returns the axes on the same place, or None."""
    others = [other for other in ax.figure.axes if other is not ax]
    return others[0] if others else None


def fit(optimizer, epochs=4, **kwargs):
    """Fits a tiny model, two updates per epoch, and returns its History."""
    x = np.linspace(-1, 1, 8, dtype=np.float32)[:, None]
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(optimizer, loss="mse", metrics=["mae"], run_eagerly=True)
    kwargs.setdefault("validation_data", (x, x))
    return model.fit(
        x,
        x,
        batch_size=4,
        epochs=epochs,
        verbose=0,
        callbacks=[PhaseLogger(verbose=0)],
        **kwargs,
    )


def adam_then_sgd(boundary):
    return SequentialOptimizer(
        [keras.optimizers.Adam(0.01), keras.optimizers.SGD(0.1, name="sgd")],
        [boundary],
    )


# --- curves ------------------------------------------------------------------


def test_curves_are_the_columns_over_epochs_counted_from_1():
    columns = columns_of([0, 0, 1], val_loss=[3.0, 2.0, 2.5])
    curves = curves_of(plot_history(columns))
    assert list(curves) == ["loss", "val_loss"]
    assert curves["loss"] == [(1, 1), (2, 1 / 2), (3, 1 / 3)]
    assert curves["val_loss"] == [(1, 3), (2, 2), (3, 2.5)]


def test_history_of_fit():
    history = fit(adam_then_sgd(4))
    ax = plot_history(history, metrics=("loss", "val_loss", "mae"))
    curves = curves_of(ax)
    assert list(curves) == ["loss", "val_loss", "mae"]
    for metric, points in curves.items():
        assert points == list(zip([1, 2, 3, 4], history.history[metric], strict=True))
    assert spans_of(ax) == [(0.5, 2.5), (2.5, 4.5)]
    assert names_of(ax) == ["adam", "sgd"]


def test_history_of_fit_that_continues_at_a_later_epoch():
    ax = plot_history(fit(adam_then_sgd(2), initial_epoch=2, epochs=4))
    assert [epoch for epoch, _ in curves_of(ax)["loss"]] == [3, 4]
    assert spans_of(ax) == [(2.5, 3.5), (3.5, 4.5)]


def test_switch_inside_an_epoch_is_marked_where_it_happened():
    # The second epoch holds updates 2 and 3, and 3 is the first of sgd's.
    history = fit(adam_then_sgd(3), epochs=3)
    assert spans_of(plot_history(history)) == [(0.5, 2.0), (2.0, 3.5)]
    assert marks_of(plot_history(history)) == [2.0]


def test_switch_is_marked_in_a_second_fit_as_well():
    optimizer = adam_then_sgd(5)
    model = fit(optimizer, epochs=2).model
    x = np.ones((32, 1))
    history = model.fit(
        x,
        x,
        batch_size=16,
        epochs=4,
        initial_epoch=2,
        verbose=0,
        callbacks=[PhaseLogger()],
    )
    assert spans_of(plot_history(history)) == [(2.5, 3.0), (3.0, 4.5)]


def test_dict_says_only_which_epoch_holds_the_switch():
    history = fit(adam_then_sgd(3), epochs=3)
    assert spans_of(plot_history(history.history)) == [(0.5, 1.5), (1.5, 3.5)]


def test_optimizer_trained_on_since_is_not_asked():
    history = fit(adam_then_sgd(3), epochs=1)
    fit_again = history.model.optimizer
    for _ in range(4):
        fit_again.apply([tf.ones_like(v) for v in history.model.trainable_variables])
    assert spans_of(plot_history(history)) == [(0.5, 1.5)]


def test_columns_may_be_arrays():
    columns = {name: np.array(c) for name, c in columns_of([0.0, 1.0]).items()}
    ax = plot_history(columns)
    assert curves_of(ax) == {"loss": [(1, 1), (2, 0.5)]}
    assert spans_of(ax) == [(0.5, 1.5), (1.5, 2.5)]


def test_metrics_of_a_validation_that_never_ran_are_left_out():
    assert list(curves_of(plot_history(columns_of([0, 1])))) == ["loss"]


def test_diverged_run_is_plotted():
    columns = columns_of([0, 1], val_loss=[float("nan"), float("inf")])
    ax = plot_history(columns)
    ax.figure.draw_without_rendering()
    assert list(curves_of(ax)) == ["loss", "val_loss"]


# --- spans, names and marks --------------------------------------------------


def test_spans_cover_the_axes_and_each_switch_is_marked():
    ax = plot_history(columns_of([0, 0, 0, 1, 1, 2]))
    assert spans_of(ax) == [(0.5, 3.5), (3.5, 5.5), (5.5, 6.5)]
    assert marks_of(ax) == [3.5, 5.5]
    assert ax.get_xlim() == (0.5, 6.5)
    assert names_of(ax) == ["phase 0", "phase 1", "phase 2"]


def test_child_that_comes_back_has_its_color_again():
    adam = keras.optimizers.Adam(0.01)
    sgd = keras.optimizers.SGD(0.1, name="sgd")
    optimizer = SequentialOptimizer([adam, sgd, adam], [2, 4])
    ax = plot_history(fit(optimizer, epochs=3))
    assert names_of(ax) == ["adam", "sgd", "adam"]
    assert legend_of(ax) == ["loss", "val_loss", "adam", "sgd"]
    assert marks_of(ax) == [1.5, 2.5]
    first, second, third = (patch.get_facecolor() for patch in ax.patches)
    assert same_color(first, third)
    assert not same_color(first, second)


def test_phase_within_an_epoch_is_skipped():
    # Three of the phases lie within the second epoch.
    ax = plot_history(columns_of([0, 3]), names=["a", "b", "c", "d"])
    assert names_of(ax) == ["a", "d"]
    assert marks_of(ax) == [1.5]


def test_single_epoch():
    ax = plot_history(columns_of([0], learning_rate=[0.1]), learning_rate=True)
    assert curves_of(ax) == {"loss": [(1, 1)]}
    assert spans_of(ax) == [(0.5, 1.5)]
    assert marks_of(ax) == []
    assert names_of(ax) == ["phase 0"]
    visible = [tick for tick in ax.get_xticks() if 0.5 <= tick <= 1.5]
    assert visible == [1]


def test_names_can_be_passed():
    ax = plot_history(fit(adam_then_sgd(4)), names=["fast", "exact"])
    assert names_of(ax) == ["fast", "exact"]


def test_names_are_those_of_the_run():
    # They were those of the optimizer that the model had been compiled with since.
    history = fit(adam_then_sgd(3))
    history.model.compile(SequentialOptimizer(["rmsprop", "lion"], [4]), loss="mse")
    ax = plot_history(history)
    assert names_of(ax) == ["adam", "sgd"]
    assert marks_of(ax) == [2.0]


@pytest.mark.parametrize("count", [12, 70])
def test_names_of_many_phases_are_all_there_once(count):
    # A legend of one column would leave no room for the picture.
    ax = plot_history(columns_of(range(count)))
    ax.figure.draw_without_rendering()
    assert legend_of(ax) == ["loss", *(f"phase {k}" for k in range(count))]
    legend, picture = ax.get_legend().get_window_extent(), ax.get_window_extent()
    assert legend.height < 0.6 * picture.height


# --- learning rate -----------------------------------------------------------


def test_learning_rate_has_its_own_logarithmic_axis():
    columns = columns_of([0, 0, 1], learning_rate=[0.01, 0.005, 0.1])
    ax = plot_history(columns, learning_rate=True)
    right = right_axis_of(ax)
    assert right.get_yscale() == "log"
    assert "learning rate" in right.get_ylabel()
    assert right.yaxis.get_ticks_position() == "right"
    (steps,) = right.patches
    assert steps.get_data().values.tolist() == columns["learning_rate"]
    assert list(steps.get_data().edges) == [0.5, 1.5, 2.5, 3.5]
    assert right.get_xlim() == ax.get_xlim() == (0.5, 3.5)
    low, high = right.get_ylim()
    assert low < 0.005
    assert high > 0.1
    # It neither gets into the curves nor is drawn over the legend.
    assert list(curves_of(ax)) == ["loss"]
    assert ax.get_yscale() == "linear"
    assert ax.get_zorder() > right.get_zorder()


def test_learning_rate_is_left_out_unless_asked_for():
    ax = plot_history(columns_of([0, 1], learning_rate=[0.1, 0.2]))
    assert right_axis_of(ax) is None


def test_learning_rate_alone():
    columns = columns_of([0, 1], learning_rate=[0.1, 0.2])
    ax = plot_history(columns, metrics=(), learning_rate=True)
    assert curves_of(ax) == {}
    assert legend_of(ax) == ["phase 0", "phase 1"]
    (steps,) = right_axis_of(ax).patches
    assert steps.get_data().values.tolist() == [0.1, 0.2]


# --- axes --------------------------------------------------------------------


def test_draws_on_the_axes_that_were_given():
    before = plt.get_fignums()
    first, second = Figure().subplots(2)
    assert plot_history(columns_of([0, 1]), ax=second) is second
    assert list(curves_of(second)) == ["loss"]
    assert not first.lines
    assert plt.get_fignums() == before


def test_legend_and_label_of_the_epochs():
    ax = plot_history(columns_of([0, 1], val_loss=[1, 1]))
    assert legend_of(ax) == ["loss", "val_loss", "phase 0", "phase 1"]
    assert ax.get_xlabel() == "epoch"


def test_picture_is_written_without_a_warning(tmp_path):
    columns = columns_of([0, 0, 1], val_loss=[1, 2, 3], learning_rate=[0.1, 0.1, 0])
    for suffix in ("png", "svg", "pdf"):
        path = tmp_path / f"history.{suffix}"
        plot_history(columns, learning_rate=True).figure.savefig(path)
        assert path.stat().st_size > 1000


# --- bad input ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "kwargs", "missing"),
    [
        ({"loss": [1.0]}, {}, "'phase'"),
        ({"phase": [0]}, {}, "'loss'"),
        (columns_of([0]), {"learning_rate": True}, "'learning_rate'"),
        (columns_of([0]), {"metrics": ["accuracy"]}, "'accuracy'"),
        (columns_of([0]), {"metrics": ["val_loss"]}, "'val_loss'"),
        # There was a validation, so this is a typo.
        (columns_of([0], val_mae=[1.0]), {"metrics": ["val_mea"]}, "'val_mea'"),
    ],
)
def test_missing_column(columns, kwargs, missing):
    with refuses("`history`", f".*{missing}: 0"):
        plot_history(columns, **kwargs)
    assert plt.get_fignums() == []


def test_history_without_phase_logger_says_how_to_get_one():
    with pytest.raises(ValueError, match=r"callbacks=\[PhaseLogger\(\), "):
        plot_history({"loss": [1.0]})


def test_no_epochs():
    with refuses("`history`", ".*{'phase': 0, 'loss': 0} values"):
        plot_history({"loss": [], "phase": []})


def test_validation_that_did_not_run_in_each_epoch():
    with refuses("`history`", ".*{'phase': 4, 'loss': 4, 'val_loss': 2} values"):
        plot_history(fit(adam_then_sgd(4), validation_freq=2))


def test_fewer_names_than_phases():
    with refuses("`names`", ".* for 3 phases"):
        plot_history(columns_of([0, 1, 2]), names=["adam", "sgd"])


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"Received: .* `pip install 'matplotlib"):
        plot_history(columns_of([0, 1]))


def test_one_metric_needs_no_list():
    # Its letters were once taken for columns.
    ax = plot_history(columns_of([0, 1]), metrics="loss")
    assert set(curves_of(ax)) == {"loss"}


def test_history_of_several_fits_counts_on():
    # Keras' `History` keeps the columns of earlier fits, but not their epochs.
    history = keras.callbacks.History()
    history.epoch, history.history = [0, 1], columns_of([0, 0, 1, 1])
    points = curves_of(plot_history(history, metrics=["loss"]))["loss"]
    assert [x for x, _ in points] == [1, 2, 3, 4]


def test_model_with_several_sequences_gives_no_names():
    history, model = keras.callbacks.History(), keras.Model()
    model.one, model.two = (SequentialOptimizer(["adam", "sgd"], [1]) for _ in range(2))
    history.set_model(model)
    history.epoch, history.history = [0, 1], columns_of([0, 1])
    _, labels = plot_history(history).get_legend_handles_labels()
    assert {"phase 0", "phase 1"} <= set(labels)
