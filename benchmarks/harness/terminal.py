"""What the programs print: lines, a progress bar, and no INFO lines of TensorFlow."""

import contextlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

_INFO_LOG = re.compile(
    rb"I\d{4} |\d{4}-\d\d-\d\d [\d:.]+: I |WARNING: All log messages before absl"
)


@contextlib.contextmanager
def without_info_logs() -> Iterator[None]:
    """Keeps the INFO lines of TensorFlow's C++ code off the terminal.

    It writes some before it obeys TF_CPP_MIN_LOG_LEVEL. Everything else that goes to
    stderr meanwhile is shown at the end.
    """
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            log.seek(0)
            for line in log:
                if not _INFO_LOG.match(line):
                    os.write(2, line)


def say(text: str) -> None:
    """Prints at once, also into a pipe."""
    print(text, flush=True)


class Progress:
    """A line on stderr that says how much is done, and about how long the rest takes.

    On a terminal it is redrawn in place, and gone when all is done; into a file
    nothing is written.

    Args:
        total: int, the number of calls of `step` to come.
        title: string, shown in front.
    """

    WIDTH = 24

    def __init__(self, total: int, title: str):
        self._total = total
        self._title = title
        self._done = 0
        self._start = time.perf_counter()
        self._draws = sys.stderr.isatty()
        self._draw("")

    def step(self, doing: str = "") -> None:
        """Counts one as done, and shows what is being done next."""
        self._done += 1
        self._draw(doing)

    def _draw(self, doing: str) -> None:
        if not self._draws:
            return
        if self._done >= self._total:
            sys.stderr.write("\r\x1b[K")
        else:
            filled = self.WIDTH * self._done // self._total
            bar = "=" * filled + "." * (self.WIDTH - filled)
            state = f"{self._title} [{bar}] {self._done}/{self._total}"
            sys.stderr.write(f"\r\x1b[K{state}{self._rest()} {doing}")
        sys.stderr.flush()

    def _rest(self) -> str:
        if not self._done:
            return ""
        passed = time.perf_counter() - self._start
        rest = round(passed / self._done * (self._total - self._done))
        return f", {rest // 60}:{rest % 60:02} left"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table for the terminal, its columns aligned to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (header, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)
