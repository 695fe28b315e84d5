"""Convolution, forward, as an implicit matrix product with batch norm's work on both sides of it.

    a = relu(x * scale + shift)                                       prologue, if scale and shift are given; else a = x
    y = conv(a, w) + residual                                         epilogue, if a residual is given
    y = conv(a, w) + relu(residual * residual_scale + residual_shift)           ... with its scale and shift
    partials[:, t, k] = (count, mean, M2) of tile t's rows of y[:, k]           ... if statistics are asked for

x           fp16, bf16 or fp32 [N, C, H, W] channels_last: NHWC in memory
w           x's dtype [K, C, R, R] channels_last: KRSC in memory; R is 3 or 1, zero padding of R//2
y, residual x's dtype [N, K, P, Q] channels_last, P = ceil(H / stride), stride 1 or 2
scale, shift, residual_scale, residual_shift    fp32 [C] and [K]
partials    fp32 [3, T, K] as `kernels.bn_stats` has them: of y as stored, a tile being consecutive rows of NPQ, BLOCK_M
            of them, or those of whole images where a program walks down their lines

The padding is of a, not of x: it is zero *after* the prologue. Everything after the product is fp32 until y is rounded.
GEMM_M = NPQ, GEMM_N = K, GEMM_K = RRC. C and K are multiples of 16.

Passes over an activation: 2 (reads x, writes y), and 1 for a residual. The statistics and the prologue cost none.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tiles
from kernels.bn_apply import bn_apply, bn_apply_cost
from kernels.contract import check_like
from kernels.conv_dgrad import conv_dgrad
from kernels.conv_fprop_kernels import conv_fprop_kernel, conv_fprop_lines_kernel
from kernels.conv_shape import (
    ConvShape,
    activation_descriptor,
    boxes_fit,
    check_affine,
    check_offsets,
    check_operand,
    check_weight,
    flop_formula,
    line_descriptor,
    weight_descriptor,
)
from kernels.conv_wgrad import conv_wgrad
from kernels.cost import Cost, nbytes
from kernels.jit import LAUNCH
from kernels.wgmma import must_wait


def conv_fprop_reference(
    x: Tensor,
    w: Tensor,
    stride: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor]:
    """(y, partials) by the library's convolution; the statistics are one tile, or none. Any dtype, fp64 included."""
    y = F.conv2d(_bn_relu(x, scale, shift), w, stride=stride, padding=w.shape[-1] // 2)
    if residual is not None:
        y = y + _bn_relu(residual, residual_scale, residual_shift)
    rows = y.permute(0, 2, 3, 1).flatten(0, 2).to(torch.promote_types(y.dtype, torch.float32))
    mean = rows.mean(0)
    partials = torch.stack([torch.full_like(mean, len(rows)), mean, (rows - mean).square().sum(0)])[:, None]
    return y, partials if statistics else partials[:, :0]


def _bn_relu(x: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if scale is None:
        return x
    return torch.relu(x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


@torch.library.custom_op("cifar::conv_fprop", mutates_args=())
def conv_fprop(
    x: Tensor,
    w: Tensor,
    stride: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor]:
    """(y, partials); without `statistics` the partials are of no tiles, [3, 0, K].

    Differentiable in x, w, scale, shift, residual, residual_scale and residual_shift, from y and from the partials'
    means and M2s, so that a batch norm made of PyTorch operations on [K] vectors gets its gradient by autograd.

    Raises ValueError or TypeError for shapes, dtypes, devices and layouts other than the module's.
    """
    shape = _check(x, w, stride, scale, shift, residual, residual_scale, residual_shift)
    tile = tiles.tile("conv_fprop", shape, x.dtype, tiles.gpu_of(x.device))
    if scale is not None and tile.prologue == "stored":
        x, scale, shift = bn_apply(x, scale, shift), None, None
    y, partials = _empty(x, shape, tile, statistics)
    tile_count, nan = _tile_count(x.shape[0], shape, tile), scale is not None
    descriptors = tile.descriptors and (tile.form == "lines" or boxes_fit(tile.BLOCK_M, shape))
    x_operand, w_operand, kernel, extents = x, w, conv_fprop_kernel, {}
    if descriptors:
        w_operand = weight_descriptor(w, tile.BLOCK_N, tile.BLOCK_K)
    if tile.form == "lines":
        kernel, x_operand = conv_fprop_lines_kernel, line_descriptor(x, tile.BLOCK_M, tile.BLOCK_K, nan)
    else:
        extents = {"P": shape.P, "Q": shape.Q, "R": shape.R, "STRIDE": stride}
        extents |= {"DESCRIPTORS": descriptors, "COLUMNS": tile.form == "columns" and scale is None}
        extents["WAIT"] = must_wait(x)
        if descriptors:
            x_operand = activation_descriptor(x, tile.BLOCK_M, tile.BLOCK_K, stride, nan)
    kernel[(tile_count * (shape.K // tile.BLOCK_N),)](
        x_operand,
        w_operand,
        y,
        scale,
        shift,
        residual,
        residual_scale,
        residual_shift,
        partials if statistics else None,
        x.shape[0],
        tile_count,
        H=shape.H,
        W=shape.W,
        C=shape.C,
        K=shape.K,
        HALVES=descriptors and tile.prologue == "fp16x2" and x.dtype == torch.float16,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        **extents,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **LAUNCH,
    )
    return y, partials


@conv_fprop.register_fake
def _(
    x,
    w,
    stride=1,
    scale=None,
    shift=None,
    residual=None,
    residual_scale=None,
    residual_shift=None,
    statistics=True,
):
    shape = ConvShape.of(x, w, stride)
    return _empty(x, shape, tiles.tile("conv_fprop", shape, x.dtype, tiles.gpu_of(x.device)), statistics)


def _check(x, w, stride, scale, shift, residual, residual_scale, residual_shift) -> ConvShape:
    check_operand("x", x)
    check_weight(w, "x", x)
    if w.shape[1] != x.shape[1]:
        raise ValueError(
            f"w has shape {list(w.shape)}, expected [K, {x.shape[1]}, R, R] for x of {x.shape[1]} channels"
        )
    shape = ConvShape.of(x, w, stride)
    check_offsets("y", x.shape[0] * shape.K * shape.P * shape.Q)
    check_affine("", scale, shift, shape.C, "x", x)
    check_affine("residual_", residual_scale, residual_shift, shape.K, "residual", x)
    if residual is not None:
        check_like("residual", residual, "x", (x.shape[0], shape.K, shape.P, shape.Q), x)
        check_operand("residual", residual)
    elif residual_scale is not None:
        raise ValueError("residual_scale and residual_shift are given without a residual")
    return shape


def _tile_count(images: int, shape: ConvShape, tile: tiles.Tile) -> int:
    """T: how many tiles leave partials."""
    if tile.form == "lines":
        return (images + tile.BLOCK_M // shape.W - 1) // (tile.BLOCK_M // shape.W)
    return (images * shape.P * shape.Q + tile.BLOCK_M - 1) // tile.BLOCK_M


def _empty(x: Tensor, shape: ConvShape, tile: tiles.Tile, statistics: bool) -> tuple[Tensor, Tensor]:
    extents = (x.shape[0], shape.K, shape.P, shape.Q)
    y = torch.empty(extents, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    tile_count = _tile_count(x.shape[0], shape, tile) if statistics else 0
    return y, torch.empty((3, tile_count, shape.K), dtype=torch.float32, device=x.device)


def _setup_context(ctx, inputs, output) -> None:
    x, w, stride, *affine_and_residual, statistics = inputs
    ctx.stride, ctx.statistics = stride, statistics
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w, *affine_and_residual, *(output if statistics else ()))


def _backward(ctx, dy: Tensor | None, dpartials: Tensor | None) -> tuple[Tensor | None, ...]:
    x, w, scale, shift, residual, residual_scale, residual_shift, *outputs = ctx.saved_tensors
    if ctx.statistics and dpartials is not None:
        dy = _add_gradient_of_statistics(dy, dpartials, *outputs)
    if dy is None:
        return (None,) * 9
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx = dw = dscale = dshift = dresidual_scale = dresidual_shift = None
    if scale is not None:
        centre = x[0, :, 0, 0].float()
        dz, sums = conv_dgrad(dy, w, *x.shape[2:], ctx.stride, None, x, scale, shift, centre)
        dx, dscale, dshift = _through_affine(dz, scale, centre, sums.sum(1))
    elif ctx.needs_input_grad[0]:
        dx, _ = conv_dgrad(dy, w, *x.shape[2:], ctx.stride)
    if ctx.needs_input_grad[1]:
        dw = conv_wgrad(x, dy, w.shape[-1], ctx.stride, scale, shift).to(w.dtype)
    dresidual = None if residual is None else dy
    if residual_scale is not None:
        z = residual * residual_scale[:, None, None] + residual_shift[:, None, None]
        dz, centre = torch.where(z > 0, dy, 0.0), residual[0, :, 0, 0].float()
        centred = (dz.float() * (residual - centre[:, None, None])).sum((0, 2, 3))
        sums = torch.stack([dz.sum((0, 2, 3), dtype=torch.float32), centred])
        dresidual, dresidual_scale, dresidual_shift = _through_affine(dz, residual_scale, centre, sums)
    return dx, dw, None, dscale, dshift, dresidual, dresidual_scale, dresidual_shift, None


def _through_affine(dz: Tensor, scale: Tensor, centre: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dscale, dshift) of z = x * scale + shift, from sums = (sum dz, sum dz * (x - centre)).

    A bare sum of dz * x would cancel where |mean| >> sigma. Any value of x serves to centre it: it is about sigma off.
    """
    dshift, centred = sums
    return (dz * scale[:, None, None]).to(dz.dtype), centred + centre * dshift, dshift


def _add_gradient_of_statistics(dy: Tensor | None, dpartials: Tensor, y: Tensor, partials: Tensor) -> Tensor:
    """dy + dmean / count + 2 (y - mean) dM2, every row with its own tile's values. The counts are constants."""
    n, k, p, q = y.shape
    count, mean, _ = partials
    _, dmean, dm2 = dpartials
    tile_of_row = torch.bucketize(torch.arange(n * p * q, device=y.device), count[:, 0].long().cumsum(0), right=True)
    tile_of_row.clamp_(max=len(count) - 1)  # where nothing is launched but to compile, the counts are memory as it came
    rows = y.permute(0, 2, 3, 1).reshape(-1, k).float()
    rows = (dmean / count)[tile_of_row] + 2 * (rows - mean[tile_of_row]) * dm2[tile_of_row]
    rows = rows.view(n, p, q, k).permute(0, 3, 1, 2)
    return (rows if dy is None else dy + rows).to(y.dtype)


conv_fprop.register_autograd(_backward, setup_context=_setup_context)


@flop_formula("cifar::conv_fprop")
def _flops(x_shape, w_shape, stride=1, *args, **kwargs) -> int:
    _, c, h, w = x_shape
    return ConvShape(c, w_shape[0], h, w, w_shape[2], stride).flops(x_shape[0])


def conv_fprop_cost(
    x: Tensor,
    w: Tensor,
    stride: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    statistics: bool = True,
) -> Cost:
    """x, w and residual read, y and the partials written, each once; and the pass that stores the activation first.

    FLOPs: the convolution's, as PyTorch counts. A 1x1 filter reads the pixels that it sees.
    """
    shape = ConvShape.of(x, w, stride)
    tile = tiles.tile("conv_fprop", shape, x.dtype, tiles.gpu_of(x.device))
    y, partials = _empty(x.to("meta"), shape, tile, statistics)
    affine = (scale, shift, residual_scale, residual_shift)
    cost = Cost(flops=shape.flops(x.shape[0]), bytes=nbytes(shape.seen(x), w, *affine, residual, y, partials))
    stored = scale is not None and tile.prologue == "stored"
    return cost + bn_apply_cost(x, scale, shift) if stored else cost
