"""Operands of `conv_wgrad`, the check that its mutants fail, and the mutants."""

import torch
from conv_cases import Conv, activation, affine, check_of_mutants, in_double, nhwc, problem_of
from kernel_checks import Mutants, assert_as_accurate

from kernels import conv_wgrad as module
from kernels import tiles
from kernels.accuracy import relative_error
from kernels.conv_shape import ConvShape
from kernels.conv_wgrad import conv_wgrad_reference


def operands(case: str | tuple, options: str, dtype: torch.dtype, device, seed: int = 0) -> list:
    _, shape = problem_of(case)
    x, dy = (activation(case, which, dtype, device, seed + i) for i, which in enumerate("xy"))
    return [x, dy, shape.R, shape.stride, *(affine(shape.C, device, seed) if options == "all" else (None, None))]


def activated(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, prologue: str) -> torch.Tensor:
    """relu(x * scale + shift) as it enters the product: in fp32 and rounded, or by the roundings of "fp16x2"."""
    scale, shift = scale[:, None, None], shift[:, None, None]
    if prologue != "fp16x2" or x.dtype != torch.float16:
        wide = torch.float64 if x.is_cuda else torch.float32  # a GPU rounds once, the interpreter the product too
        return torch.relu((x.to(wide) * scale + shift).float()).to(x.dtype)
    pivot = (-shift / scale).clamp(-16384, 16384).half()
    bias = (shift + pivot.float() * scale).half()
    return torch.relu((x - pivot).float() * scale.half().float() + bias.float()).half()


def check(op, case: str | tuple, options: str, dtype: torch.dtype, device, far: float = 0.0) -> None:
    """Check dw; a mutant must fail."""
    x, dy, size, stride, scale, shift = operands(case, options, dtype, device)
    if far:  # of x as it is stored, whose own digits are then a quarter of sigma
        sigma = 2.0 ** (torch.arange(x.shape[1], device=device) % 16 - 8.0) / 16
        x = ((x + far) * sigma[:, None, None]).to(dtype).contiguous(memory_format=torch.channels_last)
        scale, shift = scale / sigma, shift - far * scale
    dw = op(x, dy, size, stride, scale, shift)
    assert dw.is_contiguous(memory_format=torch.channels_last)
    baseline = conv_wgrad_reference(x, dy, size, stride, scale, shift)
    truth = conv_wgrad_reference(*in_double([x, dy, size, stride, scale, shift]))
    assert_as_accurate(dw, baseline, truth, "dw")
    if scale is not None:
        shape = ConvShape(x.shape[1], dy.shape[1], x.shape[2], x.shape[3], size, stride)
        prologue = tiles.tile("conv_wgrad", shape, dtype, tiles.gpu_of(x.device)).prologue
        if x.is_cuda and prologue == "fp16x2":
            return  # the last bit of a GPU's division decides which pivot a channel has
        x = activated(x, scale, shift, prologue)
    # Of the activation as it enters the product, the sum is exact to fp32's rounding whatever its dtype.
    assert relative_error(dw, conv_wgrad_reference(*in_double([x, dy, size, stride]))) < 1e-6


CONV = Conv(module.conv_wgrad, ("plain", "all"), operands, check, (("all", torch.float16, 0),))


def check_order(reduce_kernel, split: int, ahead: int, device) -> None:
    """The sums are those of a loop, to the bit, however many parts are loaded together."""
    parts = torch.randn(split, 512, generator=torch.Generator().manual_seed(0)).to(device)
    dw, expected = torch.empty(512, device=device), torch.zeros(512, device=device)
    reduce_kernel[(2,)](parts, dw, split, 512, BLOCK=256, AHEAD=ahead, num_warps=8)
    for part in parts:
        expected += part
    assert torch.equal(dw, expected)


MUTANTS = {
    "dropped_row_mask": ("in_x = (rows < N * P * Q)", "in_x = (rows >= 0)"),
    "dropped_column_mask": ("& (h < H) & (v < W)", "& (h < H)"),
    "dropped_padding_mask": ("in_dy = in_x & (p >= down)", "in_dy = in_x & (p >= down - 1)"),
    "padding_of_the_first_tap": ("(q >= right + t) & (q - right - t < Q)", "(q >= right) & (q - right < Q)"),
    "shifted_the_wrong_way": ("(rows - down * Q - right - t)", "(rows + down * Q + right + t)"),
    "shifted_the_wrong_way_descriptors": ("p - down, -right - t, k0", "p + down, right + t, k0"),
    "one_tap_for_three": ("- down * Q - right - t)[", "- down * Q - right)["),
    "one_tap_for_three_descriptors": ("-right - t, k0", "-right, k0"),
    "stored_as_one_tap": ("(tap + t) * C", "tap * C"),
    "first_column_of_every_row": ("% GROUPS * TAPS", "% GROUPS * (TAPS if TAPS == 1 else 1)"),
    "parity_forgotten": ("h, v = p * STRIDE + odd_h", "h, v = p * STRIDE"),
    "parity_forgotten_descriptors": ("odd_v * C + c0", "c0"),
    "pixels_of_the_first_part": ("x.load([first, c0])", "x.load([step * BLOCK_K, c0])"),
    "relu_forgotten": ("tl.maximum(z, 0.0,", "tl.maximum(z, -100.0,"),
    "pivot_forgotten": ("relu_affine(a, pivot,", "relu_affine(a, pivot * 0,"),
    "bias_of_another_scale": ("halves(scale, shift)", "halves(scale + 0.1, shift)"),
    "taps_transposed": ("tap // R - PAD, tap % R - PAD", "tap % R - PAD, tap // R - PAD"),
    "last_step_forgotten": ("for step in range(steps)", "for step in range(steps - 1)"),
    "forgotten_part": ("mask=part < SPLIT", "mask=part < SPLIT - 1"),
    "parts_past_the_last": ("mask=part < SPLIT", "mask=part < SPLIT + 1"),
    "parts_loaded_once": ("part = first + i", "part = i"),
    "forgotten_partial_block": ("triton.cdiv(x.shape[0] * shape.P * shape.Q,", "(x.shape[0] * shape.P * shape.Q //"),
}
check_products = check_of_mutants(
    CONV,
    ("odd_map", "all", {}),
    ("stride2_odd", "all", {}),
    ("partial_last_tile", "all", {"descriptors": True}),
    ("stride2", "all", {"descriptors": True}),
    ("odd_map", "all", {"BLOCK_K": 16, "TAPS": 3, "SPLIT": 5}),
    ("partial_last_tile", "all", {"descriptors": True, "TAPS": 3, "prologue": "fp16x2"}),
)


def check_mutant(changed, device) -> None:
    check_order(changed.conv_wgrad_reduce_kernel, 5, 2, device)
    check_products(changed, device)


def launch(changed, gpu: tiles.Gpu) -> None:
    """With pointers on sm_80 and with descriptors on sm_90, there at stride 1 in three taps and with halves."""
    for stride in (2,) if gpu.capability == (8, 0) else (2, 1):
        c, p = torch.ones(64), 8 // stride
        changed.conv_wgrad(nhwc(8, 64, 8, 8), nhwc(8, 64, p, p), 3, stride, c, c)


ROWS = {"conv_wgrad": Mutants(module, MUTANTS, check_mutant, launch)}
