"""A physics-informed network, trained with Adam and then with a quasi-Newton method.

The second half of `python -m benchmarks.digits`. A network learns the solution of a
damped oscillation, u'' + 4 u' + 400 u = 0, from its equation alone
(benchmarks/workloads/pinn.py). Shows how far Adam gets, and how far with `LBFGS` or
`SSBroyden` from a third of the steps on; and that a run which is saved in the
quasi-Newton phase and resumed ends, bit for bit, where the uninterrupted one does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from benchmarks.harness.checks import CheckError, count_different
from benchmarks.harness.terminal import say
from benchmarks.workloads.pinn import Oscillator, Points
from sequential_optimizer import LBFGS, SequentialOptimizer, SSBroyden

AT_ONCE = 20  # steps of one execution; Keras 3.5 unrolls them
POINTS = 60


@dataclass(frozen=True)
class Settings:
    """How long it takes; all count steps, each of which is one gradient."""

    steps: int = 3000
    boundary: int = 1000
    save_at: int = 2000


FULL = Settings()
QUICK = Settings(steps=300, boundary=100, save_at=200)


def make_model(second: type[keras.optimizers.Optimizer] | None, boundary: int) -> Any:
    """Returns a compiled network; all begin with the same weights."""
    keras.utils.set_random_seed(0)
    model = Oscillator(width=20, depth=2, inputs=1, dtype="float64")
    optimizer = keras.optimizers.Adam(1e-2)
    if second is not None:
        optimizer = SequentialOptimizer([optimizer, second()], [boundary])
    model.compile(optimizer, jit_compile=True, steps_per_execution=AT_ONCE)
    return model


def make_points() -> Points:
    """Returns where the equation should hold, and where the motion starts."""
    inside = np.linspace(0, 1, POINTS)[:, np.newaxis]
    return {"inside": tf.constant(inside), "start": tf.zeros((1, 1), tf.float64)}


def relative_error(model: Oscillator) -> float:
    """Returns how far the network is from the solution."""
    t = np.linspace(0, 1, 1001)
    return model.relative_error(tf.constant(t[:, np.newaxis]), model.solution(t))


def state(model: Oscillator) -> list[np.ndarray]:
    """Returns the weights, then the optimizer variables."""
    return [np.array(v) for v in (*model.variables, *model.optimizer.variables)]


def show(settings: Settings, folder: Path) -> None:
    """Does what the head of this file says; saves into the `folder`.

    Raises:
        CheckError: if the resumed run is not identical.
    """
    say(f"\na physics-informed network, {settings.steps} gradients, relative error:")
    points = make_points()
    for second in (None, LBFGS, SSBroyden):
        model = make_model(second, settings.boundary)
        model.fit_points(points, settings.save_at, AT_ONCE)
        path = folder / "oscillator.keras"
        model.save(path)
        model.fit_points(points, settings.steps - settings.save_at, AT_ONCE)
        name = f", then {second.__name__}" if second else " alone"
        say(f"{'Adam' + name:<20} {relative_error(model):.1e}")
    resumed = keras.models.load_model(path)
    first = int(resumed.optimizer.iterations)
    resumed.fit_points(points, settings.steps - first, AT_ONCE)
    unlike = count_different(state(resumed), state(model))
    way = f"iteration {first} to {int(resumed.optimizer.iterations)}"
    say(f".keras      {way}, phase 1: {'DIFFERENT' if unlike else 'identical'}")
    if unlike or int(resumed.optimizer.phase) != 1:
        raise CheckError(
            f"the resumed network is not identical to the uninterrupted one: {unlike} "
            "variables differ."
        )
