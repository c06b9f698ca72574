"""Pictures of ratios, all in the same style."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Ratio = Mapping[str, float]  # as `timing.spread` makes it
# A color each that tells them apart for the color-blind as well (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
NOISE_COLOR = "#999999"


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Returns an empty figure, in inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_ratios(
    axes: Axes,
    rows: Sequence[tuple[str, Mapping[str, Ratio]]],
    goals: Mapping[str, float] | None = None,
) -> None:
    """Draws medians as dots and quartiles as lines, one row below the other.

    Args:
        axes: where to draw.
        rows: list of (label, ratios by the name of their series). The series "noise"
            is gray.
        goals: dict from a text to a ratio, drawn as a dashed line.
    """
    names = list(dict.fromkeys(name for _, series in rows for name in series))
    colors = dict(zip([n for n in names if n != "noise"], COLORS, strict=False))
    step = 0.7 / max(len(names), 2)
    for k, name in enumerate(names):
        found = [
            (i, series[name]) for i, (_, series) in enumerate(rows) if name in series
        ]
        medians = [ratio["median"] for _, ratio in found]
        axes.errorbar(
            medians,
            [i + (k - (len(names) - 1) / 2) * step for i, _ in found],
            xerr=[
                [r["median"] - r["low"] for _, r in found],
                [r["high"] - r["median"] for _, r in found],
            ],
            fmt="o",
            markersize=4,
            color=colors.get(name, NOISE_COLOR),
            label=name,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    for text, goal in (goals or {}).items():
        axes.axvline(goal, color="black", linewidth=0.8, linestyle="--", label=text)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", linewidth=0.3)
    axes.figure.legend(loc="outside lower center", ncols=4, frameon=False)
