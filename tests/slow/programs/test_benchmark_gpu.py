"""The question `gpu`: empty without a GPU; with one, TensorFlow's numbers by JAX."""

import importlib.util

import numpy as np
import pytest

from benchmarks.harness import report
from benchmarks.harness.checks import CheckError
from benchmarks.questions import gpu
from benchmarks.workloads import models
from benchmarks.workloads.programs import Program, make_plain, make_sequence


def small_task():
    return models.mlp(width=16, hidden=1)


@pytest.fixture
def cpu():
    """The CPU as a device of JAX."""
    jax = pytest.importorskip("jax")
    return jax.devices("cpu")[0]


def make_step(program, cpu):
    # Imports JAX.
    from benchmarks.workloads.device import StepOnDevice

    task = small_task()
    return StepOnDevice(program, (task.x, task.y), cpu)


@pytest.mark.parametrize("missing", ["jax", "GPU"])
def test_without_a_gpu_one_line_says_so(missing, monkeypatch, tmp_path, capsys):
    if missing == "jax":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        reason = "jax is not installed"
    else:
        jax = pytest.importorskip("jax")
        if any(device.platform == "gpu" for device in jax.devices()):
            pytest.skip("there is a GPU")
        reason = "jax finds no GPU"
    # TensorFlow has begun with its devices in an earlier test.
    monkeypatch.setattr(gpu, "prepare", lambda: None)
    report.ask(gpu, gpu.QUICK, True, tmp_path)
    result = report.read(gpu, tmp_path)
    assert result["device"] is None
    assert result["reason"] == reason
    assert gpu.tables(result) == []
    shown = capsys.readouterr().out
    assert f"not measured: {reason}" in shown
    assert "Not measured yet: no GPU was at hand." in shown


@pytest.mark.parametrize("phase", [0, 1])
def test_step_on_a_device_makes_the_updates_of_tensorflow(phase, cpu):
    program = Program(small_task(), make_sequence(2))
    step = make_step(program, cpu)
    step.restart(phase)
    losses = [step.step() for _ in range(3)]
    program.restart(phase)
    expected = [float(program.step("xla")) for _ in range(3)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    for a, b in zip(step.weights(), program.weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_step_on_a_device_reuses_the_memory_of_the_variables(cpu):
    step = make_step(Program(small_task(), make_plain("adam")), cpu)
    step.restart()
    before = list(step._arguments)
    step.step()
    batch, variables = before[:2], before[2:]
    assert not any(array.is_deleted() for array in batch)
    assert any(array.is_deleted() for array in variables)


def test_rows_of_a_device_have_ratios_and_copies(cpu):
    rows = gpu.measure_on(cpu, small_task(), gpu.Settings(rounds=2, steps=1))
    assert [row["child"] for row in rows] == list(gpu.CHILDREN)
    for row in rows:
        assert row["sequence_over_plain"]["median"] > 0
        assert row["copies"]["number"] >= 0
        # The same compiler, another version of it.
        assert row["difference_from_cpu"] < 1e-4
    result = {"device": "test", "settings": {"rounds": 2}, "cells": rows}
    assert "Step on one test" in gpu.tables(result)[0].caption
    assert gpu.draw(result).axes


def test_device_that_computes_something_else_is_refused(cpu):
    program = Program(small_task(), make_sequence(2))
    sequence, other = (
        make_step(p, cpu) for p in (program, Program(small_task(), make_plain("lion")))
    )
    with pytest.raises(CheckError, match="phase 0 on the device"):
        gpu.check(program, sequence, other, phase=0, updates=2)
