"""The device code of `kernels.conv_fprop`, in the forms that `kernels.tiles.Tile` names.

`conv_fprop_kernel` is a product of tiles: one program, one tile of y. `conv_fprop_lines_kernel` keeps the filter in
shared memory and walks down the lines of a few images: a line of x is loaded once for each column of the filter and
adds to the three lines of y that the filter's rows reach, so that a pixel is read 3 times, and not 9 as by the other.
"""

from kernels.jit import tl, triton, wait_for_the_kernel_before
from kernels.prologue import halves, relu_affine
from kernels.wgmma import halves_of_columns, wait_for_product


@triton.jit
def _activation(x, affine, HALVES: tl.constexpr):
    """relu(x * scale + shift) with 0 for NaN, from `affine`: (scale, shift), or their `halves`."""
    if HALVES:
        pivot, scale, bias = affine
        return relu_affine(x, pivot, scale, bias, NAN_IS_ZERO=True)
    scale, shift = affine
    z = x.to(tl.float32) * scale + shift
    return tl.where(z > 0.0, z, 0.0).to(x.dtype)


@triton.jit
def _store_y(acc, m, n, in_y, K: tl.constexpr, y_ptr, residual_ptr, residual_scale_ptr, residual_shift_ptr):
    """Store acc plus the residual as pixels `m` of y, filters `n`; returns what was stored, in fp32, 0 outside of y."""
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + m * K + n, mask=in_y, other=0.0).to(tl.float32)
        if residual_scale_ptr is not None:
            residual = residual * tl.load(residual_scale_ptr + n) + tl.load(residual_shift_ptr + n)
            residual = tl.maximum(residual, 0.0, propagate_nan=tl.PropagateNan.ALL)
        acc += residual
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m * K + n, y, mask=in_y)
    return tl.where(in_y, y.to(tl.float32), 0.0)


@triton.jit
def _moments(y, in_y, count, PIXELS: tl.constexpr):
    """(mean, M2) of y down the axis of pixels, of which `count` are in y."""
    mean = tl.sum(y, axis=PIXELS) / count
    deviation = tl.where(in_y, y - tl.expand_dims(mean, PIXELS), 0.0)
    return mean, tl.sum(deviation * deviation, axis=PIXELS)


@triton.jit
def _store_partials(partials_ptr, t, offs_n, T, K: tl.constexpr, count, mean, m2):
    out = partials_ptr + t * K + offs_n
    tl.store(out, tl.zeros(mean.shape, tl.float32) + count)
    tl.store(out + T * K, mean)
    tl.store(out + 2 * T * K, m2)


@triton.jit(do_not_specialize=["N", "T"])  # one build for every batch
def conv_fprop_kernel(
    x,
    w,
    y_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    residual_scale_ptr,
    residual_shift_ptr,
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
    DESCRIPTORS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WAIT: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_M rows of y by BLOCK_N filters. x and w: descriptors or pointers; what is absent is None.

    COLUMNS: the product is filters by pixels, without a prologue. WAIT: for each step's product, see `kernels.wgmma`.
    HALVES: the prologue is in fp16, with descriptors.
    """
    wait_for_the_kernel_before()
    PAD: tl.constexpr = R // 2
    BLOCKS_N: tl.constexpr = K // BLOCK_N
    BLOCKS_C: tl.constexpr = C // BLOCK_K
    # The programs that read the same rows of x are neighbours in time.
    pid_m, pid_n = tl.program_id(0) // BLOCKS_N, tl.program_id(0) % BLOCKS_N
    first = pid_m * BLOCK_M
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < N * P * Q
    if not DESCRIPTORS:
        # The filter's top left pixel, and one bit for each of its taps: does it fall inside of x?
        top, left = offs_m // Q % P * STRIDE - PAD, offs_m % Q * STRIDE - PAD
        pixels = (offs_m // (P * Q) * H + top) * W + left
        taps_inside = tl.zeros((BLOCK_M,), tl.int32)
        for i in tl.static_range(R * R):
            h, v = top + i // R, left + i % R
            taps_inside |= (mask_m & (h >= 0) & (h < H) & (v >= 0) & (v < W)).to(tl.int32) << i

    acc = tl.zeros((BLOCK_N, BLOCK_M) if COLUMNS else (BLOCK_M, BLOCK_N), tl.float32)
    # One flat loop of a constant trip count: nested or unknown ones make ptxas serialise the wgmma instructions.
    for step in range(R * R * BLOCKS_C):
        tap, c = step // BLOCKS_C, step % BLOCKS_C * BLOCK_K
        r, s = tap // R, tap % R
        if DESCRIPTORS:
            n, p = first // (P * Q), first // Q % P
            if STRIDE == 1:
                a = x.load([n, p + r - PAD, s - PAD, c])
            else:
                a = x.load([n, p + (r - PAD >> 1), r - PAD & 1, s - PAD >> 1, (s - PAD & 1) * C + c])
            a = a.reshape(BLOCK_M, BLOCK_K)
            b = w.load([pid_n * BLOCK_N, tap * C + c])
        else:
            inside = (taps_inside >> tap & 1) != 0
            a = tl.load(x + ((pixels + r * W + s)[:, None] * C + c + offs_k), mask=inside[:, None], other=0.0)
            b = tl.load(w + offs_n[:, None] * (R * R * C) + (tap * C + c + offs_k))
        if scale_ptr is not None:
            scale, shift = tl.load(scale_ptr + c + offs_k), tl.load(shift_ptr + c + offs_k)
            if DESCRIPTORS:
                # Outside of x the descriptor reads NaN, which becomes the padding's zero without a mask.
                a = _activation(a, halves(scale, shift) if HALVES else (scale, shift), HALVES)
            else:
                z = a.to(tl.float32) * scale + shift
                z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
                z = tl.minimum(z, tl.where(inside, float("inf"), 0.0)[:, None], propagate_nan=tl.PropagateNan.ALL)
                a = z.to(a.dtype)
        if COLUMNS:
            acc = tl.dot(b, a.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
            if WAIT:
                acc = wait_for_product(acc)

    # Without an addition here, be it of zeros, ptxas 12.8 serialises the loop's wgmma instructions (C7514).
    if scale_ptr is not None and DESCRIPTORS:
        # A NaN inside of x became zero, too; but it has made its channel's statistics NaN, and those are passed on.
        nan_if_nan = tl.zeros((BLOCK_K,), tl.float32)
        for c in tl.static_range(0, C, BLOCK_K):
            nan_if_nan += (tl.load(scale_ptr + c + offs_k) + tl.load(shift_ptr + c + offs_k)) * 0.0
        acc += tl.sum(nan_if_nan)
    elif DESCRIPTORS:
        acc += 0.0
    PIXELS: tl.constexpr = 1 if COLUMNS else 0
    m, in_y = tl.expand_dims(offs_m, 1 - PIXELS), tl.expand_dims(mask_m, 1 - PIXELS)
    count = tl.minimum(N * P * Q - first, BLOCK_M).to(tl.float32)
    # A residual with an affine of its own takes as many registers as the accumulator: half of the filters at a time.
    PARTS: tl.constexpr = 2 if DESCRIPTORS and not COLUMNS and residual_scale_ptr is not None else 1
    parts = halves_of_columns(acc) if PARTS == 2 else (acc,)
    for i in tl.static_range(PARTS):
        offs = pid_n * BLOCK_N + i * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
        n = tl.expand_dims(offs, PIXELS)
        y = _store_y(parts[i], m, n, in_y, K, y_ptr, residual_ptr, residual_scale_ptr, residual_shift_ptr)
        if partials_ptr is not None:
            mean, m2 = _moments(y, in_y, count, PIXELS)
            _store_partials(partials_ptr, pid_m, offs, T, K, count, mean, m2)


@triton.jit(do_not_specialize=["N", "T"])
def conv_fprop_lines_kernel(
    x,
    w,
    y_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    residual_scale_ptr,
    residual_shift_ptr,
    partials_ptr,
    N,
    T,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_M // W whole images of y by BLOCK_N filters, 3x3 at stride 1. x and w are descriptors."""
    wait_for_the_kernel_before()
    IMAGES: tl.constexpr = BLOCK_M // W
    BLOCKS_N: tl.constexpr = K // BLOCK_N
    BLOCKS_C: tl.constexpr = C // BLOCK_K
    t, pid_n = tl.program_id(0) // BLOCKS_N, tl.program_id(0) % BLOCKS_N
    image = t * IMAGES + tl.arange(0, BLOCK_M) // W
    offs_m = image * (H * W) + tl.arange(0, BLOCK_M) % W  # of the top line
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    filters, affine = (), ()
    for i in tl.static_range(9 * BLOCKS_C):
        filters += (w.load([pid_n * BLOCK_N, i * BLOCK_K]),)
    nan_if_nan = 0.0
    if scale_ptr is not None:
        for c in tl.static_range(BLOCKS_C):
            scale, shift = tl.load(scale_ptr + c * BLOCK_K + offs_k), tl.load(shift_ptr + c * BLOCK_K + offs_k)
            nan_if_nan += tl.sum((scale + shift) * 0.0)  # the padding's NaN becomes zero: as in the other kernel
            affine += (halves(scale, shift) if HALVES else (scale, shift),)

    mean, m2 = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    count = tl.minimum(N - t * IMAGES, IMAGES).to(tl.float32) * W  # pixels of a line
    # Line h of x is the last of the three that make y's line h - 1, the second of line h, the first of line h + 1.
    last = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for h in range(H + 1):
        first = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i in tl.static_range(3 * BLOCKS_C):
            a = x.load([t * IMAGES, h, i % 3 - 1, i // 3 * BLOCK_K]).reshape(BLOCK_M, BLOCK_K)
            if scale_ptr is not None:
                a = _activation(a, affine[i // 3], HALVES)
            last = tl.dot(a, filters[(6 + i % 3) * BLOCKS_C + i // 3].T, last, input_precision="ieee")
            second = tl.dot(a, filters[(3 + i % 3) * BLOCKS_C + i // 3].T, second, input_precision="ieee")
            first = tl.dot(a, filters[i % 3 * BLOCKS_C + i // 3].T, first, input_precision="ieee")
        p = h - 1
        in_y = tl.where(p >= 0, image < N, False)[:, None]
        # The additions, be they of zeros, keep ptxas 12.8 from serialising the wgmma instructions (C7514).
        m, n = (offs_m + p * W)[:, None], offs_n[None, :]
        y = _store_y(last + nan_if_nan, m, n, in_y, K, y_ptr, residual_ptr, residual_scale_ptr, residual_shift_ptr)
        if partials_ptr is not None:
            # Chan's formula: the lines have the same count, and p of them went before.
            line_mean, line_m2 = _moments(y, in_y, count, 0)
            share = tl.where(p >= 0, 1.0 / tl.maximum(p + 1, 1).to(tl.float32), 0.0)
            delta = line_mean - mean
            mean += delta * share
            m2 += line_m2 + delta * delta * (count * p.to(tl.float32) * share)
        last, second = second + 0.0, first + 0.0
    if partials_ptr is not None:
        _store_partials(partials_ptr, t, offs_n, T, K, count * H, mean, m2)
