"""What a measurement depends on besides the code that was measured."""

import contextlib
import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

_FOLDER = Path(__file__).parent.parent
# A run writes these itself, so they say nothing about the code that was measured.
_WRITTEN_BY_RUNS = (
    ":(exclude)results",
    ":(exclude)README.md",
    ":(exclude)../README.md",
)
# Variables that change what TensorFlow and XLA compile, or how many threads there are.
_FLAGS = (
    "OMP_NUM_THREADS",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
)


def environment(quick: bool) -> dict[str, Any]:
    """Returns versions, processor, threads, commit, flags and date, for JSON."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": has_changes(),
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": cores(),
        "gpus": [
            tf.config.experimental.get_device_details(device).get("device_name", "GPU")
            for device in tf.config.list_physical_devices("GPU")
        ],
        # 0 lets TensorFlow choose.
        "intra_op_threads": tf.config.threading.get_intra_op_parallelism_threads(),
        "inter_op_threads": tf.config.threading.get_inter_op_parallelism_threads(),
        "flags": {name: os.environ[name] for name in _FLAGS if name in os.environ},
    }


def cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str:
    """Returns the name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git(*arguments: str) -> str | None:
    """Returns what git prints, or `None` outside of a clone."""
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=_FOLDER, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def has_changes() -> bool | None:
    """Returns whether the code differs from the commit, or `None` without git."""
    changes = git("status", "--porcelain", "--", "..", *_WRITTEN_BY_RUNS)
    return None if changes is None else bool(changes)
