"""The optimiser's kernel against torch.optim.SGD in float64, and against gradients that are not finite."""

import pytest
import torch
from kernel_checks import mostly_slow

pytest.importorskip("triton")

from checks.sgd import check_masking, check_steps, problem

from kernels.sgd import BLOCK, sgd, sgd_reference

BOTH = pytest.mark.parametrize("op", [sgd, sgd_reference], ids=["kernel", "reference"])
CASES = [
    pytest.param(1, 0.9, id="one_element"),
    pytest.param(BLOCK, 0.9, id="exactly_a_tile"),
    pytest.param(2 * BLOCK + 7, 0.9, id="partial_last_tile"),
    pytest.param(BLOCK + 1, 0.0, id="without_momentum"),
]


@BOTH
@pytest.mark.parametrize(("n", "momentum"), mostly_slow(CASES, "one_element", "without_momentum"))
def test_a_hundred_steps_are_those_of_torch_optim(device, op, n, momentum):
    check_steps(op, n, momentum, device)


@BOTH
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK + 8], ids=["first", "end_of_a_tile", "last"])
def test_from_the_first_bad_gradient_on_nothing_moves(device, op, place, value):
    check_masking(op, place, value, device)


def test_the_largest_finite_gradient_is_finite(device):
    operands = problem(4, 0.0, device, copy=None)
    operands["dw"].fill_(torch.finfo(torch.float32).max)
    sgd(**operands)
    assert int(operands["bad_step"]) == -1
