"""Programs that measure the package; each is run with `python -m`."""

import os

from benchmarks.harness.terminal import without_info_logs

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Here, so that it is quiet whichever program imports it first.
with without_info_logs():
    import tensorflow  # noqa: F401

# One question a script, in the order in which `python -m benchmarks` asks them.
QUESTIONS = (
    "step_throughput",
    "first_call",
    "the_switch",
    "memory",
    "idle_children",
    "rivals",
    "gpu",
    "does_it_help",
    "faults",
)
