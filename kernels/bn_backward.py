"""Backward of y = maxpool2x2?(relu(bn(x))): the mask, the two reductions, their coefficients, and dx.

    z = x * scale + shift;   dz = dy where z > 0 (with the pool: at the first maximum of its window), else 0
    partials[:, t, c] = (sum dz, sum dz * (x - mean)) over tile t's rows           (bn_backward_reduce)
    dbeta = sum dz;  dgamma = rstd * sum dz * (x - mean)                           (bn_coefficients)
    b = -scale * rstd * dgamma / n;  c = -scale * dbeta / n
    dx = scale * dz + b * (x - mean) + c                                           (bn_backward_apply)

dy, x, dx     fp16, bf16 or fp32, channels_last; dy is [N, C, H, W], or [N, C, H/2, W/2] with the pool
norm          fp32 [5, C] = (mean, var, rstd, scale, shift), by `kernels.bn_stats.bn_finalize`
partials      fp32 [2, T, C]
coefficients  fp32 [4, C] = (dgamma, dbeta, b, c)

The mask is recomputed from x, so that the activation need not be kept. Everything is centred on the mean: sum(dz * x)
and b * x + c' would cancel where |mean| >> sigma. `n` is the pixels that the statistics were taken over; where they are
constants (evaluation) it is infinite, and dx = scale * dz. A dy that is already masked gives the same result.

Passes over an activation: bn_backward_reduce 2 (dy, x), bn_backward_apply 3 (dy, x, dx); with the pool dy is a quarter.
With bn_stats (1), bn_apply (2) and the library's convolution (fprop 2, dgrad 2, wgrad 2) a conv-BN-ReLU layer makes 14
passes, where eager PyTorch makes 19 and torch.compile 16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bn_apply import output_shape, window_rows
from kernels.bn_stats import at_least_fp32, reduction_grid, tile
from kernels.contract import check_activation, check_device, check_fp32, check_like
from kernels.cost import Cost, nbytes
from kernels.jit import LAUNCH, tl, triton, wait_for_the_kernel_before

SUM_TILES, SUM_BLOCK_C = 512, 8  # lanes of bn_coefficients: four 16-byte loads of each plane for each thread


def bn_backward_reference(dy: Tensor, x: Tensor, norm: Tensor, n: float, pool: bool = False) -> tuple[Tensor, ...]:
    """(dx, dgamma, dbeta) by the formulas above, without tiles."""
    mean, _, rstd, scale, shift = norm[:, :, None, None]
    x32, dz = at_least_fp32(x), at_least_fp32(dy)
    z = x32 * scale + shift
    if pool:
        z, winner = F.max_pool2d(z, 2, return_indices=True)
    dz = torch.where(z > 0, dz, 0.0)
    if pool:
        dz = F.max_unpool2d(dz, winner, 2)
    dbeta, dgamma = dz.sum((0, 2, 3)), (dz * (x32 - mean) * rstd).sum((0, 2, 3))
    dx = scale * (dz - dbeta[:, None, None] / n - (x32 - mean) * rstd * dgamma[:, None, None] / n)
    return dx.to(x.dtype), dgamma, dbeta


@triton.jit
def _best_of_window(x_ptr, scale, shift, mask, C, POOLED_W: tl.constexpr):
    """(x, z, which) of the first maximum of the windows whose first pixels are at x_ptr."""
    best_x = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    best_z = best_x * scale + shift
    which = tl.zeros(best_z.shape, tl.int32)
    for i in tl.static_range(1, 4):
        x = tl.load(x_ptr + ((i // 2) * 2 * POOLED_W + i % 2) * C, mask=mask, other=0.0).to(tl.float32)
        z = x * scale + shift
        better = z > best_z
        best_x, best_z, which = tl.where(better, x, best_x), tl.where(better, z, best_z), tl.where(better, i, which)
    return best_x, best_z, which


@triton.jit(do_not_specialize=["M", "T", "steps"])
def bn_backward_reduce_kernel(
    dy_ptr,
    x_ptr,
    norm_ptr,
    partials_ptr,
    M,
    T,
    C,
    steps,
    POOLED_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: the partials of steps * BLOCK_M of dy's M rows by BLOCK_C channels. POOLED_W: dy's width, or 0."""
    wait_for_the_kernel_before()
    t = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask_c = offs_c < C
    mean = tl.load(norm_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(norm_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(norm_ptr + 4 * C + offs_c, mask=mask_c, other=0.0)
    rows = (t.to(tl.int64) * (steps * BLOCK_M) + tl.arange(0, BLOCK_M))[:, None]
    sum_dz = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    sum_dz_x = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for _ in range(steps):
        mask = (rows < M) & mask_c
        if POOLED_W == 0:
            x = tl.load(x_ptr + rows * C + offs_c, mask=mask, other=0.0).to(tl.float32)
            z = x * scale + shift
        else:
            window = x_ptr + window_rows(rows, POOLED_W) * C + offs_c
            x, z, _which = _best_of_window(window, scale, shift, mask, C, POOLED_W)
        dy = tl.load(dy_ptr + rows * C + offs_c, mask=mask, other=0.0).to(tl.float32)
        dz = tl.where(z > 0.0, dy, 0.0)
        sum_dz += dz
        sum_dz_x += dz * (x - mean)
        rows += BLOCK_M
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    out = partials_ptr + t * C + offs_c
    tl.store(out, tl.sum(sum_dz, axis=0), mask=offs_c < C)
    tl.store(out + T * C, tl.sum(sum_dz_x, axis=0), mask=offs_c < C)


@triton.jit(do_not_specialize=["T"])
def bn_coefficients_kernel(
    partials_ptr,
    norm_ptr,
    coefficients_ptr,
    T,
    C,
    per_pixel,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_C channels. Its BLOCK_T lanes add every BLOCK_T-th tile each, and are added at the end."""
    wait_for_the_kernel_before()
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    rstd = tl.load(norm_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)  # here, beside the first tiles' loads
    scale = tl.load(norm_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)
    lanes_dz = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    lanes_dz_x = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    dz, dz_x = lanes_dz, lanes_dz_x
    for t in range(0, T, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < T)[:, None] & mask_c[None, :]
        partial = partials_ptr + offs_t[:, None] * C + offs_c[None, :]
        # Of the pass before: an addition that waits here for its load would hold up the loads behind it.
        lanes_dz += dz
        lanes_dz_x += dz_x
        dz = tl.load(partial, mask=mask, other=0.0)
        dz_x = tl.load(partial + T * C, mask=mask, other=0.0)
    sum_dz = tl.sum(lanes_dz + dz, axis=0)
    dgamma = rstd * tl.sum(lanes_dz_x + dz_x, axis=0)
    out = coefficients_ptr + offs_c
    tl.store(out, dgamma, mask=mask_c)
    tl.store(out + C, sum_dz, mask=mask_c)
    tl.store(out + 2 * C, -scale * rstd * dgamma * per_pixel, mask=mask_c)
    tl.store(out + 3 * C, -scale * sum_dz * per_pixel, mask=mask_c)


@triton.jit(do_not_specialize=["M"])
def bn_backward_apply_kernel(
    dy_ptr,
    x_ptr,
    norm_ptr,
    coefficients_ptr,
    dx_ptr,
    M,
    C,
    POOLED_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_M of dy's M rows by BLOCK_C channels, and the rows of dx that belong to them."""
    wait_for_the_kernel_before()
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mask_c = offs_c < C
    mean = tl.load(norm_ptr + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(norm_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(norm_ptr + 4 * C + offs_c, mask=mask_c, other=0.0)
    b = tl.load(coefficients_ptr + 2 * C + offs_c, mask=mask_c, other=0.0)
    c = tl.load(coefficients_ptr + 3 * C + offs_c, mask=mask_c, other=0.0)
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    mask = (rows < M) & mask_c
    dy = tl.load(dy_ptr + rows * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    if POOLED_W == 0:
        x = tl.load(x_ptr + rows * C + offs_c, mask=mask, other=0.0).to(tl.float32)
        dz = tl.where(x * scale + shift > 0.0, dy, 0.0)
        dx = scale * dz + (b * (x - mean) + c)
        tl.store(dx_ptr + rows * C + offs_c, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    else:
        window = window_rows(rows, POOLED_W) * C + offs_c
        _x, z, which = _best_of_window(x_ptr + window, scale, shift, mask, C, POOLED_W)
        dz = tl.where(z > 0.0, dy, 0.0)
        for i in tl.static_range(4):
            offs = window + ((i // 2) * 2 * POOLED_W + i % 2) * C
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            dx = scale * tl.where(which == i, dz, 0.0) + (b * (x - mean) + c)
            tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("cifar::bn_backward_reduce", mutates_args=())
def bn_backward_reduce(dy: Tensor, x: Tensor, norm: Tensor, pool: bool = False) -> Tensor:
    """The partials (sum dz, sum dz * (x - mean)) of every tile, fp32 [2, T, C].

    Raises ValueError or TypeError for operands other than the module's docstring has them.
    """
    _check(dy, x, norm, pool)
    channels = x.shape[1]
    partials, rows, (block_m, block_c) = _empty_partials(dy, pool), dy.numel() // channels, tile(channels, pool)
    tiles, steps = reduction_grid(rows, channels, pool)
    bn_backward_reduce_kernel[(tiles, triton.cdiv(channels, block_c))](
        dy,
        x,
        norm,
        partials,
        rows,
        tiles,
        channels,
        steps,
        POOLED_W=dy.shape[3] if pool else 0,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=4,
        **LAUNCH,
    )
    return partials


@bn_backward_reduce.register_fake
def _(dy, x, norm, pool=False):
    return _empty_partials(dy, pool)


@torch.library.custom_op("cifar::bn_coefficients", mutates_args=())
def bn_coefficients(partials: Tensor, norm: Tensor, n: float) -> Tensor:
    """coefficients fp32 [4, C] = (dgamma, dbeta, b, c) of statistics over `n` pixels, infinity if they are constants.

    Raises ValueError or TypeError for operands other than the module's docstring has them, and unless n > 0.
    """
    check_fp32("partials", partials, (2, None, None), "norm", norm)
    channels = partials.shape[2]
    check_fp32("norm", norm, (5, channels), "partials", partials)
    check_device("partials", partials)
    if not n > 0:
        raise ValueError(f"n is {n}, expected a positive number of pixels")
    coefficients = torch.empty((4, channels), dtype=torch.float32, device=partials.device)
    bn_coefficients_kernel[(triton.cdiv(channels, SUM_BLOCK_C),)](
        partials,
        norm,
        coefficients,
        partials.shape[1],
        channels,
        1.0 / n,
        BLOCK_T=SUM_TILES,
        BLOCK_C=SUM_BLOCK_C,
        num_warps=8,
        **LAUNCH,
    )
    return coefficients


@bn_coefficients.register_fake
def _(partials, norm, n):
    return partials.new_empty((4, partials.shape[2]))


@torch.library.custom_op("cifar::bn_backward_apply", mutates_args=())
def bn_backward_apply(dy: Tensor, x: Tensor, norm: Tensor, coefficients: Tensor, pool: bool = False) -> Tensor:
    """dx = scale * dz + b * (x - mean) + c, in x's dtype.

    Raises ValueError or TypeError for operands other than the module's docstring has them.
    """
    _check(dy, x, norm, pool)
    channels = x.shape[1]
    check_fp32("coefficients", coefficients, (4, channels), "x", x)
    dx, rows, (block_m, block_c) = torch.empty_like(x), dy.numel() // channels, tile(channels, pool)
    bn_backward_apply_kernel[(triton.cdiv(rows, block_m), triton.cdiv(channels, block_c))](
        dy,
        x,
        norm,
        coefficients,
        dx,
        rows,
        channels,
        POOLED_W=dy.shape[3] if pool else 0,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=4,
        **LAUNCH,
    )
    return dx


@bn_backward_apply.register_fake
def _(dy, x, norm, coefficients, pool=False):
    return torch.empty_like(x)


def _check(dy: Tensor, x: Tensor, norm: Tensor, pool: bool) -> None:
    check_activation("x", x)
    check_like("dy", dy, "x", output_shape(x, pool), x)
    check_fp32("norm", norm, (5, x.shape[1]), "x", x)


def _empty_partials(dy: Tensor, pool: bool) -> Tensor:
    tiles, _ = reduction_grid(dy.numel() // dy.shape[1], dy.shape[1], pool)
    return torch.empty((2, tiles, dy.shape[1]), dtype=torch.float32, device=dy.device)


def bn_backward_reduce_cost(dy: Tensor, x: Tensor, norm: Tensor, pool: bool = False) -> Cost:
    """Two passes: dy and x read. The mask's affine map for each element of x, the two sums for each of dy."""
    partials = _empty_partials(dy.detach().to("meta"), pool)
    return Cost(flops=2 * x.numel() + 4 * dy.numel(), bytes=nbytes(dy, x, norm, partials))


def bn_coefficients_cost(partials: Tensor, norm: Tensor, n: float) -> Cost:
    """No pass over an activation: the partials read, four values for each channel written."""
    return Cost(flops=partials.numel(), bytes=nbytes(partials, norm) + 4 * nbytes(norm[0]))


def bn_backward_apply_cost(dy: Tensor, x: Tensor, norm: Tensor, coefficients: Tensor, pool: bool = False) -> Cost:
    """Three passes: dy and x read, dx written. The mask's affine map and the gradient's for each element of x."""
    return Cost(flops=7 * x.numel(), bytes=nbytes(dy, x, x, norm, coefficients))
