"""What can be seen only in a process that has not imported TensorFlow yet."""

import os
import re
import subprocess
import sys


def imported_with(**environment):
    return subprocess.run(
        [sys.executable, "-c", "import sequential_optimizer"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_legacy_keras_is_refused_at_import():
    result = imported_with(TF_USE_LEGACY_KERAS="1")
    assert result.returncode != 0
    assert "ImportError" in result.stderr
    assert "Unset the environment variable" in result.stderr


COMPILED_ONCE = """
import tensorflow as tf
from tests.training import test_training as t

optimizer = t.make_sequence("aba")
t.run_loop(optimizer, t.make_tiny(), t.BATCHES, "xla", built=True)
assert int(optimizer.phase) == 2
optimizer = t.make_sequence("ab")
loop = t.make_while_loop(t.make_tiny(), optimizer, "xla")
for last in (1, 3, 6):
    loop(tf.constant(0), tf.constant(last))
assert int(optimizer.phase) == 1
"""


def test_step_and_loop_are_compiled_once_over_the_whole_run(tmp_path):
    # A trace can be compiled several times. XLA dumps every module that it compiles,
    # but reads the flag once in a process.
    environment = {**os.environ, "XLA_FLAGS": f"--xla_dump_to={tmp_path}"}
    subprocess.run(
        [sys.executable, "-c", COMPILED_ONCE],
        env=environment,
        check=True,
        timeout=300,
    )
    modules = [path.name for path in tmp_path.glob("*.before_optimizations.txt")]
    names = [re.search(r"inference_([a-z]+)_", module)[1] for module in modules]
    assert sorted(names) == ["loop", "step"], modules
