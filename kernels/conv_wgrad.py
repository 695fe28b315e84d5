"""Gradient of a convolution in its weights, with the convolution's input recomputed on load.

    a = relu(x * scale + shift)                                     prologue, if scale and shift are given; else a = x
    dw[k, c, r, s] = sum over n, p, q of a[n, c, h, v] * dy[n, k, p, q]     where h = stride * p + r - R//2, v likewise

x            fp16, bf16 or fp32 [N, C, H, W] channels_last
dy           x's dtype [N, K, P, Q] channels_last, P = ceil(H / stride), stride 1 or 2
scale, shift fp32 [C]
dw           fp32 [K, C, R, R] channels_last: KRSC in memory; R is 3 or 1

One program sums one tap (r, s), or the three of a row of the filter, over one of SPLIT parts of the pixels; a second
kernel adds the parts in order, so that runs repeat bit for bit. Within a program a's pixels stay and dy is shifted:
what the tap reads outside of a map is then a zero of dy, and the prologue needs no mask. At stride 2 a's pixels are
those of the parity that the tap reads. GEMM_M = C, GEMM_N = K, GEMM_K = NPQ for each tap: a is the first operand, which
may come from registers, where its prologue leaves it. At stride 1 its pixels are consecutive and x is a matrix, so that
without a prologue wgmma takes both operands from shared memory; of a box with more sides Triton 3.6 copies the first.

Passes over an activation: 2 (reads x and dy). The parts are fp32 [SPLIT, K, R, R, C], written and read once.
"""

import torch
from torch import Tensor

from kernels import tiles
from kernels.bn_apply import bn_apply, bn_apply_cost
from kernels.contract import check_like
from kernels.conv_shape import (
    ConvShape,
    activation_descriptor,
    boxes_fit,
    check_affine,
    check_offsets,
    check_operand,
    flop_formula,
    pixel_descriptor,
)
from kernels.cost import Cost, nbytes
from kernels.jit import LAUNCH, tl, triton, wait_for_the_kernel_before
from kernels.prologue import halves, relu_affine
from kernels.wgmma import must_wait, wait_for_product


def conv_wgrad_reference(
    x: Tensor,
    dy: Tensor,
    size: int,
    stride: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """dw by the library's convolution; fp32, or fp64 of fp64 operands."""
    if scale is not None:
        x = torch.relu(x * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
    shape = (dy.shape[1], x.shape[1], size, size)
    dw = torch.nn.grad.conv2d_weight(x, shape, dy, stride=stride, padding=size // 2)
    return dw.to(torch.promote_types(dw.dtype, torch.float32))


@triton.jit(do_not_specialize=["N", "steps"])  # one build for every batch
def conv_wgrad_kernel(
    x,
    dy,
    parts_ptr,
    scale_ptr,
    shift_ptr,
    N,
    steps,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    STRIDE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WAIT: tl.constexpr,
    HALVES: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: dw of TAPS taps, BLOCK_M channels and BLOCK_N filters, over `steps` blocks of BLOCK_K pixels.

    WAIT: for each product, see `kernels.wgmma`. HALVES: the prologue is in fp16.
    """
    wait_for_the_kernel_before()
    PAD: tl.constexpr = R // 2
    BLOCKS_M: tl.constexpr = C // BLOCK_M
    BLOCKS_N: tl.constexpr = K // BLOCK_N
    GROUPS: tl.constexpr = R * R // TAPS
    # The programs that read the same pixels are neighbours in time: the part changes slowest.
    pid = tl.program_id(0)
    part, tap = pid // (BLOCKS_M * BLOCKS_N * GROUPS), pid // (BLOCKS_M * BLOCKS_N) % GROUPS * TAPS
    c0, k0 = pid // BLOCKS_N % BLOCKS_M * BLOCK_M, pid % BLOCKS_N * BLOCK_N
    offs_c, offs_k = c0 + tl.arange(0, BLOCK_M), k0 + tl.arange(0, BLOCK_N)
    # The tap reads x's pixel STRIDE * p + r - PAD = STRIDE * (p + down) + odd_h: a's pixel p + down of its parity.
    r, s = tap // R - PAD, tap % R - PAD
    if STRIDE == 1:
        down, right, odd_h, odd_v = r, s, 0, 0
    else:
        down, right, odd_h, odd_v = r >> 1, s >> 1, r & 1, s & 1
    if scale_ptr is not None:
        scale, shift = tl.load(scale_ptr + offs_c), tl.load(shift_ptr + offs_c)
        if HALVES:
            pivot, scale, shift = halves(scale, shift)

    accs = (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),) * TAPS
    tl.assume(steps > 0)  # without it ptxas serialises the wgmma instructions of the loop (C7515)
    for step in range(steps):
        first = (part * steps + step) * BLOCK_K
        if DESCRIPTORS:
            n, p = first // (P * Q), first // Q % P
            if STRIDE == 1:
                a = x.load([first, c0])
            else:
                a = x.load([n, p, odd_h, 0, odd_v * C + c0]).reshape(BLOCK_K, BLOCK_M)
        else:
            rows = first + tl.arange(0, BLOCK_K)
            p, q = rows // Q % P, rows % Q
            h, v = p * STRIDE + odd_h, q * STRIDE + odd_v
            in_x = (rows < N * P * Q) & (h < H) & (v < W)
            pixels = (rows // (P * Q) * H + h) * W + v
            a = tl.load(x + pixels[:, None] * C + offs_c, mask=in_x[:, None], other=0.0)
        if scale_ptr is not None:
            if HALVES:
                a = relu_affine(a, pivot, scale, shift, NAN_IS_ZERO=False)
            else:
                z = a.to(tl.float32) * scale + shift
                a = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL).to(a.dtype)
        sums = ()
        for t in tl.static_range(TAPS):  # the next tap of the row reads one pixel further to the right
            if DESCRIPTORS:
                b = dy.load([n, p - down, -right - t, k0]).reshape(BLOCK_K, BLOCK_N)
            else:
                in_dy = in_x & (p >= down) & (p - down < P) & (q >= right + t) & (q - right - t < Q)
                b = tl.load(dy + (rows - down * Q - right - t)[:, None] * K + offs_k, mask=in_dy[:, None], other=0.0)
            product = tl.dot(a.T, b, accs[t], input_precision="ieee")
            sums += (wait_for_product(product) if WAIT else product,)
        accs = sums
    out = parts_ptr + part * (K * R * R * C) + offs_k[None, :] * (R * R * C) + offs_c[:, None]
    for t in tl.static_range(TAPS):
        tl.store(out + (tap + t) * C, accs[t])


@triton.jit(do_not_specialize=["SPLIT"])
def conv_wgrad_reduce_kernel(parts_ptr, dw_ptr, SPLIT, elements, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    """One program: BLOCK elements of dw, one a thread, whose parts are added in order and loaded AHEAD at a time."""
    wait_for_the_kernel_before()
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, SPLIT, AHEAD):
        parts = ()
        for i in tl.static_range(AHEAD):
            part = first + i
            parts += (tl.load(parts_ptr + part * elements + offs, mask=part < SPLIT, other=0.0),)
        for i in tl.static_range(AHEAD):
            dw += parts[i]
    tl.store(dw_ptr + offs, dw)


@torch.library.custom_op("cifar::conv_wgrad", mutates_args=())
def conv_wgrad(
    x: Tensor,
    dy: Tensor,
    size: int,
    stride: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """dw, fp32 [K, C, size, size] channels_last. Not differentiable.

    Raises ValueError or TypeError for shapes, dtypes, devices and layouts other than the module's.
    """
    shape = _check(x, dy, size, stride, scale, shift)
    tile, split, steps = _cut(x, shape)
    if scale is not None and tile.prologue == "stored":
        x, scale, shift = bn_apply(x, scale, shift), None, None
    check_offsets("parts [SPLIT, K, R, R, C]", split * shape.K * shape.C * size**2)
    dw = _empty(x, dy, size)
    parts = dw if tile.SPLIT == 1 else dw.new_empty((split, dw.numel()))
    x_operand, dy_operand = x, dy
    descriptors = tile.descriptors and boxes_fit(tile.BLOCK_K, shape)
    if descriptors:
        if stride == 1:
            x_operand = pixel_descriptor(x, tile.BLOCK_K, tile.BLOCK_M)
        else:
            x_operand = activation_descriptor(x, tile.BLOCK_K, tile.BLOCK_M, stride)
        dy_operand = activation_descriptor(dy, tile.BLOCK_K, tile.BLOCK_N)
    programs = size**2 // tile.TAPS * (shape.C // tile.BLOCK_M) * (shape.K // tile.BLOCK_N)
    conv_wgrad_kernel[(split * programs,)](
        x_operand,
        dy_operand,
        parts,
        scale,
        shift,
        x.shape[0],
        steps,
        H=shape.H,
        W=shape.W,
        P=shape.P,
        Q=shape.Q,
        C=shape.C,
        K=shape.K,
        R=size,
        STRIDE=stride,
        DESCRIPTORS=descriptors,
        WAIT=must_wait(x) and (scale is not None or stride == 2),  # else wgmma takes both operands from shared memory
        HALVES=tile.prologue == "fp16x2" and x.dtype == torch.float16,
        TAPS=tile.TAPS,
        BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N,
        BLOCK_K=tile.BLOCK_K,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **LAUNCH,
    )
    if tile.SPLIT > 1:  # whatever is left of it: a small batch launches what every other one does
        interpreted = tiles.gpu_of(x.device).capability is None  # whose time is per program
        block = 256 if interpreted else min(256, max(32, triton.next_power_of_2(dw.numel() // 4096)))
        ahead = min(64, triton.next_power_of_2(tile.SPLIT))
        grid = (dw.numel() // block,)  # C and K are multiples of 16: nothing is left
        warps = block // 32
        conv_wgrad_reduce_kernel[grid](
            parts, dw, split, dw.numel(), BLOCK=block, AHEAD=ahead, num_warps=warps, **LAUNCH
        )
    return dw


@conv_wgrad.register_fake
def _(x, dy, size, stride=1, scale=None, shift=None):
    return _empty(x, dy, size)


def _empty(x: Tensor, dy: Tensor, size: int) -> Tensor:
    extents = (dy.shape[1], x.shape[1], size, size)
    return torch.empty(extents, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)


def _cut(x: Tensor, shape: ConvShape) -> tuple[tiles.Tile, int, int]:
    """The tile, the parts that it leaves of x's images, at most its SPLIT, and the steps of a part's programs."""
    tile = tiles.tile("conv_wgrad", shape, x.dtype, tiles.gpu_of(x.device))
    blocks = triton.cdiv(x.shape[0] * shape.P * shape.Q, tile.BLOCK_K)
    split = min(tile.SPLIT, blocks)
    return tile, split, triton.cdiv(blocks, split)


def _check(x, dy, size, stride, scale, shift) -> ConvShape:
    check_operand("x", x)
    check_operand("dy", dy)
    shape = ConvShape(x.shape[1], dy.shape[1], x.shape[2], x.shape[3], size, stride)
    check_like("dy", dy, "x", (x.shape[0], shape.K, shape.P, shape.Q), x)
    check_affine("", scale, shift, shape.C, "x", x)
    return shape


@flop_formula("cifar::conv_wgrad")
def _flops(x_shape, dy_shape, size, stride=1, *args, **kwargs) -> int:
    _, c, h, w = x_shape
    return ConvShape(c, dy_shape[1], h, w, size, stride).flops(x_shape[0])


def conv_wgrad_cost(
    x: Tensor,
    dy: Tensor,
    size: int,
    stride: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Cost:
    """x and dy read and dw written, each once, and the parts written and read; and the pass that stores the activation
    first. FLOPs are the convolution's alone, as PyTorch counts them; a 1x1 filter reads the pixels that it sees."""
    shape = ConvShape(x.shape[1], dy.shape[1], x.shape[2], x.shape[3], size, stride)
    tile, split, _ = _cut(x, shape)
    dw = _empty(x.to("meta"), dy, size)
    parts = 0 if tile.SPLIT == 1 else 2 * split * nbytes(dw)
    cost = Cost(shape.flops(x.shape[0]), nbytes(shape.seen(x), dy, scale, shift, dw) + parts)
    stored = scale is not None and tile.prologue == "stored"
    return cost + bn_apply_cost(x, scale, shift) if stored else cost
