"""How fast is an update of LBFGS and SSBroyden?

    python -m benchmarks quasi_newton            # about 20 minutes on two cores
    python -m benchmarks quasi_newton --quick    # seconds, on few weights

An update is bound by memory: LBFGS reads its two matrices twice, SSBroyden reads its
matrix twice and writes it once. So its time is divided by that of copying as many
bytes, and by that of the same method in other frameworks, without a line search. The
function is a sum of squares, whose gradient costs next to nothing.
Goals: at most twice the time of the copy, no slower than any rival, in a sequence as
fast as alone, and idle no slower than an idle Adam with as many variables.

A rival that is not installed is left out (`pip install -e '.[bench]'` has them all).
"""

import functools
import gc
import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from benchmarks.harness import report, timing
from benchmarks.harness.checks import CheckError
from benchmarks.harness.drawing import draw_ratios, new_figure
from benchmarks.harness.terminal import say
from sequential_optimizer import LBFGS, SequentialOptimizer, SSBroyden

BOUND_GOAL = 2.0
# What two programs that do the same may differ by.
SAME_GOAL = 1.05
# Which modules each needs.
RIVALS = {"optax": ("jax", "optax"), "torch": ("torch",)}
TOLERANCE = 1e-2  # of a direction: float32, of a history of 50 pairs
LONG = 10**9


@dataclass(frozen=True)
class Settings:
    """What is measured, and for how long.

    Args:
        sizes: numbers of weights for LBFGS.
        histories: of LBFGS.
        dense_sizes: numbers of weights for SSBroyden.
        largest_in_sequence: numbers of the matrices, above which there is no memory
            for the sequences as well.
        largest_with_rivals: the same for the rivals, which would take 20 GB.
        rounds: rounds of all programs.
        steps: updates of each program in a round.
    """

    sizes: tuple[int, ...] = (10**3, 10**4, 10**5, 10**6, 10**7)
    histories: tuple[int, ...] = (10, 50)
    dense_sizes: tuple[int, ...] = (500, 1000, 2000, 4000, 8000)
    largest_in_sequence: int = 2 * 10**8
    largest_with_rivals: int = 5 * 10**8
    rounds: int = 15
    steps: int = 5


FULL = Settings()
QUICK = Settings(sizes=(1000,), histories=(5,), dense_sizes=(100,), rounds=2, steps=2)


@dataclass(frozen=True)
class Case:
    """A method and its size; `history` is 0 for SSBroyden."""

    size: int
    history: int = 0

    @property
    def method(self) -> str:
        return "LBFGS" if self.history else "SSBroyden"

    @property
    def numbers(self) -> int:
        """How many numbers its matrices have."""
        return self.size * (2 * self.history or self.size)

    @property
    def moved_bytes(self) -> int:
        """How many bytes an update has to read and write at least."""
        return 4 * self.numbers * (2 if self.history else 3)

    @property
    def warm_up(self) -> int:
        """Updates after which the memory is full."""
        return self.history + 5

    def make(self) -> keras.optimizers.Optimizer:
        """Returns a new optimizer."""
        if self.history:
            return LBFGS(history_size=self.history, gradient_tolerance=0.0)
        return SSBroyden(gradient_tolerance=0.0)


def make_cases(settings: Settings) -> list[Case]:
    """Returns all that is to be measured."""
    return [
        *(Case(n, m) for n in settings.sizes for m in settings.histories),
        *(Case(n) for n in settings.dense_sizes),
    ]


def measure(settings: Settings) -> dict[str, Any]:
    """Returns one row per case, and what was left out."""
    rivals, left_out = find_rivals()
    rows = []
    for case in make_cases(settings):
        rows.append(measure_case(case, settings, rivals))
        # What Keras and TensorFlow make refers to itself.
        gc.collect()
    return {"cases": rows, "left_out": left_out}


def find_rivals() -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Returns the modules of the rivals, and those that are not installed."""
    modules, left_out = {}, []
    for name, needs in RIVALS.items():
        missing = [module for module in needs if not importlib.util.find_spec(module)]
        if missing:
            reason = f"{' and '.join(missing)} not installed"
            say(f"left out: {name}: {reason}")
            left_out.append({"rival": name, "reason": reason})
        else:
            modules[name] = importlib.import_module(
                f"benchmarks.workloads.rival_{name}"
            )
    return modules, left_out


# --- programs ------------------------------------------------------------------


def curvatures(size: int) -> np.ndarray:
    """Returns the factors of the squares, in the same random order at every call."""
    factors = np.logspace(0, 3, size, dtype=np.float32)
    return np.random.default_rng(0).permutation(factors)


class Update:
    """A compiled update of weights by an optimizer; the weights are in `parts`."""

    def __init__(
        self, size: int, optimizer: keras.optimizers.Optimizer, parts: int = 1
    ) -> None:
        split = np.array_split(curvatures(size), parts)
        self._curvatures = [tf.constant(part) for part in split]
        self.weights = [tf.Variable(tf.ones(len(part))) for part in split]
        self.optimizer = optimizer
        optimizer.build(self.weights)
        self.step = tf.function(self._step, autograph=False, jit_compile=True)

    def _step(self) -> tf.Tensor:
        pairs = zip(self._curvatures, self.weights, strict=True)
        self.optimizer.apply([part * weight for part, weight in pairs], self.weights)
        # Something to wait for.
        return self.weights[0][0]


def make_copy(moved_bytes: int) -> Callable[[], tf.Tensor]:
    """Returns a function that reads half of the bytes, and writes the other half."""
    source = tf.Variable(tf.ones(moved_bytes // 8))

    def copy() -> tf.Tensor:
        source.assign(-source)
        return source[0]

    return tf.function(copy, autograph=False, jit_compile=True)


def make_programs(
    case: Case, in_sequence: bool, rivals: dict[str, Any]
) -> dict[str, Callable[[], Any]]:
    """Returns a function that makes an update, by the name of the program."""
    alone = Update(case.size, case.make())
    programs: dict[str, Callable[[], Any]] = {
        "copy": make_copy(case.moved_bytes),
        "alone": alone.step,
    }
    for _ in range(case.warm_up):
        alone.step()
    check_search(case, alone)
    if in_sequence:
        # So many that an Adam has two variables for each, a counter and a rate.
        many = len(alone.optimizer.variables) // 2 - 1
        for name, second, boundary, parts in (
            ("in a sequence", case.make(), 1, 1),
            ("idle", case.make(), LONG, many),
            ("idle Adam", keras.optimizers.Adam(name="late"), LONG, many),
        ):
            children = [keras.optimizers.Adam(name="adam"), second]
            sequence = SequentialOptimizer(children, [boundary])
            programs[name] = Update(case.size, sequence, parts).step
    for name, module in rivals.items():
        if case.history:
            programs[name] = module.make_lbfgs(curvatures(case.size), case.history)
    for program in programs.values():
        for _ in range(case.warm_up):
            program()
    return programs


def measure_case(
    case: Case, settings: Settings, rivals: dict[str, Any]
) -> dict[str, Any]:
    """Returns the row of a case."""
    in_sequence = case.numbers <= settings.largest_in_sequence
    has_room = case.numbers <= settings.largest_with_rivals
    programs = make_programs(case, in_sequence, rivals if has_room else {})
    calls = {
        name: functools.partial(timing.median_seconds, program, settings.steps)
        for name, program in programs.items()
    }
    seconds = timing.in_rounds(
        calls, settings.rounds, f"{case.method}, {case.size}, {case.history}"
    )
    pairs = {
        "update_over_copy": ("alone", "copy"),
        "in_sequence_over_alone": ("in a sequence", "alone"),
        "idle_over_idle_adam": ("idle", "idle Adam"),
        "optax_over_ours": ("optax", "alone"),
        "torch_over_ours": ("torch", "alone"),
    }
    return {
        "method": case.method,
        "size": case.size,
        "history": case.history,
        "milliseconds": timing.spread(1e3 * seconds["alone"]),
        **{
            key: timing.ratio(seconds[program], seconds[over])
            for key, (program, over) in pairs.items()
            if program in seconds
        },
    }


# --- the check -----------------------------------------------------------------


def check_search(case: Case, update: Update) -> None:
    """Raises CheckError unless the direction is that of NumPy, from the same memory."""
    state = {v.name: v.numpy() for v in update.optimizer.variables}
    gradient = state["gradient"].astype(np.float64)
    if case.history:
        expected = -two_loops(state, case.history, gradient)
    else:
        expected = -state["inverse"].astype(np.float64) @ gradient
    off = np.linalg.norm(state["direction"] - expected) / np.linalg.norm(expected)
    if not off <= TOLERANCE:
        raise CheckError(
            f"{case.method} of {case.size} weights: the direction differs from that of "
            f"NumPy by {off:.2g} of its length; allowed is {TOLERANCE:.2g}."
        )


def two_loops(
    state: dict[str, np.ndarray], history: int, gradient: np.ndarray
) -> np.ndarray:
    """Returns H g by the two-loop recursion: Nocedal and Wright, algorithm 7.4."""
    count = int(state["pairs"])
    rows = [row % history for row in range(max(count - history, 0), count)]
    pairs = [(state["steps"][row], state["changes"][row]) for row in rows]
    q, alphas = gradient, []
    for s, y in reversed(pairs):
        alphas.append(s @ q / (y @ s))
        q = q - alphas[-1] * y
    s, y = pairs[-1]
    r = (s @ y) / (y @ y) * q
    for (s, y), alpha in zip(pairs, reversed(alphas), strict=True):
        r = r + s * (alpha - y @ r / (y @ s))
    return r


# --- what is shown -------------------------------------------------------------

COLUMNS = {
    "update_over_copy": "update / copy",
    "in_sequence_over_alone": "in a sequence / alone",
    "idle_over_idle_adam": "idle / idle Adam",
    "optax_over_ours": "optax / ours",
    "torch_over_ours": "torch / ours",
}


def tables(result: dict[str, Any]) -> list[report.Table]:
    """Returns the table of all cases."""
    rows = [
        (
            case["method"],
            str(case["size"]),
            str(case["history"] or "-"),
            timing.as_text(case["milliseconds"]),
            *(timing.as_text(case[key]) if key in case else "-" for key in COLUMNS),
            ", ".join(missed(case)) or "met",
        )
        for case in result["cases"]
    ]
    header = ("method", "weights", "history", "ms", *COLUMNS.values(), "goals")
    rounds = result["cases"][0]["milliseconds"]["rounds"]
    left_out = "; ".join(f"{r['rival']}: {r['reason']}" for r in result["left_out"])
    caption = (
        "Time of an update in float32, compiled by XLA: median (quartiles) of "
        f"{rounds} rounds. The copy moves as many bytes as the update has to: the "
        "matrices of LBFGS are read twice, SSBroyden's is read twice and written once. "
        f"Goals: update / copy at most {BOUND_GOAL}, rivals at least 1, the rest "
        f"at most {SAME_GOAL}. The idle children have equally many variables, or one "
        "more or less. Rivals make no line search; none has SSBroyden. Each direction "
        "was compared with that of NumPy's two loops, or product. "
        "A dash in the largest cases: not enough memory for all programs at once. "
        f"Left out: {left_out or 'nothing'}."
    )
    return [report.Table(caption, header, rows)]


def missed(case: dict[str, Any]) -> list[str]:
    """Returns what a case does not reach, in words."""
    most = {"update_over_copy": BOUND_GOAL}
    most |= {"in_sequence_over_alone": SAME_GOAL, "idle_over_idle_adam": SAME_GOAL}
    above = [
        f"ABOVE {goal}: {COLUMNS[key]}"
        for key, goal in most.items()
        if key in case and case[key]["median"] > goal
    ]
    behind = [
        f"BEHIND {name}"
        for name in RIVALS
        if case.get(f"{name}_over_ours", {"median": math.inf})["median"] < 1
    ]
    return above + behind


def headline(result: dict[str, Any]) -> str:
    """Answers the question in one sentence."""
    said = []
    for method in ("LBFGS", "SSBroyden"):
        cases = [case for case in result["cases"] if case["method"] == method]
        ratios = timing.medians(cases, "update_over_copy")
        said.append(f"{timing.from_to(ratios)} ({method})")
    return (
        f"An update takes {' and '.join(said)} times as long as copying the bytes that "
        "it has to move."
    )


def draw(result: dict[str, Any]) -> Figure:
    """Returns the picture of the table."""
    figure, axes = new_figure(7.5, 1.5 + 0.45 * len(result["cases"]))
    rows = [
        (
            f"{case['method']}, {case['size']} weights"
            + (f", {case['history']} pairs" if case["history"] else ""),
            {COLUMNS[key]: case[key] for key in COLUMNS if key in case},
        )
        for case in result["cases"]
    ]
    draw_ratios(axes, rows, {f"goal {BOUND_GOAL}": BOUND_GOAL})
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("ratio of times")
    return figure
