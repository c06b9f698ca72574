"""Weights and optimizer variables equal those of plain optimizers, bit by bit."""

import keras
import pytest

from sequential_optimizer import SequentialOptimizer
from tests.reference import (
    assert_same,
    make_gradients,
    make_variables,
    run,
    run_plain,
    weights_of,
)

optimizers = keras.optimizers

BOUNDARY = 3
UPDATES = 6

BUILT_IN = {
    "adadelta": lambda: optimizers.Adadelta(0.5),
    "adafactor": lambda: optimizers.Adafactor(0.05),
    "adagrad": lambda: optimizers.Adagrad(0.1),
    "adam": lambda: optimizers.Adam(0.05, amsgrad=True),
    "adamax": lambda: optimizers.Adamax(0.05),
    "adamw": lambda: optimizers.AdamW(0.05),
    "ftrl": lambda: optimizers.Ftrl(0.1),
    "lamb": lambda: optimizers.Lamb(0.05),
    "lion": lambda: optimizers.Lion(0.05),
    "muon": lambda: optimizers.Muon(0.05),
    "nadam": lambda: optimizers.Nadam(0.05),
    "rmsprop": lambda: optimizers.RMSprop(0.05, momentum=0.9, centered=True),
    "schedule_free_adamw": lambda: optimizers.ScheduleFreeAdamW(0.05),
    "sgd": lambda: optimizers.SGD(0.05, momentum=0.9, nesterov=True),
}
# What the oldest supported Keras does not have yet.
CLASS_NAMES = {"muon": "Muon", "schedule_free_adamw": "ScheduleFreeAdamW"}
AVAILABLE = [
    name for name in BUILT_IN if hasattr(optimizers, CLASS_NAMES.get(name, "Optimizer"))
]


def check(
    make_children, boundaries, mode, variables=make_variables, grads=None, atol=0
):
    """Compares a SequentialOptimizer with the oracle on the same gradients.

    `make_children` returns the optimizer of each phase, new at each call.
    """
    updates = (boundaries[-1] if boundaries else 0) + BOUNDARY
    ours, theirs = variables(), variables()
    gradients = (grads or make_gradients)(ours, updates)
    children, plain = make_children(), make_children()
    optimizer = SequentialOptimizer(children, boundaries)
    history = run(optimizer, ours, gradients, mode)
    expected = run_plain(plain, boundaries, theirs, gradients, mode)
    assert_same(history, expected, atol)
    for child, plain_child in zip(children, plain, strict=True):
        assert_same(
            weights_of(child.variables), weights_of(plain_child.variables), atol
        )
    assert int(optimizer.iterations) == updates
    return optimizer


@pytest.mark.parametrize("position", ["first", "second"])
@pytest.mark.parametrize("name", AVAILABLE)
def test_built_in_optimizer(name, position, mode):
    def make_children():
        other = optimizers.SGD(0.01, momentum=0.5, name="other")
        child = BUILT_IN[name]()
        return [child, other] if position == "first" else [other, child]

    # XLA orders the terms of Adagrad's update differently inside of a conditional.
    # Keras compiles the step of ScheduleFreeAdamW differently there too: its weights
    # are the difference of two larger terms.
    atol = 0
    if mode == "xla":
        atol = {"adagrad": 6e-8, "schedule_free_adamw": 6e-7}.get(name, 0)
    check(make_children, [BOUNDARY], mode, atol=atol)
