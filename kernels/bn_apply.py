"""Batch norm's affine map, ReLU, 2x2 max-pool and residual in one kernel.

    z = x * scale + shift
    y = maxpool2x2?(relu(z)) + residual?

x            fp16, bf16 or fp32 [N, C, H, W] channels_last: in memory, rows of C channels
scale, shift fp32 [C]; by `kernels.bn_stats.bn_finalize`, or from the running statistics
residual, y  as x, or [N, C, H/2, W/2] with the pool, which needs even H and W

Arithmetic is fp32 with one rounding at the end. The pool takes the first of equal maxima, as `F.max_pool2d` does.

Passes over an activation: 2 (x read, y written), 1.25 with the pool; the residual adds a read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bn_stats import at_least_fp32, tile
from kernels.contract import check_activation, check_fp32, check_like
from kernels.cost import Cost, nbytes
from kernels.jit import LAUNCH, tl, triton, wait_for_the_kernel_before


def bn_apply_reference(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, pool: bool = False
) -> Tensor:
    """The formula above in PyTorch."""
    y = torch.relu(at_least_fp32(x) * scale[:, None, None] + shift[:, None, None])
    if pool:
        y = F.max_pool2d(y, 2)
    return (y if residual is None else y + at_least_fp32(residual)).to(x.dtype)


@triton.jit
def window_rows(rows, POOLED_W: tl.constexpr):
    """First pixel of the 2x2 window of each pooled pixel, in a map 2 * POOLED_W wide and of even height."""
    return (rows // POOLED_W) * (4 * POOLED_W) + (rows % POOLED_W) * 2


@triton.jit(do_not_specialize=["M"])
def bn_apply_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    M,
    C,
    POOLED_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_M of y's M rows by BLOCK_C channels. POOLED_W is y's width, or 0 without the pool."""
    wait_for_the_kernel_before()
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    mask_c = offs_c < C
    mask = (rows < M) & mask_c
    scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(shift_ptr + offs_c, mask=mask_c, other=0.0)
    if POOLED_W == 0:
        z = tl.load(x_ptr + rows * C + offs_c, mask=mask, other=0.0).to(tl.float32) * scale + shift
    else:
        x_ptr += window_rows(rows, POOLED_W) * C + offs_c
        z = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32) * scale + shift
        for i in tl.static_range(1, 4):
            x = tl.load(x_ptr + ((i // 2) * 2 * POOLED_W + i % 2) * C, mask=mask, other=0.0).to(tl.float32)
            other = x * scale + shift
            z = tl.where((other > z) | (other != other), other, z)  # NaN wins, as in PyTorch
    y = tl.where(z <= 0.0, 0.0, z)  # NaN stays NaN
    if residual_ptr is not None:
        y += tl.load(residual_ptr + rows * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * C + offs_c, y.to(y_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("cifar::bn_apply", mutates_args=())
def bn_apply(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, pool: bool = False) -> Tensor:
    """y = maxpool2x2?(relu(x * scale + shift)) + residual?, in x's dtype. `kernels.bn_relu` is its differentiable form.

    Raises ValueError or TypeError for operands other than the module's docstring has them, and for odd maps with the
    pool.
    """
    check_activation("x", x)
    channels = x.shape[1]
    check_fp32("scale", scale, (channels,), "x", x)
    check_fp32("shift", shift, (channels,), "x", x)
    y = _empty_output(x, pool)
    if residual is not None:
        check_like("residual", residual, "x", y.shape, x)
    rows, (block_m, block_c) = y.numel() // channels, tile(channels, pool)
    grid = (triton.cdiv(rows, block_m), triton.cdiv(channels, block_c))
    bn_apply_kernel[grid](
        x,
        scale,
        shift,
        residual,
        y,
        rows,
        channels,
        POOLED_W=y.shape[3] if pool else 0,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=4,
        **LAUNCH,
    )
    return y


@bn_apply.register_fake
def _(x, scale, shift, residual=None, pool=False):
    return _empty_output(x, pool)


def _empty_output(x: Tensor, pool: bool) -> Tensor:
    if not pool:
        return torch.empty_like(x)
    shape = output_shape(x, pool)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def output_shape(x: Tensor, pool: bool) -> tuple[int, ...]:
    """y's shape. Raises ValueError if the pool does not divide x's map."""
    n, c, h, w = x.shape
    if not pool:
        return n, c, h, w
    if h % 2 or w % 2:
        raise ValueError(f"x has a map of {h}x{w}, expected even height and width for the 2x2 pool")
    return n, c, h // 2, w // 2


def bn_apply_cost(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, pool: bool = False) -> Cost:
    """x read and y written, the residual read if there is one; an affine map and a comparison for each element of x."""
    y_bytes = nbytes(x) // 4 if pool else nbytes(x)
    flops = 3 * x.numel() + (0 if residual is None else residual.numel())
    return Cost(flops=flops, bytes=nbytes(x, scale, shift, residual) + y_bytes)
