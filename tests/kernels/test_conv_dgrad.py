"""conv_dgrad against float64: every option, machine code."""

import pytest
import torch
from conv_cases import (
    CASES,
    DTYPES,
    activation,
    random_tiles,
    use_tile,
)
from kernel_checks import assert_as_accurate, channels_last, mostly_slow
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from checks.conv_dgrad import check, operands
from conv_cases import in_double, nhwc, unaligned

from kernels import jit, tiles
from kernels.conv_dgrad import conv_dgrad, conv_dgrad_cost, conv_dgrad_reference
from kernels.conv_shape import ConvShape
from kernels.cost import Cost

OPTIONS = ("plain", "mask", "shortcut", "strided_shortcut", "all")
HOW = [(False, "rows"), (True, "rows"), (False, "columns"), (True, "columns"), (True, "lines")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", mostly_slow(CASES, "partial_last_tile", "stride2_odd"))
def test_conv_dgrad_matches_float64(device, monkeypatch, case, dtype):
    use_tile(monkeypatch, case)
    for options in OPTIONS if case in ("partial_last_tile", "stride2_odd") else ("plain", "all"):
        check(conv_dgrad, case, options, DTYPES[dtype], device)


@pytest.mark.parametrize(("images", "shape", "tile"), mostly_slow(random_tiles("conv_dgrad", 30), 0, 1), ids=str)
def test_any_tile_matches_float64(device, monkeypatch, images, shape, tile):
    monkeypatch.setattr(tiles, "tile", lambda *arguments: tile)
    for options, far in (("plain", 0), ("strided_shortcut", 0), ("all", -400)):
        check(conv_dgrad, (images, shape), options, torch.float16, device, far)


@pytest.mark.parametrize("form", mostly_slow(["rows", "columns"], 1))
@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("case", mostly_slow(CASES, "partial_last_tile", "stride2_odd"))
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


@pytest.mark.parametrize(("descriptors", "form"), mostly_slow(HOW, 0, 4))
@pytest.mark.parametrize("options", OPTIONS)
def test_every_option_in_every_form(device, monkeypatch, options, descriptors, form):
    use_tile(monkeypatch, "partial_last_tile", descriptors, form=form)
    for dtype in DTYPES.values():
        check(conv_dgrad, "partial_last_tile", options, dtype, device)


@pytest.mark.parametrize(("descriptors", "form"), mostly_slow(HOW, 0, 4))
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
@pytest.mark.slow
def test_repeats_bit_for_bit(device, monkeypatch, case, form):
    use_tile(monkeypatch, case, form != "rows", form=form)
    arguments = operands(case, "all", torch.float16, device)
    for a, b in zip(conv_dgrad(*arguments), conv_dgrad(*arguments), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("descriptors", "form"), mostly_slow(HOW, 0, 4))
def test_a_large_mean_does_not_cancel(device, monkeypatch, descriptors, form):
    """sum(dz * x) - mean * sum(dz) in fp32 would be off by about |mean| sum|dz| eps, here a hundredth of the result."""
    use_tile(monkeypatch, "partial_last_tile", descriptors, form=form)
    dy, w, *rest = operands("partial_last_tile", "mask", torch.float32, device)
    x = rest[4] + 1e5
    _, scale, shift, mean = rest[4], rest[5], rest[6] - 1e5 * rest[5], x.double().mean((0, 2, 3)).float()
    dz, partials = conv_dgrad(dy, w, *rest[:4], x, scale, shift, mean)
    truth = (dz.double() * (x.double() - mean[:, None, None])).sum((0, 2, 3))
    assert ((partials[1].sum(0) - truth).abs() < 1e-5 * truth.abs().max()).all()


@pytest.mark.slow
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
