"""Operands of `conv_fprop`, the check that its mutants fail, and the mutants."""

import torch
from conv_cases import Conv, activation, affine, check_of_mutants, in_double, nhwc, problem_of
from kernel_checks import Mutants, assert_as_accurate

from kernels import conv_fprop as module
from kernels import conv_fprop_kernels, tiles
from kernels.conv_fprop import conv_fprop_reference
from kernels.conv_shape import ConvShape


def operands(case: str | tuple, options: str, dtype: torch.dtype, device, seed: int = 0) -> list:
    _, shape = problem_of(case)
    x, w = (activation(case, which, dtype, device, seed + i) for i, which in enumerate("xw"))
    prologue = affine(shape.C, device, seed) if options in ("prologue", "all") else (None, None)
    residual = None if options in ("plain", "prologue") else activation(case, "y", dtype, device, seed + 2)
    residual_affine = affine(shape.K, device, seed + 1) if options in ("affine_residual", "all") else (None, None)
    return [x, w, shape.stride, *prologue, residual, *residual_affine]


def statistics_of(y: torch.Tensor, tile_count: int, block_m: int) -> torch.Tensor:
    """(count, mean, M2) of every tile of y, in y's dtype."""
    parts = y.permute(0, 2, 3, 1).flatten(0, 2).split(block_m)
    assert len(parts) == tile_count
    rows = [(torch.full_like(p[0], len(p)), p.mean(0), (p - p.mean(0)).square().sum(0)) for p in parts]
    return torch.stack([torch.stack(row) for row in zip(*rows, strict=True)])


def check(op, case: str | tuple, options: str, dtype: torch.dtype, device, far: float = 0.0) -> None:
    """Check y and the partials; a mutant must fail."""
    arguments = operands(case, options, dtype, device)
    x, _, _, scale, shift, *_ = arguments
    if far:
        arguments[0] = x + far
        arguments[4] = shift - scale * far
    y, partials = op(*arguments)
    baseline, _ = conv_fprop_reference(*arguments)
    truth, _ = conv_fprop_reference(*in_double(arguments))
    assert y.stride() == baseline.stride() or y.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(y, baseline, truth, "y")
    tile = tiles.tile("conv_fprop", ConvShape.of(x, arguments[1], arguments[2]), dtype, tiles.gpu_of(y.device))
    block_m = tile.BLOCK_M * (x.shape[2] if tile.form == "lines" else 1)
    truth, baseline = (statistics_of(y.to(t), partials.shape[1], block_m) for t in (torch.float64, torch.float32))
    assert torch.equal(partials[0], baseline[0]), "counts"
    assert_as_accurate(partials[1], baseline[1], truth[1], "means of y as stored")
    assert_as_accurate(partials[2], baseline[2], truth[2], "M2 of y as stored")


OPTIONS = ("plain", "prologue", "residual", "affine_residual", "all")
OF_ANY_TILE = ("plain", torch.float16, 0), ("all", torch.float16, 0), ("prologue", torch.float32, 0)
CONV = Conv(module.conv_fprop, OPTIONS, operands, check, OF_ANY_TILE)


MUTANTS = {
    "padding_before_the_prologue": ("z = tl.minimum(z, tl.where(inside,", "z = tl.minimum(z, tl.where(inside | True,"),
    "relu_forgotten": ("z = tl.maximum(z, 0.0, propagate", "z = tl.maximum(z, -100.0, propagate"),
    "dropped_row_mask": ("mask_m = offs_m < N * P * Q", "mask_m = offs_m >= 0"),
    "dropped_padding_mask": ("(mask_m & (h >= 0) & (h < H)", "(mask_m & (h >= -1) & (h < H)"),
    "taps_off_by_one": ("(pixels + r * W + s)", "(pixels + r * W + s - 1)"),
    "taps_transposed": ("(pixels + r * W + s)", "(pixels + s * W + r)"),
    "taps_transposed_descriptors": ("x.load([n, p + r - PAD, s - PAD, c])", "x.load([n, p + s - PAD, r - PAD, c])"),
    "parity_forgotten_descriptors": ("r - PAD & 1, s - PAD >> 1, (s", "0, s - PAD >> 1, (s"),
    "last_channel_block_forgotten": ("range(R * R * BLOCKS_C)", "range(R * R * BLOCKS_C - 1)"),
    "columns_of_another_tap": ("tl.dot(b, a.T, acc,", "tl.dot(b, a.T, acc * 0.5,"),
    "statistics_of_unrounded_y": ("tl.where(in_y, y.to(tl.float32), 0.0)", "tl.where(in_y, acc, 0.0)"),
    "padding_rows_in_m2": ("tl.where(in_y, y - tl.expand_dims(mean, PIXELS), 0.0)", "y - tl.expand_dims(mean, PIXELS)"),
    "forgotten_partial_tile": ("count = tl.minimum(N * P * Q - first, BLOCK_M)", "count = (BLOCK_M + N * 0)"),
    "residual_after_the_statistics": ("        acc += residual\n", "        acc += residual * 0.5\n"),
    "residual_relu_forgotten": ("residual = tl.maximum(residual, 0.0,", "residual = tl.maximum(residual, -100.0,"),
    "second_half_of_the_filters_forgotten": ("+ i * (BLOCK_N // PARTS)", "+ i // 2 * (BLOCK_N // PARTS)"),
    "lines_rows_of_the_filter_swapped": ("filters[i % 3 * BLOCKS_C", "filters[(6 + i % 3) * BLOCKS_C + 0 * BLOCKS_C"),
    "lines_mirrored": ("h, i % 3 - 1,", "h, 1 - i % 3,"),
    "lines_last_line_forgotten": ("range(H + 1)", "range(H)"),
    "lines_of_absent_images": ("image < N, False", "image < N + 1, False"),
    "lines_sums_in_the_wrong_order": ("last, second = second + 0.0, first", "last, second = second + 0.0, second"),
    "lines_whose_means_differ_not": ("m2 += line_m2 + delta * delta", "m2 += line_m2 + 0.0 * delta"),
    "lines_count_of_one": ("K, count * H, mean, m2)", "K, count, mean, m2)"),
}
OF_THE_OP = {"padding_before_the_prologue_descriptors": ("shape, tile), scale is not None", "shape, tile), False")}


check_mutant = check_of_mutants(
    CONV,
    ("partial_last_tile", "all", {}),
    ("stride2_odd", "all", {}),
    ("stride2", "all", {"descriptors": True}),
    ("several_channel_blocks", "all", {"descriptors": True}),
    ("several_channel_blocks", "all", {"form": "columns", "prologue": "stored"}),
    ("partial_last_tile", "all", {"descriptors": True, "form": "lines"}),
)


def launch(changed, gpu: tiles.Gpu) -> None:
    """With pointers on sm_80 and with descriptors on sm_90, where 64 channels go by lines."""
    for channels in (64,) if gpu.capability == (8, 0) else (128, 64):
        x, w, c = nhwc(2, channels, 8, 8), nhwc(channels, channels, 3, 3), torch.ones(channels)
        changed.conv_fprop(x, w, 1, c, c, x, c, c)


ROWS = {
    "conv_fprop": Mutants(module, MUTANTS, check_mutant, launch, kernels=conv_fprop_kernels),
    "conv_fprop_op": Mutants(module, OF_THE_OP, check_mutant, launch),
}
