"""Writes what was measured into both READMEs, from the JSON files."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.harness import report

README = Path(__file__).resolve().parent.parent / "README.md"
MAIN_README = README.parent.parent / "README.md"


def origin(sittings: list[dict[str, Any]]) -> str:
    """Returns when, where and with what something was measured, as one sentence.

    Args:
        sittings: the environment of each sitting.
    """
    when = dict.fromkeys(map(moment_of, sittings))
    where = dict.fromkeys(map(place_of, sittings))
    return f"Measured {', '.join(when)}: {'; '.join(where)}."


def moment_of(environment: dict[str, Any]) -> str:
    """Returns the date and the commit."""
    commit = (environment["commit"] or "unknown")[:7]
    changes = " with uncommitted changes" if environment["uncommitted_changes"] else ""
    return f"{environment['date'][:10]} at commit {commit}{changes}"


def place_of(environment: dict[str, Any]) -> str:
    """Returns the software and the machine."""
    return (
        f"TensorFlow {environment['tensorflow']}, Keras {environment['keras']}, "
        f"Python {environment['python']}, {environment['cpu']}, "
        f"{environment['cores']} cores"
        f"{', --quick' if environment['quick'] else ''}"
    )


def part(question: Any, results: Path) -> str:
    """Returns what stands between the markers of a question."""
    result = report.read(question, results)
    headline = question.headline(result)
    tables = question.tables(result)
    if not tables:
        return headline
    name = report.name_of(question)
    return "\n\n".join(
        [
            f"**{headline}**",
            *(table.as_markdown() for table in tables if not table.folded),
            f"![{report.text_of(question)}](results/{name}.png)",
            origin(report.sittings_of(result)),
            *(table.as_markdown() for table in tables if table.folded),
        ]
    )


def costs(questions: Iterable[Any], results: Path) -> str:
    """Returns the table of the main README, a line for each cost that was measured."""
    lines = ["| | measured |", "| --- | --- |"]
    for question in questions:
        if not hasattr(question, "COST"):
            continue
        result = report.read(question, results)
        if question.tables(result):
            anchor = report.name_of(question).replace("_", "-")
            link = f"[{question.COST}](benchmarks/README.md#{anchor})"
            date = result["environment"]["date"][:10]
            lines.append(f"| {link} | {question.headline(result)} ({date}) |")
    return "\n".join(lines)


def with_part(text: str, name: str, new: str) -> str:
    """Returns the text with the part of a question replaced."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    form = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
    if len(form.findall(text)) != 1:
        raise ValueError(f"The README must have `{begin}` and `{end}`, once each.")
    return form.sub(lambda _: f"{begin}\n\n{new}\n\n{end}", text)


def write(changed: Iterable[Any], questions: Iterable[Any], results: Path) -> None:
    """Writes the parts of the questions that changed, and the table of all costs."""
    text = README.read_text()
    for question in changed:
        name = report.name_of(question)
        text = with_part(text, name, part(question, results))
    README.write_text(text)
    text = MAIN_README.read_text()
    MAIN_README.write_text(with_part(text, "headline", costs(questions, results)))
