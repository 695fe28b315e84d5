"""The optimiser's kernel against torch.optim.SGD in float64, and against gradients that are not finite."""

import pytest
import torch
from ahead_of_time import compile_all, compiling, launches, unique
from kernel_checks import assert_as_accurate, assert_caught, mutant
from torch import Tensor

pytest.importorskip("triton")

from kernels import jit
from kernels import sgd as module
from kernels.cost import Cost
from kernels.sgd import BLOCK, sgd, sgd_cost, sgd_reference

interpreted = pytest.mark.skipif(not jit.INTERPRETED, reason="out-of-bounds mutants need the interpreter's guard")
DECAY = 0.01
CASES = [
    pytest.param(1, 0.9, id="one_element"),
    pytest.param(BLOCK, 0.9, id="exactly_a_tile"),
    pytest.param(2 * BLOCK + 7, 0.9, id="partial_last_tile"),
    pytest.param(BLOCK + 1, 0.0, id="without_momentum"),
]


def problem(n: int, momentum: float, device, copy: torch.dtype | None = torch.float16) -> dict:
    generator = torch.Generator().manual_seed(0)
    w, dw, v = (torch.randn(n, generator=generator).to(device) for _ in range(3))
    return {
        "w": w,
        "dw": dw,
        "v": v if momentum else None,
        "copy": None if copy is None else w.to(copy),
        "rates": torch.tensor([7.0, 0.1, 0.2, 0.05]).to(device),  # a first step that read entry 0 would be seen
        "step": torch.ones(1, dtype=torch.int64, device=device),
        "bad_step": torch.full((1,), -1, device=device),
        "momentum": momentum,
        "decay": DECAY,
    }


def hundred_steps(op, n: int, momentum: float, device) -> Tensor:
    """w after steps whose rates end with the table, each with a gradient of its own."""
    operands = problem(n, momentum, device)
    if momentum:
        operands["v"].zero_()
    for step in range(1, 101):
        operands["step"].fill_(step)
        operands["dw"].copy_(gradient(n, step))
        op(**operands)
    assert int(operands["bad_step"]) == -1
    assert torch.equal(operands["copy"], operands["w"].half())
    return operands["w"]


def library_s(n: int, momentum: float, device, dtype: torch.dtype) -> Tensor:
    """The same by torch.optim.SGD."""
    operands = problem(n, momentum, device)
    w = torch.nn.Parameter(operands["w"].to(dtype))
    optimiser = torch.optim.SGD([w], lr=1.0, momentum=momentum, nesterov=momentum > 0, weight_decay=DECAY)
    for step in range(1, 101):
        w.grad = gradient(n, step).to(device, dtype)
        optimiser.param_groups[0]["lr"] = float(operands["rates"][min(step, 3)])
        optimiser.step()
    return w.detach()


def gradient(n: int, step: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(step))


def check_hundred_steps(op, n: int, momentum: float, device) -> None:
    truth, baseline = (library_s(n, momentum, device, dtype) for dtype in (torch.float64, torch.float32))
    assert_as_accurate(hundred_steps(op, n, momentum, device), baseline, truth)


@pytest.mark.parametrize("op", [sgd, sgd_reference], ids=["kernel", "reference"])
@pytest.mark.parametrize(("n", "momentum"), CASES)
def test_a_hundred_steps_are_those_of_torch_optim(device, op, n, momentum):
    check_hundred_steps(op, n, momentum, device)


def check_masking(op, place: int, value: float, device) -> None:
    operands = problem(BLOCK + 9, 0.9, device)
    before = {name: operands[name].clone() for name in ("w", "v", "copy")}
    operands["dw"][place] = value
    operands["step"].fill_(3)
    op(**operands)
    assert int(operands["bad_step"]) == 3
    operands["dw"].fill_(1.0)
    operands["step"].fill_(4)
    op(**operands)
    assert int(operands["bad_step"]) == 3, "the first one is kept"
    for name, tensor in before.items():
        assert torch.equal(operands[name], tensor), name


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


MUTANTS = {
    "no_decay": ("other=0.0) + decay * w", "other=0.0)"),
    "plain_momentum": ("g += momentum * v", "g = v"),
    "velocity_not_kept": ("        tl.store(v_ptr + offs, v, mask=mask)\n", ""),
    "rate_of_the_step_before": ("tl.minimum(tl.load(step_ptr), S - 1)", "tl.minimum(tl.load(step_ptr) - 1, S - 1)"),
    "not_masked": ("mask = tl.where(tl.load(bad_step_ptr) < 0, offs < N, False)", "mask = offs < N"),
    "nan_passes": ('tl.abs(dw) < float("inf"), 0, 1', 'tl.abs(dw) == float("inf"), 1, 0'),
    "the_last_one_kept": ("none = tl.full((), -1, tl.int64)", "none = tl.load(bad_step_ptr)"),
    "copy_of_the_step_before": ("w.to(copy_ptr.dtype.element_ty)", "(w + rate * g).to(copy_ptr.dtype.element_ty)"),
    "first_tile_only": (
        "tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)\n    dw",
        "tl.arange(0, BLOCK)\n    dw",
    ),
}


def check_all(op, device) -> None:
    for value in (float("nan"), float("inf")):
        check_masking(op, BLOCK + 8, value, device)
    operands = problem(3, 0.9, device)
    operands["dw"][1] = float("nan")
    for step in (2, 3):
        operands["step"].fill_(step)
        op(**operands)
    assert int(operands["bad_step"]) == 2
    check_hundred_steps(op, BLOCK + 7, 0.9, device)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(device, tmp_path, name):
    changed = mutant(module, tmp_path, *MUTANTS[name])
    assert_caught(lambda: check_all(changed.sgd, device))


@interpreted
@pytest.mark.parametrize("kernel", ["check", "update"])
def test_reading_past_the_end_is_caught(device, tmp_path, kernel):
    old = "mask=offs < N, other" if kernel == "check" else "offs < N, False)"
    changed = mutant(module, tmp_path, old, old.replace("offs < N", "offs < N + 1"))
    assert_caught(lambda: check_all(changed.sgd, device))


def test_the_check_that_mutants_fail(device):
    check_all(sgd, device)


ACCESSES = {80: "128", 90: "128", 100: ""}  # bits; for 10.0 the compiler may take 256


def test_machine_code():
    """No spills, whole vectors, and one compare-and-swap, on every architecture."""
    with launches() as recorded:
        for momentum, copy in ((0.9, torch.bfloat16), (0.9, None), (0.0, torch.float16)):
            sgd(**problem(2**16, momentum, "cpu", copy))
    builds = [build.on(arch) for build in unique(recorded) for arch in ACCESSES]
    assert len(builds) == 12, "one check, three updates"
    for build, facts in zip(builds, compile_all(builds), strict=True):
        assert not facts.error, facts.error
        assert facts.spill_bytes == facts.local_bytes == 0
        wide = ACCESSES[build.arch]
        if build.kernel == "sgd_check_kernel":
            assert facts.count("LDG", wide) >= 4
            assert facts.count("ATOM", "CAS") == 1, facts.sass
        else:
            tensors = 2 + ("v_ptr" not in build.constexprs)
            assert facts.count("LDG", wide) >= 4 * tensors
            assert facts.count("STG", wide) >= 4 * (tensors - 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles ahead of time")
def test_mutants_compile(tmp_path):
    with launches() as builds:
        for old, new in MUTANTS.values():
            mutant(module, tmp_path, old, new).sgd(**problem(2**16, 0.9, "cpu"))
    assert all(compiling(builds))
