"""Gradient of a convolution in its input, with the backward of the BN-ReLU in front of the convolution in its epilogue.

    da[n, c, h, v] = sum over k, r, s of dy[n, k, p, q] * w[k, c, r, s]     where h = stride * p + r - R//2, v likewise
    da = da + shortcut                                                      epilogue, if a shortcut's gradient is given
    dz = da where x * scale + shift > 0, else 0                             ... if x, scale, shift and mean are given
    partials[:, t, c] = (sum dz, sum dz * (x - mean)) over tile t's rows    ... with them; else no tiles, and dz = da

dy        fp16, bf16 or fp32 [N, K, P, Q] channels_last, P = ceil(H / stride), stride 1 or 2
w         dy's dtype [K, C, R, R] channels_last: KRSC in memory; R is 3 or 1, zero padding of R//2
dz, x     dy's dtype [N, C, H, W] channels_last; x is what the batch norm normalised, not the activation
shortcut  as dz; or [N, C, P, Q], which is added at the pixels (stride * p, stride * q): the gradient that a strided 1x1
          convolution of the same input sends back is its stride-1 dgrad, added there
scale, shift, mean  fp32 [C]
partials  fp32 [2, T, C] as `kernels.bn_backward` has them: of dz as stored, so that they are its sums to the last bit;
          a tile is BLOCK_M pixels of a class, or where a program walks down lines the BLOCK_M / W images that it does

At stride 2 the pixels of x fall into four classes by the parity of (h, v), each with its own taps of the filter (1, 2,
2 and 4 of the 9). A program computes pixels of one class, so that no tap is wasted, and the rows of every class are the
pixels of dy. GEMM_M = NPQ for each class, GEMM_N = C, GEMM_K = K times the taps. C and K are multiples of 16.

Passes over an activation: 2 (reads dy, writes dz), 1 for x and 1 for the shortcut. The mask and the sums cost no other.
"""

import torch
from torch import Tensor

from kernels import tiles
from kernels.contract import check_fp32, check_like
from kernels.conv_dgrad_kernels import conv_dgrad_kernel, conv_dgrad_lines_kernel
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
from kernels.cost import Cost, nbytes
from kernels.jit import LAUNCH
from kernels.wgmma import must_wait


def conv_dgrad_reference(
    dy: Tensor,
    w: Tensor,
    height: int,
    width: int,
    stride: int = 1,
    shortcut: Tensor | None = None,
    x: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dz, partials) by the library's convolution; the sums are one tile, or none. Any dtype, fp64 included."""
    padding = w.shape[-1] // 2
    size = (dy.shape[0], w.shape[1], height, width)
    dz = torch.nn.grad.conv2d_input(size, w, dy, stride=stride, padding=padding)
    if shortcut is not None:
        apart = 1 if shortcut.shape == dz.shape else stride
        dz[:, :, ::apart, ::apart] += shortcut
    if x is None:
        return dz, dz.new_empty((2, 0, w.shape[1]), dtype=torch.promote_types(dz.dtype, torch.float32))
    dz = torch.where(x * scale[:, None, None] + shift[:, None, None] > 0, dz, 0)
    wide = dz.to(torch.promote_types(dz.dtype, torch.float32))
    sums = [wide.sum((0, 2, 3)), (wide * (x - mean[:, None, None])).sum((0, 2, 3))]
    return dz, torch.stack(sums)[:, None]


@torch.library.custom_op("cifar::conv_dgrad", mutates_args=())
def conv_dgrad(
    dy: Tensor,
    w: Tensor,
    height: int,
    width: int,
    stride: int = 1,
    shortcut: Tensor | None = None,
    x: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(dz, partials) for an input of `height` by `width` pixels; without x the partials are of no tiles, [2, 0, C].

    Not differentiable. Raises ValueError or TypeError for shapes, dtypes, devices and layouts other than the module's.
    """
    shape = _check(dy, w, height, width, stride, shortcut, x, scale, shift, mean)
    tile = tiles.tile("conv_dgrad", shape, dy.dtype, tiles.gpu_of(dy.device))
    dz, partials = _empty(dy, shape, tile, x is not None)
    tile_count = _tile_count(dy.shape[0], shape, tile)
    descriptors = tile.descriptors and (tile.form == "lines" or boxes_fit(tile.BLOCK_M, shape))
    kernel, extents, dy_operand, w_operand, elementwise = conv_dgrad_kernel, {}, dy, w, [dz, shortcut, x]
    if descriptors:
        w_operand = weight_descriptor(w, tile.BLOCK_K, tile.BLOCK_N)
    if tile.form == "lines":
        kernel, dy_operand = conv_dgrad_lines_kernel, line_descriptor(dy, tile.BLOCK_M, tile.BLOCK_K)
    else:
        strided = shortcut is not None and shortcut.shape != dz.shape
        extents = {"P": shape.P, "Q": shape.Q, "R": shape.R, "STRIDE": stride, "STRIDED_SHORTCUT": strided}
        extents |= {"DESCRIPTORS": descriptors, "COLUMNS": tile.form == "columns", "WAIT": must_wait(dy)}
        if descriptors:
            dy_operand = activation_descriptor(dy, tile.BLOCK_M, tile.BLOCK_K)
        if descriptors and tile.form == "columns":
            strides = stride, 1 if strided else stride, stride
            elementwise = [
                one if one is None else activation_descriptor(one, tile.BLOCK_M, tile.BLOCK_N, apart)
                for one, apart in zip(elementwise, strides, strict=True)
            ]
    kernel[(tile_count * (shape.C // tile.BLOCK_N),)](
        dy_operand,
        w_operand,
        *elementwise,
        scale,
        shift,
        mean,
        partials if x is not None else None,
        dy.shape[0],
        tile_count,
        H=height,
        W=width,
        C=shape.C,
        K=shape.K,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        **extents,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **LAUNCH,
    )
    return dz, partials


@conv_dgrad.register_fake
def _(dy, w, height, width, stride=1, shortcut=None, x=None, scale=None, shift=None, mean=None):
    shape = _shape(dy, w, height, width, stride)
    return _empty(dy, shape, tiles.tile("conv_dgrad", shape, dy.dtype, tiles.gpu_of(dy.device)), x is not None)


def _shape(dy: Tensor, w: Tensor, height: int, width: int, stride: int) -> ConvShape:
    return ConvShape(*map(int, (w.shape[1], dy.shape[1], height, width, w.shape[2], stride)))


def _check(dy, w, height, width, stride, shortcut, x, scale, shift, mean) -> ConvShape:
    check_operand("dy", dy)
    check_weight(w, "dy", dy)
    shape = _shape(dy, w, height, width, stride)
    n, c = dy.shape[0], shape.C
    if dy.shape[1] != w.shape[0] or tuple(dy.shape[2:]) != (shape.P, shape.Q):
        expected = [n, w.shape[0], shape.P, shape.Q]
        raise ValueError(
            f"dy has shape {list(dy.shape)}, expected {expected} for {height}x{width} maps at stride {stride}"
        )
    check_offsets("dz", n * c * height * width)
    if shortcut is not None:
        strided = tuple(shortcut.shape) == (n, c, shape.P, shape.Q)
        check_like("shortcut", shortcut, "dy", shortcut.shape if strided else (n, c, height, width), dy)
        check_operand("shortcut", shortcut)
    check_affine("", scale, shift, c, "dy", dy)
    if len({x is None, scale is None, mean is None}) != 1:
        raise ValueError("x, scale, shift and mean go together: the mask and the sums need all of them")
    if x is not None:
        check_like("x", x, "dy", (n, c, height, width), dy)
        check_operand("x", x)
        check_fp32("mean", mean, (c,), "x", x)
    return shape


def _tile_count(images: int, shape: ConvShape, tile: tiles.Tile) -> int:
    """T: how many tiles leave partials."""
    if tile.form == "lines":
        return (images + tile.BLOCK_M // shape.W - 1) // (tile.BLOCK_M // shape.W)
    return shape.stride**2 * ((images * shape.P * shape.Q + tile.BLOCK_M - 1) // tile.BLOCK_M)


def _empty(dy: Tensor, shape: ConvShape, tile: tiles.Tile, sums: bool) -> tuple[Tensor, Tensor]:
    extents = (dy.shape[0], shape.C, shape.H, shape.W)
    dz = torch.empty(extents, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    tile_count = _tile_count(dy.shape[0], shape, tile) if sums else 0
    return dz, torch.empty((2, tile_count, shape.C), dtype=torch.float32, device=dy.device)


@flop_formula("cifar::conv_dgrad")
def _flops(dy_shape, w_shape, height, width, stride=1, *args, **kwargs) -> int:
    return ConvShape(w_shape[1], dy_shape[1], height, width, w_shape[2], stride).flops(dy_shape[0])


def conv_dgrad_cost(
    dy: Tensor,
    w: Tensor,
    height: int,
    width: int,
    stride: int = 1,
    shortcut: Tensor | None = None,
    x: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mean: Tensor | None = None,
) -> Cost:
    """dy, w, shortcut, x read, dz and the partials written, each once. FLOPs: the convolution's, as PyTorch counts."""
    shape = _shape(dy, w, height, width, stride)
    tile = tiles.tile("conv_dgrad", shape, dy.dtype, tiles.gpu_of(dy.device))
    dz, partials = _empty(dy.to("meta"), shape, tile, x is not None)
    return Cost(shape.flops(dy.shape[0]), nbytes(dy, w, shortcut, x, scale, shift, mean, dz, partials))
