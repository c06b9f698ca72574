"""The errors of runs that differ in their seed only. A run that diverged has none."""

from dataclasses import dataclass
from typing import Any

import numpy as np

FAILED = 0.05  # an error above this is no solution


def error_of(row: dict[str, Any]) -> float:
    """Returns the error of a run, infinite if it diverged."""
    return np.inf if row["error"] is None else row["error"]


def quantile(errors: list[float], share: float) -> float:
    """Returns an error that was measured: of two, the one farther from the best.

    So the median is infinite if half of the runs diverged. Only of the lower quartile
    it is the one nearer to the best, so that the quartiles never hide the spread.
    """
    method = "lower" if share < 0.5 else "higher"
    return float(np.quantile(errors, share, method=method))


@dataclass(frozen=True)
class Group:
    """The runs of a contender on a problem, seed by seed."""

    rows: list[dict[str, Any]]

    @property
    def errors(self) -> list[float]:
        """The error of each run."""
        return [error_of(row) for row in self.rows]

    @property
    def median(self) -> float:
        """The median of the errors."""
        return quantile(self.errors, 0.5)

    @property
    def failures(self) -> int:
        """How many found no solution."""
        return sum(error > FAILED for error in self.errors)

    @property
    def failed(self) -> str:
        """How many found no solution, of how many."""
        return f"{self.failures} of {len(self.errors)}"

    @property
    def text(self) -> str:
        """The median of the errors with its quartiles."""
        low, high = (quantile(self.errors, share) for share in (0.25, 0.75))
        return f"{self.median:.1e} ({low:.1e} to {high:.1e})"

    def median_of(self, key: str) -> float:
        """Returns the median of what else a row says."""
        values = [np.inf if row[key] is None else row[key] for row in self.rows]
        return quantile(values, 0.5)
