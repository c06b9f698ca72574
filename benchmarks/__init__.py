"""Programs that measure the package, and the example of the main README.

    questions    what is asked, one file per question
    workloads    what is measured
    harness      how

Each imports only what stands below it: nobody below knows what is asked above.
"""

import os

from benchmarks.harness.terminal import without_info_logs

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Here, so that it is quiet whichever program imports it first.
with without_info_logs():
    import tensorflow  # noqa: F401
