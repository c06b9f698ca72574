"""Does a run that was killed end, bit for bit, where it would have ended?

    python -m benchmarks faults                        # about 3 minutes on two cores
    python -m benchmarks faults --quick                # within a minute
    python -m benchmarks faults --set kills=100 seed=7

Training runs are killed by SIGKILL at random moments before, at and after a switch,
some of them while they save; some checkpoints are damaged as well. Each run is started
again and finds what the killed one has saved. It has survived if the digest of all
weights and optimizer variables equals that of a run which nobody killed, when it begins
again and after every update from there to the end.

benchmarks/README.md says what was found out about saving.
"""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import report
from benchmarks.harness.checks import CheckError
from benchmarks.harness.drawing import COLORS, new_figure
from benchmarks.harness.terminal import Progress
from benchmarks.workloads.fault_runs import (
    DAMAGES,
    KINDS,
    Kind,
    Life,
    Moment,
    damage_newest,
    live_again,
    reference,
    reference_going_back,
)
from benchmarks.workloads.fault_worker import PAUSE

PLACES = ("before", "at", "after")
# A run is killed at most this many times.
KILLS_OF_A_RUN = 3
# A kill that came too late does not count, and another one is drawn.
TRIES = 4


@dataclass(frozen=True)
class Settings:
    """How many kills, and which."""

    kills: int = 30
    seed: int = 0
    kinds: tuple[str, ...] = tuple(KINDS)


FULL = Settings()
QUICK = Settings(kills=2, kinds=("cluster", "saving"))


def measure(settings: Settings) -> dict[str, Any]:
    """Returns one row per kill.

    Raises:
        CheckError: if a run did not survive one.
    """
    shares = sum(KINDS[name].share for name in settings.kinds)
    kills = {
        name: max(1, round(settings.kills * KINDS[name].share / shares))
        for name in settings.kinds
    }
    progress = Progress(sum(kills.values()), "kills")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        runs = {
            name: pool.submit(
                kill,
                KINDS[name],
                count,
                np.random.default_rng((settings.seed, *name.encode())),
                Path(folder) / name,
                progress,
            )
            for name, count in kills.items()
        }
        rows = [
            {"kind": name, **row} for name, run in runs.items() for row in run.result()
        ]
    check(rows)
    return {"kills": rows}


def check(rows: Sequence[dict[str, Any]]) -> None:
    """Raises CheckError if a run did not survive its kill."""
    lost = [row for row in rows if not row["survived"]]
    if lost:
        raise CheckError(f"{len(lost)} of {len(rows)} kills not survived: {lost}")


def kill(
    kind: Kind, kills: int, rng: np.random.Generator, folder: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Kills runs of a kind until so many kills have hit; returns a row for each."""
    folder.mkdir()
    expected = reference(kind, folder / "reference")
    rows: list[dict[str, Any]] = []
    for run in range(TRIES * kills):
        count = min(kills - len(rows), KILLS_OF_A_RUN)
        if not count:
            return rows
        moments = draw_moments(kind, count, rng, expected)
        for row in kill_one(kind, moments, rng, folder / f"{run}", expected):
            # One that came too late says nothing, unless it did harm.
            if row.pop("hit") or not row["survived"]:
                rows.append(row)
                progress.step(kind.title)
    raise CheckError(f"{kind.title}: only {len(rows)} of {kills} kills hit")


def draw_moments(
    kind: Kind, count: int, rng: np.random.Generator, expected: Life
) -> list[Moment]:
    """Returns moments in the order of the run, spread over all places."""
    first, second = kind.workload.switches
    # Something has to be left to train.
    last = kind.updates - kind.save_every - 1
    draws = {
        "before": lambda: rng.integers(3, first - 1),
        "at": lambda: rng.choice([first, second]) - rng.integers(2),
        "after": lambda: rng.integers(first + 2, last),
    }
    longest = 2 * PAUSE
    if kind.event == "saving":
        longest = float(np.median(expected.save_seconds))
    places = [PLACES[i % len(PLACES)] for i in rng.permutation(len(PLACES))[:count]]
    numbers = sorted(int(draws[place]()) for place in places)
    for i in range(1, len(numbers)):
        # Something has to be saved between two kills.
        numbers[i] = max(numbers[i], numbers[i - 1] + 3)
    return [
        Moment(
            kind.event,
            number,
            delay=float(rng.uniform(0, longest)),
            victim=int(rng.integers(kind.processes)),
        )
        for number in numbers
        if number <= last
    ]


def kill_one(
    kind: Kind,
    moments: Sequence[Moment],
    rng: np.random.Generator,
    folder: Path,
    expected: Life,
) -> list[dict[str, Any]]:
    """Kills one run at each of the moments, lets it end; returns a row per kill."""
    folder.mkdir()
    lives: list[Life] = []
    rows: list[dict[str, Any]] = []
    for moment in [*moments, None]:
        damaged = None
        if rows and kind.is_damaged:
            damage = DAMAGES[int(rng.integers(len(DAMAGES)))]
            damaged = damage_newest(folder, damage, rng)
        life, *others = live_again(kind, folder, moment)
        lives.append(life)
        if kind.goes_back and rows:
            expected = reference_going_back(kind, lives, folder)
        differences = [
            event
            for one in (life, *others)
            for event in one.differences(expected.digests)
        ]
        if rows:
            rows[-1] |= {
                "restored": life.restored,
                "refused": life.refused,
                "differences": differences,
                "survived": not differences and (not damaged or bool(life.refused)),
            }
        elif differences:
            raise CheckError(f"{kind.title}: differs before it is killed: {life}")
        if moment:
            rows.append(
                {
                    "killed_after": life.last,
                    "place": place_of(life.last, kind.workload.switches),
                    "victim": moment.victim,
                    "hit": life.is_killed
                    and (kind.event != "saving" or life.is_saving),
                }
            )
    is_complete = life.is_finished and life.last == expected.last
    for row in rows:
        row["survived"] = row["survived"] and is_complete
    return rows


def place_of(last: int, switches: Sequence[int]) -> str:
    """Returns where a kill after the update number `last` was."""
    if any(abs(last - switch) <= 1 for switch in switches):
        return "at"
    return "before" if last < switches[0] else "after"


# --- showing them ------------------------------------------------------------------


def tables(result: dict[str, Any]) -> list[report.Table]:
    """Returns the table of all kinds."""
    kinds = dict.fromkeys(one["kind"] for one in result["kills"])
    rows = [
        row_of(
            KINDS[name].title, [one for one in result["kills"] if one["kind"] == name]
        )
        for name in kinds
    ]
    rows.append(row_of("all", result["kills"]))
    header = ("killed", "kills", "survived", *(f"{p} a switch" for p in PLACES))
    caption = (
        "A kill is survived if the resumed run ends, bit for bit, where one that "
        "nobody killed does. Repeated: the updates that had to be made again, median "
        "and most. "
        f"Seed {result['settings']['seed']}."
    )
    header = (*header, "broken files refused", "updates repeated")
    return [report.Table(caption, header, rows)]


def row_of(title: str, kills: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """Returns a row of the table."""
    places = [sum(one["place"] == place for one in kills) for place in PLACES]
    repeated = [one["killed_after"] - one["restored"] for one in kills]
    return (
        title,
        str(len(kills)),
        str(sum(one["survived"] for one in kills)),
        *map(str, places),
        str(sum(len(one["refused"]) for one in kills)),
        f"{np.median(repeated):g}, {max(repeated)}",
    )


def headline(result: dict[str, Any]) -> str:
    """Answers the question in one sentence."""
    kills = result["kills"]
    survived = sum(one["survived"] for one in kills)
    return (
        f"{survived} of {len(kills)} killed runs, started again, ended bit for bit "
        "where a run that nobody killed ended."
    )


def draw(result: dict[str, Any]) -> Figure:
    """Returns a picture of where each run was killed, and where it went on."""
    kills = result["kills"]
    figure, axes = new_figure(7, 1 + 0.2 * len(kills))
    for i, one in enumerate(kills):
        axes.plot(KINDS[one["kind"]].workload.switches, [i, i], "k|")
        axes.plot([one["restored"], one["killed_after"]], [i, i], color=COLORS[0])
        color = COLORS[2] if one["survived"] else COLORS[1]
        axes.plot(one["killed_after"], i, "x", color=color)
        axes.plot(one["restored"], i, "o", color=COLORS[0], markersize=3)
    starts = [i for i, one in enumerate(kills) if one["kind"] != kills[i - 1]["kind"]]
    axes.set_yticks(starts, [KINDS[kills[i]["kind"]].title for i in starts])
    axes.invert_yaxis()
    axes.set_xlabel("updates (cross: killed, dot: resumed, bars: switches)")
    return figure
