"""Plots of a training history, with the phases shaded."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sequential_optimizer._find_sequence import child_of, sequences_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FONT_SIZE = 9  # points


def plot_history(
    history: Any,
    metrics: Sequence[str] = ("loss", "val_loss"),
    ax: "Axes | None" = None,
    learning_rate: bool = False,
    names: Sequence[str] | None = None,
) -> "Axes":
    """Plots metrics over epochs, with the phases shaded and the switches marked.

    A switch inside an epoch is marked where it happened, if `history` is what `fit`
    returned. From a dict alone only the phase of an epoch's last update is known, and
    the switch is marked where that epoch begins.

    Args:
        history: what `Model.fit` returned, or its `history` dict, with the column
            `phase` of `PhaseLogger`.
        metrics: names of the columns to plot. Those of a validation, `val_...`, are
            left out if there was none.
        ax: matplotlib Axes to draw on. Defaults to new ones.
        learning_rate: whether to plot the column `learning_rate` as well, on a
            logarithmic axis of its own. Defaults to `False`.
        names: names of the phases. Default to those of the children if `history` is
            what `fit` returned, else to `phase 0`, `phase 1`, ...

    Returns:
        The matplotlib Axes.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: if a column is missing or has no value for some of the epochs, or
            if there are more phases than `names`.

    Example:

    >>> from sequential_optimizer import plot_history
    >>> history = {"loss": [3.0, 2.0, 1.5, 1.4], "phase": [0, 0, 1, 1]}
    >>> axes = plot_history(history, names=["adam", "sgd"])
    >>> axes.get_xlabel()
    'epoch'
    """
    try:
        import matplotlib.pyplot as plt
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            "`plot_history` needs matplotlib, which is not installed. Install it "
            "with the `plot` extra: `pip install 'sequential_optimizer[plot]'`."
        ) from error
    columns: Mapping[str, Sequence[float]] = getattr(history, "history", history)
    metrics = _without_validation(metrics, columns)
    _check_columns(columns, ["phase", *metrics, *["learning_rate"] * learning_rate])
    phases = [int(phase) for phase in columns["phase"]]
    # Keras counts epochs from 0 in `History.epoch`, and from 1 on the screen.
    epochs = [epoch + 1 for epoch in getattr(history, "epoch", range(len(phases)))]
    names = _names(history, names, max(phases) + 1)
    if ax is None:
        ax = plt.subplots(layout="constrained")[1]
    for metric in metrics:
        ax.plot(epochs, columns[metric], marker=".", label=metric)
    ax.set_xlabel("epoch")
    ax.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    begins = _begins_of_phases(history, columns, epochs)
    _shade_phases(ax, begins, [names[phase] for _, phase in begins], epochs[-1] + 0.5)
    if learning_rate:
        _plot_learning_rate(ax, epochs, columns["learning_rate"])
    if metrics:
        ax.legend()
    return ax


def _without_validation(
    metrics: Sequence[str], columns: Mapping[str, Any]
) -> list[str]:
    """Returns the metrics, without those of a validation that never ran."""
    if any(column.startswith("val_") for column in columns):
        return list(metrics)
    left = [metric for metric in metrics if not metric.startswith("val_")]
    return left or list(metrics)


def _check_columns(columns: Mapping[str, Any], needed: Sequence[str]) -> None:
    missing = [column for column in needed if column not in columns]
    if missing:
        raise ValueError(
            f"`history` must have the columns {list(needed)}. "
            f"Received: {sorted(columns)}, without {', '.join(map(repr, missing))}. "
            "Train with `callbacks=[PhaseLogger()]`, and pass metrics that you "
            "compiled."
        )
    epochs = len(columns["phase"])
    if not epochs:
        raise ValueError(
            "`history` must have at least one epoch. Received: a history of no epochs. "
            "Plot it after `fit` has run."
        )
    for column in needed:
        if len(columns[column]) != epochs:
            raise ValueError(
                "`history` must have a value of each column for each epoch. Received: "
                f"{epochs} epochs and {len(columns[column])} of `{column}`. Train "
                "with `validation_freq=1`, or leave the column out."
            )


def _names(history: Any, names: Sequence[str] | None, count: int) -> Sequence[str]:
    if names is None:
        sequence = _sequence_of(history)
        phases = 0 if sequence is None else len(sequence.child_of_phase)
        # Too few if the model was compiled with another optimizer since.
        if phases < count:
            return [f"phase {k}" for k in range(count)]
        return [child_of(sequence, k).name for k in range(phases)]
    if len(names) < count:
        raise ValueError(
            f"`names` must have a name for each phase. Received: names={names!r} for "
            f"{count} phases. Pass {count} names."
        )
    return names


def _sequence_of(history: Any) -> Any:
    """Returns the sequence that a history was made with, if there is one."""
    found = sequences_of(getattr(history, "model", None))
    return found[0] if len(found) == 1 else None


def _begins_of_phases(
    history: Any, columns: Mapping[str, Sequence[float]], epochs: Sequence[int]
) -> list[tuple[float, int]]:
    """Returns where each phase begins on the axis of epochs, and which it is."""
    phases = [int(phase) for phase in columns["phase"]]
    left = epochs[0] - 0.5
    by_epoch = [
        (epoch - 0.5, phase)
        for i, (epoch, phase) in enumerate(zip(epochs, phases, strict=True))
        if i == 0 or phase != phases[i - 1]
    ]
    counts, sequence = columns.get("iterations", []), _sequence_of(history)
    if sequence is None or len(counts) != len(epochs) or len(counts) < 2:
        return by_epoch
    # The first epoch has made as many updates as the second.
    before = max(2 * counts[0] - counts[1], 0)
    edges = [left, *(epoch + 0.5 for epoch in epochs)]
    begins = [
        (float(np.interp(start, [before, *counts], edges)), phase)
        for phase, start in enumerate(sequence.phase_starts)
        if 0 <= start < counts[-1]
    ]
    last_of_epoch = [
        max((k for x, k in begins if x < right), default=-1) for right in edges[1:]
    ]
    firsts = [i for i, (x, _) in enumerate(begins) if x == left]
    if last_of_epoch != phases or not firsts:
        return by_epoch  # The optimizer has been trained, or exchanged, since.
    return begins[firsts[-1] :]


def _shade_phases(
    ax: "Axes", begins: Sequence[tuple[float, int]], names: Sequence[str], end: float
) -> None:
    """Shades each stretch of one phase, one colour per name, and names it."""
    # From the end of the colour cycle; the curves take theirs from the beginning.
    colors = {name: f"C{9 - i % 10}" for i, name in enumerate(dict.fromkeys(names))}
    edges = [*(left for left, _ in begins), end]
    for name, left, right in zip(names, edges[:-1], edges[1:], strict=True):
        ax.axvspan(left, right, color=colors[name], alpha=0.15, linewidth=0)
        if left != edges[0]:
            ax.axvline(left, color="0.4", linestyle="--", linewidth=1)
    centers = [sum(edges[i : i + 2]) / 2 for i in range(len(names))]
    _write_above(ax, centers, names)


def _write_above(ax: "Axes", centers: Sequence[float], labels: Sequence[str]) -> None:
    """Writes labels above the axes: upright, or even joined, if they are crowded."""
    left, right = ax.get_xlim()
    points = ax.get_window_extent().width * 72 / ax.figure.dpi
    line = 1.4 * _FONT_SIZE * (right - left) / points  # the height of a line, in epochs
    # A letter is about half as wide as a line is high.
    widths = [line / 2 * (len(label) + 1) for label in labels]
    crowded = any(
        centers[i] - centers[i - 1] < (widths[i] + widths[i - 1]) / 2
        for i in range(1, len(labels))
    )
    places: list[float] = []
    texts: list[str] = []
    for center, label in zip(centers, labels, strict=True):
        if places and crowded and center - places[-1] < line:
            texts[-1] += f", {label}"
        else:
            places.append(center)
            texts.append(label)
    # An axis of its own, so that a title goes above it, and zooming moves it along.
    top = ax.secondary_xaxis("top")
    top.set_ticks(places, texts, fontsize=_FONT_SIZE, rotation=90 if crowded else 0)
    top.tick_params(length=0)


def _plot_learning_rate(
    ax: "Axes", epochs: Sequence[int], learning_rate: Sequence[float]
) -> None:
    right = ax.twinx()
    edges = [epochs[0] - 0.5, *(epoch + 0.5 for epoch in epochs)]
    right.stairs(
        learning_rate, edges, baseline=None, color="0.5", linestyle=":", linewidth=1.5
    )
    right.set_yscale("log")
    right.set_ylabel("learning rate (dotted)", color="0.5")
    right.tick_params(which="both", colors="0.5")
    # Else it would be drawn over the legend.
    ax.set_zorder(right.get_zorder() + 1)
    ax.patch.set_visible(False)
