"""Does the switch cost anything on a GPU?

    python -m benchmarks gpu            # minutes, if there is a GPU
    python -m benchmarks gpu --quick    # seconds, on a tiny model

The train step with [Adam, SGD with momentum] in each of its phases, over the one with
the plain optimizer, as XLA programs that TensorFlow made and the client of JAX runs on
the GPU (workloads/device.py), and the copies on the device in both.

Without JAX, or a GPU that it can use, this says so and measures nothing.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from matplotlib.figure import Figure

from benchmarks.harness import report, timing
from benchmarks.harness.checks import CheckError, check_same
from benchmarks.harness.drawing import draw_ratios, new_figure
from benchmarks.harness.terminal import say
from benchmarks.workloads.models import Task, make_tasks
from benchmarks.workloads.programs import Program, make_plain, make_sequence

COST = "A step on a GPU"
CHILDREN = ("adam", "sgd")
# Against the weights that TensorFlow computes on the CPU. GPUs multiply matrices with
# fewer digits by default, which changes the updates by about a hundredth; another rule
# or a lost state changes them by more than a tenth.
TOLERANCE_TO_CPU = 0.05


@dataclass(frozen=True)
class Settings:
    """How long it takes: rounds, and timed steps of each program in a round."""

    tiny_models: bool = False
    rounds: int = 30
    steps: int = 10
    checked_updates: int = 2


FULL = Settings()
QUICK = Settings(tiny_models=True, rounds=3, steps=3)


def prepare() -> None:
    """Hides the GPU from TensorFlow, which would take all of its memory."""
    tf.config.set_visible_devices([], "GPU")


def measure(settings: Settings) -> dict[str, Any]:
    """Returns one row per model and phase, and none if there is no GPU."""
    device, reason = find_gpu()
    if device is None:
        say(f"not measured: {reason}")
        return {"device": None, "reason": reason, "cells": []}
    cells = []
    for task in make_tasks(settings.tiny_models):
        cells += measure_on(device, task, settings)
    return {"device": device.device_kind, "reason": reason, "cells": cells}


def find_gpu() -> tuple[Any, str]:
    """Returns a GPU of JAX, or `None` and the reason why there is none."""
    if not importlib.util.find_spec("jax"):
        return None, "jax is not installed"
    import jax

    try:
        return jax.devices("gpu")[0], ""
    except RuntimeError:
        return None, "jax finds no GPU"


def measure_on(device: Any, task: Task, settings: Settings) -> list[dict[str, Any]]:
    """Returns the rows of a model on a device of JAX."""
    # Needs JAX.
    from benchmarks.workloads.device import StepOnDevice

    def on_device(program: Program) -> StepOnDevice:
        return StepOnDevice(program, (task.x, task.y), device)

    programs = [Program(task, make_plain(name)) for name in CHILDREN]
    plains = [on_device(program) for program in programs]
    copies = [on_device(program) for program in programs]
    program = Program(task, make_sequence(len(CHILDREN)))
    sequence = on_device(program)
    calls: dict[Any, Callable[[], float]] = {}
    for phase in range(len(CHILDREN)):
        for name, step, of_step in (
            ("plain", plains[phase], 0),
            ("copy", copies[phase], 0),
            ("sequence", sequence, phase),
        ):
            calls[name, phase] = functools.partial(
                step.median_seconds, of_step, settings.steps
            )
    differences = [
        check(program, sequence, plains[phase], phase, settings.checked_updates)
        for phase in range(len(CHILDREN))
    ]
    seconds = timing.in_rounds(calls, settings.rounds, task.name)
    return [
        {
            "model": task.name,
            "phase": phase,
            "child": child,
            "sequence_over_plain": timing.ratio(
                seconds["sequence", phase], seconds["plain", phase]
            ),
            "plain_over_itself": timing.ratio(
                seconds["copy", phase], seconds["plain", phase]
            ),
            "copies": copies_in_phase(sequence, child),
            "plain_copies": copies_in_phase(plains[phase], None),
            "difference_from_cpu": differences[phase],
        }
        for phase, child in enumerate(CHILDREN)
    ]


def check(
    program: Program, sequence: Any, plain: Any, phase: int, updates: int
) -> float:
    """Checks the weights after some updates in a phase, and returns their difference.

    Raises:
        CheckError: if those of the sequence on the device are not those of the plain
            optimizer there, or not those of TensorFlow on the CPU.
    """
    program.restart(phase)
    first = program.weights()
    for _ in range(updates):
        program.step("xla")
    expected = program.weights()
    found = []
    for step, of_step in ((sequence, phase), (plain, 0)):
        step.restart(of_step)
        for _ in range(updates):
            step.step()
        found.append(step.weights())
    check_same(f"phase {phase} on the device", *found, first)
    return check_same(
        f"phase {phase}, device against CPU",
        found[0],
        expected,
        first,
        TOLERANCE_TO_CPU,
    )


def copies_in_phase(step: Any, child: str | None) -> dict[str, int]:
    """Returns the copies of a step, without those in the other branches."""
    program = step.optimized()
    everywhere = [program.entry]
    if child is not None:
        (branches,) = program.conditionals()
        everywhere += [b for b in branches if program.scope_of(b, CHILDREN) == child]
        if len(everywhere) != 2:
            raise CheckError(f"there is not exactly one branch of {child}.")
    counted = [program.copies(name) for name in everywhere]
    return {
        "number": sum(copies.number for copies in counted),
        "bytes": sum(copies.bytes for copies in counted),
    }


def tables(result: dict[str, Any]) -> list[report.Table]:
    """Returns the table of all cells, or none if there was no GPU."""
    if result["device"] is None:
        return []
    rows = [
        (
            cell["model"],
            f"{cell['phase']}, {cell['child']}",
            timing.as_text(cell["sequence_over_plain"], 3),
            timing.as_text(cell["plain_over_itself"], 3),
            *(copies_as_text(cell[key]) for key in ("copies", "plain_copies")),
        )
        for cell in result["cells"]
    ]
    header = ("model", "phase", "sequence / plain", "plain / plain (noise)")
    return [
        report.Table(caption(result), (*header, "copies", "copies, plain"), rows),
    ]


def copies_as_text(copies: dict[str, int]) -> str:
    """Returns number and size of copies as text."""
    return f"{copies['number']} ({copies['bytes'] / 1e6:.1f} MB)"


def caption(result: dict[str, Any]) -> str:
    """Returns what the table says."""
    return (
        f"Step on one {result['device']}: median (quartiles) of "
        f"{result['settings']['rounds']} rounds. Copies on the device in one step, of "
        "variables and of results."
    )


def headline(result: dict[str, Any]) -> str:
    """Answers the question in one sentence."""
    if result["device"] is None:
        return "Not measured yet: no GPU was at hand."
    ratios = timing.medians(result["cells"], "sequence_over_plain")
    return (
        f"On one {result['device']} a step takes {timing.from_to(ratios)} times as "
        "long as a plain one."
    )


def draw(result: dict[str, Any]) -> Figure:
    """Returns the picture of the table; without a GPU it says so."""
    figure, axes = new_figure(7, 4)
    if result["device"] is None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, f"not measured: {result['reason']}", ha="center")
        return figure
    rows = [
        (
            f"{cell['model']}, {cell['child']}",
            {
                "noise": cell["plain_over_itself"],
                "sequence": cell["sequence_over_plain"],
            },
        )
        for cell in result["cells"]
    ]
    draw_ratios(axes, rows)
    axes.set_xlabel("time of a step over that of the plain optimizer")
    return figure
