"""A million updates and a hundred phases: nothing grows, nothing is counted wrong."""

import re

import keras
import numpy as np
import pytest
import tensorflow as tf

from benchmarks.harness.processes import size_in_status
from sequential_optimizer import SequentialOptimizer
from tests.helpers.oracle import assert_same, make_variables, weights_of

PHASES = 100
UPDATES_IN_PHASE = 10_000
UPDATES = PHASES * UPDATES_IN_PHASE
# One call of the compiled loop; not whole phases, so switches lie inside of calls too.
CALLS = 40
UPDATES_IN_CALL = UPDATES // CALLS


def adam_and_sgd():
    return keras.optimizers.Adam(1e-3), keras.optimizers.SGD(1e-3, momentum=0.9)


def make_loop(optimizer, variables):
    """Returns the compiled function that makes updates `start` to `stop - 1`."""

    def body(t):
        # Never the same twice, and never at rest.
        phase = tf.cast(t, tf.float32) * 0.01
        gradients = [0.1 * v + tf.sin(phase + tf.ones(v.shape)) for v in variables]
        optimizer.apply(gradients, variables)
        return [t + 1]

    @tf.function(jit_compile=True, autograph=False)
    def loop(start, stop):
        return tf.while_loop(lambda t: t < stop, body, [start])[0]

    return loop


@pytest.fixture(scope="module")
def run():
    """The optimizer, its variables and loop, and the memory after each call."""
    adam, sgd = adam_and_sgd()
    boundaries = range(UPDATES_IN_PHASE, UPDATES, UPDATES_IN_PHASE)
    optimizer = SequentialOptimizer([adam, sgd] * (PHASES // 2), list(boundaries))
    variables = make_variables()
    optimizer.build(variables)
    loop = make_loop(optimizer, variables)
    used, phases = [], []
    for start in range(0, UPDATES, UPDATES_IN_CALL):
        phases.append(int(optimizer.phase))
        loop(tf.constant(start), tf.constant(start + UPDATES_IN_CALL))
        used.append(size_in_status("VmRSS"))
    return optimizer, variables, loop, used, phases


def test_counters_are_exact(run):
    optimizer, _, _, _, phases = run
    assert int(optimizer.iterations) == UPDATES
    assert [int(c.iterations) for c in optimizer.children] == [UPDATES // 2] * 2
    starts = range(0, UPDATES, UPDATES_IN_CALL)
    assert phases == [start // UPDATES_IN_PHASE for start in starts]
    assert int(optimizer.phase) == PHASES - 1


def test_weights_are_those_of_the_plain_optimizers(run):
    _, variables, *_ = run
    plain = make_variables()
    loops = []
    for optimizer in adam_and_sgd():
        optimizer.build(plain)
        loops.append(make_loop(optimizer, plain))
    for phase in range(PHASES):
        start = phase * UPDATES_IN_PHASE
        loops[phase % 2](tf.constant(start), tf.constant(start + UPDATES_IN_PHASE))
    assert np.isfinite(weights_of(plain)[0]).all()
    assert_same(weights_of(variables), weights_of(plain))


def test_loop_is_traced_once_and_has_a_branch_for_each_child(run):
    *_, loop, _, _ = run
    assert loop.experimental_get_tracing_count() == 1
    first, last = tf.constant(0), tf.constant(1)
    hlo = loop.experimental_get_compiler_ir(first, last)(stage="hlo")
    (conditional,) = re.findall(r" conditional\(.*", hlo)
    branches = re.search(r"branch_computations=\{(.*?)\}", conditional)
    two = re.findall(r"(?:true|false)_computation=", conditional)
    assert len(branches[1].split(",") if branches else two) == 2


@pytest.mark.skipif(size_in_status("VmRSS") is None, reason="needs /proc")
def test_memory_is_flat(run):
    *_, used, _ = run
    # What the first calls allocate is kept for the next ones. A single float for each
    # of the later updates would be 3 MB.
    settled = CALLS // 4
    assert used[-1] - used[settled] < 2e6
