"""SGD with Nesterov momentum on all parameters at once, masked from the first gradient on that is not finite.

    bad_step = step, if bad_step < 0 and dw is not finite somewhere
    g = dw + decay * w;  v = momentum * v + g;  w = w - rate * (g + momentum * v)      only while bad_step < 0
    rate = rates[min(step, S - 1)]
    copy = w, rounded

w, dw, v  fp32 [N]: parameters, gradients and velocities, each as one buffer; there is no v without momentum
copy      fp16 or bf16 [N], or None: what convolutions take, so that none of them has to cast
rates     fp32 [S], the learning rate after each number of steps
step      int64 [1], the number of this step; bad_step int64 [1], the first whose gradient was not finite, or -1

w, v, copy and bad_step change in place. Step, rate and mask are read on the device: nothing waits for the host, and a
step captured in a CUDA graph needs nothing new. The rule is that of `torch.optim.SGD(nesterov=True)`.

Two launches, since all of dw must be seen before any of w may change: dw is read; then dw, w and v are read, and w, v
and the copy written. The flag is set by a compare-and-swap that every program attempts with the same value, so that
runs repeat.
"""

import torch
from torch import Tensor

from kernels.contract import check_device, check_fp32
from kernels.cost import Cost, nbytes
from kernels.jit import LAUNCH, tl, triton, wait_for_the_kernel_before

COPIES = (torch.float16, torch.bfloat16)
BLOCK = 2048  # four 16-byte accesses to each tensor for each thread of four warps


def sgd_reference(
    w: Tensor,
    dw: Tensor,
    v: Tensor | None,
    copy: Tensor | None,
    rates: Tensor,
    step: Tensor,
    bad_step: Tensor,
    momentum: float,
    decay: float,
) -> None:
    """The formula above by PyTorch's fused optimiser, which skips its update where `found_inf` is 1."""
    finite = torch.linalg.vector_norm(dw, torch.inf).isfinite()
    bad_step.copy_(torch.where((bad_step < 0) & ~finite, step, bad_step))
    torch._fused_sgd_(
        [w],
        [dw],
        [] if v is None else [v],
        weight_decay=decay,
        momentum=momentum,
        lr=rates[step.clamp(max=len(rates) - 1)].view(()),
        dampening=0.0,
        nesterov=v is not None,
        maximize=False,
        is_first_step=False,
        found_inf=(bad_step >= 0).float().view(()),
    )
    if copy is not None:
        copy.copy_(w)


@triton.jit
def sgd_check_kernel(dw_ptr, step_ptr, bad_step_ptr, N, BLOCK: tl.constexpr):
    wait_for_the_kernel_before()
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dw = tl.load(dw_ptr + offs, mask=offs < N, other=0.0)
    bad = tl.sum(tl.where(tl.abs(dw) < float("inf"), 0, 1), axis=0)  # False for NaN
    if bad > 0:
        none = tl.full((), -1, tl.int64)
        tl.atomic_cas(bad_step_ptr, none, tl.load(step_ptr))


@triton.jit(do_not_specialize=["S"])  # one build for runs of every length
def sgd_kernel(
    w_ptr,
    dw_ptr,
    v_ptr,
    copy_ptr,
    rates_ptr,
    step_ptr,
    bad_step_ptr,
    N,
    S,
    momentum,
    decay,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK elements. `v_ptr` and `copy_ptr` may be None."""
    wait_for_the_kernel_before()
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = tl.where(tl.load(bad_step_ptr) < 0, offs < N, False)
    rate = tl.load(rates_ptr + tl.minimum(tl.load(step_ptr), S - 1))
    w = tl.load(w_ptr + offs, mask=mask, other=0.0)
    g = tl.load(dw_ptr + offs, mask=mask, other=0.0) + decay * w
    if v_ptr is not None:
        v = momentum * tl.load(v_ptr + offs, mask=mask, other=0.0) + g
        tl.store(v_ptr + offs, v, mask=mask)
        g += momentum * v
    w -= rate * g
    tl.store(w_ptr + offs, w, mask=mask)
    if copy_ptr is not None:
        tl.store(copy_ptr + offs, w.to(copy_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("cifar::sgd", mutates_args=("w", "v", "copy", "bad_step"))
def sgd(
    w: Tensor,
    dw: Tensor,
    v: Tensor | None,
    copy: Tensor | None,
    rates: Tensor,
    step: Tensor,
    bad_step: Tensor,
    momentum: float,
    decay: float,
) -> None:
    """One step of all parameters, in place, as the module's docstring has it.

    Raises ValueError or TypeError for operands other than those, and for a momentum without v or the reverse.
    """
    check_fp32("w", w, (None,), "itself", w)
    check_fp32("dw", dw, tuple(w.shape), "w", w)
    check_fp32("rates", rates, (None,), "w", w)
    if (v is not None) != (momentum > 0):
        raise ValueError(f"momentum is {momentum}, expected it above 0 with v and at 0 without")
    if v is not None:
        check_fp32("v", v, tuple(w.shape), "w", w)
    if copy is not None and (copy.dtype not in COPIES or copy.shape != w.shape or not copy.is_contiguous()):
        raise ValueError(f"copy is {copy.dtype} {list(copy.shape)}, expected fp16 or bf16, contiguous {list(w.shape)}")
    for name, x in (("step", step), ("bad_step", bad_step)):
        if x.dtype != torch.int64 or tuple(x.shape) != (1,) or x.device != w.device:
            raise ValueError(f"{name} is {x.dtype} {list(x.shape)} on {x.device}, expected int64 [1] on {w.device}")
    check_device("w", w)
    grid = (triton.cdiv(w.numel(), BLOCK),)
    sgd_check_kernel[grid](dw, step, bad_step, w.numel(), BLOCK=BLOCK, num_warps=4, **LAUNCH)
    sgd_kernel[grid](
        w,
        dw,
        v,
        copy,
        rates,
        step,
        bad_step,
        w.numel(),
        rates.numel(),
        momentum,
        decay,
        BLOCK=BLOCK,
        num_warps=4,
        **LAUNCH,
    )


@sgd.register_fake
def _(w, dw, v, copy, rates, step, bad_step, momentum, decay):
    return None


def sgd_cost(
    w: Tensor,
    dw: Tensor,
    v: Tensor | None,
    copy: Tensor | None,
    rates: Tensor,
    step: Tensor,
    bad_step: Tensor,
    momentum: float,
    decay: float,
) -> Cost:
    """dw read twice, w and v read and written, the copy written; a comparison, and two operations for each product."""
    products = 2 if v is None else 4
    return Cost(flops=(1 + 2 * products) * w.numel(), bytes=2 * nbytes(w, dw, v) + nbytes(copy))
