"""Keras' own tests pass with a SequentialOptimizer where they make an optimizer."""

import fnmatch
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import keras
import pytest

from tests.slow.programs.keras_suite import PLACES

ROOT = Path(__file__).parents[3]
SOURCE = Path(keras.__file__).parent / "src"
FILES = [
    str(path)
    for folder in ("optimizers", "callbacks", "saving")
    for path in sorted((SOURCE / folder).glob("*_test.py"))
]
SECONDS = 1200
# Of tests/README.md.
SENTENCE = r"In Keras ([\d.]+), (\d+) of .* (\d+) pass .* (\d+) are skipped, and (\d+) "

pytestmark = pytest.mark.skipif(
    not FILES, reason="this version of Keras ships no tests"
)

# Why a test cannot apply, and the tests: patterns of "file::class::test".
REASONS = {
    "calls `_clip_gradients`, which is private, and on the child": [
        "*::test_clip_norm",
        "*::test_clip_value",
        "optimizer_test.py::*::test_global_clip_norm",
    ],
    "puts mocks into the optimizer and wants the child to call them": [
        "optimizer_sparse_test.py::*::test_sparse_gradients_*",
    ],
    "reads an attribute, or calls a method, that its class alone has": [
        "muon_test.py::*::test_Newton_Schulz",
        "muon_test.py::*::test_adamw_*",
        "muon_test.py::*::test_lr_adjust_*",
        "muon_test.py::*::test_muon_*",
        "muon_test.py::*::test_should_use_adamw",
        "nadam_test.py::*::test_build_with_empty_var_list",
        "optimizer_test.py::*::test_clip_args",
    ],
    "wants the class or the name of the plain optimizer": [
        "multi_optimizer_test.py::*::test_serialization",
        "multi_optimizer_test.py::*::test_tensorboard_logging_with_multi_optimizer",
        "optimizer_test.py::*::test_get_method",
        "optimizer_test.py::*::test_optimizer_auto_naming",
        "saving_lib_test.py::*::test_saved_module_paths_and_class_names",
    ],
    "counts the variables of the plain optimizer": [
        "file_editor_test.py::*::test_scalar_weight",
        "optimizer_test.py::*::test_setting_lr_to_callable_untracks_lr_var",
        "sgd_test.py::*::test_single_step",
    ],
    "wants the words of an error; ours says the same in others": [
        "optimizer_test.py::*::test_empty_gradients",
        "optimizer_test.py::*::test_set_weights",
    ],
    "needs the package orbax-checkpoint": ["orbax_checkpoint_test.py::*"],
}


def run(place, folder):
    """Returns what the plugin reports of Keras' tests, by "file::class::test"."""
    report = folder / f"{place}.json"
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "tests.slow.programs.keras_suite",
            ),
            *("--place", place, "--report", str(report)),
            # Neither the settings of this repository nor its folder.
            *("-c", os.devnull, f"--rootdir={folder}", "-p", "no:cacheprovider"),
            *FILES,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    # 1 is a test that failed.
    assert done.returncode in (0, 1), done.stdout[-5000:]
    return json.loads(report.read_text())


def reasons_for(name):
    return [
        reason
        for reason, patterns in REASONS.items()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]


@pytest.fixture(scope="class")
def tests(request, tmp_path_factory):
    """The tests that got a SequentialOptimizer in the place of the class."""
    place = request.cls.place
    found = run(place, tmp_path_factory.mktemp(place))
    return {name: test for name, test in found.items() if test["made"]}


class Suite:
    """Keras' tests with a SequentialOptimizer in one of `PLACES`."""

    def test_keras_tests_pass_or_are_known_not_to_apply(self, tests):
        failed = {n: t["error"] for n, t in tests.items() if t["outcome"] == "failed"}
        unknown = {n: error for n, error in failed.items() if not reasons_for(n)}
        assert unknown == {}
        # Most must still pass, or the replacement has become one that nobody can use.
        assert len(failed) < len(tests) / 2

    def test_list_holds_nothing_that_passes(self, tests):
        passed = [name for name, test in tests.items() if test["outcome"] == "passed"]
        assert [name for name in passed if reasons_for(name)] == []

    def test_readme_has_the_counts(self, tests):
        text = re.sub(r"\s+", " ", (ROOT / "tests" / "README.md").read_text())
        version, *numbers = re.search(SENTENCE, text).groups()
        if version != keras.__version__:
            pytest.skip(f"the README has those of Keras {version}")
        outcomes = Counter(test["outcome"] for test in tests.values())
        expected = [outcomes[name] for name in ("passed", "skipped", "failed")]
        assert [int(number) for number in numbers] == [len(tests), *expected]


# A class each, so that they run side by side.
class TestOnly(Suite):
    place = "only"


class TestFirst(Suite):
    place = "first"


class TestSecond(Suite):
    place = "second"


def test_no_place_is_left_out():
    assert {suite.place for suite in Suite.__subclasses__()} == set(PLACES)
