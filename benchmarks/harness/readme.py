"""Writes the tables of both READMEs anew, from the JSON files.

    python -m benchmarks.readme

A full run of a question does so for its own part. The pictures are drawn anew as well.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import QUESTIONS
from benchmarks.harness import headline, report

README = Path(__file__).parent.parent / "README.md"


def origin(environment: dict[str, Any]) -> str:
    """Returns where, when and with what something was measured, as one sentence."""
    commit = (environment["commit"] or "unknown")[:7]
    changes = " with uncommitted changes" if environment["uncommitted_changes"] else ""
    return (
        f"Measured {environment['date'][:10]} at commit {commit}{changes}: "
        f"TensorFlow {environment['tensorflow']}, Keras {environment['keras']}, "
        f"Python {environment['python']}, {environment['cpu']}, "
        f"{environment['cores']} cores"
        f"{', --quick' if environment['quick'] else ''}."
    )


def part(name: str, results: Path = report.RESULTS) -> str:
    """Returns what stands between the markers of a question."""
    result = report.read(name, results)
    tables = [table.as_markdown() for table in report.question(name).tables(result)]
    picture = f"![{name}](results/{name}.png)"
    return "\n\n".join([*tables, picture, origin(result["environment"])])


def with_part(text: str, name: str, new: str) -> str:
    """Returns the text with the part of a question replaced."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    form = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if len(form.findall(text)) != 1:
        raise ValueError(f"The README must have `{begin}` and `{end}`, once each.")
    return form.sub(lambda _: f"{begin}\n\n{new}\n\n{end}", text)


def update(names: Iterable[str]) -> None:
    """Puts the newest tables of the questions into the READMEs."""
    text = README.read_text()
    for name in names:
        text = with_part(text, name, part(name))
    README.write_text(text)
    text = headline.README.read_text()
    headline.README.write_text(with_part(text, "headline", headline.table()))


def main() -> int:
    """Writes every part for which there is a result."""
    measured = [
        name for name in QUESTIONS if (report.RESULTS / f"{name}.json").exists()
    ]
    for name in measured:
        report.draw(name)
    update(measured)
    return 0


if __name__ == "__main__":
    sys.exit(main())
