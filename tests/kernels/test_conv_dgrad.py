"""conv_dgrad against float64: every option, machine code."""

import dataclasses

import pytest
import torch
from ahead_of_time import compile_all, compiling, launches
from conv_cases import (
    CASES,
    DTYPES,
    MATRIX_INSTRUCTION,
    activation,
    affine,
    assert_machine_code,
    double,
    layer_operands,
    operands_are_shared,
    random_tiles,
    use_tile,
)
from kernel_checks import assert_as_accurate, assert_caught, channels_last, mutant, mutant_kernel
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from kernels import conv_dgrad as module
from kernels import conv_dgrad_kernels, jit, tiles
from kernels.conv_dgrad import conv_dgrad, conv_dgrad_cost, conv_dgrad_reference
from kernels.conv_shape import RESNET9_LAYERS, RESNET_LAYERS, ConvShape
from kernels.cost import Cost

OPTIONS = ("plain", "mask", "shortcut", "strided_shortcut", "all")
HOW = [(False, "rows"), (True, "rows"), (False, "columns"), (True, "columns"), (True, "lines")]
poisoned = pytest.mark.usefixtures("poisoned_memory")


def operands(case: str | tuple, options: str, dtype: torch.dtype, device, seed: int = 0) -> list:
    n, shape = CASES[case] if isinstance(case, str) else case
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


def in_double(arguments: list) -> list:
    return [a if isinstance(a, int) else double(a)[0] for a in arguments]


def check(op, case: str | tuple, options: str, dtype: torch.dtype, device, far: float = 0.0) -> None:
    """What dz and the partials must satisfy, and a mutant must not; x's mean is `far` standard deviations from 0."""
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


@poisoned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_conv_dgrad_matches_float64(device, monkeypatch, case, dtype):
    use_tile(monkeypatch, case)
    for options in OPTIONS if case in ("partial_last_tile", "stride2_odd") else ("plain", "all"):
        check(conv_dgrad, case, options, DTYPES[dtype], device)


@poisoned
@pytest.mark.parametrize(("images", "shape", "tile"), random_tiles("conv_dgrad", 30), ids=str)
def test_any_tile_matches_float64(device, monkeypatch, images, shape, tile):
    monkeypatch.setattr(tiles, "tile", lambda *arguments: tile)
    for options, far in (("plain", 0), ("strided_shortcut", 0), ("all", -400)):
        check(conv_dgrad, (images, shape), options, torch.float16, device, far)


@poisoned
@pytest.mark.parametrize("form", ["rows", "columns"])
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("case", CASES)
def test_descriptors_and_pointers_agree(device, monkeypatch, case, options, form):
    arguments = operands(case, options, torch.float16, device)
    use_tile(monkeypatch, case, form=form)
    pointers = conv_dgrad(*arguments)
    use_tile(monkeypatch, case, descriptors=True, form=form)
    if jit.INTERPRETED:
        for a, b in zip(conv_dgrad(*arguments), pointers, strict=True):
            assert torch.equal(a, b)
    else:
        check(conv_dgrad, case, options, torch.float16, device)


@poisoned
@pytest.mark.parametrize(("descriptors", "form"), HOW)
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_in_every_form(device, monkeypatch, options, descriptors, form):
    use_tile(monkeypatch, "partial_last_tile", descriptors, form=form)
    for dtype in DTYPES.values():
        check(conv_dgrad, "partial_last_tile", options, dtype, device)


@pytest.mark.parametrize(("descriptors", "form"), HOW)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_stays_where_it_belongs(device, monkeypatch, descriptors, form, value):
    """A pixel of dy reaches the pixels of dz that its filters see, one of x its own mask and its channel's sum."""
    use_tile(monkeypatch, "one_image_one_tile", descriptors, form=form)
    dy, w, *rest = operands("one_image_one_tile", "all", torch.float16, device)
    x, mean = rest[4], rest[7]
    x[0, 5, 3, 6] = value
    mean[5] = 0.0  # as it is of the others
    dz, sums = conv_dgrad(dy, w, *rest)
    expected, expected_sums = conv_dgrad_reference(dy, w, *rest)
    assert_as_accurate(dz, expected, conv_dgrad_reference(*in_double([dy, w, *rest]))[0])
    assert torch.equal(sums.sum(1).isfinite(), expected_sums[:, 0].isfinite())
    assert not sums[1, :, 5].isfinite().all()
    dy[0, 3, 1, 1] = value
    dz, _ = conv_dgrad(dy, w, *rest[:3], None)
    assert torch.equal(dz.isfinite(), conv_dgrad_reference(dy, w, *rest[:3], None)[0].isfinite())
    assert not dz[:, :, :3, :3].isfinite().any()


@pytest.mark.parametrize("case", ["projection_1x1", "projection_1x1_odd"])
def test_a_strided_shortcut_is_the_gradient_of_a_projection(device, case):
    """A 3x3 and a 1x1 convolution of one input, both of stride 2: the second's dgrad enters the first's epilogue."""
    _, shape = CASES[case]
    dy1, dy3 = (activation(case, "y", torch.float32, device, seed) for seed in (0, 1))
    w1 = channels_last(shape.K, shape.C, 3, 3, dtype=torch.float32, seed=2, device=device)
    w3 = activation(case, "w", torch.float32, device, 3)
    both = [f(*a, shape.H, shape.W, 2)[0] for f, a in ((conv_dgrad, (dy1, w1)), (conv_dgrad, (dy3, w3)))]
    compact, _ = conv_dgrad(dy3, w3, shape.P, shape.Q)
    fused, _ = conv_dgrad(dy1, w1, shape.H, shape.W, 2, compact)
    torch.testing.assert_close(fused, both[0] + both[1])


@pytest.mark.parametrize(
    ("case", "form"), [("stride2", "rows"), ("stride2", "columns"), ("partial_last_tile", "lines")]
)
def test_repeats_bit_for_bit(device, monkeypatch, case, form):
    use_tile(monkeypatch, case, form != "rows", form=form)
    arguments = operands(case, "all", torch.float16, device)
    for a, b in zip(conv_dgrad(*arguments), conv_dgrad(*arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("descriptors", "form"), HOW)
def test_a_large_mean_does_not_cancel(device, monkeypatch, descriptors, form):
    """sum(dz * x) - mean * sum(dz) in fp32 would be off by about |mean| sum|dz| eps, here a hundredth of the result."""
    use_tile(monkeypatch, "partial_last_tile", descriptors, form=form)
    dy, w, *rest = operands("partial_last_tile", "mask", torch.float32, device)
    x = rest[4] + 1e5
    _, scale, shift, mean = rest[4], rest[5], rest[6] - 1e5 * rest[5], x.double().mean((0, 2, 3)).float()
    dz, partials = conv_dgrad(dy, w, *rest[:4], x, scale, shift, mean)
    truth = (dz.double() * (x.double() - mean[:, None, None])).sum((0, 2, 3))
    assert ((partials[1].sum(0) - truth).abs() < 1e-5 * truth.abs().max()).all()


def test_registration(device, monkeypatch):
    for case, options in (
        ("stride2_odd", "all"),
        ("projection_1x1", "strided_shortcut"),
        ("partial_last_tile", "plain"),
    ):
        torch.library.opcheck(conv_dgrad, operands(case, options, torch.float16, device))
    use_tile(monkeypatch, "several_channel_blocks", True, form="lines")
    torch.library.opcheck(conv_dgrad, operands("several_channel_blocks", "all", torch.float16, device))


def test_the_partials_of_lines_are_one_for_a_program(device, monkeypatch):
    """In a tile of 32 pixels are a line each of eight images, 4 pixels wide."""
    monkeypatch.setattr(tiles, "tile", lambda *_: tiles.Tile(32, 16, 16, 4, 1, True, form="lines"))
    n, shape = 17, ConvShape(16, 16, 4, 4)
    arguments = operands((n, shape), "mask", torch.float16, device)
    _, partials = conv_dgrad(*arguments)
    assert partials.shape == (2, 3, 16)
    dy, w, _, _, _, _, x, *vectors = arguments
    read = sum(t.numel() for t in (dy, w, x)) * 2 + sum(v.numel() for v in vectors) * 4
    assert conv_dgrad_cost(*arguments) == Cost(shape.flops(n), read + x.numel() * 2 + partials.numel() * 4)


def test_compiles_into_one_graph(device):
    arguments = operands("stride2", "all", torch.float16, device)

    def step(*arguments):
        dz, sums = conv_dgrad(*arguments)
        return dz * 2, sums.sum(1)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(compiled, step(*arguments), strict=True))


@pytest.mark.parametrize("case", ["odd_map", "stride2_odd", "projection_1x1"])
def test_flops_are_pytorchs(device, case):
    counts = []
    for dgrad in (conv_dgrad, conv_dgrad_reference):
        with FlopCounterMode(display=False) as counter:
            dgrad(*operands(case, "all", torch.float32, device))
        counts.append(counter.get_total_flops())
    n, shape = CASES[case]
    assert counts[0] == counts[1] == shape.flops(n)


def test_cost():
    """64x32x32 to 128 at stride 2, 512 images, fp16: 19.3 GFLOP; dy is 33.6 MB, dz, x and the shortcut 67.1 MB each."""
    dy = torch.empty(512, 128, 16, 16, dtype=torch.float16, device="meta")
    w = torch.empty(128, 64, 3, 3, dtype=torch.float16, device="meta")
    x = torch.empty(512, 64, 32, 32, dtype=torch.float16, device="meta")
    c = torch.empty(64, device="meta")
    rows, shape = 512 * 16 * 16, ConvShape(64, 128, 32, 32, stride=2)
    partials = 2 * 4 * (rows // tiles.tile("conv_dgrad", shape, x.dtype, tiles.gpu_of(x.device)).BLOCK_M)
    traffic = rows * 128 * 2 + 3 * 4 * rows * 64 * 2 + 128 * 64 * 9 * 2 + (3 + partials) * 64 * 4
    assert conv_dgrad_cost(dy, w, 32, 32, 2, x, x, c, c, c) == Cost(2 * rows * 128 * 64 * 9, traffic)


DY, W, C16 = (2, 32, 4, 4), (32, 16, 3, 3), torch.ones(16)


def nhwc(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return channels_last(*shape, dtype=dtype, seed=0, device=torch.device("cpu"))


def unaligned(n: int, c: int, h: int, w: int) -> torch.Tensor:
    return torch.zeros(n * c * h * w + 1, dtype=torch.float16)[1:].view(n, h, w, c).permute(0, 3, 1, 2)


@pytest.mark.skipif(not jit.INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param((nhwc(*DY)[:0], nhwc(*W), 4, 4), ValueError, "dy has shape .* non-empty", id="zero_images"),
        pytest.param((nhwc(*DY).contiguous(), nhwc(*W), 4, 4), ValueError, "dy .* channels_last", id="nchw"),
        pytest.param((nhwc(*DY), nhwc(*W).float(), 4, 4), TypeError, "w is torch.float32, expected dy's", id="w_dtype"),
        pytest.param((nhwc(*DY), nhwc(64, 16, 3, 3), 4, 4), ValueError, r"expected \[2, 64, 4, 4\]", id="filters"),
        pytest.param((nhwc(*DY), nhwc(*W), 5, 4), ValueError, r"expected \[2, 32, 5, 4\]", id="height"),
        pytest.param((nhwc(*DY), nhwc(*W), 9, 8, 2), ValueError, r"expected \[2, 32, 5, 4\]", id="height_at_stride_2"),
        pytest.param((nhwc(*DY), nhwc(32, 8, 3, 3), 4, 4), ValueError, "C is 8 .* multiple of 16", id="c_of_8"),
        pytest.param(
            (nhwc(*DY), nhwc(*W), 4, 4, 1, nhwc(2, 16, 2, 2)), ValueError, "shortcut has shape", id="shortcut"
        ),
        pytest.param((nhwc(*DY), nhwc(*W), 4, 4, 1, None, nhwc(2, 16, 4, 4)), ValueError, "go together", id="x_alone"),
        pytest.param(
            (nhwc(*DY), nhwc(*W), 4, 4, 1, None, nhwc(2, 16, 4, 4), C16, C16), ValueError, "go together", id="no_mean"
        ),
        pytest.param(
            (nhwc(*DY), nhwc(*W), 4, 4, 1, None, nhwc(2, 16, 4, 4), C16, C16, C16[:8]),
            ValueError,
            "mean has shape",
            id="mean_shape",
        ),
        pytest.param(
            (nhwc(*DY), nhwc(*W), 4, 4, 1, None, nhwc(2, 16, 4, 2), C16, C16, C16), ValueError, "x has shape", id="x"
        ),
        pytest.param(
            (nhwc(*DY), nhwc(*W), 4, 4, 1, unaligned(2, 16, 4, 4)),
            ValueError,
            "shortcut's memory",
            id="shortcut_address",
        ),
        pytest.param(
            (nhwc(*DY), nhwc(*W), 4, 4, 1, None, unaligned(2, 16, 4, 4), C16, C16, C16),
            ValueError,
            "x's memory begins at an address",
            id="x_address",
        ),
    ],
)
def test_contract(arguments, error, message):
    with pytest.raises(error, match=message):
        conv_dgrad(*arguments)


def test_more_elements_than_32_bit_offsets_reach(device):
    dy = torch.empty(2**15, 16, 16, 16, dtype=torch.float16, device=device, memory_format=torch.channels_last)
    w = torch.empty(16, 64, 1, 1, dtype=torch.float16, device=device, memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"dz has 2147483648 elements, .* split the batch"):
        conv_dgrad(dy, w, 32, 32, 2)


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


def check_mutant(op, monkeypatch, device) -> None:
    problems = (
        ("partial_last_tile", "all", {}),
        ("stride2_odd", "strided_shortcut", {}),
        ("stride2_odd", "mask", {"form": "columns"}),
        ("projection_1x1", "plain", {}),
        ("stride2", "mask", {"descriptors": True}),
        ("stride2", "strided_shortcut", {"descriptors": True, "form": "columns"}),
        ("partial_last_tile", "all", {"descriptors": True, "form": "lines"}),
        ("several_channel_blocks", "all", {"descriptors": True, "form": "lines"}),
    )
    for case, options, changes in problems:
        use_tile(monkeypatch, case, **changes)
        check(op, case, options, torch.float16, device)


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    made = {name: mutant_kernel(module, conv_dgrad_kernels, folder, *change) for name, change in MUTANTS.items()}
    return made | {name: mutant(module, folder, *change) for name, change in OF_THE_OP.items()}


@pytest.fixture(scope="module")
def compiled(mutants):
    """Which mutants compile: with pointers on sm_80, on sm_90 with descriptors at stride 2 and by lines at stride 1."""
    builds = []
    for capability, stride in (((8, 0), 2), ((9, 0), 2), ((9, 0), 1)):
        with launches(tiles.Gpu("", capability)) as recorded:
            for changed in mutants.values():
                dy, w = nhwc(2, 64, 8 // stride, 8 // stride), nhwc(64, 64, 3, 3)
                x, c = nhwc(2, 64, 8, 8), torch.ones(64)
                changed.conv_dgrad(dy, w, 8, 8, stride, x, x, c, c, c)
        builds += recorded
    results = compiling(builds)
    return {name: all(results[i :: len(mutants)]) for i, name in enumerate(mutants)}


@poisoned
@pytest.mark.skipif(not jit.INTERPRETED, reason="out-of-bounds mutants need the interpreter's guard")
@pytest.mark.parametrize("name", MUTANTS | OF_THE_OP)
def test_mutant_is_caught(monkeypatch, mutants, compiled, name, device):
    assert compiled[name]
    assert_caught(lambda: check_mutant(mutants[name].conv_dgrad, monkeypatch, device))


def test_the_check_that_mutants_fail(monkeypatch, device):
    check_mutant(conv_dgrad, monkeypatch, device)


def layer_builds(arch: int, device) -> list:
    """What every layer of both networks launches: the article's with everything on, ResNet9's without the mask.

    The gradient of the article's projections is a dgrad of stride 1, and then the 3x3 layer's strided shortcut.
    """
    builds = []
    for shape in dict.fromkeys(RESNET_LAYERS + RESNET9_LAYERS):
        x, w, y, c, _ = layer_operands(shape, device)
        arguments = (y, w, shape.H, shape.W, shape.stride)
        if shape.R == 1:
            arguments = (y, w, shape.P, shape.Q)
        elif shape in RESNET_LAYERS:
            arguments += (torch.empty_like(x[..., : shape.P, : shape.Q]) if shape.stride == 2 else x, x, c, c, c)
        with launches() as recorded:
            conv_dgrad(*arguments)
        builds += [dataclasses.replace(build, arch=arch, label=f"conv_dgrad {shape}") for build in recorded]
    return builds


def test_machine_code_of_every_layer(monkeypatch):
    builds = []
    for arch in MATRIX_INSTRUCTION:
        monkeypatch.setattr(tiles, "gpu_of", lambda device, arch=arch: tiles.Gpu("", (arch // 10, 0)))
        builds += layer_builds(arch, torch.device("cpu"))
    for build, facts in zip(builds, compile_all(builds), strict=True):
        assert_machine_code(build, facts)
        if build.arch == 90:
            assert facts.blocks_per_sm() >= 2, "one's epilogue is under the other's products"
            assert "lines" in build.kernel or (build.constexprs["COLUMNS"] and operands_are_shared(facts)), facts.label
