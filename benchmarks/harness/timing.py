"""Measures programs side by side, and compares them as ratios.

The time of one program means little: it depends on the machine, and on what else runs
there at the moment. So every program runs once in every round, in a random order, and
a ratio is taken within a round. What is reported is the median over the rounds, with
the quartiles. A plain program is measured against a second copy of itself as well:
ratios closer to 1 than that are noise.
"""

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from benchmarks.harness.terminal import Progress

Key = TypeVar("Key", bound=Hashable)


def seconds_of(call: Callable[[], Any]) -> float:
    """Returns how long a call takes, its result included."""
    start = time.perf_counter()
    wait_for(call())
    return time.perf_counter() - start


def wait_for(result: Any) -> None:
    """Returns when a tensor has its value."""
    if hasattr(result, "numpy"):
        result.numpy()


def median_seconds(call: Callable[[], Any], calls: int) -> float:
    """Returns the median time of a call, after one that is not counted.

    That one brings the program's memory back into the caches, from which the program
    that ran before has evicted it.
    """
    wait_for(call())
    return float(np.median([seconds_of(call) for _ in range(calls)]))


def in_rounds(
    programs: Mapping[Key, Callable[[], float]],
    rounds: int,
    title: str,
    seed: int = 0,
) -> dict[Key, np.ndarray]:
    """Calls every program once per round, in an order that is new in each.

    Args:
        programs: dict of functions that return what they measured.
        rounds: int, the number of rounds.
        title: string, shown with the progress.
        seed: int, of the orders.

    Returns:
        For each program an array with what it returned in each round.
    """
    rng = np.random.default_rng(seed)
    keys = list(programs)
    measured: dict[Key, list[float]] = {key: [] for key in keys}
    progress = Progress(rounds * len(keys), title)
    for _ in range(rounds):
        for i in rng.permutation(len(keys)):
            measured[keys[i]].append(programs[keys[i]]())
            progress.step(str(keys[i]))
    return {key: np.array(values) for key, values in measured.items()}


def spread(values: np.ndarray) -> dict[str, float | int]:
    """Returns median, quartiles and number of values, for JSON."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {
        "median": round(float(median), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "rounds": len(values),
    }


def ratio(seconds: np.ndarray, over: np.ndarray) -> dict[str, float | int]:
    """Returns the ratios of each round, as `spread` does."""
    return spread(seconds / over)


def as_text(ratio: Mapping[str, float], digits: int = 2) -> str:
    """Returns a ratio as text: median (lower quartile to upper quartile)."""
    median, low, high = (
        number(ratio[key], digits) for key in ("median", "low", "high")
    )
    return f"{median} ({low} to {high})"


def number(value: float, digits: int = 2) -> str:
    """Returns a ratio as text, a large one without digits that mean nothing."""
    return f"{value:.{digits if abs(value) < 10 else 0}f}"


def medians(rows: Iterable[dict[str, Any]], key: str) -> list[float]:
    """Returns the medians of a ratio in all rows."""
    return [row[key]["median"] for row in rows]


def from_to(values: Sequence[float]) -> str:
    """Returns the smallest and the largest of the values as text."""
    return " to ".join(dict.fromkeys([number(min(values)), number(max(values))]))
