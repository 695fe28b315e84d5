"""Batch statistics of an activation, and what batch norm needs of them.

    partials[:, t, c] = (count, mean, M2) of tile t's rows of x[:, c]        M2 = sum((x - mean)^2)
    y = x + residual, rounded, and the partials of y                          (bn_stats_add)
    norm[:, c] = (mean, var, rstd, scale, shift)                              (bn_finalize)
        rstd = (M2 / n + eps)^-1/2, scale = gamma * rstd, shift = beta - mean * scale, var = M2 / (n - 1)

x, residual, y  fp16, bf16 or fp32 [N, C, H, W] channels_last: in memory, M = N*H*W rows of C channels
partials        fp32 [3, T, C], of the values as stored (after rounding); any T tiles of any sizes, sum of counts = n
gamma, beta     fp32 [C]
norm            fp32 [5, C]; `var` is the unbiased variance, for the running statistics

Sums of squares would cancel where |mean| >> sigma. Within a program every lane runs a recurrence: Welford's
(Technometrics 4, 1962) down its rows, or that of Chan, Golub and LeVeque (1979) down its tiles. Their formula merges
the lanes at the end, so that no loop has a barrier. There are no atomics and the tiles depend on the shape alone, so
that runs repeat bit for bit.

Passes over an activation: bn_stats 1 (reads x), bn_stats_add 3 (reads x and residual, writes y); bn_finalize none.
"""

import torch
from torch import Tensor

from kernels.contract import check_activation, check_device, check_fp32, check_like
from kernels.cost import Cost, nbytes
from kernels.jit import LAUNCH, tl, triton, wait_for_the_kernel_before

# Elements of a step of a program: two 16-byte accesses of fp16 for each thread of four warps. Under a 2x2 pool they are
# of the pooled map: one access to each of the window's pixels.
TILE, POOLED_TILE = 2048, 1024
MAX_BLOCK_C = 64  # 128 bytes of fp16: whole cache lines
MAX_PROGRAMS = 660  # a reduction's programs: five for each of an H200's 132 multiprocessors, resident at once
# Lanes of bn_finalize: a 16-byte load of each plane for each thread of 16 warps. Eight channels are 32 bytes, the least
# that the L2 cache sends: more programs of fewer channels would each read as much.
FINALIZE_TILES, FINALIZE_BLOCK_C = 256, 8


def bn_stats_reference(x: Tensor) -> Tensor:
    """The partials of x as a single tile, [3, 1, C]; of float64 in float64."""
    rows = at_least_fp32(x.permute(0, 2, 3, 1).flatten(0, 2))
    mean = rows.mean(0)
    return torch.stack([torch.full_like(mean, len(rows)), mean, (rows - mean).square().sum(0)])[:, None]


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or as it is in float64: the references' arithmetic."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def bn_finalize_reference(partials: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """Merge the tiles by Chan's formula; [5, C]."""
    count, means, m2 = partials
    n = count.sum(0)
    mean = (count * means).sum(0) / n
    m2 = (m2 + count * (means - mean).square()).sum(0)
    rstd = (m2 / n + eps).rsqrt()
    return torch.stack([mean, m2 / (n - 1).clamp(min=1), rstd, gamma * rstd, beta - mean * gamma * rstd])


def tile(channels: int, pool: bool = False) -> tuple[int, int]:
    """(BLOCK_M, BLOCK_C) of the elementwise kernels: the rows and channels that one step of a program handles."""
    block_c = min(MAX_BLOCK_C, triton.next_power_of_2(channels))
    return (POOLED_TILE if pool else TILE) // block_c, block_c


def reduction_grid(rows: int, channels: int, pool: bool = False) -> tuple[int, int]:
    """(T, steps): tiles of a reduction over `rows` rows, and how many blocks of BLOCK_M rows make a tile."""
    block_m, block_c = tile(channels, pool)
    row_blocks, channel_blocks = triton.cdiv(rows, block_m), triton.cdiv(channels, block_c)
    steps = triton.cdiv(row_blocks * channel_blocks, MAX_PROGRAMS)
    return triton.cdiv(row_blocks, steps), steps


@triton.jit
def merge(count, mean, m2):
    """Chan's formula down axis 0 of [R, C]; a row with a count of 0 has a mean and an M2 of 0 and adds nothing."""
    n = tl.sum(count, axis=0)
    merged = tl.sum(count * mean, axis=0) / tl.maximum(n, 1.0)
    deviation = mean - merged[None, :]
    return n, merged, tl.sum(m2 + count * deviation * deviation, axis=0)


# Extents are run-time integers, so that one compilation serves every layer.
@triton.jit(do_not_specialize=["M", "T", "steps"])
def bn_stats_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    partials_ptr,
    M,
    T,
    C,
    steps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: the partials of steps * BLOCK_M rows by BLOCK_C channels. `residual_ptr` and `y_ptr` may be None."""
    wait_for_the_kernel_before()
    t = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    rows = t * (steps * BLOCK_M) + tl.arange(0, BLOCK_M)
    count = tl.zeros((BLOCK_M, 1), tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for _ in range(steps):
        valid = (rows < M)[:, None]
        mask = valid & mask_c[None, :]
        offs = rows.to(tl.int64)[:, None] * C + offs_c[None, :]
        x = tl.load(x_ptr + offs, mask=mask, other=0.0)
        if residual_ptr is not None:
            x = x.to(tl.float32) + tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            x = x.to(y_ptr.dtype.element_ty)
            tl.store(y_ptr + offs, x, mask=mask)
        x = x.to(tl.float32)
        weight = tl.where(valid, 1.0, 0.0)  # a row past the end leaves its lane as it was
        count += weight
        delta = (x - mean) * weight
        mean += delta * (1.0 / tl.maximum(count, 1.0))
        m2 += delta * (x - mean)
        rows += BLOCK_M
    n, mean, m2 = merge(tl.broadcast_to(count, (BLOCK_M, BLOCK_C)), mean, m2)
    out = partials_ptr + t * C + offs_c
    tl.store(out, n, mask=mask_c)
    tl.store(out + T * C, mean, mask=mask_c)
    tl.store(out + 2 * T * C, m2, mask=mask_c)


@triton.jit(do_not_specialize=["T"])
def bn_finalize_kernel(
    partials_ptr,
    gamma_ptr,
    beta_ptr,
    norm_ptr,
    T,
    C,
    eps,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One program: BLOCK_C channels. Its BLOCK_T lanes take every BLOCK_T-th tile each, and are merged at the end."""
    wait_for_the_kernel_before()
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    gamma = tl.load(gamma_ptr + offs_c, mask=mask_c, other=0.0)  # here, beside the first tiles' loads
    beta = tl.load(beta_ptr + offs_c, mask=mask_c, other=0.0)
    pivot = tl.load(partials_ptr + T * C + offs_c, mask=mask_c, other=0.0)  # lanes count from the first mean
    n = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    mean = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    m2 = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for t in range(0, T, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < T)[:, None] & mask_c[None, :]
        partial = partials_ptr + offs_t[:, None] * C + offs_c[None, :]
        tile_n = tl.load(partial, mask=mask, other=0.0)
        tile_mean = tl.load(partial + T * C, mask=mask, other=0.0)
        tile_m2 = tl.load(partial + 2 * T * C, mask=mask, other=0.0)
        total = n + tile_n
        share = tile_n / tl.maximum(total, 1.0)  # an empty tile, or none, leaves its lane as it was
        delta = (tile_mean - pivot[None, :]) - mean
        mean += delta * share
        m2 += tile_m2 + delta * delta * (n * share)
        n = total
    n, mean, m2 = merge(n, mean, m2)
    mean += pivot
    rstd = 1.0 / tl.sqrt_rn(m2 / tl.maximum(n, 1.0) + eps)
    scale = gamma * rstd
    shift = beta - mean * scale
    out = norm_ptr + offs_c
    tl.store(out, mean, mask=mask_c)
    tl.store(out + C, m2 / tl.maximum(n - 1.0, 1.0), mask=mask_c)
    tl.store(out + 2 * C, rstd, mask=mask_c)
    tl.store(out + 3 * C, scale, mask=mask_c)
    tl.store(out + 4 * C, shift, mask=mask_c)


def _launch(x: Tensor, residual: Tensor | None, y: Tensor | None) -> Tensor:
    channels = x.shape[1]
    rows, (block_m, block_c) = x.numel() // channels, tile(channels)
    tiles, steps = reduction_grid(rows, channels)
    partials = _empty_partials(x)
    grid = (tiles, triton.cdiv(channels, block_c))
    bn_stats_kernel[grid](
        x,
        residual,
        y,
        partials,
        rows,
        tiles,
        channels,
        steps,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=4,
        **LAUNCH,
    )
    return partials


def _empty_partials(x: Tensor) -> Tensor:
    tiles, _ = reduction_grid(x.numel() // x.shape[1], x.shape[1])
    return torch.empty((3, tiles, x.shape[1]), dtype=torch.float32, device=x.device)


@torch.library.custom_op("cifar::bn_stats", mutates_args=())
def bn_stats(x: Tensor) -> Tensor:
    """The partials of x. Not differentiable: batch norm's gradient through its statistics is part of its own backward.

    Raises ValueError or TypeError unless x is a non-empty activation as the module's docstring has it.
    """
    check_activation("x", x)
    return _launch(x, None, None)


@bn_stats.register_fake
def _(x):
    return _empty_partials(x)


bn_stats.register_autograd(
    lambda ctx, _: None, setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(output)
)


@torch.library.custom_op("cifar::bn_stats_add", mutates_args=())
def bn_stats_add(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """(y, partials of y) with y = x + residual rounded to x's dtype; the gradient of y reaches both.

    Raises ValueError or TypeError unless both are activations of one shape, dtype and device.
    """
    check_activation("x", x)
    check_like("residual", residual, "x", x.shape, x)
    y = torch.empty_like(x)
    return y, _launch(x, residual, y)


@bn_stats_add.register_fake
def _(x, residual):
    return torch.empty_like(x), _empty_partials(x)


bn_stats_add.register_autograd(
    lambda ctx, dy, _: (dy, dy),
    setup_context=lambda ctx, inputs, output: ctx.mark_non_differentiable(output[1]),
)


@torch.library.custom_op("cifar::bn_finalize", mutates_args=())
def bn_finalize(partials: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
    """norm [5, C] = (mean, var, rstd, scale, shift) of the merged tiles.

    Raises ValueError or TypeError unless partials is fp32 [3, T, C] and gamma and beta are fp32 [C].
    """
    check_fp32("partials", partials, (3, None, None), "gamma", gamma)
    channels = partials.shape[2]
    check_fp32("gamma", gamma, (channels,), "partials", partials)
    check_fp32("beta", beta, (channels,), "partials", partials)
    check_device("partials", partials)
    norm = torch.empty((5, channels), dtype=torch.float32, device=partials.device)
    grid = (triton.cdiv(channels, FINALIZE_BLOCK_C),)
    bn_finalize_kernel[grid](
        partials,
        gamma,
        beta,
        norm,
        partials.shape[1],
        channels,
        eps,
        BLOCK_T=FINALIZE_TILES,
        BLOCK_C=FINALIZE_BLOCK_C,
        num_warps=16,
        **LAUNCH,
    )
    return norm


@bn_finalize.register_fake
def _(partials, gamma, beta, eps):
    return partials.new_empty((5, partials.shape[2]))


def bn_stats_cost(x: Tensor) -> Cost:
    """One pass: x read. Four operations for each element: Welford's update."""
    return Cost(flops=4 * x.numel(), bytes=nbytes(x, _meta_partials(x)))


def bn_stats_add_cost(x: Tensor, residual: Tensor) -> Cost:
    """Three passes: x and residual read, y written."""
    return Cost(flops=5 * x.numel(), bytes=nbytes(x, residual, x, _meta_partials(x)))


def bn_finalize_cost(partials: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Cost:
    """No pass over an activation: the partials read, five values for each channel written."""
    return Cost(flops=2 * partials.numel(), bytes=nbytes(partials, gamma, beta) + 5 * nbytes(gamma))


def _meta_partials(x: Tensor) -> Tensor:
    return _empty_partials(x.detach().to("meta"))
