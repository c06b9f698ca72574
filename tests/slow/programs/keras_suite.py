"""A pytest plugin that puts a SequentialOptimizer where Keras' own tests make one.

    pytest -p tests.slow.programs.keras_suite --place second --report FILE FILES

Every optimizer that a test makes by itself, by its class, its name or its config, is
the child of a SequentialOptimizer instead, in one of `PLACES`. What spans the phases
is moved to the parent, as the README tells people to do. The report says of each test
how it ended and how many SequentialOptimizers it got.
"""

import json
import sys
import types
from pathlib import Path
from typing import Any

import keras
import pytest

from sequential_optimizer import SequentialOptimizer

# Settings that a SequentialOptimizer has itself.
PARENT_SETTINGS = (
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)
# They take optimizers: those are replaced, and not what holds them.
HOLDERS = tuple(
    getattr(keras.optimizers, name)
    for name in ("LossScaleOptimizer", "MultiOptimizer")
    if hasattr(keras.optimizers, name)
)


def other_child() -> Any:
    """Returns a child whose updates nobody can overlook."""
    return new(keras.optimizers.SGD, 1e3, name="not_at_work")


def only(child: Any, **settings: Any) -> SequentialOptimizer:
    return SequentialOptimizer([child], [], **settings)


def first(child: Any, **settings: Any) -> SequentialOptimizer:
    return SequentialOptimizer([child, other_child()], [10**6], **settings)


def second(child: Any, **settings: Any) -> SequentialOptimizer:
    optimizer = SequentialOptimizer([other_child(), child], [None], **settings)
    optimizer.advance()
    return optimizer


PLACES = {"only": only, "first": first, "second": second}


def new(cls: type, *args: Any, **kwargs: Any) -> Any:
    """Returns a new instance of `cls`, and nothing else in its place."""
    instance = object.__new__(cls)
    instance.__init__(*args, **kwargs)  # type: ignore[misc]
    return instance


def is_for_a_sequence() -> bool:
    """Returns whether the package itself asks for an optimizer: for a child."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("sequential_optimizer"):
            return True
        frame = frame.f_back
    return False


class Plugin:
    """Replaces the optimizers while tests run, and keeps how the tests ended."""

    def __init__(self, place: str) -> None:
        self._place = PLACES[place]
        self._made = 0
        self.tests: dict[str, dict[str, Any]] = {}

    def make(self, cls: type, *args: Any, **kwargs: Any) -> Any:
        """Stands for `Optimizer.__new__`.

        What it returns is not a `cls`, so Python does not call `cls.__init__` on it.
        """
        replaced = (
            cls is not keras.optimizers.Optimizer
            and not issubclass(cls, (SequentialOptimizer, *HOLDERS))
            and not is_for_a_sequence()
        )
        if not replaced:
            return object.__new__(cls)
        names = PARENT_SETTINGS & kwargs.keys()
        settings = {name: kwargs.pop(name) for name in names}
        optimizer = self._place(new(cls, *args, **kwargs), **settings)
        self._made += 1
        return optimizer

    def pytest_sessionstart(self) -> None:
        keras.optimizers.Optimizer.__new__ = self.make

    def pytest_runtest_setup(self) -> None:
        self._made = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: Any) -> Any:
        report = yield
        name = f"{item.path.name}::{item.cls.__name__}::{item.name}"
        test = self.tests.setdefault(name, {"outcome": "passed", "error": ""})
        test["made"] = self._made
        if report.outcome != "passed":
            test["outcome"] = report.outcome
            test["error"] = str(call.excinfo.value) if call.excinfo else ""
        return report


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--place", choices=PLACES, required=True)
    parser.addoption("--report", type=Path, required=True)


def conftest_of_keras() -> types.ModuleType:
    """Returns what tests import from a file that is not in Keras' package."""
    module = types.ModuleType("conftest")

    def skip_if_backend(backend: str, reason: str) -> Any:
        return pytest.mark.skipif(keras.backend.backend() == backend, reason=reason)

    vars(module)["skip_if_backend"] = skip_if_backend
    return module


def pytest_configure(config: Any) -> None:
    sys.modules["conftest"] = conftest_of_keras()
    for marker in ("requires_trainable_backend", "multi_device"):
        config.addinivalue_line("markers", f"{marker}: of Keras")
    config.pluginmanager.register(Plugin(config.getoption("place")), "in place")


def pytest_unconfigure(config: Any) -> None:
    plugin = config.pluginmanager.get_plugin("in place")
    config.getoption("report").write_text(json.dumps(plugin.tests))
