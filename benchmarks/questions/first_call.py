"""How much longer does the first call take, until a train step is traced and compiled?

    python -m benchmarks first_call            # about 28 minutes on two cores
    python -m benchmarks first_call --quick    # seconds, on tiny models

Every measurement is of a new model, optimizer and `tf.function`. Tracing is the time of
`get_concrete_function`; compiling is the time of the first call after it, less that of
the second: TensorFlow lowers the graph to XLA's HLO, and XLA compiles that. Both are
reported over the slowest plain child.
Goals: with two children tracing and compiling take at most 1.5 times as long as with
the slowest plain child; with any number at most as long as the forward and backward
pass and every child's own part together. With Adam and a search at most 2.5 times as
long as with Adam alone.

The searches are measured after all else. What is in the file by then is not measured
again: to do so, remove results/first_call.json.
"""

import functools
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

from benchmarks.harness import report, timing
from benchmarks.harness.drawing import draw_ratios, new_figure
from benchmarks.workloads.models import (
    Task,
    make_tasks,
    many_variables,
    mlp,
    transformer,
)
from benchmarks.workloads.programs import (
    OPTIMIZERS,
    Program,
    check_sequence,
    make_plain,
    make_sequence,
)
from sequential_optimizer import LBFGS, SequentialOptimizer, SSBroyden

COST = "The first call"
TWO_CHILDREN_GOAL = 1.5
SEARCH_GOAL = 2.5
SEARCHES = {"LBFGS": LBFGS, "SSBroyden": SSBroyden}
Name = str | int
# The programs besides the plain children and the sequences.
WITHOUT, COPY = "without optimizer", "copy"


@dataclass(frozen=True)
class Settings:
    """How long it takes: the cases, and the rounds of each."""

    tiny_models: bool = False
    children: tuple[int, ...] = (2, 3, 4, 8)
    variables: tuple[int, ...] = (20, 100, 400)
    rounds: int = 5
    # Of the smallest model, whose times are short and so the noisiest.
    small_rounds: int = 15


FULL = Settings()
QUICK = Settings(
    tiny_models=True, children=(2,), variables=(), rounds=1, small_rounds=1
)


@dataclass(frozen=True)
class Group:
    """Programs that are timed together: one task and one setting.

    Attributes:
        task: the model and its data.
        setting: "step", "while_loop" or "loss scaling".
        children: for each of these numbers there is a sequence.
        noise: whether one plain child is timed twice.
        rounds: how often each program is timed.
    """

    task: Task
    rounds: int
    setting: str = "step"
    children: tuple[int, ...] = (2,)
    noise: bool = False

    def programs(self) -> list[Name]:
        """Returns what to make of it with `program`."""
        return [
            WITHOUT,
            *list(OPTIMIZERS)[: max(self.children)],
            *([COPY] if self.noise else []),
            *self.children,
        ]

    def program(self, name: Name) -> Program:
        """Returns a new program, of a sequence if `name` is its number of children."""
        optimizer: Any
        if name == WITHOUT:
            optimizer = NoOptimizer()
        elif isinstance(name, int):
            optimizer = make_sequence(name)
        elif name in SEARCHES:
            children = [make_plain("adam"), SEARCHES[name](name="search")]
            optimizer = SequentialOptimizer(children, [None])
        else:
            optimizer = make_plain("adam" if name == COPY else name)
        if self.setting == "loss scaling" and name != WITHOUT:
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        kind = InLoop if self.setting == "while_loop" else Program
        return kind(self.task, optimizer)


class NoOptimizer:
    """Stands where an optimizer does, and only keeps the gradients.

    It computes nothing with them, which would have to be compiled.
    """

    def build(self, variables: list[Any]) -> None:
        self.variables = [tf.Variable(tf.zeros(v.shape)) for v in variables]

    def scale_loss(self, loss: tf.Tensor) -> tf.Tensor:
        return loss

    def apply(self, gradients: list[Any], variables: list[Any]) -> None:
        for kept, gradient in zip(self.variables, gradients, strict=True):
            kept.assign(gradient)


class InLoop(Program):
    """A program whose train step is a loop in the graph, of two updates."""

    def _train_step(self, x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        step = super()._train_step

        def body(i: tf.Tensor, loss: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return i + 1, step(x, y)

        return tf.while_loop(lambda i, loss: i < 2, body, [0, 0.0])[1]


def make_groups(settings: Settings) -> list[Group]:
    """Returns all that is to be timed."""
    tasks = [] if settings.tiny_models else make_tasks()
    small = mlp(width=64, hidden=1 if settings.tiny_models else 3)
    # Tracing even a small transformer takes a second.
    block = small if settings.tiny_models else transformer(blocks=1)
    rounds = settings.rounds
    return [
        *(Group(task, rounds, noise="CNN" in task.name) for task in tasks),
        Group(block, rounds, "while_loop"),
        Group(block, rounds, "loss scaling"),
        Group(small, settings.small_rounds, children=settings.children, noise=True),
        *(Group(many_variables(count), rounds) for count in settings.variables),
    ]


def measure_in_sittings(
    settings: Settings, earlier: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yields the result without the searches, and then with them.

    Args:
        settings: how long it takes.
        earlier: the result of an earlier sitting with these settings, or `{}`.
    """
    keys = ("cases", "noise", "searches")
    result = {key: earlier[key] for key in keys if key in earlier}
    if "cases" not in result:
        result |= measure_cases(settings)
        yield result
    if "searches" not in result:
        result["searches"] = measure_searches(settings)
    yield result


def measure_cases(settings: Settings) -> dict[str, Any]:
    """Returns a row per sequence, and one per plain child that was timed twice."""
    groups = make_groups(settings)
    # The very first trace imports a lot.
    time_first_call(groups[-1], "adam", {})
    cases, noise = [], []
    for group in groups:
        seconds, differences = measure_group(group)
        cases += [row(group, seconds, n) | differences[n] for n in group.children]
        if group.noise:
            ratio = timing.ratio(total(seconds[COPY]), total(seconds["adam"]))
            noise.append({"model": group.task.name, "plain_over_itself": ratio})
    return {"cases": cases, "noise": noise}


def measure_searches(settings: Settings) -> list[dict[str, Any]]:
    """Returns one row per sequence of Adam and a search."""
    # Few weights, as SSBroyden is for.
    task = mlp(width=32, hidden=1 if settings.tiny_models else 2)
    group = Group(task, settings.small_rounds)
    newest: dict[Name, Program] = {}
    calls = {
        name: functools.partial(time_first_call, group, name, newest)
        for name in ("adam", *SEARCHES)
    }
    seconds = timing.in_rounds(calls, group.rounds, "Adam and a search")
    rows = []
    for name, search in SEARCHES.items():
        plains = [newest["adam"], Program(task, search())]
        check_sequence(newest[name], plains, "xla")
        ratios = {
            "trace_over_adam": timing.ratio(seconds[name][:, 0], seconds["adam"][:, 0]),
            "compile_over_adam": timing.ratio(
                seconds[name][:, 1], seconds["adam"][:, 1]
            ),
            "both_over_adam": timing.ratio(
                total(seconds[name]), total(seconds["adam"])
            ),
        }
        rows.append({"children": f"Adam, {name}", **ratios})
    return rows


def measure_group(
    group: Group,
) -> tuple[dict[Name, np.ndarray], dict[int, dict[str, Any]]]:
    """Returns the seconds of tracing and compiling, and what the check found."""
    newest: dict[Name, Program] = {}
    calls = {
        name: functools.partial(time_first_call, group, name, newest)
        for name in group.programs()
    }
    seconds = timing.in_rounds(
        calls, group.rounds, f"{group.task.name}, {group.setting}"
    )
    plains = [newest[name] for name in list(OPTIMIZERS)[: max(group.children)]]
    checked = {
        n: {
            "variables": len(newest[n].model.trainable_variables),
            "difference_of_weights": check_sequence(newest[n], plains[:n], "xla"),
        }
        for n in group.children
    }
    return seconds, checked


def time_first_call(
    group: Group, name: Name, newest: dict[Name, Program]
) -> tuple[float, float]:
    """Returns the seconds of tracing and of compiling a new program.

    The program is put into `newest`, so that what was timed can be checked.
    """
    newest.pop(name, None)
    keras.utils.clear_session(free_memory=False)
    newest[name] = program = group.program(name)
    gc.collect()
    trace = timing.seconds_of(lambda: program.function("xla"))
    first = timing.seconds_of(lambda: program.step("xla"))
    second = timing.seconds_of(lambda: program.step("xla"))
    return trace, first - second


def row(group: Group, seconds: dict[Name, np.ndarray], children: int) -> dict[str, Any]:
    """Returns the row of a sequence."""
    plains = list(OPTIMIZERS)[:children]
    # By its median: the slowest of each round would be the noisiest.
    slowest = max(plains, key=lambda name: np.median(total(seconds[name])))
    # Medians here, too: noise would grow with every difference of the same round.
    without = np.median(total(seconds[WITHOUT]))
    parts = without + sum(
        max(np.median(total(seconds[name])) - without, 0) for name in plains
    )
    sequence, plain = seconds[children], seconds[slowest]
    return {
        "model": group.task.name,
        "setting": group.setting,
        "children": children,
        "slowest_child": slowest,
        "trace_over_plain": timing.ratio(sequence[:, 0], plain[:, 0]),
        "compile_over_plain": timing.ratio(sequence[:, 1], plain[:, 1]),
        "both_over_plain": timing.ratio(total(sequence), total(plain)),
        "both_over_sum_of_parts": timing.ratio(total(sequence), parts),
    }


def total(seconds: np.ndarray) -> np.ndarray:
    """Returns the time of tracing and compiling together, one entry per round."""
    return seconds.sum(axis=1)


def tables(result: dict[str, Any]) -> list[report.Table]:
    """Returns the table of all cases."""
    header = (
        "model",
        "setting",
        "variables",
        "children",
        "trace / plain",
        "compile / plain",
        "both / plain",
        "both / sum of parts",
        "goals",
    )
    rows = [
        (
            case["model"],
            case["setting"],
            str(case["variables"]),
            str(case["children"]),
            *(
                timing.as_text(case[key])
                for key in (
                    "trace_over_plain",
                    "compile_over_plain",
                    "both_over_plain",
                    "both_over_sum_of_parts",
                )
            ),
            ", ".join(missed(case)) or "met",
        )
        for case in result["cases"]
    ]
    counts = {case["both_over_plain"]["rounds"] for case in result["cases"]}
    rounds = " or ".join(str(count) for count in sorted(counts))
    noise = "; ".join(
        f"{timing.as_text(row['plain_over_itself'])} ({row['model']})"
        for row in result["noise"]
    )
    caption = (
        f"Times of the first call over those of the slowest plain child: median "
        f"(quartiles) of {rounds} rounds, each of a new model, optimizer and function. "
        "The sum of parts is the forward and backward pass without an optimizer, plus "
        "what each plain child takes on top of that. Goals for both together: at most "
        f"{TWO_CHILDREN_GOAL} times plain with two children, and at most the sum of "
        f"parts with any number. Noise, plain Adam over itself: {noise}. The weights "
        "at which the timed programs arrive after two updates in each phase were "
        "compared with those of the plain optimizers."
    )
    return [report.Table(caption, header, rows), *table_of_searches(result)]


def table_of_searches(result: dict[str, Any]) -> list[report.Table]:
    """Returns the table of Adam and a search, none if they were not measured yet."""
    if "searches" not in result:
        return []
    rows = [
        (
            row["children"],
            *(
                timing.as_text(row[f"{what}_over_adam"])
                for what in ("trace", "compile", "both")
            ),
            "met" if row["both_over_adam"]["median"] <= SEARCH_GOAL else "ABOVE",
        )
        for row in result["searches"]
    ]
    caption = (
        "Times of the first call over those of Adam alone, on an MLP of 6 variables. "
        f"Goal: both at most {SEARCH_GOAL} times. Checked as above."
    )
    header = ("children", "trace / Adam", "compile / Adam", "both / Adam", "goal")
    return [report.Table(caption, header, rows)]


def missed(case: dict[str, Any]) -> list[str]:
    """Returns what a case is above, in words."""
    above = []
    if case["children"] == 2 and case["both_over_plain"]["median"] > TWO_CHILDREN_GOAL:
        above.append(f"ABOVE {TWO_CHILDREN_GOAL} x plain")
    if case["both_over_sum_of_parts"]["median"] > 1:
        above.append("ABOVE sum of parts")
    return above


def headline(result: dict[str, Any]) -> str:
    """Answers the question in one sentence."""
    two = [case for case in result["cases"] if case["children"] == 2]
    most = max(result["cases"], key=lambda case: case["children"])
    return (
        "With two children the first call takes "
        f"{timing.from_to(timing.medians(two, 'both_over_plain'))} times as long as "
        f"with the slowest plain child alone; with {most['children']} children, "
        f"{timing.number(most['both_over_plain']['median'])} times."
    )


def draw(result: dict[str, Any]) -> Figure:
    """Returns the picture of the table."""
    figure, axes = new_figure(7.5, 1.5 + 0.45 * len(result["cases"]))
    rows = [
        (
            label(case),
            {
                "trace": case["trace_over_plain"],
                "compile": case["compile_over_plain"],
                "both, over the sum of parts": case["both_over_sum_of_parts"],
            },
        )
        for case in result["cases"]
    ]
    draw_ratios(axes, rows, {f"goal {TWO_CHILDREN_GOAL}": TWO_CHILDREN_GOAL})
    axes.set_xlabel("time over that of the slowest plain child")
    return figure


def label(case: dict[str, Any]) -> str:
    """Returns the name of a case for the picture."""
    setting = "" if case["setting"] == "step" else f", {case['setting']}"
    children = "" if case["children"] == 2 else f", {case['children']} children"
    model = case["model"]
    # There are two MLPs; other models have the number in their name.
    if not model.endswith("variables"):
        model += f" of {case['variables']} variables"
    return f"{model}{setting}{children}"
