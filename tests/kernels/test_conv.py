"""The three convolution ops against float64: every option, any tile, large means, values that are not finite."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from checks import conv_dgrad as dgrads
from checks import conv_fprop as fprops
from checks import conv_wgrad as wgrads
from conv_cases import CASES, DTYPES, activation, affine, in_double, random_tiles, use, use_tile
from kernel_checks import assert_as_accurate, channels_last, mostly_slow

from kernels import jit, tiles
from kernels.bn_apply import bn_apply
from kernels.conv_dgrad import conv_dgrad, conv_dgrad_cost, conv_dgrad_reference
from kernels.conv_fprop import _add_gradient_of_statistics, conv_fprop, conv_fprop_reference
from kernels.conv_shape import ConvShape
from kernels.conv_wgrad import conv_wgrad, conv_wgrad_reduce_kernel, conv_wgrad_reference
from kernels.cost import Cost
from kernels.tiles import Tile

HALF, SINGLE = torch.float16, torch.float32
CONVS = {"conv_fprop": fprops.CONV, "conv_dgrad": dgrads.CONV, "conv_wgrad": wgrads.CONV}
IN_FULL = ("partial_last_tile", "stride2_odd")
VALUES = [pytest.param(case, dtype, id=f"{case}-{dtype}") for case, dtype in itertools.product(CASES, DTYPES)]


@pytest.mark.parametrize(("case", "dtype"), mostly_slow(VALUES, "partial_last_tile-fp32", "stride2_odd-fp16"))
@pytest.mark.parametrize("op", CONVS)
def test_options_match_float64(device, monkeypatch, op, case, dtype):
    use_tile(monkeypatch, case)
    for options in CONVS[op].options if case in IN_FULL else ("plain", "all"):
        CONVS[op].check(CONVS[op].op, case, options, DTYPES[dtype], device)


COUNTS = {"conv_fprop": 40, "conv_dgrad": 30, "conv_wgrad": 40}
RANDOM = [
    pytest.param(op, *problem, id=f"{op}-" + "-".join(map(str, problem)), marks=() if i == 0 else pytest.mark.slow)
    for op, count in COUNTS.items()
    for i, problem in enumerate(random_tiles(op, count))
]


@pytest.mark.parametrize(("op", "images", "shape", "tile"), RANDOM)
def test_any_tile_matches_float64(device, monkeypatch, op, images, shape, tile):
    use(monkeypatch, tile)
    for options, dtype, far in CONVS[op].of_any_tile:
        if dtype == HALF or tile.form != "rows" or tile.prologue != "fp32":
            CONVS[op].check(CONVS[op].op, (images, shape), options, dtype, device, far)


def test_random_tiles_of_wgrad_are_of_every_kind():
    found = [tile for *_, tile in random_tiles("conv_wgrad", 40)]
    kinds = {(tile.descriptors, tile.prologue, tile.TAPS, tile.SPLIT > 1) for tile in found}
    assert {(True, prologue, 3, True) for prologue in tiles.PROLOGUES} <= kinds
    assert {(False, "fp16x2", 3), (True, "fp16x2", 1)} <= {kind[:3] for kind in kinds}


@pytest.mark.parametrize("case", mostly_slow(CASES, "partial_last_tile"))
@pytest.mark.parametrize(
    ("op", "options", "form"),
    [
        ("conv_fprop", "plain", "rows"),
        ("conv_fprop", "all", "rows"),
        *(("conv_dgrad", *both) for both in itertools.product(("plain", "all"), ("rows", "columns"))),
        ("conv_wgrad", "all", "rows"),
    ],
)
def test_descriptors_and_pointers_agree(device, monkeypatch, op, case, options, form):
    conv = CONVS[op]
    if not jit.INTERPRETED:
        use_tile(monkeypatch, case, descriptors=True, form=form)
        conv.check(conv.op, case, options, HALF, device)
        return
    results, given = [], conv.operands(case, options, HALF, device)
    for descriptors in (False, True):
        use_tile(monkeypatch, case, descriptors, form=form)
        results.append(conv.op(*given))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("prologue", ["fp32", "fp16x2"])
@pytest.mark.parametrize(
    ("op", "far", "form"),
    mostly_slow(
        [
            *(("conv_fprop", far, form) for far in (-400.0, 16.0, 400.0) for form in ("rows", "lines")),
            ("conv_wgrad", -400.0, "rows"),
            ("conv_wgrad", 400.0, "rows"),
        ],
        *(0, 1, 6),
    ),
)
def test_prologue_of_a_mean_far_from_zero_loses_no_digits(device, monkeypatch, op, far, form, prologue):
    if op == "conv_fprop":
        case = "partial_last_tile"
        use_tile(monkeypatch, case, True, form=form, prologue=prologue)
    else:
        case = "one_image_one_tile"
        use(monkeypatch, Tile(16, 16, 32, 4, 1, descriptors=True, SPLIT=2, TAPS=3, prologue=prologue))
    CONVS[op].check(CONVS[op].op, case, "prologue" if op == "conv_fprop" else "all", HALF, device, far)


# What is fprop's own.


def test_no_statistics(device):
    given = fprops.operands("partial_last_tile", "all", HALF, device)
    y, partials = conv_fprop(*given, False)
    assert torch.equal(y, conv_fprop(*given)[0])
    assert partials.shape == (3, 0, 16)


def test_statistics_of_a_large_mean_do_not_cancel(device, monkeypatch):
    """sum(y^2) / n - mean^2 in fp32 has an error of about mean^2 eps, here larger than the variance."""
    use_tile(monkeypatch, "partial_last_tile")
    x, w, *_ = fprops.operands("partial_last_tile", "plain", SINGLE, device)
    residual = torch.full_like(activation("partial_last_tile", "y", SINGLE, device), 3e4)
    y, partials = conv_fprop(x, w, 1, None, None, residual)
    truth = fprops.statistics_of(y.double(), partials.shape[1], 32)
    assert ((partials[2] - truth[2]).abs() < 1e-3 * truth[2]).all()


@pytest.mark.parametrize("value", [0.0, torch.nan, 1e9])
def test_statistics_of_no_meaning_reach_no_other_memory(value):
    """Only compiled kernels have them: an index beyond the end would lose the GPU to the process."""
    y = channels_last(2, 16, 4, 4, dtype=SINGLE, seed=1, device=torch.device("cpu"))
    partials = torch.full((3, 2, 16), value)
    assert _add_gradient_of_statistics(y, partials, y, partials).shape == y.shape


FPROP_FORMS = mostly_slow(
    [
        (False, "rows", "fp32"),
        (True, "rows", "fp32"),
        (True, "rows", "fp16x2"),
        (True, "lines", "fp32"),
        (True, "lines", "fp16x2"),
        (True, "columns", "stored"),
    ],
    *(0, 4),
)


@pytest.mark.parametrize("channel", [3, -1], ids=["first_block", "last_block"])
@pytest.mark.parametrize(("descriptors", "form", "prologue"), FPROP_FORMS)
def test_fprop_passes_nan_on(device, monkeypatch, descriptors, form, prologue, channel):
    """A NaN in x makes its channel's statistics NaN, hence scale and shift; the ReLU must not hide it."""
    case = "several_channel_blocks"
    use_tile(monkeypatch, case, descriptors, form=form, prologue=prologue)
    x, w, stride, scale, shift, *_ = fprops.operands(case, "prologue", HALF, device)
    x[0, channel, 1, 1] = scale[channel] = shift[channel] = torch.nan
    y, partials = conv_fprop(x, w, stride, scale, shift)
    assert y.isnan().all()
    assert partials[1:].isnan().all()


@pytest.mark.parametrize(("descriptors", "form", "prologue"), FPROP_FORMS)
def test_fprop_keeps_what_is_not_finite_to_its_pixels(device, monkeypatch, descriptors, form, prologue):
    """Without a prologue: y is not finite where a filter sees the pixel, and there alone.

    The truth is a CPU's: in fp16 on an H200, cuDNN 9 makes 0 of what is -inf.
    """
    use_tile(monkeypatch, "one_image_one_tile", descriptors, form=form, prologue=prologue)
    x, w, *_ = fprops.operands("one_image_one_tile", "plain", HALF, device)
    for value in (torch.inf, -torch.inf, torch.nan):
        x[0, 3, 1, 1] = value
        y, _ = conv_fprop(x, w)
        truth, _ = conv_fprop_reference(x.cpu().float(), w.cpu().float())
        assert torch.equal(y.isfinite().cpu(), truth.isfinite())
        assert not y[:, :, :3, :3].isfinite().any()


def test_a_stored_prologue_is_the_activations_own_pass(device, monkeypatch):
    use_tile(monkeypatch, "several_channel_blocks", True, form="columns", prologue="stored")
    x, w, stride, scale, shift, *_ = fprops.operands("several_channel_blocks", "prologue", HALF, device)
    y, partials = conv_fprop(x, w, stride, scale, shift)
    expected = conv_fprop(bn_apply(x, scale, shift), w, stride)
    assert torch.equal(y, expected[0])
    assert torch.equal(partials, expected[1])


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
    "case", mostly_slow(["partial_last_tile", "stride2_odd", "projection_1x1", "c_not_multiple_of_tile"], 0)
)
def test_gradients_through_everything(device, monkeypatch, case, dtype):
    use_tile(monkeypatch, case)
    arguments = fprops.operands(case, "all", DTYPES[dtype], device)
    gamma, beta = affine(CASES[case][1].K, device, 7)
    arguments += [gamma, beta, activation(case, "y", DTYPES[dtype], device, 8)]

    def gradients(conv, values):
        leaves = [v if isinstance(v, int) else v.clone().requires_grad_() for v in values]
        return torch.autograd.grad(block(conv, *leaves), [v for v in leaves[:-1] if not isinstance(v, int)])

    names = ["x", "w", "scale", "shift", "residual", "residual_scale", "residual_shift", "gamma", "beta"]
    ours, baseline = gradients(conv_fprop, arguments), gradients(conv_fprop_reference, arguments)
    truth = gradients(conv_fprop_reference, in_double(arguments))
    for name, a, b, c in zip(names, ours, baseline, truth, strict=True):
        assert_as_accurate(a, b, c, f"d{name}")


def test_the_statistics_alone_have_a_gradient(device, monkeypatch):
    use_tile(monkeypatch, "partial_last_tile")
    x, w, *_ = fprops.operands("partial_last_tile", "plain", SINGLE, device)
    gradients = []
    for conv in (conv_fprop, conv_fprop_reference):
        leaf = x.clone().requires_grad_()
        _, (count, mean, _) = conv(leaf, w)
        gradients += torch.autograd.grad((count * mean).sum(0).square().sum(), leaf)
    torch.testing.assert_close(*gradients)


# What is dgrad's own.

DGRAD_FORMS = mostly_slow(
    [(False, "rows"), (True, "rows"), (False, "columns"), (True, "columns"), (True, "lines")], 0, 4
)


@pytest.mark.parametrize(("descriptors", "form"), DGRAD_FORMS[1:])
@pytest.mark.parametrize("options", dgrads.OPTIONS)
def test_dgrad_in_every_other_form(device, monkeypatch, options, descriptors, form):
    use_tile(monkeypatch, "partial_last_tile", descriptors, form=form)
    for dtype in DTYPES.values():
        dgrads.check(conv_dgrad, "partial_last_tile", options, dtype, device)


@pytest.mark.parametrize(("descriptors", "form"), DGRAD_FORMS)
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_dgrad_keeps_what_is_not_finite_to_its_pixels(device, monkeypatch, descriptors, form, value):
    """A pixel of dy reaches the pixels of dz that its filters see, one of x its own mask and its channel's sum."""
    use_tile(monkeypatch, "one_image_one_tile", descriptors, form=form)
    dy, w, *rest = dgrads.operands("one_image_one_tile", "all", HALF, device)
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
    dy1, dy3 = (activation(case, "y", SINGLE, device, seed) for seed in (0, 1))
    w1 = channels_last(shape.K, shape.C, 3, 3, dtype=SINGLE, seed=2, device=device)
    w3 = activation(case, "w", SINGLE, device, 3)
    both = sum(conv_dgrad(dy, w, shape.H, shape.W, 2)[0] for dy, w in ((dy1, w1), (dy3, w3)))
    compact, _ = conv_dgrad(dy3, w3, shape.P, shape.Q)
    torch.testing.assert_close(conv_dgrad(dy1, w1, shape.H, shape.W, 2, compact)[0], both)


@pytest.mark.parametrize(("descriptors", "form"), DGRAD_FORMS)
def test_sums_of_dgrad_of_a_large_mean_do_not_cancel(device, monkeypatch, descriptors, form):
    """sum(dz * x) - mean * sum(dz) in fp32 would be off by about |mean| sum|dz| eps, here a hundredth of the result."""
    use_tile(monkeypatch, "partial_last_tile", descriptors, form=form)
    dy, w, *rest, x, scale, shift, _ = dgrads.operands("partial_last_tile", "mask", SINGLE, device)
    x = x + 1e5
    mean = x.double().mean((0, 2, 3)).float()
    dz, partials = conv_dgrad(dy, w, *rest, x, scale, shift - 1e5 * scale, mean)
    truth = (dz.double() * (x.double() - mean[:, None, None])).sum((0, 2, 3))
    assert ((partials[1].sum(0) - truth).abs() < 1e-5 * truth.abs().max()).all()


def test_dgrad_by_lines_leaves_one_partial_for_a_program(device, monkeypatch):
    """In a tile of 32 pixels are a line each of eight images, 4 pixels wide."""
    use(monkeypatch, Tile(32, 16, 16, 4, 1, True, form="lines"))
    n, shape = 17, ConvShape(16, 16, 4, 4)
    arguments = dgrads.operands((n, shape), "mask", HALF, device)
    _, partials = conv_dgrad(*arguments)
    assert partials.shape == (2, 3, 16)
    dy, w, _, _, _, _, x, *vectors = arguments
    moved = sum(t.nbytes for t in (dy, w, x, x, partials, *vectors))
    assert conv_dgrad_cost(*arguments) == Cost(shape.flops(n), moved)


# What is wgrad's own.


@pytest.mark.parametrize("split", mostly_slow([1, 2, 4, 64], 1, 3))
def test_any_split_sums_every_pixel_once(device, monkeypatch, split):
    """48 rows are 3 blocks of 16: split evenly, with a part that has nothing left, and into more parts than blocks."""
    use(monkeypatch, Tile(16, 16, 16, 4, 1, SPLIT=split))
    wgrads.check(conv_wgrad, "partial_last_tile", "all", HALF, device)


@pytest.mark.parametrize("ahead", [1, 4, 8])
@pytest.mark.parametrize("split", [1, 5, 8])
def test_parts_are_added_in_order(device, split, ahead):
    wgrads.check_order(conv_wgrad_reduce_kernel, split, ahead, device)


TILES = {
    "pointers": Tile(16, 32, 16, 4, 1, SPLIT=2),
    "pointers_fp16x2": Tile(16, 32, 16, 4, 1, SPLIT=2, prologue="fp16x2"),
    "descriptors": Tile(16, 32, 16, 4, 1, True, SPLIT=2, TAPS=3),
    "descriptors_fp16x2": Tile(16, 32, 16, 4, 1, True, SPLIT=2, TAPS=3, prologue="fp16x2"),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("tile", mostly_slow(TILES, "descriptors_fp16x2"))
def test_wgrad_keeps_what_is_not_finite_to_its_channel(device, monkeypatch, tile):
    """A pixel of x whose neighbours are all inside reaches every tap, one of dy every channel; a NaN of x stands, by
    the statistics of its channel, for a channel of NaN."""
    use(monkeypatch, TILES[tile])
    for value, which in itertools.product((torch.nan, torch.inf), range(2)):
        arguments = wgrads.operands("one_image_one_tile", "all", HALF, device)
        arguments[which][0, 3, 1, 4] = value
        dw, reference = conv_wgrad(*arguments), conv_wgrad_reference(*arguments)
        # Of dy an infinity is met by zeros of relu, which makes NaN in either.
        assert torch.equal(dw.isfinite(), reference.isfinite())
        bad = dw[:, 3] if which == 0 else dw[3]
        assert not bad.isfinite().any()
        assert dw.isfinite().sum() == dw.numel() - bad.numel()
        if which == 0 and value == torch.inf:
            assert torch.equal(dw[:, 3], reference[:, 3])
    for which in (4, 5):
        arguments = wgrads.operands("one_image_one_tile", "all", HALF, device)
        arguments[which][3] = torch.nan
        dw = conv_wgrad(*arguments)
        assert dw[:, 3].isnan().all()
        assert not dw[:, :3].isnan().any()
