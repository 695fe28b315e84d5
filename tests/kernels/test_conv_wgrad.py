"""conv_wgrad against float64: every option, random tiles, the split, machine code."""

import pytest
import torch
from conv_cases import (
    CASES,
    DTYPES,
    affine,
    random_tiles,
    use_tile,
)
from kernel_checks import mostly_slow
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from checks.conv_wgrad import check, check_order, operands, use
from conv_cases import nhwc

from kernels import jit, tiles
from kernels.bn_apply import bn_apply_cost
from kernels.conv_wgrad import conv_wgrad, conv_wgrad_cost, conv_wgrad_reduce_kernel, conv_wgrad_reference
from kernels.cost import Cost
from kernels.tiles import Tile


@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", mostly_slow(CASES, "partial_last_tile", "stride2_odd"))
def test_conv_wgrad_matches_float64(device, monkeypatch, case, dtype, prologue):
    use_tile(monkeypatch, case)
    check(conv_wgrad, operands(case, prologue, DTYPES[dtype], device))


@pytest.mark.parametrize("case", mostly_slow(CASES, "partial_last_tile", "stride2_odd"))
def test_descriptors_and_pointers_agree(device, monkeypatch, case):
    arguments = operands(case, True, torch.float16, device)
    use_tile(monkeypatch, case)
    pointers = conv_wgrad(*arguments)
    use_tile(monkeypatch, case, descriptors=True)
    if jit.INTERPRETED:
        assert torch.equal(conv_wgrad(*arguments), pointers)
    else:
        check(conv_wgrad, arguments)


@pytest.mark.parametrize("split", [1, 2, 4, 64])
def test_any_split_sums_every_pixel_once(device, monkeypatch, split):
    """48 rows are 3 blocks of 16: split evenly, with a part that has nothing left, and into more parts than blocks."""
    use(monkeypatch, Tile(16, 16, 16, 4, 1, SPLIT=split))
    check(conv_wgrad, operands("partial_last_tile", True, torch.float16, device))


@pytest.mark.parametrize(("images", "shape", "tile"), mostly_slow(random_tiles("conv_wgrad", 40), 0, 1), ids=str)
def test_any_tile_matches_float64(device, monkeypatch, images, shape, tile):
    """With a prologue, and in the kernel without one where the tile has the activation stored."""
    use(monkeypatch, tile)
    check(conv_wgrad, operands((images, shape), True, torch.float16, device), tile.prologue)


def test_the_random_tiles_are_of_every_kind():
    found = [tile for *_, tile in random_tiles("conv_wgrad", 40)]
    kinds = {(tile.descriptors, tile.prologue, tile.TAPS, tile.SPLIT > 1) for tile in found}
    assert {(True, prologue, 3, True) for prologue in tiles.PROLOGUES} <= kinds
    assert {(False, "fp16x2", 3), (True, "fp16x2", 1)} <= {kind[:3] for kind in kinds}


@pytest.mark.parametrize("prologue", ["fp32", "fp16x2"])
@pytest.mark.parametrize("sigmas", [400.0, -400.0])
def test_a_mean_of_many_sigmas_costs_no_digits(device, monkeypatch, sigmas, prologue):
    """Of x as it is stored, whose own digits are then a quarter of sigma."""
    use(monkeypatch, Tile(16, 16, 32, 4, 1, descriptors=True, SPLIT=2, TAPS=3, prologue=prologue))
    x, dy, size, stride, *_ = operands("one_image_one_tile", False, torch.float16, device)
    sigma = 2.0 ** torch.arange(-8, 8, device=device)[:, None, None] / 16
    x = ((x + sigmas) * sigma).half().contiguous(memory_format=torch.channels_last)
    gamma, beta = affine(16, device)
    scale = gamma / sigma.flatten()
    check(conv_wgrad, [x, dy, size, stride, scale, beta - sigmas * gamma], prologue)


@pytest.mark.slow
def test_repeats_bit_for_bit(device, monkeypatch):
    use_tile(monkeypatch, "stride2")
    arguments = operands("stride2", True, torch.float16, device)
    assert torch.equal(conv_wgrad(*arguments), conv_wgrad(*arguments))


@pytest.mark.parametrize("ahead", [1, 4, 8])
@pytest.mark.parametrize("split", [1, 5, 8])
def test_parts_are_added_in_order(device, split, ahead):
    check_order(conv_wgrad_reduce_kernel, split, ahead, device)


TILES = {
    "pointers": Tile(16, 32, 16, 4, 1, SPLIT=2),
    "pointers_fp16x2": Tile(16, 32, 16, 4, 1, SPLIT=2, prologue="fp16x2"),
    "descriptors": Tile(16, 32, 16, 4, 1, True, SPLIT=2, TAPS=3),
    "descriptors_fp16x2": Tile(16, 32, 16, 4, 1, True, SPLIT=2, TAPS=3, prologue="fp16x2"),
}


@pytest.mark.parametrize("tile", mostly_slow(TILES, "pointers", "descriptors_fp16x2"))
def test_nan_is_passed_on(device, monkeypatch, tile):
    """A NaN of x stands, by the statistics of its channel, for a channel of NaN."""
    use(monkeypatch, TILES[tile])
    x, dy, *rest = operands("one_image_one_tile", False, torch.float16, device)
    for which in range(2):
        given = affine(16, device)
        given[which][3] = torch.nan
        dw = conv_wgrad(x, dy, *rest[:2], *given)
        assert dw[:, 3].isnan().all()
        assert not dw[:, :3].isnan().any()


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("tile", mostly_slow(TILES, "pointers", "descriptors_fp16x2"))
def test_what_is_not_finite_stays_in_its_channel(device, monkeypatch, tile, value):
    """A pixel of x whose neighbours are all inside reaches every tap; one of dy every channel."""
    use(monkeypatch, TILES[tile])
    for which in range(2):
        arguments = operands("one_image_one_tile", True, torch.float16, device)
        arguments[which][0, 3, 1, 4] = value
        dw, reference = conv_wgrad(*arguments), conv_wgrad_reference(*arguments)
        # Of dy an infinity is met by zeros of relu, which makes NaN in either.
        assert torch.equal(dw.isfinite(), reference.isfinite())
        bad = dw[:, 3] if which == 0 else dw[3]
        assert not bad.isfinite().any()
        assert dw.isfinite().sum() == dw.numel() - bad.numel()
        if which == 0 and value == torch.inf:
            assert torch.equal(dw[:, 3], reference[:, 3])


@pytest.mark.slow
def test_registration(device):
    for case, prologue in (("stride2_odd", True), ("projection_1x1", False)):
        torch.library.opcheck(conv_wgrad, operands(case, prologue, torch.float16, device))


def test_compiles_into_one_graph(device):
    arguments = operands("stride2", True, torch.float16, device)
    compiled = torch.compile(lambda *a: conv_wgrad(*a) * 2, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(compiled, conv_wgrad(*arguments) * 2)


@pytest.mark.parametrize("case", ["odd_map", "stride2_odd", "projection_1x1"])
def test_flops_are_pytorchs(device, case):
    counts = []
    for wgrad in (conv_wgrad, conv_wgrad_reference):
        with FlopCounterMode(display=False) as counter:
            wgrad(*operands(case, True, torch.float32, device))
        counts.append(counter.get_total_flops())
    n, shape = CASES[case]
    assert counts[0] == counts[1] == shape.flops(n)


def test_cost():
    """64x32x32 to 64, 512 images, fp16: 38.7 GFLOP; x and dy are 67.1 MB each, dw 147 kB."""
    x = torch.empty(512, 64, 32, 32, dtype=torch.float16, device="meta")
    c = torch.empty(64, device="meta")
    rows = 512 * 32 * 32
    expected = Cost(2 * rows * 64 * 64 * 9, 2 * rows * 64 * 2 + 2 * 64 * 4 + 64 * 64 * 9 * 4)
    assert conv_wgrad_cost(x, x, 3, 1, c, c) == expected


@pytest.mark.parametrize(("split", "parts"), [(1, 0), (8, 8), (10**6, 2 * 32 * 32 // 32)])
def test_cost_of_the_parts(monkeypatch, split, parts):
    """They are written and read, and as many as there are blocks of 32 pixels at the most."""
    x, dw = torch.empty(2, 64, 32, 32, dtype=torch.float16, device="meta"), 64 * 64 * 9 * 4
    use(monkeypatch, Tile(64, 64, 32, 4, 1, SPLIT=split))
    assert conv_wgrad_cost(x, x, 3).bytes == 2 * x.numel() * 2 + dw + 2 * parts * dw


def test_cost_of_a_stored_activation(monkeypatch):
    x, c = torch.empty(2, 64, 32, 32, dtype=torch.float16, device="meta"), torch.empty(64, device="meta")
    recomputed, plain = conv_wgrad_cost(x, x, 3, 1, c, c), conv_wgrad_cost(x, x, 3)
    use(monkeypatch, Tile(64, 64, 32, 4, 1, prologue="stored"))
    assert conv_wgrad_cost(x, x, 3, 1, c, c) == recomputed + bn_apply_cost(x, c, c)
    assert conv_wgrad_cost(x, x, 3) == plain


X, DY, C16 = (2, 16, 4, 4), (2, 32, 4, 4), torch.ones(16)


@pytest.mark.skipif(not jit.INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param((nhwc(*X)[:0], nhwc(*DY)[:0], 3), ValueError, "x has shape .* non-empty", id="zero_images"),
        pytest.param((nhwc(*X).contiguous(), nhwc(*DY), 3), ValueError, "x .* channels_last", id="nchw"),
        pytest.param((nhwc(*X), nhwc(*DY).contiguous(), 3), ValueError, "dy .* channels_last", id="dy_nchw"),
        pytest.param((nhwc(*X), nhwc(*DY).float(), 3), TypeError, "dy is torch.float32, expected x's", id="dy_dtype"),
        pytest.param((nhwc(*X), nhwc(*DY), 3, 2), ValueError, r"dy has shape .* \[2, 32, 2, 2\]", id="dy_at_stride_2"),
        pytest.param((nhwc(*X), nhwc(3, 32, 4, 4), 3), ValueError, "dy has shape", id="images_differ"),
        pytest.param((nhwc(*X), nhwc(*DY), 5), ValueError, "5 pixels wide", id="filter_5x5"),
        pytest.param((nhwc(2, 8, 4, 4), nhwc(*DY), 3), ValueError, "C is 8 .* multiple of 16", id="c_of_8"),
        pytest.param((nhwc(*X), nhwc(*DY), 3, 1, C16), ValueError, "go together", id="scale_alone"),
        pytest.param((nhwc(*X), nhwc(*DY), 3, 1, C16, C16[:8]), ValueError, "shift has shape", id="shift_shape"),
    ],
)
def test_contract(arguments, error, message):
    with pytest.raises(error, match=message):
        conv_wgrad(*arguments)


def test_more_elements_than_32_bit_offsets_reach(device):
    x = torch.empty(1, 2**14, 1, 1, dtype=torch.float16, device=device, memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"parts .* has 2415919104 elements"):
        conv_wgrad(x, x, 3)
