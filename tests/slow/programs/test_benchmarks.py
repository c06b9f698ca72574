"""Every question runs, is answered with what it says, and refuses wrong results."""

import dataclasses
import functools
import json
import os
import subprocess
import tempfile

import keras
import numpy as np
import pytest

from benchmarks.__main__ import main, measured, question
from benchmarks.harness import readme, report, terminal, timing
from benchmarks.harness.checks import CheckError, check_same, difference
from benchmarks.harness.environment import environment
from benchmarks.questions import (
    QUESTIONS,
    first_call,
    memory,
    step_throughput,
    the_switch,
)
from benchmarks.workloads import models, peak_memory, programs, ways
from sequential_optimizer import SequentialOptimizer

NAMES = ("step_throughput", "first_call", "the_switch", "memory")
# As short as they can be.
TINY = {
    "step_throughput": {"rounds": 2, "steps": 1, "short_rounds": 1, "short_steps": 1},
    "first_call": {},
    "the_switch": {"rounds": 2, "compiling_rounds": 1},
    "memory": {},
}


def small_task():
    return models.mlp(width=16, hidden=1)


def files_of_the_repository():
    """Returns what a full run would write, with the time of its last change."""
    paths = [readme.README, readme.MAIN_README, *report.RESULTS.iterdir()]
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.fixture(scope="module")
def quick_runs(tmp_path_factory):
    """For each question the exit code, and the folder of a quick run without options.

    And the files of the repository before and after them.
    """
    before = files_of_the_repository()
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_throughput, "make_tasks", lambda tiny: [small_task()])
        patch.setattr(step_throughput, "digits_task", small_task)
        # A process takes seconds, so the plain one should not run twice.
        once = functools.cache(peak_memory.measure_in_process)
        patch.setattr(memory, "measure_in_process", once)
        for name in NAMES:
            module = question(name)
            quick = dataclasses.replace(module.QUICK, **TINY[name])
            patch.setattr(module, "QUICK", quick)
            folder = tmp_path_factory.mktemp(name)
            patch.setattr(tempfile, "tempdir", str(folder))
            code = main([name, "--quick"])
            runs[name] = code, next(folder.glob("benchmarks-*"))
    return runs, before, files_of_the_repository()


@pytest.fixture
def results(quick_runs):
    """The JSON file of each question."""
    return {
        name: report.read(question(name), folder)
        for name, (_, folder) in quick_runs[0].items()
    }


def ratios_in(value):
    """Yields every ratio in what JSON holds."""
    if isinstance(value, dict):
        if "median" in value:
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from ratios_in(item)


# --- every question ----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_quick_run_writes_json_and_picture(quick_runs, name):
    code, folder = quick_runs[0][name]
    assert code == 0
    assert {path.name for path in folder.iterdir()} == {f"{name}.json", f"{name}.png"}
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_quick_runs_leave_the_repository_as_it_is(quick_runs):
    _, before, after = quick_runs
    assert before == after


@pytest.mark.parametrize("name", NAMES)
def test_result_says_where_it_comes_from(results, name):
    result = results[name]
    assert result["question"] == name
    assert result["settings"]
    found = result["environment"]
    for key in ("python", "tensorflow", "keras", "numpy", "cpu", "cores", "date"):
        assert found[key], key
    for key in ("commit", "uncommitted_changes", "intra_op_threads", "flags"):
        assert key in found
    assert found["quick"] is True


@pytest.mark.parametrize("name", NAMES)
def test_ratios_are_medians_between_their_quartiles(results, name):
    ratios = list(ratios_in(results[name]))
    assert ratios
    for ratio in ratios:
        assert ratio["low"] <= ratio["median"] <= ratio["high"]
        assert ratio["rounds"] >= 1
        assert np.isfinite([ratio["low"], ratio["high"]]).all()


@pytest.mark.parametrize("name", NAMES)
def test_tables_have_a_cell_for_every_column(results, name):
    for table in question(name).tables(results[name]):
        assert table.rows
        assert {len(row) for row in table.rows} == {len(table.header)}
        assert table.as_markdown().count("\n| ") == len(table.rows) + 1
        assert table.rows[0][0] in table.as_text()


@pytest.mark.parametrize("name", QUESTIONS)
def test_question_has_all_that_is_needed(name):
    module = question(name)
    assert module.__doc__.partition("\n")[0].endswith("?")
    assert type(module.FULL) is type(module.QUICK)
    assert module.FULL != module.QUICK
    for function in ("tables", "headline", "draw"):
        assert callable(getattr(module, function))
    # Either at once or in sittings.
    assert hasattr(module, "measure") != hasattr(module, "measure_in_sittings")
    assert f"python -m benchmarks {name} --quick" in module.__doc__


# --- what each measures ------------------------------------------------------


def test_step_throughput_has_both_modes_and_phases(results):
    cells = results["step_throughput"]["cells"]
    assert [(cell["mode"], cell["child"]) for cell in cells] == [
        ("xla", "adam"),
        ("xla", "sgd"),
        ("graph", "adam"),
        ("graph", "sgd"),
    ]
    for cell in cells:
        assert cell["sequence_over_plain"]["rounds"] == 2
        assert cell["plain_over_itself"]["rounds"] == 2


# What `python -m benchmarks.digits` showed before this question did.
def test_short_steps_have_a_table_without_a_goal(results):
    result = results["step_throughput"]
    assert len(result["short_steps"]) == 4
    for cell in result["short_steps"]:
        assert cell["sequence_over_plain"]["rounds"] == 1
        assert cell["plain_milliseconds"]["median"] > 0
    goals, short = step_throughput.tables(result)
    assert len(goals.rows) == len(short.rows) == 4
    del result["short_steps"]
    assert step_throughput.tables(result) == [goals]


def test_first_call_has_every_setting(results):
    cases = results["first_call"]["cases"]
    assert [(case["setting"], case["variables"]) for case in cases] == [
        ("while_loop", 4),
        ("loss scaling", 4),
        ("step", 4),
    ]


def test_switch_of_the_sequence_traces_and_compiles_nothing(results):
    rows = {row["way"]: row for row in results["the_switch"]["ways"]}
    assert list(rows) == list(ways.make_ways(small_task()))
    counts = {
        way: (row["traces_before"], row["compiles_before"]) for way, row in rows.items()
    }
    at_switch = {
        way: (row["traces_at_switch"], row["compiles_at_switch"])
        for way, row in rows.items()
    }
    assert at_switch["sequence"] == (0, 0)
    assert counts["two functions"] == at_switch["two functions"] == (1, 1)
    assert at_switch["two functions, compiled at the start"] == (0, 0)
    assert at_switch["both updates, then tf.where"] == (0, 0)
    # Keras' own train step is traced twice, as any that creates variables is.
    assert at_switch["Model.compile again"][0] >= 1
    assert at_switch["Model.compile again"][1] >= 1
    for row in rows.values():
        assert len(row["steps"]) == 2 * ways.AROUND


def test_memory_of_the_sequence_is_that_of_its_children(results):
    (row,) = results["memory"]["sequences"]
    # Three counters of four or eight bytes, and the starts of two phases.
    assert 28 <= row["own_bytes"] <= 40
    # SGD's momentum.
    assert row["optimizer_over_adam"] == pytest.approx(1.5, abs=0.01)
    assert {plain["child"] for plain in results["memory"]["plain"]} == {
        "adam",
        "sgd",
        "copy",
    }


# --- wrong results -----------------------------------------------------------


def always_adam(children=2, boundaries=None):
    """Returns a sequence in which it is Adam's turn in every phase."""
    adams = [keras.optimizers.Adam(name=f"child_{i}") for i in range(children)]
    return SequentialOptimizer(adams, boundaries or [None])


def wrong_momentum(children=2, boundaries=None):
    sgd = keras.optimizers.SGD(1e-2, momentum=0.8, name="sgd")
    first = programs.make_plain("adam")
    return SequentialOptimizer([first, sgd], boundaries or [None])


@pytest.mark.parametrize("broken", [always_adam, wrong_momentum])
def test_sequence_that_does_something_else_is_not_timed(monkeypatch, broken):
    monkeypatch.setattr(step_throughput, "make_sequence", broken)
    monkeypatch.setattr(timing, "in_rounds", None)
    with pytest.raises(CheckError, match="sequence of 2 phases, xla"):
        step_throughput.measure_task(small_task(), step_throughput.QUICK)


def test_first_call_has_both_searches(results):
    rows = results["first_call"]["searches"]
    assert [row["children"] for row in rows] == ["Adam, LBFGS", "Adam, SSBroyden"]
    assert all(row["both_over_adam"]["median"] > 0 for row in rows)
    before = {"cases": results["first_call"]["cases"], "noise": []}
    assert first_call.table_of_searches(before) == []


# The cases take half an hour, the searches five minutes.
def test_first_call_measures_only_what_is_missing(results, monkeypatch):
    whole = results["first_call"]
    monkeypatch.setattr(first_call, "measure_cases", None)
    monkeypatch.setattr(first_call, "measure_searches", lambda settings: ["measured"])
    before = {"cases": whole["cases"], "noise": whole["noise"]}
    (result,) = first_call.measure_in_sittings(first_call.QUICK, before)
    assert result == {**before, "searches": ["measured"]}
    (result,) = first_call.measure_in_sittings(first_call.QUICK, whole)
    assert result["searches"] == whole["searches"]


def test_first_call_without_an_optimizer_keeps_the_gradients():
    group = first_call.Group(small_task(), rounds=1)
    program, sgd = group.program(first_call.WITHOUT), group.program("sgd")
    before = program.weights()
    program.step()
    np.testing.assert_equal(program.weights(), before)
    sgd.step()
    # The first update with momentum: - learning rate * gradient.
    for kept, first, weight in zip(
        program.optimizer.variables, before, sgd.weights(), strict=True
    ):
        np.testing.assert_allclose(first - 1e-2 * kept.numpy(), weight, atol=1e-7)


def test_first_call_of_a_broken_sequence_is_not_reported(monkeypatch):
    monkeypatch.setattr(first_call, "make_sequence", always_adam)
    with pytest.raises(CheckError, match="sequence of 2 phases"):
        first_call.measure_group(first_call.Group(small_task(), rounds=1))


def test_way_that_switches_too_late_is_not_timed():
    late = ways.OneFunction(small_task(), programs.make_sequence(2, [9]))
    assert ways.BOUNDARY == 8
    with pytest.raises(CheckError, match="too late"):
        the_switch.check(small_task(), {"too late": late})


def test_memory_of_a_broken_sequence_is_not_measured(monkeypatch):
    monkeypatch.setattr(memory, "make_sequence", always_adam)
    monkeypatch.setattr(memory, "make_task", lambda tiny: small_task())
    with pytest.raises(CheckError, match="sequence of 2 phases"):
        memory.check(memory.QUICK)


def test_command_fails_and_writes_nothing_if_a_check_fails(
    monkeypatch, tmp_path, capsys
):
    def fail(settings):
        raise CheckError("wrong")

    monkeypatch.setattr(memory, "measure", fail)
    assert main(["memory", "--quick", "--results", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith("FAILED: wrong\n")
    assert list(tmp_path.iterdir()) == []


def test_difference_is_zero_only_if_all_is_the_same_bit_by_bit():
    first, end = [np.zeros(2), np.ones(3)], [np.ones(2), np.float64([2, 2, 2])]
    assert difference(end, end, first) == 0
    one_bit = [end[0], np.nextafter(end[1], 9)]
    assert 0 < difference(one_bit, end, first) < 1e-15
    assert difference([end[0], end[1] + 0.5], end, first) == pytest.approx(0.5)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 3.0])
def test_difference_of_one_variable_is_not_hidden_by_the_others(wrong):
    first, end = [np.zeros(1), np.zeros(1000)], [np.ones(1), np.full(1000, 100.0)]
    with pytest.raises(CheckError, match="what"):
        check_same("what", [np.float64([wrong]), end[1]], end, first)
    with pytest.raises(CheckError, match="what"):
        check_same("what", [end[0], end[1] * wrong], end, first)


def test_variable_that_must_not_change_is_compared_too():
    with pytest.raises(CheckError, match="differ by inf"):
        check_same("", [np.full(1, 1e-9)], [np.zeros(1)], [np.zeros(1)])


# --- measuring ---------------------------------------------------------------


def test_every_program_runs_once_in_every_round_in_random_order():
    order = []

    def call(name):
        order.append(name)
        return float(len(order))

    def run():
        order.clear()
        calls = {name: lambda name=name: call(name) for name in "abcd"}
        return timing.in_rounds(calls, 20, "")

    measured = run()
    rounds = [tuple(order[i : i + 4]) for i in range(0, 80, 4)]
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds)) > 5
    for r, names in enumerate(rounds):
        for i, name in enumerate(names):
            assert measured[name][r] == 4 * r + i + 1
    again = run()
    assert all(np.array_equal(measured[name], again[name]) for name in "abcd")


def test_ratio_is_taken_within_a_round():
    # Each round is twice as slow as the one before, for both.
    plain = np.float64([1, 2, 4, 8, 16])
    assert timing.ratio(1.5 * plain, plain) == {
        "median": 1.5,
        "low": 1.5,
        "high": 1.5,
        "rounds": 5,
    }
    spread = timing.spread(np.float64([3, 1, 2, 5, 4]))
    assert (spread["low"], spread["median"], spread["high"]) == (2, 3, 4)
    assert timing.as_text(spread, 1) == "3.0 (2.0 to 4.0)"
    assert timing.number(123.456) == "123"


def test_first_call_that_is_not_counted_is_not_in_the_median():
    calls = []
    timing.median_seconds(lambda: calls.append(1), 3)
    assert len(calls) == 4


@pytest.mark.parametrize(
    "task",
    [
        *models.make_tasks(tiny=True),
        models.residual_cnn(width=2, blocks=1, batch=1),
        models.transformer(width=16, blocks=1, heads=2, length=8, words=50),
    ],
    ids=lambda task: task.name,
)
def test_models_take_their_data_and_start_from_the_same_weights(task):
    one, other = task.new_model(), task.new_model()
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    logits = one(task.x)
    assert logits.shape[:-1] == task.y.shape
    assert logits.shape[-1] > task.y.max()


@pytest.mark.parametrize("count", [4, 20])
def test_many_variables_are_as_many_as_asked_for(count):
    assert len(models.many_variables(count).new_model().trainable_variables) == count


def test_program_restarts_from_where_it_started():
    program = programs.Program(small_task(), programs.make_sequence(2))
    first = program.weights()
    losses = [float(program.step()) for _ in range(3)]
    program.advance()
    program.step()
    program.restart()
    assert difference(program.weights(), first, first) == 0
    assert int(program.optimizer.phase) == 0
    assert [float(program.step()) for _ in range(3)] == losses
    program.restart(phase=1)
    assert int(program.optimizer.phase) == 1
    assert program.traces() == 1


def test_environment_holds_no_paths(monkeypatch):
    monkeypatch.setenv("TF_CONFIG_FILE", "/somewhere")
    monkeypatch.setenv("TF_ENABLE_ONEDNN_OPTS", "0")
    found = environment(quick=False)
    assert found["flags"]["TF_ENABLE_ONEDNN_OPTS"] == "0"
    assert "/somewhere" not in json.dumps(found)


# --- the terminal and the README ---------------------------------------------


def test_all_runs_each_question_in_its_own_process(monkeypatch, capsys):
    commands = []

    def run(command):
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, int("memory" in command))

    monkeypatch.setattr(subprocess, "run", run)
    assert main(["--quick"]) == 1
    assert commands == [["benchmarks", name, "--quick"] for name in QUESTIONS]
    assert "FAILED: memory" in capsys.readouterr().out
    commands.clear()
    options = ["--results", "there", "--set", "rounds=2"]
    assert main(["the_switch", "gpu", *options]) == 0
    assert [command[:2] for command in commands] == [
        ["benchmarks", "the_switch"],
        ["benchmarks", "gpu"],
    ]
    assert all(sorted(command[2:]) == sorted(options) for command in commands)


def test_unknown_question_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["the_swich"])
    assert "no question: the_swich" in capsys.readouterr().err


def test_settings_of_a_question_can_be_changed(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(report, "ask", lambda *arguments: found.append(arguments))
    options = ["--results", str(tmp_path), "--set", "kills=100", "seed=7"]
    assert main(["faults", *options]) == 0
    ((_, settings, quick, results),) = found
    assert (settings.kills, settings.seed, quick, results) == (100, 7, False, tmp_path)


def test_progress_stays_out_of_files(capsys):
    progress = terminal.Progress(2, "title")
    progress.step("one")
    progress.step("two")
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_is_gone_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    progress = terminal.Progress(2, "title")
    progress.step("one")
    shown = capsys.readouterr().err
    assert "title [============............] 1/2, 0:00 left one" in shown
    progress.step("two")
    assert capsys.readouterr().err == "\r\x1b[K"


def test_info_lines_stay_off_the_terminal(capfd):
    with terminal.without_info_logs():
        # As C++ code does, past `sys.stderr`.
        os.write(2, b"I0000 00:00:1.5 1 port.cc:153] oneDNN\n")
        os.write(2, b"E0000 00:00:1.5 1 port.cc:153] broken\n")
        os.write(2, b"2026-01-01 00:00:00.5: I port.cc:153] oneDNN\n")
    os.write(2, b"after\n")
    shown = capfd.readouterr().err
    assert shown == "E0000 00:00:1.5 1 port.cc:153] broken\nafter\n"


def test_text_table_is_aligned():
    table = terminal.text_table(("a", "long"), [("wide", "1"), ("b", "22")])
    assert table.splitlines() == ["a     long", "----  ----", "wide  1", "b     22"]


@pytest.mark.parametrize("name", QUESTIONS)
def test_readme_has_a_place_for_every_question(name):
    assert (
        readme.with_part(readme.README.read_text(), name, "new").count("\nnew\n") == 1
    )


@pytest.mark.parametrize("name", QUESTIONS)
def test_readme_says_what_was_measured(name):
    if not (report.RESULTS / f"{name}.json").exists():
        pytest.skip("not measured yet")
    text = readme.README.read_text()
    part = readme.part(question(name), report.RESULTS)
    assert readme.with_part(text, name, part) == text
    assert (report.RESULTS / f"{name}.png").exists()
    assert report.read(question(name), report.RESULTS)["environment"]["quick"] is False


def test_full_run_writes_its_part_of_the_readme(
    quick_runs, results, monkeypatch, tmp_path
):
    text = "# Before\n<!-- begin memory -->\nold\n<!-- end memory -->\nafter\n"
    (tmp_path / "README.md").write_text(text)
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    (tmp_path / "main.md").write_text("<!-- begin headline -->\n<!-- end headline -->")
    monkeypatch.setattr(readme, "MAIN_README", tmp_path / "main.md")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rows = {key: results["memory"][key] for key in ("sequences", "plain")}
    monkeypatch.setattr(memory, "measure", lambda settings: rows)
    assert main(["memory"]) == 0
    written = (tmp_path / "README.md").read_text()
    assert "\nold\n" not in written
    assert "| children |" in written
    assert "](results/memory.png)" in written
    assert f"Keras {keras.__version__}" in written
    assert written.startswith("# Before\n<!-- begin memory -->\n")
    assert written.endswith("<!-- end memory -->\nafter\n")
    assert (tmp_path / "memory.json").exists()
    said = memory.headline(results["memory"])
    assert f"**{said}**" in written
    date = report.read(memory, tmp_path)["environment"]["date"][:10]
    lines = (tmp_path / "main.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| [")] == [
        f"| [Memory](benchmarks/README.md#memory) | {said} ({date}) |"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_headline_holds_the_medians(results, name):
    # Of several cells the largest is shown.
    ratios = {
        "step_throughput": lambda result: [
            cell["sequence_over_plain"] for cell in result["cells"]
        ],
        "first_call": lambda result: [
            case["both_over_plain"] for case in result["cases"]
        ],
        "the_switch": lambda result: [result["ways"][0]["steps"][ways.AROUND]],
        "memory": lambda result: [row["peak_over_adam"] for row in result["sequences"]],
    }[name](results[name])
    largest = max(ratio["median"] for ratio in ratios)
    assert timing.number(largest) in question(name).headline(results[name])


def test_main_readme_has_the_headline():
    text = readme.MAIN_README.read_text()
    costs = readme.costs(measured(), report.RESULTS)
    assert readme.with_part(text, "headline", costs) == text


def test_what_was_not_measured_is_one_line_and_no_cost(tmp_path):
    gpu = question("gpu")
    result = {"device": None, "reason": "jax finds no GPU", "cells": []}
    (tmp_path / "gpu.json").write_text(json.dumps(result))
    assert readme.part(gpu, tmp_path) == "Not measured yet: no GPU was at hand."
    assert "GPU" not in readme.costs([gpu], tmp_path)


def test_part_without_its_markers_is_refused():
    with pytest.raises(ValueError, match="begin memory"):
        readme.with_part("nothing", "memory", "new")
