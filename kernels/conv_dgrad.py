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
partials  fp32 [2, T, C] as `kernels.bn_backward` has them: of dz as stored, so that they are its sums to the last bit

At stride 2 the pixels of x fall into four classes by the parity of (h, v), each with its own taps of the filter (1, 2,
2 and 4 of the 9). A program computes pixels of one class, so that no tap is wasted, and the rows of every class are the
pixels of dy. GEMM_M = NPQ for each class, GEMM_N = C, GEMM_K = K times the taps. C and K are multiples of 16.

Passes over an activation: 2 (reads dy, writes dz), 1 for x and 1 for the shortcut. The mask and the sums cost no other.
"""

import torch
from torch import Tensor

from kernels import tiles
from kernels.contract import check_fp32, check_like
from kernels.conv_shape import (
    ConvShape,
    activation_descriptor,
    boxes_fit,
    check_affine,
    check_offsets,
    check_operand,
    check_weight,
    flop_formula,
    weight_descriptor,
)
from kernels.cost import Cost, nbytes
from kernels.jit import tl, triton


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


@triton.jit(do_not_specialize=["N", "T"])  # one build for every batch
def conv_dgrad_kernel(
    dy,
    w,
    dz_ptr,
    shortcut_ptr,
    x_ptr,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    partials_ptr,
    N,
    T,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    STRIDED_SHORTCUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_M pixels of one class by BLOCK_N channels. dy and w are descriptors or pointers."""
    PAD: tl.constexpr = R // 2
    BLOCKS_N: tl.constexpr = C // BLOCK_N
    BLOCKS_K: tl.constexpr = K // BLOCK_K
    # The programs that read the same rows of dy are neighbours in time.
    t, pid_n = tl.program_id(0) // BLOCKS_N, tl.program_id(0) % BLOCKS_N
    first = t // (STRIDE * STRIDE) * BLOCK_M
    odd_h, odd_v = t // STRIDE % STRIDE, t % STRIDE  # the class; stride 1 has one
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    p, q = offs_m // Q % P, offs_m % Q
    h, v = p * STRIDE + odd_h, q * STRIDE + odd_v
    in_dy = offs_m < N * P * Q
    mask_m = in_dy & (h < H) & (v < W)

    # Along each side: tap i of `taps` is the filter's pixel r0 + STRIDE * i and reads dy's pixel p + last - i.
    if STRIDE == 1:
        taps_h, taps_v, last_h, last_v, r0, s0 = R, R, PAD, PAD, 0, 0
        steps = R * R * BLOCKS_K
    else:
        if R == 3:
            taps_h, taps_v, last_h, last_v, r0, s0 = 1 + odd_h, 1 + odd_v, odd_h, odd_v, 1 - odd_h, 1 - odd_v
        else:
            taps_h, taps_v, last_h, last_v, r0, s0 = 1, 1, 0, 0, 0, 0
        steps = taps_h * taps_v * BLOCKS_K
        tl.assume(steps > 0)  # without it ptxas serialises the wgmma instructions of the loop (C7515)
    if not DESCRIPTORS:
        # One bit for each tap: does it fall inside of dy?
        SIDE: tl.constexpr = (R + STRIDE - 1) // STRIDE
        taps_inside = tl.zeros((BLOCK_M,), tl.int32)
        for bit in tl.static_range(SIDE * SIDE):
            above, left = p + last_h - bit // SIDE, q + last_v - bit % SIDE
            taps_inside |= (in_dy & (above >= 0) & (above < P) & (left >= 0) & (left < Q)).to(tl.int32) << bit

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):
        tap, k = step // BLOCKS_K, step % BLOCKS_K * BLOCK_K
        i, j = tap // taps_v, tap % taps_v
        column = ((r0 + i * STRIDE) * R + s0 + j * STRIDE) * C
        if DESCRIPTORS:
            a = dy.load([first // (P * Q), first // Q % P + last_h - i, last_v - j, k]).reshape(BLOCK_M, BLOCK_K)
            b = w.load([k, column + pid_n * BLOCK_N])
        else:
            inside = (taps_inside >> (i * SIDE + j) & 1) != 0
            rows = offs_m + (last_h - i) * Q + (last_v - j)
            a = tl.load(dy + rows[:, None] * K + (k + offs_k), mask=inside[:, None], other=0.0)
            b = tl.load(w + (k + offs_k)[:, None] * (R * R * C) + (column + offs_n))
        acc = tl.dot(a, b, acc, input_precision="ieee")

    # Without an addition here, be it of zeros, ptxas 12.8 serialises the loop's wgmma instructions (C7514).
    acc += 0.0
    if R < STRIDE:
        acc = tl.where(odd_h + odd_v == 0, acc, 0.0)  # pixels that a strided 1x1 filter never saw
    offs_x = ((offs_m // (P * Q) * H + h) * W + v)[:, None] * C + offs_n
    if shortcut_ptr is not None:
        if STRIDED_SHORTCUT:
            mask_shortcut = tl.where(odd_h + odd_v == 0, mask_m, False)[:, None]
            acc += tl.load(shortcut_ptr + offs_m[:, None] * C + offs_n, mask=mask_shortcut, other=0.0).to(tl.float32)
        else:
            acc += tl.load(shortcut_ptr + offs_x, mask=mask_m[:, None], other=0.0).to(tl.float32)
    if x_ptr is not None:
        x = tl.load(x_ptr + offs_x, mask=mask_m[:, None], other=0.0).to(tl.float32)
        z = x * tl.load(scale_ptr + offs_n) + tl.load(shift_ptr + offs_n)
        acc = tl.where(mask_m[:, None] & (z > 0.0), acc, 0.0)
    dz = acc.to(dz_ptr.dtype.element_ty)
    tl.store(dz_ptr + offs_x, dz, mask=mask_m[:, None])
    if x_ptr is not None:
        dz = dz.to(tl.float32)
        out = partials_ptr + t * C + offs_n
        tl.store(out, tl.sum(dz, axis=0))
        tl.store(out + T * C, tl.sum(dz * (x - tl.load(mean_ptr + offs_n)), axis=0))


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
    dz, partials = _empty(dy, shape, tile.BLOCK_M, x is not None)
    dy_operand, w_operand = dy, w
    descriptors = tile.descriptors and boxes_fit(tile.BLOCK_M, shape)
    if descriptors:
        dy_operand = activation_descriptor(dy, tile.BLOCK_M, tile.BLOCK_K)
        w_operand = weight_descriptor(w, tile.BLOCK_K, tile.BLOCK_N)
    tile_count = _tiles(dy, stride, tile.BLOCK_M)
    conv_dgrad_kernel[(tile_count * (shape.C // tile.BLOCK_N),)](
        dy_operand,
        w_operand,
        dz,
        shortcut,
        x,
        scale,
        shift,
        mean,
        partials if x is not None else None,
        dy.shape[0],
        tile_count,
        H=height,
        W=width,
        P=shape.P,
        Q=shape.Q,
        C=shape.C,
        K=shape.K,
        R=shape.R,
        STRIDE=stride,
        STRIDED_SHORTCUT=shortcut is not None and shortcut.shape != dz.shape,
        DESCRIPTORS=descriptors,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return dz, partials


@conv_dgrad.register_fake
def _(dy, w, height, width, stride=1, shortcut=None, x=None, scale=None, shift=None, mean=None):
    shape = _shape(dy, w, height, width, stride)
    block_m = tiles.tile("conv_dgrad", shape, dy.dtype, tiles.gpu_of(dy.device)).BLOCK_M
    return _empty(dy, shape, block_m, x is not None)


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
    check_affine("", scale, shift, c, "dy", dy)
    if len({x is None, scale is None, mean is None}) != 1:
        raise ValueError("x, scale, shift and mean go together: the mask and the sums need all of them")
    if x is not None:
        check_like("x", x, "dy", (n, c, height, width), dy)
        check_fp32("mean", mean, (c,), "x", x)
    return shape


def _tiles(dy: Tensor, stride: int, block_m: int) -> int:
    return stride**2 * ((dy.shape[0] * dy.shape[2] * dy.shape[3] + block_m - 1) // block_m)


def _empty(dy: Tensor, shape: ConvShape, block_m: int, sums: bool) -> tuple[Tensor, Tensor]:
    extents = (dy.shape[0], shape.C, shape.H, shape.W)
    dz = torch.empty(extents, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    tile_count = _tiles(dy, shape.stride, block_m) if sums else 0
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
    block_m = tiles.tile("conv_dgrad", shape, dy.dtype, tiles.gpu_of(dy.device)).BLOCK_M
    dz, partials = _empty(dy.to("meta"), shape, block_m, x is not None)
    return Cost(shape.flops(dy.shape[0]), nbytes(dy, w, shortcut, x, scale, shift, mean, dz, partials))
