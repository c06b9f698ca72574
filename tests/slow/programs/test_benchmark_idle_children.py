"""The question `idle_children` measures what it says, and hlo.py reads HLO right."""

import dataclasses

import numpy as np
import pytest

from benchmarks.harness import hlo, report
from benchmarks.harness.checks import CheckError
from benchmarks.questions import idle_children
from benchmarks.workloads import models, programs

# A switch as XLA writes it. In the second branch the first variable is handed on in a
# copy, the second is updated, and the third is handed on in place. The copy of the loss
# is none of a variable.
SWITCH = """\
HloModule step, is_scheduled=true

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %add = f32[] add(%x, %y), metadata={op_name="step/switch/sgd_1/Add"}
}

%branch0 (p: (f32[4,8], f32[4], s64[])) -> (f32[4,8], f32[4], s64[]) {
  %p = (f32[4,8]{1,0}, f32[4]{0}, s64[]) parameter(0)
  %a = f32[4,8]{1,0} get-tuple-element(%p), index=0
  %b = f32[4]{0} get-tuple-element(%p), index=1
  %c = s64[] get-tuple-element(%p), index=2
  %d = f32[4,8]{1,0} add(%a, %a), metadata={op_name="step/switch/adam_0/Add"}
  ROOT %t = (f32[4,8]{1,0}, f32[4]{0}, s64[]) tuple(%d, %b, /*index=2*/%c)
}

%branch1 (q: (f32[4,8], f32[4], s64[])) -> (f32[4,8], f32[4], s64[]) {
  %q = (f32[4,8]{1,0}, f32[4]{0}, s64[]) parameter(0)
  %e = f32[4,8]{1,0} get-tuple-element(%q), index=0
  %f = f32[4]{0} get-tuple-element(%q), index=1
  %g = s64[] get-tuple-element(%q), index=2
  %copy.1 = f32[4,8]{1,0} copy(%e)
  %h = f32[4]{0} fusion(%f, %f), kind=kLoop, calls=%sum
  %copy.2 = f32[4]{0} copy(%h)
  ROOT %u = (f32[4,8]{1,0}, f32[4]{0}, s64[]) tuple(%copy.1, %copy.2, %g)
}

ENTRY %main (i: s32[], v: (f32[4,8], f32[4], s64[])) -> (f32[4,8], f32[4], s64[]) {
  %i = s32[] parameter(0)
  %v = (f32[4,8]{1,0}, f32[4]{0}, s64[]) parameter(1)
  %copy.3 = s32[] copy(%i)
  ROOT %r = (f32[4,8]{1,0}, f32[4]{0}, s64[]) conditional(%copy.3, %v, %v), BRANCHES
}
"""
LISTED = "branch_computations={%branch0, %branch1}"
# The index is a boolean: false is 0.
TRUE_FIRST = "true_computation=%branch1, false_computation=%branch0"
TINY = dataclasses.replace(
    idle_children.QUICK, grid=((4, (1, 2, 3)), (6, (1, 2))), rounds=2, steps=1
)


# --- reading HLO ---------------------------------------------------------------


@pytest.mark.parametrize("branches", [LISTED, TRUE_FIRST])
def test_branches_are_found_in_their_order(branches):
    program = hlo.Module(SWITCH.replace("BRANCHES", branches))
    assert program.conditionals() == [["branch0", "branch1"]]


def test_copy_that_is_handed_on_is_counted_with_its_bytes():
    program = hlo.Module(SWITCH.replace("BRANCHES", LISTED))
    assert program.copies_handed_on("branch0") == hlo.Copies(0, 0)
    assert program.copies_handed_on("branch1") == hlo.Copies(1, 4 * 8 * 4)


def test_shapes_of_operands_are_no_operands():
    typed = SWITCH.replace("copy(%e)", "copy(f32[4,8]{1,0} %e)")
    program = hlo.Module(typed.replace("BRANCHES", LISTED))
    assert program.copies_handed_on("branch1") == hlo.Copies(1, 4 * 8 * 4)


def test_all_copies_of_a_computation_are_counted():
    program = hlo.Module(SWITCH.replace("BRANCHES", LISTED))
    assert program.copies("branch1") == hlo.Copies(2, 4 * 8 * 4 + 4 * 4)
    assert program.copies(program.entry) == hlo.Copies(1, 4)


def test_scope_of_a_branch_is_found_also_in_what_it_calls():
    program = hlo.Module(SWITCH.replace("BRANCHES", LISTED))
    names = ["adam_0", "sgd_1"]
    found = [program.scope_of(branch, names) for branch in ("branch0", "branch1")]
    assert found == names
    # A part of a name is not the name.
    assert program.scope_of("branch0", ["adam"]) is None


# --- counting the copies of the package ------------------------------------------


def test_copies_are_of_idle_variables_in_a_branch_per_child():
    rows = idle_children.count_copies(
        models.many_variables(4), idle_children.make_sequence(["adam", "sgd"])
    )
    assert [row["child"] for row in rows] == ["adam_child_0", "sgd_child_1"]
    assert {row["branch"] for row in rows} == {0, 1}
    # Adam has two variables for each weight, SGD one, and both a count and a rate.
    assert [row["idle_variables"] for row in rows] == [4 + 2, 2 * 4 + 2]
    for row in rows:
        assert 0 <= row["copies"] <= row["idle_variables"]
        assert 0 <= row["copied_bytes"] <= row["idle_bytes"]


def test_program_without_a_switch_is_refused():
    with pytest.raises(CheckError, match="0 conditionals"):
        idle_children.count_copies(
            models.many_variables(4), idle_children.make_sequence(["adam"])
        )


# --- time ------------------------------------------------------------------------


def test_idle_variables_are_as_many_as_the_optimizers_have():
    sequence = programs.Program(
        models.many_variables(4), idle_children.make_sequence(["adam"] * 3)
    ).optimizer
    _, *idle = sequence.children
    count = sum(len(child.variables) for child in idle)
    assert count == idle_children.idle_variables(children=3, variables=4)


def test_slope_is_taken_per_round_without_the_switch():
    idle = np.array([10, 30, 70])
    first, second = 5 + 0.25 * idle, 100 + 2.0 * idle
    slopes = idle_children.slope_of(idle, np.stack([first, second], axis=1))
    np.testing.assert_allclose(slopes, [0.25, 2.0])


def test_cells_are_timed_in_their_phase():
    program = programs.Program(
        models.many_variables(4), idle_children.make_sequence(["adam"] * 3)
    )
    for phase, expected in (("last", 2), ("first", 0), ("last", 2)):
        cell = idle_children.Cell(3, "graph", phase)
        assert idle_children.time_cell(program, cell, steps=1) > 0
        assert int(program.optimizer.phase) == expected


def test_quick_run_has_a_row_for_everything(tmp_path):
    report.ask(idle_children, TINY, True, tmp_path)
    result = report.read(idle_children, tmp_path)
    # For each mode one child in its only phase, more in the first and last.
    assert len(result["cells"]) == 2 * (1 + 2 + 2) + 2 * (1 + 2)
    # One number of children above 1 has no slope.
    assert {row["variables"] for row in result["slopes"]} == {4}
    assert len(result["slopes"]) == 2 * 2
    assert len(result["copies"]) == sum(len(order) for order in TINY.orders)
