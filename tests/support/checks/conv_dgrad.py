"""Operands of `conv_dgrad`, the check that its mutants fail, and the mutants."""

import torch
from conv_cases import Conv, activation, affine, check_of_mutants, in_double, nhwc, problem_of
from kernel_checks import Mutants, assert_as_accurate, channels_last

from kernels import conv_dgrad as module
from kernels import conv_dgrad_kernels, tiles
from kernels.conv_dgrad import conv_dgrad_reference


def operands(case: str | tuple, options: str, dtype: torch.dtype, device, seed: int = 0) -> list:
    n, shape = problem_of(case)
    dy, w = (activation(case, which, dtype, device, seed + i) for i, which in enumerate("yw"))
    shortcut, mask = None, [None] * 4
    if options == "strided_shortcut":
        shortcut = channels_last(n, shape.C, shape.P, shape.Q, dtype=dtype, seed=seed + 2, device=device)
    elif options in ("shortcut", "all"):
        shortcut = activation(case, "x", dtype, device, seed + 2)
    if options not in ("plain", "shortcut"):
        x = activation(case, "x", dtype, device, seed + 3) + 2
        scale, shift = affine(shape.C, device, seed)
        mask = [x, scale, shift - 2 * scale, x.float().mean((0, 2, 3))]
    return [dy, w, shape.H, shape.W, shape.stride, shortcut, *mask]


def check(op, case: str | tuple, options: str, dtype: torch.dtype, device, far: float = 0.0) -> None:
    """Check dz and the partials; a mutant must fail."""
    arguments = operands(case, options, dtype, device)
    if far and arguments[6] is not None:
        arguments[6] += far
        arguments[8] -= far * arguments[7]
        arguments[9] = arguments[6].double().mean((0, 2, 3)).float()
    dz, partials = op(*arguments)
    baseline, _ = conv_dgrad_reference(*arguments)
    truth, _ = conv_dgrad_reference(*in_double(arguments))
    assert dz.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(dz, baseline, truth, "dz")
    x, *_, mean = arguments[6:]
    if x is None:
        assert partials.shape == (2, 0, dz.shape[1])
        return
    for row, weight in enumerate((torch.ones_like(x), x - mean[:, None, None].double())):
        terms = dz.double() * weight
        assert_as_accurate(
            partials[row].sum(0), terms.float().sum((0, 2, 3)), terms.sum((0, 2, 3)), "sums of dz as stored"
        )


OPTIONS = ("plain", "mask", "shortcut", "strided_shortcut", "all")
OF_ANY_TILE = ("plain", torch.float16, 0), ("strided_shortcut", torch.float16, 0), ("all", torch.float16, -400)
CONV = Conv(module.conv_dgrad, OPTIONS, operands, check, OF_ANY_TILE)


MUTANTS = {
    "dropped_row_mask": ("in_dy = offs_m < N * P * Q", "in_dy = offs_m >= 0"),
    "dropped_column_mask": ("& (h < H) & (v < W)", "& (h < H)"),
    "dropped_padding_mask": ("(above >= 0) & (above < P)", "(above >= -1) & (above < P)"),
    "filter_not_flipped": ("(last_h - i) * Q", "(i - last_h) * Q"),
    "taps_transposed": ("((r0 + i * STRIDE) * R + s0 + j * STRIDE)", "((s0 + j * STRIDE) * R + r0 + i * STRIDE)"),
    "parity_of_taps_swapped": ("1 - odd_h, 1 - odd_v", "odd_h, odd_v"),
    "parity_of_pixels_swapped": ("h, v = p * STRIDE + odd_h", "h, v = p * STRIDE + (STRIDE - 1 - odd_h)"),
    "off_by_one_descriptors": ("last_v - j, k]", "last_v - j + 1, k]"),
    "last_filter_block_forgotten": ("for step in range(steps)", "for step in range(steps - 1)"),
    "mask_forgotten": ("keep = z > 0.0", "keep = z == z"),
    "sums_of_what_is_no_pixel": ("keep = inside[:, None] & keep", "pass"),
    "shortcut_by_half": ("acc += _load(shortcut, at_shortcut,", "acc += 0.5 * _load(shortcut, at_shortcut,"),
    "sums_not_centred": ("- tl.expand_dims(tl.load(mean_ptr", "+ 0.0 * tl.expand_dims(tl.load(mean_ptr"),
    "strided_filter_everywhere": ("if R < STRIDE:", "if R < STRIDE - 1:"),
    "strided_shortcut_everywhere": ("tl.where(odd_h + odd_v == 0, mask_m, False)", "mask_m"),
    "columns_of_another_tap": ("tl.dot(b.T, a.T, acc,", "tl.dot(b.T, a.T, acc * 0.5,"),
    "columns_sums_of_no_pixel": ("acc = tl.where(mask_m[None, :], acc, 0.0)", "pass"),
    "columns_halves_swapped": ("tl.join(dz0, dz1)", "tl.join(dz1, dz0)"),
    "columns_half_a_sum": ("sum_dz + tl.sum(terms1[0], axis=1)", "sum_dz * 2"),
    "boxes_parity_of_columns": ("odd_h, 0, odd_v * C + channel", "odd_h, 0, (1 - odd_v) * C + channel"),
    "boxes_parity_of_lines": ("image, line, odd_h, 0", "image, line, 1 - odd_h, 0"),
    "boxes_strided_shortcut_everywhere": ("tl.where(odd_h + odd_v == 0, image, N)", "image"),
    "lines_filter_not_flipped": ("taps[i // 3 * 9 + i % 3], above", "taps[i // 3 * 9 + 6 + i % 3], above"),
    "lines_mirrored": ("p, 1 - i % 3,", "p, i % 3 - 1,"),
    "lines_last_forgotten": ("for p in range(H + 1)", "for p in range(H)"),
    "lines_of_absent_images": ("tl.where(p > 0, image < N, False)", "tl.where(p > 0, image <= N, False)"),
    "lines_line_above_counted": ("tl.where(p > 0, image < N, False)", "image < N"),
    "lines_in_the_wrong_order": ("here = below + 0.0", "here = above + 0.0"),
    "lines_sums_of_the_last_line": ("sum_dz_x += tl.sum(terms[1]", "sum_dz_x = tl.sum(terms[1]"),
    "lines_half_of_the_pairs": ("sum_dz += tl.sum(terms[0].reshape", "sum_dz += tl.max(terms[0].reshape"),
    "lines_shortcut_of_another_line": ("at[0] + 2 * W", "at[0] + W"),
    "lines_shortcut_of_the_first_forgotten": ("if shortcut is not None:\n        here", "if H < 1:\n        here"),
}
OF_THE_OP = {"lines_one_partial_too_few": ("(images + tile.BLOCK_M // shape.W - 1)", "images")}


check_mutant = check_of_mutants(
    CONV,
    ("partial_last_tile", "all", {}),
    ("stride2_odd", "strided_shortcut", {}),
    ("stride2_odd", "mask", {"form": "columns"}),
    ("projection_1x1", "plain", {}),
    ("stride2", "mask", {"descriptors": True}),
    ("stride2", "strided_shortcut", {"descriptors": True, "form": "columns"}),
    ("partial_last_tile", "all", {"descriptors": True, "form": "lines"}),
    ("several_channel_blocks", "all", {"descriptors": True, "form": "lines"}),
)


def launch(changed, gpu: tiles.Gpu) -> None:
    """With pointers on sm_80, and on sm_90 with descriptors at stride 2 and by lines at stride 1."""
    for stride in (2,) if gpu.capability == (8, 0) else (2, 1):
        dy, w = nhwc(2, 64, 8 // stride, 8 // stride), nhwc(64, 64, 3, 3)
        x, c = nhwc(2, 64, 8, 8), torch.ones(64)
        changed.conv_dgrad(dy, w, 8, 8, stride, x, x, c, c, c)


ROWS = {
    "conv_dgrad": Mutants(module, MUTANTS, check_mutant, launch, kernels=conv_dgrad_kernels),
    "conv_dgrad_op": Mutants(module, OF_THE_OP, check_mutant, launch),
}
