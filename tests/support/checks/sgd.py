"""Operands of `sgd`, the checks that its mutants fail, and the mutants."""

import torch
from kernel_checks import Mutants, assert_as_accurate

from kernels import sgd as module
from kernels.sgd import BLOCK

DECAY = 0.01


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


def check_steps(op, n: int, momentum: float, device, steps: int = 100) -> None:
    """w is torch.optim.SGD's after steps whose rates end with the table, each with a gradient of its own."""
    operands, theirs = problem(n, momentum, device), []
    for dtype in (torch.float64, torch.float32):
        w = torch.nn.Parameter(operands["w"].to(dtype, copy=True))
        theirs.append(torch.optim.SGD([w], lr=1.0, momentum=momentum, nesterov=momentum > 0, weight_decay=DECAY))
    if momentum:
        operands["v"].zero_()
    for step in range(1, steps + 1):
        gradient = torch.randn(n, generator=torch.Generator().manual_seed(step)).to(device)
        operands["step"].fill_(step)
        operands["dw"].copy_(gradient)
        op(**operands)
        for optimiser in theirs:
            (group,) = optimiser.param_groups
            group["lr"], (w,) = float(operands["rates"][min(step, 3)]), group["params"]
            w.grad = gradient.to(w.dtype)
            optimiser.step()
    assert int(operands["bad_step"]) == -1
    assert torch.equal(operands["copy"], operands["w"].half())
    truth, baseline = (optimiser.param_groups[0]["params"][0].detach() for optimiser in theirs)
    assert_as_accurate(operands["w"], baseline, truth)


def check_masking(op, place: int, value: float, device) -> None:
    operands = problem(BLOCK + 9, 0.9, device)
    before = {name: operands[name].clone() for name in ("w", "v", "copy")}
    for step, bad in ((3, value), (4, 1.0)):
        operands["dw"][place] = bad
        operands["step"].fill_(step)
        op(**operands)
        assert int(operands["bad_step"]) == 3, "the first one is kept"
    for name, tensor in before.items():
        assert torch.equal(operands[name], tensor), name


def check_all(changed, device) -> None:
    op = changed.sgd
    for value in (float("nan"), float("inf")):
        check_masking(op, BLOCK + 8, value, device)
    operands = problem(3, 0.9, device)
    operands["dw"][1] = float("nan")
    for step in (2, 3):
        operands["step"].fill_(step)
        op(**operands)
    assert int(operands["bad_step"]) == 2
    check_steps(op, BLOCK + 7, 0.9, device, steps=10)


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

PAST_THE_END = {
    "check_reads_past_the_end": ("mask=offs < N, other", "mask=offs < N + 1, other"),
    "update_reads_past_the_end": ("offs < N, False)", "offs < N + 1, False)"),
}


def launch(changed) -> None:
    changed.sgd(**problem(2**16, 0.9, "cpu"))


ROWS = {
    "sgd": Mutants(module, MUTANTS, check_all, launch, guarded=False),
    "sgd_bounds": Mutants(module, PAST_THE_END, check_all),
}
