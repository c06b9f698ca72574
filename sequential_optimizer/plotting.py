"""Plots of a training history, with the phases shaded."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sequential_optimizer._find_sequence import child_of
from sequential_optimizer._phases import last_started

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_history(
    history: Any,
    metrics: Sequence[str] = ("loss", "val_loss"),
    ax: "Axes | None" = None,
    learning_rate: bool = False,
    names: Sequence[str] | None = None,
) -> "Axes":
    """Plots metrics over epochs, with the phases shaded and the switches marked.

    Each name has a color, so a child that comes back has the same one; the legend
    shows which.

    A switch inside an epoch is marked where it happened, if `history` is what `fit`
    returned and the optimizer has not been trained since. Otherwise, as from a dict,
    only the phase of an epoch's last update is known, and the switch is marked where
    that epoch begins.

    Args:
        history: what `Model.fit` returned, or its `history` dict, with the column
            `phase` of `PhaseLogger`.
        metrics: names of the columns to plot, or the name of one. Validation columns,
            `val_...`, are left out if there was no validation.
        ax: matplotlib Axes to draw on. Defaults to new ones.
        learning_rate: whether to plot the column `learning_rate` as well, on a
            separate logarithmic axis. Defaults to `False`.
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
            "`plot_history` needs matplotlib. Received: "
            f"{error}. Install it: `pip install 'matplotlib>=3.8'`."
        ) from error
    columns: Mapping[str, Sequence[float]] = getattr(history, "history", history)
    metrics = [metrics] if isinstance(metrics, str) else metrics
    if not any(column.startswith("val_") for column in columns):
        # Unless nothing else was asked for.
        metrics = [m for m in metrics if not m.startswith("val_")] or metrics
    _check_columns(columns, ["phase", *metrics, *["learning_rate"] * learning_rate])
    sequence = getattr(history, "sequence", None)  # set by PhaseLogger
    phases = [int(phase) for phase in columns["phase"]]
    names = _names(names, sequence, max(phases) + 1)
    # Keras counts epochs from 0 in `History.epoch`, and from 1 on the screen.
    epochs = [epoch + 1 for epoch in getattr(history, "epoch", [])]
    if len(epochs) != len(phases):  # columns alone, or of several fits
        epochs = list(range(1, len(phases) + 1))
    edges = [epochs[0] - 0.5, *(epoch + 0.5 for epoch in epochs)]
    ax = ax or plt.subplots(layout="constrained")[1]
    for metric in metrics:
        ax.plot(epochs, columns[metric], marker=".", label=metric)
    ax.set(xlabel="epoch", xlim=(edges[0], edges[-1]))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    begins = _begins_of_phases(phases, edges, columns.get("iterations", []), sequence)
    _shade_phases(ax, begins, names)
    if learning_rate:
        _plot_learning_rate(ax, edges, columns["learning_rate"])
    ax.legend(fontsize="small", ncols=1 + len(set(names)) // 12)
    return ax


def _check_columns(columns: Mapping[str, Any], needed: Sequence[str]) -> None:
    found = {column: len(columns.get(column, [])) for column in needed}
    if 0 in found.values() or len(set(found.values())) > 1:
        raise ValueError(
            "`history` must have a value for each epoch in every column to plot. "
            f"Received: the columns {sorted(columns)}, with {found} values of those to "
            "plot. Train with `callbacks=[PhaseLogger(), ...]`, compile the metrics, "
            "and validate in each epoch, or leave the column out."
        )


def _names(names: Sequence[str] | None, sequence: Any, count: int) -> Sequence[str]:
    if names is None:
        if sequence is None:
            return [f"phase {k}" for k in range(count)]
        return [child_of(sequence, k).name for k in range(count)]
    if len(names) < count:
        raise ValueError(
            f"`names` must have a name for each phase. Received: names={names!r} for "
            f"{count} phases. Pass {count} names."
        )
    return names


def _begins_of_phases(
    phases: list[int], edges: list[float], iterations: Any, sequence: Any
) -> dict[float, int]:
    """Returns the phases by where they begin on the axis of epochs.

    Args:
        phases: for each epoch the phase of its last update.
        edges: where the first epoch begins, and where each ends.
        iterations: the number of updates at the end of each epoch, if known.
        sequence: the optimizer that made the updates, or `None`.
    """
    before = [-1, *phases]
    by_epoch = {edges[i]: k for i, k in enumerate(phases) if k != before[i]}
    if sequence is None or not 2 <= len(iterations) == len(phases):
        return by_epoch
    starts = sequence.phase_starts
    if phases != [last_started(np.where(starts < n, starts, -1)) for n in iterations]:
        return by_epoch  # The optimizer has been trained since.
    # As if the first epoch had made as many updates as the second.
    updates = [max(2 * iterations[0] - iterations[1], 0), *iterations]
    # Phases that began before the first epoch all land on its edge: the last one wins.
    return {
        float(np.interp(start, updates, edges)): phase
        for phase, start in enumerate(starts)
        if 0 <= start < iterations[-1]
    }


def _shade_phases(ax: "Axes", begins: dict[float, int], names: Sequence[str]) -> None:
    """Shades each stretch of one phase, one color per name, and marks the switches."""
    colors: dict[str, str] = {}
    edges = [*begins, ax.get_xlim()[1]]
    for left, right, phase in zip(edges[:-1], edges[1:], begins.values(), strict=True):
        name = names[phase]
        label = None if name in colors else name
        # From the end of the color cycle; the curves take theirs from the beginning.
        color = colors.setdefault(name, f"C{9 - len(colors) % 10}")
        ax.axvspan(left, right, color=color, alpha=0.2, linewidth=0, label=label)
        if left != edges[0]:
            ax.axvline(left, color="0.4", linestyle="--", linewidth=1)


def _plot_learning_rate(ax: "Axes", edges: list[float], learning_rate: Any) -> None:
    right = ax.twinx()
    right.stairs(learning_rate, edges, baseline=None, color="0.5", linestyle=":")
    right.set(yscale="log", ylabel="learning rate (dotted)")
    # Otherwise the learning rate would be drawn over the legend.
    ax.set_zorder(right.get_zorder() + 1)
    ax.patch.set_visible(False)
