"""conv_fprop against float64: every option, gradients, machine code."""

import pytest
import torch
from conv_cases import (
    CASES,
    DTYPES,
    activation,
    affine,
    random_tiles,
    use_tile,
)
from kernel_checks import assert_as_accurate, mostly_slow
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from checks.conv_fprop import check, operands, statistics_of
from conv_cases import in_double, nhwc, unaligned

from kernels import jit, tiles
from kernels.bn_apply import bn_apply, bn_apply_cost
from kernels.conv_fprop import conv_fprop, conv_fprop_cost, conv_fprop_reference
from kernels.conv_shape import ConvShape
from kernels.cost import Cost

OPTIONS = ("plain", "prologue", "residual", "affine_residual", "all")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", mostly_slow(CASES, "partial_last_tile", "stride2_odd"))
def test_conv_fprop_matches_float64(device, monkeypatch, case, dtype):
    use_tile(monkeypatch, case)
    for options in OPTIONS if case in ("partial_last_tile", "stride2_odd") else ("plain", "all"):
        check(conv_fprop, case, options, DTYPES[dtype], device)


@pytest.mark.parametrize(("images", "shape", "tile"), mostly_slow(random_tiles("conv_fprop", 40), 0, 1), ids=str)
def test_any_tile_matches_float64(device, monkeypatch, images, shape, tile):
    monkeypatch.setattr(tiles, "tile", lambda *arguments: tile)
    for options in ("plain", "all"):
        check(conv_fprop, (images, shape), options, torch.float16, device)
    if tile.form != "rows" or tile.prologue != "fp32":
        check(conv_fprop, (images, shape), "prologue", torch.float32, device)


@pytest.mark.parametrize("prologue", ["fp32", "fp16x2"])
@pytest.mark.parametrize("form", ["rows", "lines"])
@pytest.mark.parametrize("mean", mostly_slow([-400.0, 16.0, 400.0], 0))
def test_a_mean_far_from_zero_costs_the_prologue_no_digits(device, monkeypatch, mean, form, prologue):
    use_tile(monkeypatch, "partial_last_tile", True, form=form, prologue=prologue)
    check(conv_fprop, "partial_last_tile", "prologue", torch.float16, device, mean)


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("case", mostly_slow(CASES, "partial_last_tile", "stride2_odd"))
def test_descriptors_and_pointers_agree(device, monkeypatch, case, options):
    arguments = operands(case, options, torch.float16, device)
    use_tile(monkeypatch, case)
    pointers = conv_fprop(*arguments)
    use_tile(monkeypatch, case, descriptors=True)
    if jit.INTERPRETED:
        for a, b in zip(conv_fprop(*arguments), pointers, strict=True):
            assert torch.equal(a, b)
    else:
        check(conv_fprop, case, options, torch.float16, device)


@pytest.mark.slow
def test_repeats_bit_for_bit(device, monkeypatch):
    use_tile(monkeypatch, "stride2")
    arguments = operands("stride2", "all", torch.float16, device)
    for a, b in zip(conv_fprop(*arguments), conv_fprop(*arguments), strict=True):
        assert torch.equal(a, b)


def test_no_statistics(device):
    arguments = operands("partial_last_tile", "all", torch.float16, device)
    y, partials = conv_fprop(*arguments, False)
    assert torch.equal(y, conv_fprop(*arguments)[0])
    assert partials.shape == (3, 0, 16)


def test_a_large_mean_does_not_cancel(device, monkeypatch):
    """sum(y^2) / n - mean^2 in fp32 has an error of about mean^2 eps, here larger than the variance."""
    use_tile(monkeypatch, "partial_last_tile")
    x, w, *_ = operands("partial_last_tile", "plain", torch.float32, device)
    residual = torch.full_like(activation("partial_last_tile", "y", torch.float32, device), 3e4)
    y, partials = conv_fprop(x, w, 1, None, None, residual)
    truth = statistics_of(y.double(), partials.shape[1], 32)
    assert ((partials[2] - truth[2]).abs() < 1e-3 * truth[2]).all()


HOW = [(False, "rows", "fp32"), (True, "rows", "fp32"), (True, "rows", "fp16x2"), (True, "lines", "fp32")]
HOW += [(True, "lines", "fp16x2"), (True, "columns", "stored")]


@pytest.mark.parametrize("channel", [3, -1], ids=["first_block", "last_block"])
@pytest.mark.parametrize(("descriptors", "form", "prologue"), mostly_slow(HOW, 0, 4))
def test_nan_is_passed_on(device, monkeypatch, descriptors, form, prologue, channel):
    """A NaN in x makes its channel's statistics NaN, hence scale and shift; the ReLU must not hide it."""
    case = "several_channel_blocks"
    use_tile(monkeypatch, case, descriptors, form=form, prologue=prologue)
    x, w, stride, scale, shift, *_ = operands(case, "prologue", torch.float16, device)
    x[0, channel, 1, 1] = scale[channel] = shift[channel] = torch.nan
    y, partials = conv_fprop(x, w, stride, scale, shift)
    assert y.isnan().all()
    assert partials[1:].isnan().all()


@pytest.mark.parametrize(("descriptors", "form", "prologue"), mostly_slow(HOW, 0, 4))
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_where_it_belongs(device, monkeypatch, descriptors, form, prologue, value):
    """Without a prologue: y is not finite where a filter sees the pixel, and there alone.

    The truth is a CPU's: in fp16 on an H200, cuDNN 9 makes 0 of what is -inf.
    """
    use_tile(monkeypatch, "one_image_one_tile", descriptors, form=form, prologue=prologue)
    x, w, *_ = operands("one_image_one_tile", "plain", torch.float16, device)
    x[0, 3, 1, 1] = value
    y, _ = conv_fprop(x, w)
    truth, _ = conv_fprop_reference(x.cpu().float(), w.cpu().float())
    assert torch.equal(y.isfinite().cpu(), truth.isfinite())
    assert not y[:, :, :3, :3].isfinite().any()


def test_a_stored_prologue_is_the_activations_own_pass(device, monkeypatch):
    use_tile(monkeypatch, "several_channel_blocks", True, form="columns", prologue="stored")
    x, w, stride, scale, shift, *_ = operands("several_channel_blocks", "prologue", torch.float16, device)
    y, partials = conv_fprop(x, w, stride, scale, shift)
    expected = conv_fprop(bn_apply(x, scale, shift), w, stride)
    assert torch.equal(y, expected[0])
    assert torch.equal(partials, expected[1])
    cost, without = conv_fprop_cost(x, w, stride, scale, shift), conv_fprop_cost(x, w, stride)
    assert cost == without + bn_apply_cost(x, scale, shift) + Cost(0, 2 * 48 * 4)


def block(conv, x, w, stride, scale, shift, residual, residual_scale, residual_shift, gamma, beta, dz):
    """sum(dz * bn(conv)), with batch norm made of the partials; a ReLU's mask would flip with the last bit of y."""
    y, partials = conv(x, w, stride, scale, shift, residual, residual_scale, residual_shift)
    count, means, m2 = partials
    n = count.sum(0)
    mean = (count * means).sum(0) / n
    rstd = ((m2 + count * (means - mean).square()).sum(0) / n + 1e-5).rsqrt()
    z = (y - mean[:, None, None]) * (gamma * rstd)[:, None, None] + beta[:, None, None]
    return (z * dz).sum()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", mostly_slow(["partial_last_tile", "stride2_odd", "projection_1x1", "c_not_multiple_of_tile"], 1)
)
def test_gradients_through_everything(device, monkeypatch, case, dtype):
    use_tile(monkeypatch, case)
    arguments = operands(case, "all", DTYPES[dtype], device)
    gamma, beta = affine(CASES[case][1].K, device, 7)
    arguments += [gamma, beta, activation(case, "y", DTYPES[dtype], device, 8)]

    def gradients(conv, values):
        leaves = [v if isinstance(v, int) else v.clone().requires_grad_() for v in values]
        tensors = [v for v in leaves[:-1] if not isinstance(v, int)]
        return torch.autograd.grad(block(conv, *leaves), tensors)

    names = ["x", "w", "scale", "shift", "residual", "residual_scale", "residual_shift", "gamma", "beta"]
    ours, baseline = gradients(conv_fprop, arguments), gradients(conv_fprop_reference, arguments)
    truth = gradients(conv_fprop_reference, in_double(arguments))
    for name, a, b, c in zip(names, ours, baseline, truth, strict=True):
        assert_as_accurate(a, b, c, f"d{name}")


def test_gradients_of_what_is_asked_for(device):
    x, w, *_ = operands("stride2", "plain", torch.float32, device)
    w.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        conv_fprop(x, w, 2, statistics=False)[0].sum().backward()
    assert w.grad is not None
    assert counter.get_total_flops() == 2 * CASES["stride2"][1].flops(2), "no dgrad"


def test_the_statistics_alone_have_a_gradient(device, monkeypatch):
    use_tile(monkeypatch, "partial_last_tile")
    x, w, *_ = operands("partial_last_tile", "plain", torch.float32, device)
    gradients = []
    for conv in (conv_fprop, conv_fprop_reference):
        leaf = x.clone().requires_grad_()
        _, (count, mean, _) = conv(leaf, w)
        gradients += torch.autograd.grad((count * mean).sum(0).square().sum(), leaf)
    torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_registration(device):
    for case, options in (("stride2_odd", "all"), ("projection_1x1", "plain")):
        arguments = operands(case, options, torch.float32, device)
        torch.library.opcheck(conv_fprop, [a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments])
    torch.library.opcheck(conv_fprop, (*operands("stride2_odd", "prologue", torch.float16, device), False))


def test_compiles_into_one_graph(device):
    arguments = operands("stride2", "all", torch.float16, device)
    gamma, beta = affine(16, device, 7)
    arguments += [gamma, beta, activation("stride2", "y", torch.float16, device, 8)]

    def gradients(step):
        x, w = (arguments[i].clone().requires_grad_() for i in (0, 1))
        return torch.autograd.grad(step(conv_fprop, x, w, *arguments[2:]), (x, w))

    compiled = gradients(torch.compile(block, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(compiled, gradients(block), strict=True))


def test_flops_are_pytorchs(device):
    """Forward and backward: three convolutions' worth, as FlopCounterMode counts those of the library."""
    for case in ("one_image_one_tile", "stride2_odd", "projection_1x1"):
        counts = []
        for conv in (conv_fprop, conv_fprop_reference):
            x, w, stride, scale, shift, *_ = operands(case, "prologue", torch.float32, device)
            with FlopCounterMode(display=False) as counter:
                conv(x.requires_grad_(), w.requires_grad_(), stride, scale, shift)[0].sum().backward()
            counts.append(counter.get_total_flops())
        n, shape = CASES[case]
        assert counts[0] == counts[1] == 3 * shape.flops(n)


def test_cost():
    """64x32x32 to 64, 512 images, fp16: 38.7 GFLOP; x, y and the residual are 67.1 MB each, w 74 kB."""
    x = torch.empty(512, 64, 32, 32, dtype=torch.float16, device="meta")
    w = torch.empty(64, 64, 3, 3, dtype=torch.float16, device="meta")
    c = torch.empty(64, device="meta")
    rows = 512 * 32 * 32
    partials = 3 * (
        rows // tiles.tile("conv_fprop", ConvShape(64, 64, 32, 32), x.dtype, tiles.gpu_of(x.device)).BLOCK_M
    )
    expected = Cost(2 * rows * 64 * 64 * 9, 3 * rows * 64 * 2 + 64 * 64 * 9 * 2 + (2 + partials) * 64 * 4)
    assert conv_fprop_cost(x, w, 1, c, c, x) == expected
    assert conv_fprop_cost(x, w, statistics=False).bytes == 2 * rows * 64 * 2 + 64 * 64 * 9 * 2


X, W, C16 = (2, 16, 4, 4), (32, 16, 3, 3), torch.ones(16)


@pytest.mark.skipif(not jit.INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param((nhwc(*X)[:0], nhwc(*W)), ValueError, "x has shape .* non-empty", id="zero_images"),
        pytest.param((nhwc(*X).contiguous(), nhwc(*W)), ValueError, "x .* channels_last", id="nchw"),
        pytest.param((nhwc(*X), nhwc(*W).contiguous()), ValueError, "w .* channels_last", id="kcrs"),
        pytest.param((nhwc(2, 32, 4, 4)[:, :16], nhwc(*W)), ValueError, "x .* channels_last", id="non_contiguous"),
        pytest.param((nhwc(*X), nhwc(*W).float()), TypeError, "w is torch.float32, expected x's", id="w_dtype"),
        pytest.param((nhwc(*X).double(), nhwc(*W)), TypeError, "x is torch.float64", id="dtype"),
        pytest.param((nhwc(*X).bfloat16(), nhwc(*W)), TypeError, "bfloat16.*interpreter", id="interpreted_bf16"),
        pytest.param((nhwc(*X), nhwc(32, 48, 3, 3)), ValueError, r"expected \[K, 16, R, R\]", id="channels_differ"),
        pytest.param((nhwc(2, 24, 4, 4), nhwc(32, 24, 3, 3)), ValueError, "C is 24 .* multiple of 16", id="c_of_24"),
        pytest.param((nhwc(2, 3, 4, 4), nhwc(32, 3, 3, 3)), ValueError, "C is 3 .* multiple of 16", id="first_layer"),
        pytest.param((nhwc(*X), nhwc(8, 16, 3, 3)), ValueError, "K is 8 .* multiple of 16", id="k_of_8"),
        pytest.param((nhwc(*X), nhwc(32, 16, 5, 5)), ValueError, "5 pixels wide", id="filter_5x5"),
        pytest.param((nhwc(*X), nhwc(32, 16, 3, 1)), ValueError, "square", id="filter_3x1"),
        pytest.param((nhwc(*X), nhwc(*W), 3), ValueError, "stride is 3", id="stride_3"),
        pytest.param((unaligned(*X), nhwc(*W)), ValueError, "x's memory .* no multiple of 16", id="unaligned"),
        pytest.param((nhwc(*X), nhwc(*W), 1, C16), ValueError, "scale and shift go together", id="scale_alone"),
        pytest.param((nhwc(*X), nhwc(*W), 1, C16.half(), C16), TypeError, "scale is torch.float16", id="scale_dtype"),
        pytest.param((nhwc(*X), nhwc(*W), 1, C16, C16[:8]), ValueError, "shift has shape", id="shift_shape"),
        pytest.param(
            (nhwc(*X), nhwc(*W), 2, None, None, nhwc(2, 32, 4, 4)), ValueError, "residual has shape", id="residual"
        ),
        pytest.param(
            (nhwc(*X), nhwc(*W), 1, None, None, None, torch.ones(32), torch.ones(32)),
            ValueError,
            "without a residual",
            id="residual_affine_alone",
        ),
    ],
)
def test_contract(arguments, error, message):
    with pytest.raises(error, match=message):
        conv_fprop(*arguments)


def test_more_elements_than_32_bit_offsets_reach(device):
    x = torch.empty(2**15, 64, 32, 32, dtype=torch.float16, device=device, memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"x has 2147483648 elements, .* split the batch"):
        conv_fprop(x, x)
    x = torch.empty(2**13, 16, 64, 64, dtype=torch.float16, device=device, memory_format=torch.channels_last)
    w = torch.empty(64, 16, 1, 1, dtype=torch.float16, device=device, memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"y has 2147483648 elements, .* split the batch"):
        conv_fprop(x, w)
    w = torch.empty(2**27, 16, 1, 1, dtype=torch.float16, device=device, memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"w has 2147483648 elements"):
        conv_fprop(x[:1, :, :1, :1], w)
