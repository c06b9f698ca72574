"""A tiny training run that is stopped, saved, loaded and continued.

`Run` trains without a stop, saves on the way and remembers the state after every
call. Whatever was saved must continue through the same states, bit for bit.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from sequential_optimizer import SequentialOptimizer
from tests.helpers import models
from tests.helpers.models import adam_then_sgd
from tests.helpers.oracle import assert_same

optimizers = keras.optimizers
schedules = keras.optimizers.schedules

BOUNDARY = 3
ROWS, FEATURES = 16, 4


@dataclass(frozen=True)
class Case:
    """An optimizer, and the calls of `train` after which its run is saved."""

    make: Callable[[], Any]
    saved_after: tuple[int, ...] = (BOUNDARY - 1, BOUNDARY, BOUNDARY + 1)
    calls: int = 6
    advance_after: int | None = None


def adam_sgd(boundaries=(BOUNDARY,), **kwargs):
    return SequentialOptimizer(adam_then_sgd(), list(boundaries), **kwargs)


def _returning():
    adam, sgd = adam_then_sgd()
    return SequentialOptimizer([adam, sgd, adam], [BOUNDARY, BOUNDARY + 2])


def _same_class():
    return SequentialOptimizer(
        [
            optimizers.Adam(0.05, name="first"),
            optimizers.Adam(0.01, beta_1=0.5, name="second"),
        ],
        [BOUNDARY],
    )


def _schedules():
    return SequentialOptimizer(
        [
            optimizers.SGD(schedules.ExponentialDecay(0.05, 1, 0.5), momentum=0.9),
            optimizers.Nadam(schedules.CosineDecay(0.05, 4)),
        ],
        [BOUNDARY],
    )


def _nested():
    return SequentialOptimizer(
        [adam_sgd([2], name="inner"), optimizers.RMSprop(0.01)], [BOUNDARY]
    )


def _loss_scaled():
    # Two doublings of the scale within the run, so its own state matters too.
    return optimizers.LossScaleOptimizer(
        adam_sgd(), initial_scale=8.0, dynamic_growth_steps=2
    )


CASES = {
    "adam_sgd": Case(adam_sgd),
    "returning": Case(
        _returning, saved_after=tuple(range(BOUNDARY - 1, BOUNDARY + 4)), calls=7
    ),
    "same_class": Case(_same_class),
    "schedules": Case(_schedules),
    "ema": Case(lambda: adam_sgd(use_ema=True, ema_overwrite_frequency=2)),
    # The boundary is after call 6; calls 5 and 7 are in the middle of a window.
    "accumulation": Case(
        lambda: adam_sgd(gradient_accumulation_steps=2),
        saved_after=(4, 5, 6, 7, 8),
        calls=10,
    ),
    "nested": Case(_nested),
    "loss_scaled": Case(_loss_scaled),
    # `None` ended by `advance()`, and an integer that was never reached.
    "ended": Case(lambda: adam_sgd([None]), advance_after=BOUNDARY),
    "ended_before_integer": Case(lambda: adam_sgd([100]), advance_after=BOUNDARY),
}


def saves(names):
    """Returns the parameters (name of the case, call it is saved after)."""
    return [(name, calls) for name in names for calls in CASES[name].saved_after]


def make_model(optimizer=None, **kwargs):
    """Returns a model with the same weights at every call, compiled if it can be."""
    model = models.make_model(3, 1, features=FEATURES)
    if optimizer is not None:
        model.compile(optimizer, "mse", **{"jit_compile": False, **kwargs})
    return model


def build(model):
    """Builds the optimizer of a compiled model; returns the model."""
    model.optimizer.build(model.trainable_variables)
    return model


@functools.cache
def make_data(batches=12):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(batches, ROWS, FEATURES)).astype("float32")
    return x, np.sin(x.sum(-1, keepdims=True)).astype("float32")


def gradients_of(model, optimizer, x, y):
    """Returns the gradients of the loss as `optimizer` scales it."""
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(model(x) - y))
        scaled = optimizer.scale_loss(loss)
    return tape.gradient(scaled, model.trainable_variables)


def train(model, start, stop):
    """Makes calls `start` to `stop - 1` of a run, eagerly.

    Returns:
        The state after each call.
    """
    x, y = make_data()
    states = []
    for t in range(start, stop):
        gradients = gradients_of(model, model.optimizer, x[t], y[t])
        model.optimizer.apply(gradients, model.trainable_variables)
        states.append(state_of(model))
    return states


def state_of(model):
    """Returns the weights and all optimizer variables."""
    return models.state_of(model, model.optimizer)


def own_state_of(optimizer):
    """Returns the counter and the lowest phase that may run, without children."""
    return [np.array(v) for v in (optimizer.iterations, optimizer._min_phase)]


class Run:
    """A run without a stop.

    Args:
        case: what is trained.
        folder: where `save` writes.
        save: function of (model, folder of this call), called as `case` says.
    """

    def __init__(self, case: Case, folder: Path, save: Callable) -> None:
        self.case = case
        self._folder = folder
        model = make_model(case.make())
        self.states = [None]
        for t in range(case.calls):
            self.states += train(model, t, t + 1)
            if t + 1 == case.advance_after:
                model.optimizer.advance()
                self.states[-1] = state_of(model)
            if t + 1 in case.saved_after:
                self.folder(t + 1).mkdir()
                save(model, self.folder(t + 1))
        self.phase = int(_sequential(model).phase)
        # A run that never switches would show nothing.
        assert self.phase == len(_sequential(model).boundaries)

    def folder(self, calls: int) -> Path:
        """Returns the folder that was saved after `calls` calls."""
        return self._folder / str(calls)

    def assert_continues(self, model, calls: int) -> None:
        """Asserts that a loaded model is where the run was, and continues like it."""
        assert_same(state_of(model), self.states[calls])
        advance_after = self.case.advance_after or 0
        if advance_after <= calls:
            assert_same(train(model, calls, self.case.calls), self.states[calls + 1 :])
            return
        # Saved while the phase that is about to be ended still runs.
        assert int(model.optimizer.phase) == 0
        train(model, calls, advance_after)
        model.optimizer.advance()
        assert_same(state_of(model), self.states[advance_after])
        assert_same(
            train(model, advance_after, self.case.calls),
            self.states[advance_after + 1 :],
        )


def warnings_of(function, *args, **kwargs):
    """Calls a function; returns the messages of the warnings it gives.

    Under `filterwarnings = error` Keras would turn a warning in a file into a
    ValueError about the file, and a warning must not pass for a refusal.
    """
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always", UserWarning)
        function(*args, **kwargs)
    return [str(warning.message) for warning in record]


def _sequential(model):
    return getattr(model.optimizer, "inner_optimizer", model.optimizer)


def make_runs(factory: pytest.TempPathFactory, save: Callable) -> Callable:
    """Returns a function from the name of a case to its run, made only once."""

    @functools.cache
    def run_of(name: str) -> Run:
        return Run(CASES[name], factory.mktemp(name), save)

    return run_of
