"""Processes that start within a second, report what they do, and can be killed.

TensorFlow takes seconds to import. A server imports it once, and then each `Process` is
a fork of it. That is safe because importing starts no threads and no devices, and each
process starts its own.
"""

import contextlib
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.terminal import without_info_logs

HOST = "127.0.0.1"
_STATUS = Path("/proc/self/status")
# Seconds. Only what hangs takes so long, or what runs on a busy machine.
LIMIT = 150
KILLED_WITHIN = 10.0

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["sequential_optimizer", "benchmarks"])


# Starting a process checks whether others have ended, and an exit code can be read
# from its pipe only once: threads must not do so at the same time.
_lock = threading.Lock()


@functools.cache
def start_server() -> None:
    """Starts the process that the others are forked from."""
    with without_info_logs():
        multiprocessing.forkserver.ensure_running()


class ProcessError(Exception):
    """A process failed, or did not end in time. The message holds its whole log."""


class Process:
    """Calls a function in a new process.

    Args:
        function: is called with `report`, a function that sends an object here, and
            with `arguments`. Must be importable by its name.
        arguments: what can be pickled.
        log: path of the file that its output goes to.
        environ: dict, environment variables set for it.
        limit: int, seconds after which the process ends itself, whatever happens.
    """

    def __init__(
        self,
        function: Callable[..., None],
        arguments: tuple[Any, ...],
        log: Path,
        environ: dict[str, str] | None = None,
        limit: int = LIMIT,
    ) -> None:
        self.log = log
        self.deadline = time.monotonic() + limit
        self._reports, sender = _forks.Pipe(duplex=False)
        self._process = _forks.Process(
            target=_run,
            args=(function, arguments, str(log), environ or {}, limit, sender),
            daemon=True,
        )
        with _lock:
            start_server()
            self._process.start()
        sender.close()

    def reports(self) -> Iterator[Any]:
        """Yields what the process reports, until it ends."""
        while True:
            try:
                if not self._reports.poll(max(self.deadline - time.monotonic(), 0)):
                    raise ProcessError(self.describe("did not end in time"))
                yield self._reports.recv()
            except (EOFError, OSError):
                return

    def exit_code(self) -> int | None:
        """Returns the exit code, or `None` while it is running."""
        with _lock:
            return self._process.exitcode

    def wait(self, seconds: float) -> bool:
        """Waits for the end; returns whether it came."""
        deadline = time.monotonic() + seconds
        while self.exit_code() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.exit_code() is not None

    def kill(self) -> bool:
        """Sends SIGKILL to this process alone; returns whether that ended it."""
        was_running = self.exit_code() is None
        if was_running:
            self._process.kill()
            self.wait(KILLED_WITHIN)
        return was_running and self.exit_code() == -signal.SIGKILL

    def check(self) -> None:
        """Waits for the end; raises ProcessError if the process failed."""
        if not self.wait(max(self.deadline - time.monotonic(), 0)):
            self.kill()
            raise ProcessError(self.describe("did not end in time"))
        if self.exit_code() != 0:
            raise ProcessError(
                self.describe(f"ended with exit code {self.exit_code()}")
            )

    def describe(self, what: str) -> str:
        """Returns a message that says what happened and holds the whole log."""
        return f"process {self._process.pid} {what}; {self.log}:\n{self.text()}"

    def text(self) -> str:
        """Returns all that the process has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def _run(
    function: Callable[..., None],
    arguments: tuple[Any, ...],
    log: str,
    environ: dict[str, str],
    limit: int,
    sender: Any,
) -> None:
    signal.alarm(limit)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environ)
    code = 0
    try:
        function(sender.send, *arguments)
    except BaseException:  # noqa: BLE001 (it ends here, and the log tells)
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    # At once: a member of a broken cluster waits for the others when Python ends.
    os._exit(code)


@contextlib.contextmanager
def running(processes: list[Process]) -> Iterator[list[Process]]:
    """Kills those that are still running when the block ends."""
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()


def all_reports(process: Process) -> Iterator[Any]:
    """Yields what a process reports; raises ProcessError if it failed."""
    with running([process]):
        yield from process.reports()
        process.check()


def check_all(processes: list[Process]) -> None:
    """Waits for the end of all; raises ProcessError with every log if one failed.

    The others are killed then, because they wait for it.
    """
    with running(processes):
        try:
            _first_failure(processes)
        except ProcessError as error:
            logs = [process.describe("took part") for process in processes]
            raise ProcessError("\n\n".join([str(error), *logs])) from None


def _first_failure(processes: list[Process]) -> None:
    waiting = list(processes)
    while waiting:
        for process in list(waiting):
            late = time.monotonic() > process.deadline
            if late or process.wait(0.05):
                process.check()
                waiting.remove(process)


def free_ports(count: int) -> list[int]:
    """Returns ports of this machine that nobody uses."""
    with contextlib.ExitStack() as stack:
        sockets = [
            stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            for _ in range(count)
        ]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def cluster_environments(**counts: int) -> dict[tuple[str, int], dict[str, str]]:
    """Returns the environment of each task of a new cluster on this machine.

    Args:
        **counts: ints, how many tasks each job has.

    Returns:
        dict from pairs of the name of a job and the index of a task.
    """
    ports = iter(free_ports(sum(counts.values())))
    cluster = {
        job: [f"{HOST}:{next(ports)}" for _ in range(count)]
        for job, count in counts.items()
    }
    return {
        (job, index): {
            "TF_CONFIG": json.dumps(
                {"cluster": cluster, "task": {"type": job, "index": index}}
            )
        }
        for job, count in counts.items()
        for index in range(count)
    }


# --- the memory of this process ----------------------------------------------


def peak_memory() -> int:
    """Returns the largest number of bytes that the process has had in memory.

    On Linux not what `getrusage` says, which in a process that was started by a larger
    one is at least the size of the larger one.
    """
    found = size_in_status("VmHWM")
    if found is not None:
        return found
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def size_in_status(name: str) -> int | None:
    """Returns a size that Linux tells of this process, in bytes; `None` elsewhere."""
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def forget_peak() -> None:
    """Lets `peak_memory` start again from what is in memory now, if Linux can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
