"""The optimiser's kernel against torch.optim.SGD in float64, and against gradients that are not finite."""

import pytest
import torch
from kernel_checks import mostly_slow

pytest.importorskip("triton")

from checks.sgd import check_hundred_steps, check_masking, problem

from kernels import jit
from kernels.cost import Cost
from kernels.sgd import BLOCK, sgd, sgd_cost, sgd_reference

interpreted = pytest.mark.skipif(not jit.INTERPRETED, reason="out-of-bounds mutants need the interpreter's guard")
CASES = [
    pytest.param(1, 0.9, id="one_element"),
    pytest.param(BLOCK, 0.9, id="exactly_a_tile"),
    pytest.param(2 * BLOCK + 7, 0.9, id="partial_last_tile"),
    pytest.param(BLOCK + 1, 0.0, id="without_momentum"),
]


@pytest.mark.parametrize("op", [sgd, sgd_reference], ids=["kernel", "reference"])
@pytest.mark.parametrize(("n", "momentum"), mostly_slow(CASES, "one_element", "without_momentum"))
def test_a_hundred_steps_are_those_of_torch_optim(device, op, n, momentum):
    check_hundred_steps(op, n, momentum, device)


@pytest.mark.parametrize("op", [sgd, sgd_reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK + 8], ids=["first", "end_of_a_tile", "last"])
def test_from_the_first_bad_gradient_on_nothing_moves(device, op, place, value):
    check_masking(op, place, value, device)


def test_the_largest_finite_gradient_is_finite(device):
    operands = problem(4, 0.0, device, copy=None)
    operands["dw"].fill_(torch.finfo(torch.float32).max)
    sgd(**operands)
    assert int(operands["bad_step"]) == -1


def test_registration(device):
    torch.library.opcheck(sgd, (), problem(40, 0.9, device))
    torch.library.opcheck(sgd, (), problem(40, 0.0, device, None))


def test_compiles_into_one_graph(device):
    eager, compiled = problem(40, 0.9, device), problem(40, 0.9, device)
    sgd(**eager)
    torch.compile(lambda: sgd(**compiled), fullgraph=True, backend="aot_eager")()
    assert torch.equal(eager["w"], compiled["w"])
    assert torch.equal(eager["v"], compiled["v"])


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        pytest.param("w", lambda x: x.half(), TypeError, "w is torch.float16", id="dtype"),
        pytest.param("dw", lambda x: x[1:], ValueError, "dw has shape", id="length"),
        pytest.param("copy", lambda x: x.float(), ValueError, "copy is torch.float32", id="copy"),
        pytest.param("rates", lambda x: x[:0], ValueError, "rates has shape", id="no_rates"),
        pytest.param("step", lambda x: x.int(), ValueError, "step is torch.int32", id="step"),
        pytest.param("bad_step", lambda x: x[0], ValueError, r"bad_step is torch.int64 \[\]", id="bad_step"),
        pytest.param("momentum", lambda x: 0.0, ValueError, "momentum is 0.0", id="momentum"),
    ],
)
def test_other_operands_are_refused(device, name, change, error, message):
    operands = problem(40, 0.9, device)
    operands[name] = change(operands[name])
    with pytest.raises(error, match=message):
        sgd(**operands)


def test_cost():
    operands = problem(1000, 0.9, "cpu")
    assert sgd_cost(**operands) == Cost(flops=9000, bytes=2 * 3 * 4000 + 2000)
    assert sgd_cost(**problem(1000, 0.0, "cpu", None)) == Cost(flops=5000, bytes=2 * 2 * 4000)
