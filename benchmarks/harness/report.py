"""Asks a question: measures, writes JSON and a picture, prints the tables.

benchmarks/questions/__init__.py says what a question is.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import tensorflow as tf

from benchmarks.harness.environment import environment
from benchmarks.harness.terminal import say, text_table, without_info_logs

RESULTS = Path(__file__).resolve().parent.parent / "results"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text, for the terminal and for Markdown.

    Args:
        caption: string, what the table says.
        header: tuple of strings.
        rows: list of tuples of strings.
        folded: string, what a reader clicks on to see it in Markdown, or `""` if it
            is open.
    """

    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    folded: str = ""

    def as_text(self) -> str:
        """Returns it for the terminal."""
        return f"{text_table(self.header, self.rows)}\n\n{self.caption}"

    def as_markdown(self) -> str:
        """Returns it for benchmarks/README.md."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        text = f"{table}\n\n{self.caption}"
        return folded(self.folded, text) if self.folded else text


def folded(summary: str, text: str) -> str:
    """Returns Markdown that is hidden until a reader clicks on the summary."""
    return f"<details>\n<summary>{summary}</summary>\n\n{text}\n\n</details>"


def name_of(question: Any) -> str:
    """Returns the name of the question: that of its file."""
    return question.__name__.rpartition(".")[2]


def text_of(question: Any) -> str:
    """Returns what is asked: the first line of its docstring."""
    return question.__doc__.partition("\n")[0]


def ask(question: Any, settings: Any, quick: bool, results: Path) -> None:
    """Measures, writes the result as JSON and as a picture, and prints it.

    Args:
        question: the module that asks it.
        settings: how long it takes, an instance of the question's `Settings`.
        quick: bool, whether this is too short to be an answer.
        results: folder.

    Raises:
        CheckError: if what was measured is not what it is said to be.
    """
    name = name_of(question)
    say(f"== {name}: {text_of(question)}")
    if hasattr(question, "prepare"):
        question.prepare()
    compile_something()
    results.mkdir(parents=True, exist_ok=True)
    head = {
        "question": name,
        "environment": environment(quick),
        "settings": dataclasses.asdict(settings),
    }
    if hasattr(question, "measure_in_sittings"):
        earlier = earlier_result(question, settings, results)
        head["earlier_sittings"] = sittings_of(earlier)
        for measured in question.measure_in_sittings(settings, earlier):
            result = {**head, **measured}
            if {**earlier, **measured} == earlier:
                result = earlier  # Nothing was left to measure: names no new sitting.
            write(question, result, results)
    else:
        result = {**head, **question.measure(settings)}
        write(question, result, results)
    draw(question, results)
    for table in question.tables(result):
        say(f"\n{table.as_text()}")
    say(f"\n{question.headline(result)}")
    say(f"\nwritten: {results / name}.json and .png\n")


def earlier_result(question: Any, settings: Any, results: Path) -> dict[str, Any]:
    """Returns what was measured before with the same settings, or `{}`."""
    if not (results / f"{name_of(question)}.json").exists():
        return {}
    earlier = read(question, results)
    same = earlier["settings"] == json.loads(json.dumps(dataclasses.asdict(settings)))
    return earlier if same else {}


def sittings_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the environments of all sittings in which a result was measured."""
    if not result:
        return []
    return [*result.get("earlier_sittings", []), result["environment"]]


def write(question: Any, result: dict[str, Any], results: Path) -> None:
    """Writes a result as JSON, or nothing if it is stopped in between."""
    path = results / f"{name_of(question)}.json"
    new = path.with_suffix(".new")
    new.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    new.replace(path)


def read(question: Any, results: Path) -> dict[str, Any]:
    """Returns the newest result of a question."""
    return json.loads((results / f"{name_of(question)}.json").read_text())


def draw(question: Any, results: Path) -> None:
    """Draws the picture of a question from its JSON file."""
    figure = question.draw(read(question, results))
    # Without the version of matplotlib in it, equal pictures are equal files.
    path = results / f"{name_of(question)}.png"
    figure.savefig(path, dpi=120, metadata={"Software": None})


def compile_something() -> None:
    """Lets XLA start, which it does with lines of log on the terminal."""
    with without_info_logs():
        tf.function(lambda x: x + 1, jit_compile=True)(tf.constant(1))
