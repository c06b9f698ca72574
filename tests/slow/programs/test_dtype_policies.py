"""Compiled training under each dtype policy; uncompiled it is in test_training.py."""

import pytest

from tests.training.test_training import POLICIES, check_fit_under


@pytest.mark.parametrize("policy", POLICIES, indirect=True)
def test_compiled_fit_under_a_dtype_policy_equals_two_fits(policy):
    # Older XLA rounds bfloat16 only where a fusion ends: there the bits of a plain
    # step also change with an optimization barrier before its optimizer (measured with
    # TensorFlow 2.16). One unit in the last place of weights below 1.
    atol = 2.0**-8 if policy == "bfloat16" else 0
    check_fit_under(policy, jit_compile=True, atol=atol)
