"""Checks that what is timed does what it is said to do."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

# XLA may fuse, and so add up, in another order when there is a conditional around the
# update. Adam divides by the size of the gradient, so for a weight whose gradient is
# nearly zero that difference can grow to that of a whole update. Hence the change of a
# variable is compared as a whole; another child, or one that lost its state, is off by
# more than a tenth of the change.
TOLERANCE = 2e-3


class CheckError(Exception):
    """Something that a program is to show does not hold."""


def difference(
    actual: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    first: Sequence[np.ndarray],
) -> float:
    """Returns how far `actual` is from `expected`, over how far that is from `first`.

    The largest over all variables, of Euclidean norms. 0 is equal, bit for bit.
    """
    worst = 0.0
    for a, e, f in zip(actual, expected, first, strict=True):
        if np.array_equal(a, e):
            continue
        off = float(np.linalg.norm((a - e).ravel()))
        change = float(np.linalg.norm((e - f).ravel()))
        # Not `max`, which would drop a NaN.
        share = off / change if change else np.inf
        worst = share if not share <= worst else worst
    return worst


def check_same(
    what: str,
    actual: Sequence[np.ndarray],
    expected: Sequence[np.ndarray],
    first: Sequence[np.ndarray],
    tolerance: float = TOLERANCE,
) -> float:
    """Raises CheckError if `actual` is not `expected`; returns the `difference`.

    Args:
        what: string, what was checked, for the message.
        actual: list of arrays, the weights to check.
        expected: list of arrays, the weights that are right.
        first: list of arrays, the weights from which both started.
        tolerance: float, the largest `difference` allowed.
    """
    off = difference(actual, expected, first)
    if not off <= tolerance:
        raise CheckError(
            f"{what}: the weights are not those of the plain optimizers. They differ "
            f"by {off:.2g} of what the updates changed; allowed is {tolerance:.2g}."
        )
    return off


def count_different(actual: Sequence[Any], expected: Sequence[Any]) -> int:
    """Returns how many tensors are missing or not the same, bit for bit."""

    def bits(tensor: Any) -> tuple[Any, ...]:
        array = np.asarray(tensor)
        return array.dtype, array.shape, array.tobytes()

    pairs = itertools.zip_longest(actual, expected)
    return sum(bits(a) != bits(b) for a, b in pairs)
