"""The device code of `kernels.conv_dgrad`, in the forms that `kernels.tiles.Tile` names.

`conv_dgrad_kernel` is a product of tiles: one program, one tile of dz. `conv_dgrad_lines_kernel` keeps the filter in
shared memory and walks down the lines of a few images. PIXELS is the axis of the pixels in a product: 0 where it is
[pixels, channels], 1 where it is [channels, pixels]. Of the first, wgmma takes dy's tile from registers, since Triton
looks through the reshape of a box only for a product's second operand.
"""

from kernels.jit import tl, triton, wait_for_the_kernel_before
from kernels.wgmma import halves_of_columns, wait_for_product


@triton.jit
def _load(source, at, columns, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr, PIXELS: tl.constexpr):
    """M pixels by N channels of x or of a shortcut. `at` is (pixels, which are in) for a pointer, or a box's corner.

    Boxes are of [channels, pixels] alone.
    """
    if len(at) == 2:
        offsets = tl.expand_dims(at[0] * C, 1 - PIXELS) + tl.expand_dims(columns, PIXELS)
        tile = tl.load(source + offsets, mask=tl.expand_dims(at[1], 1 - PIXELS), other=0.0)
    else:
        tile = source.load(at).reshape(M, N).T
    return tile


@triton.jit
def _store(dz, at, target, columns, C: tl.constexpr, PIXELS: tl.constexpr):
    """Store dz where `_load` would load it."""
    if len(at) == 2:
        offsets = tl.expand_dims(at[0] * C, 1 - PIXELS) + tl.expand_dims(columns, PIXELS)
        tl.store(target + offsets, dz, mask=tl.expand_dims(at[1], 1 - PIXELS))
    else:
        target.store(at, dz.T.reshape(target.block_shape))


@triton.jit
def _mask(da, x, inside, dtype: tl.constexpr, columns, scale_ptr, shift_ptr, PIXELS: tl.constexpr):
    """dz as it is stored: da where x * scale + shift > 0, of pixels that are `inside` where that is not None."""
    z = x.to(tl.float32) * tl.expand_dims(tl.load(scale_ptr + columns), PIXELS)
    z += tl.expand_dims(tl.load(shift_ptr + columns), PIXELS)
    keep = z > 0.0
    if inside is not None:
        keep = inside[:, None] & keep
    return tl.where(keep, da, 0.0).to(dtype)


@triton.jit
def _terms(dz, x, columns, mean_ptr, PIXELS: tl.constexpr):
    """What the two sums are of, in fp32: dz and dz * (x - mean)."""
    dz = dz.to(tl.float32)
    return dz, dz * (x.to(tl.float32) - tl.expand_dims(tl.load(mean_ptr + columns), PIXELS))


@triton.jit(do_not_specialize=["N", "T"])  # one build for every batch
def conv_dgrad_kernel(
    dy,
    w,
    dz,
    shortcut,
    x,
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
    COLUMNS: tl.constexpr,
    WAIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_M pixels of one class by BLOCK_N channels. dy and w are descriptors or pointers.

    COLUMNS: the product is channels by pixels. With descriptors dz, x and the shortcut are descriptors, too: as boxes
    they take the accumulator's layout, in which four threads have all pixels of a channel. WAIT: for each step's
    product, see `kernels.wgmma`.
    """
    wait_for_the_kernel_before()
    PIXELS: tl.constexpr = 1 if COLUMNS else 0
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

    acc = tl.zeros((BLOCK_N, BLOCK_M) if COLUMNS else (BLOCK_M, BLOCK_N), tl.float32)
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
        if COLUMNS:
            acc = tl.dot(b.T, a.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(a, b, acc, input_precision="ieee")
            if WAIT:
                acc = wait_for_product(acc)

    # Without an addition here, be it of zeros, ptxas 12.8 serialises the loop's wgmma instructions (C7514).
    acc += 0.0
    if R < STRIDE:
        acc = tl.where(odd_h + odd_v == 0, acc, 0.0)  # pixels that a strided 1x1 filter never saw
    if DESCRIPTORS and COLUMNS:
        # What a box has outside of the batch is neither masked nor stored: dy and the shortcut are zeros there.
        image, line, channel = first // (P * Q), first // Q % P, pid_n * BLOCK_N
        if STRIDE == 1:
            at = image, line, 0, channel
        else:
            at = image, line, odd_h, 0, odd_v * C + channel
        at_shortcut = at
        if STRIDED_SHORTCUT:
            at_shortcut = tl.where(odd_h + odd_v == 0, image, N), line, 0, channel
        dtype: tl.constexpr = dz.dtype
    else:
        at = (offs_m // (P * Q) * H + h) * W + v, mask_m
        at_shortcut = at
        if STRIDED_SHORTCUT:
            at_shortcut = offs_m, tl.where(odd_h + odd_v == 0, mask_m, False)
        dtype: tl.constexpr = dz.dtype.element_ty
    if shortcut is not None:
        acc += _load(shortcut, at_shortcut, offs_n, C, BLOCK_M, BLOCK_N, PIXELS).to(tl.float32)
    if x is None:
        _store(acc.to(dtype), at, dz, offs_n, C, PIXELS)
    else:
        x = _load(x, at, offs_n, C, BLOCK_M, BLOCK_N, PIXELS)
        if COLUMNS:  # in halves, or 128 accumulators a thread and x in fp32 spill
            if not DESCRIPTORS:
                acc = tl.where(mask_m[None, :], acc, 0.0)
            da, x = halves_of_columns(acc), halves_of_columns(x)
            dz0 = _mask(da[0], x[0], None, dtype, offs_n, scale_ptr, shift_ptr, 1)
            terms0 = _terms(dz0, x[0], offs_n, mean_ptr, 1)
            sum_dz, sum_dz_x = tl.sum(terms0[0], axis=1), tl.sum(terms0[1], axis=1)
            dz1 = _mask(da[1], x[1], None, dtype, offs_n, scale_ptr, shift_ptr, 1)
            terms1 = _terms(dz1, x[1], offs_n, mean_ptr, 1)
            sum_dz, sum_dz_x = sum_dz + tl.sum(terms1[0], axis=1), sum_dz_x + tl.sum(terms1[1], axis=1)
            _store(tl.join(dz0, dz1).permute(0, 2, 1).reshape(BLOCK_N, BLOCK_M), at, dz, offs_n, C, 1)
        else:
            masked = _mask(acc, x, mask_m, dtype, offs_n, scale_ptr, shift_ptr, 0)
            _store(masked, at, dz, offs_n, C, 0)
            terms = _terms(masked, x, offs_n, mean_ptr, 0)
            sum_dz, sum_dz_x = tl.sum(terms[0], axis=0), tl.sum(terms[1], axis=0)
        out = partials_ptr + t * C + offs_n
        tl.store(out, sum_dz)
        tl.store(out + T * C, sum_dz_x)


@triton.jit(do_not_specialize=["N", "T"])
def conv_dgrad_lines_kernel(
    dy,
    w,
    dz,
    shortcut,
    x,
    scale_ptr,
    shift_ptr,
    mean_ptr,
    partials_ptr,
    N,
    T,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: all lines of BLOCK_M // W images by BLOCK_N channels, 3x3 at stride 1. dy and w are descriptors.

    Its part of the filter stays in shared memory. Line p of dy is loaded once for each of the three shifts, and adds to
    the lines p - 1, p and p + 1 of dz; the first of them is then complete.
    """
    wait_for_the_kernel_before()
    BLOCKS_N: tl.constexpr = C // BLOCK_N
    BLOCKS_K: tl.constexpr = K // BLOCK_K
    t, pid_n = tl.program_id(0) // BLOCKS_N, tl.program_id(0) % BLOCKS_N
    first = t * (BLOCK_M // W)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    image = first + offs_m // W
    dtype: tl.constexpr = dz.dtype.element_ty
    taps = ()
    for i in tl.static_range(9 * BLOCKS_K):
        taps += (w.load([i // 9 * BLOCK_K, i % 9 * C + pid_n * BLOCK_N]),)
    above = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    here = above
    if shortcut is not None:
        here = _load(shortcut, (image * H * W + offs_m % W, image < N), offs_n, C, BLOCK_M, BLOCK_N, 0).to(tl.float32)
    sum_dz = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), tl.float32)
    sum_dz_x = tl.zeros((BLOCK_M // 16, 8, BLOCK_N), tl.float32)
    for p in range(H + 1):  # the last of dy's lines is outside and reads as zeros
        inside = tl.where(p > 0, image < N, False)
        at = (image * H + p - 1) * W + offs_m % W, inside
        a_line = None
        if x is not None:  # early, so that the products hide its latency
            a_line = _load(x, at, offs_n, C, BLOCK_M, BLOCK_N, 0)
        below = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if shortcut is not None:  # is what a line's sum begins with
            of_below = at[0] + 2 * W, tl.where(p < H - 1, image < N, False)
            below = _load(shortcut, of_below, offs_n, C, BLOCK_M, BLOCK_N, 0).to(tl.float32)
        for i in tl.static_range(3 * BLOCKS_K):
            a = dy.load([first, p, 1 - i % 3, i // 3 * BLOCK_K]).reshape(BLOCK_M, BLOCK_K)
            above = tl.dot(a, taps[i // 3 * 9 + i % 3], above, input_precision="ieee")
            here = tl.dot(a, taps[i // 3 * 9 + 3 + i % 3], here, input_precision="ieee")
            below = tl.dot(a, taps[i // 3 * 9 + 6 + i % 3], below, input_precision="ieee")
        if x is None:
            _store((above + 0.0).to(dtype), at, dz, offs_n, C, 0)
        else:
            masked = _mask(above + 0.0, a_line, inside, dtype, offs_n, scale_ptr, shift_ptr, 0)
            _store(masked, at, dz, offs_n, C, 0)
            terms = _terms(masked, a_line, offs_n, mean_ptr, 0)
            # A thread has the rows i and i + 8 of each 16 of the accumulator: these sums take no exchange.
            sum_dz += tl.sum(terms[0].reshape(BLOCK_M // 16, 2, 8, BLOCK_N), axis=1)
            sum_dz_x += tl.sum(terms[1].reshape(BLOCK_M // 16, 2, 8, BLOCK_N), axis=1)
        above = here + 0.0  # for ptxas, as above
        here = below + 0.0
    if x is not None:
        out = partials_ptr + t * C + offs_n
        tl.store(out, tl.sum(tl.sum(sum_dz, axis=0), axis=0))
        tl.store(out + T * C, tl.sum(tl.sum(sum_dz_x, axis=0), axis=0))
