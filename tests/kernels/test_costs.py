"""Costs of ops: passes over activations, and what each adds to them."""

import pytest
import torch
from block_cases import prefer_stored
from checks import augment as augments
from checks import sgd as updates
from checks.ops import backward_of, operands
from conv_cases import use

pytest.importorskip("triton")

from kernels import fused_preact, tiles
from kernels.augment import augment_cost
from kernels.bn_apply import bn_apply, bn_apply_cost
from kernels.bn_backward import bn_backward_apply_cost, bn_backward_reduce_cost, bn_coefficients_cost
from kernels.bn_relu import bn_relu_cost
from kernels.bn_stats import bn_finalize_cost, bn_stats, bn_stats_add_cost, bn_stats_cost, reduction_grid
from kernels.conv_dgrad import conv_dgrad_cost
from kernels.conv_fprop import conv_fprop_cost
from kernels.conv_shape import ConvShape
from kernels.conv_wgrad import conv_wgrad_cost
from kernels.cost import Cost, nbytes
from kernels.fused_conv_bn_relu import conv_bn_relu_backward_cost, conv_bn_relu_cost
from kernels.metered_cost import metered_cost
from kernels.sgd import sgd_cost
from kernels.tiles import Tile


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x


def vectors(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.float32)


def partials_of(op: str, shape: ConvShape) -> int:
    """Tiles of fp16 operands of 512 images at the default tile, each of BLOCK_M of the pixels of y."""
    block_m = tiles.tile(op, shape, torch.float16, tiles.gpu_of(torch.device("meta"))).BLOCK_M
    return 512 * shape.P * shape.Q // block_m


X, POOLED, DY = meta(512, 64, 32, 32), meta(512, 64, 16, 16), meta(512, 128, 16, 16)
C, NORM, COEFFICIENTS = vectors(64), vectors(5, 64), vectors(4, 64)
N, PASS = X.numel(), 2 * X.numel()  # elements, and bytes of a pass over them
TILES, STEPS = reduction_grid(512 * 32 * 32, 64)
PARTIALS = vectors(3, TILES, 64)
W, W2 = meta(64, 64, 3, 3), meta(128, 64, 3, 3)
LAYER, STRIDED = ConvShape(64, 64, 32, 32), ConvShape(64, 128, 32, 32, stride=2)
OF_FPROP, OF_DGRAD = (
    p * 64 * 4 for p in (3 * partials_of("conv_fprop", LAYER), 8 * partials_of("conv_dgrad", STRIDED))
)
AUGMENT, SGD = augments.problem(7, 600, 512, 32, 32, 4, 8), updates.problem
COSTS = {
    "augment": (augment_cost(*AUGMENT, torch.float16), Cost(2 * 512 * 3072, 512 * (3072 + 6144 + 8 + 20) + 24)),
    "bn_apply": (bn_apply_cost(X, C, C), Cost(3 * N, 2 * PASS + 512)),
    "bn_apply_residual": (bn_apply_cost(X, C, C, X), Cost(4 * N, 3 * PASS + 512)),
    "bn_apply_pool": (bn_apply_cost(X, C, C, None, True), Cost(3 * N, PASS + PASS // 4 + 512)),
    "bn_stats": (bn_stats_cost(X), Cost(4 * N, PASS + 12 * TILES * 64)),
    "bn_stats_add": (bn_stats_add_cost(X, X), Cost(5 * N, 3 * PASS + 12 * TILES * 64)),
    "bn_finalize": (bn_finalize_cost(PARTIALS, C, C, 1e-5), Cost(6 * TILES * 64, 12 * TILES * 64 + 7 * 256)),
    "bn_relu": (bn_relu_cost(X, vectors(3, 1, 64), C, C, 1e-5), Cost(3 * N + 6 * 64, 2 * PASS + 512 + 10 * 256)),
    "bn_backward_reduce": (bn_backward_reduce_cost(X, X, NORM), Cost(6 * N, 2 * PASS + 5 * 256 + 8 * TILES * 64)),
    "bn_coefficients": (
        bn_coefficients_cost(vectors(2, TILES, 64), NORM, 1.0),
        Cost(2 * TILES * 64, 8 * TILES * 64 + 9 * 256),
    ),
    "bn_backward_apply": (bn_backward_apply_cost(X, X, NORM, COEFFICIENTS), Cost(7 * N, 3 * PASS + 9 * 256)),
    "bn_backward_apply_pool": (
        bn_backward_apply_cost(POOLED, X, NORM, COEFFICIENTS, True),
        Cost(7 * N, 2 * PASS + PASS // 4 + 9 * 256),
    ),
    "conv_fprop": (
        conv_fprop_cost(X, W, 1, C, C, X),
        Cost(LAYER.flops(512), 3 * PASS + W.nbytes + 512 + OF_FPROP),
    ),
    "conv_fprop_no_statistics": (
        conv_fprop_cost(X, W, statistics=False),
        Cost(LAYER.flops(512), 2 * PASS + W.nbytes),
    ),
    "conv_dgrad": (  # four classes of pixels, each with as many tiles as dy has
        conv_dgrad_cost(DY, W2, 32, 32, 2, X, X, C, C, C),
        Cost(STRIDED.flops(512), DY.nbytes + 3 * PASS + W2.nbytes + 3 * 256 + OF_DGRAD),
    ),
    "conv_wgrad": (conv_wgrad_cost(X, X, 3, 1, C, C), Cost(LAYER.flops(512), 2 * PASS + 512 + 64 * 64 * 9 * 4)),
    "sgd": (sgd_cost(**SGD(1000, 0.9, "cpu")), Cost(9000, 2 * 3 * 4000 + 2000)),
    "sgd_without_momentum": (sgd_cost(**SGD(1000, 0.0, "cpu", None)), Cost(5000, 2 * 2 * 4000)),
    "sum": (Cost(1, 2) + Cost(10, 20), Cost(11, 22)),
}


@pytest.mark.parametrize("op", COSTS)
def test_cost(op):
    found, expected = COSTS[op]
    assert found == expected


def test_costs_are_in_passes_by_hand():
    """A pass of 64x32x32 maps of 512 images in fp16 is 67.1 MB; tiles are of 5 programs on each of 132 SMs."""
    assert round(PASS / 1e6, 1) == 67.1
    assert LAYER.flops(512) == 2 * 512 * 32 * 32 * 64 * 64 * 9
    assert STRIDED.flops(512) == 2 * 512 * 16 * 16 * 128 * 64 * 9
    assert (TILES - 1) * STEPS * 32 < 512 * 32 * 32 <= TILES * STEPS * 32
    assert TILES <= 660
    assert nbytes(torch.zeros(3, 4, dtype=torch.float16), None, torch.zeros(5)) == 3 * 4 * 2 + 5 * 4


@pytest.mark.parametrize(("split", "parts"), [(1, 0), (8, 8), (10**6, 2 * 32 * 32 // 32)])
def test_parts_of_wgrad_are_written_and_read(monkeypatch, split, parts):
    """There are as many as blocks of 32 pixels at the most."""
    x, dw = meta(2, 64, 32, 32), 64 * 64 * 9 * 4
    use(monkeypatch, Tile(64, 64, 32, 4, 1, SPLIT=split))
    assert conv_wgrad_cost(x, x, 3).bytes == 2 * x.nbytes + dw + 2 * parts * dw


def test_storing_an_activation_first_costs_the_pass(monkeypatch):
    recomputed, plain = conv_wgrad_cost(X, X, 3, 1, C, C), conv_wgrad_cost(X, X, 3)
    use(monkeypatch, Tile(64, 64, 32, 4, 1, prologue="stored"))
    assert conv_wgrad_cost(X, X, 3) == plain
    assert conv_wgrad_cost(X, X, 3, 1, C, C) == recomputed + bn_apply_cost(X, C, C)
    affine = Cost(0, 2 * 256)
    assert conv_fprop_cost(X, W, 1, C, C) == conv_fprop_cost(X, W) + bn_apply_cost(X, C, C) + affine


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_metered_cost_is_the_sum_of_the_ops_that_are_called(device):
    """At the shapes that they are called with; PyTorch's own operations are not counted."""
    x = torch.empty(2, 16, 8, 8, dtype=torch.float16, device=device).to(memory_format=torch.channels_last)
    c = torch.empty(16, device=device)
    expected = bn_apply_cost(x, c, c, pool=True) + bn_stats_cost(meta(2, 16, 4, 4))
    assert metered_cost(lambda x, c: bn_stats(bn_apply(x, c, c, pool=True) * 2), x, c) == expected


def test_a_layer_with_library_convolutions_makes_fourteen_passes():
    """Six by the library's convolution (fprop, dgrad and wgrad read or write two each), eight by the kernels here."""
    rows = ("bn_stats", "bn_apply", "bn_backward_reduce", "bn_backward_apply")
    assert 6 + sum(COSTS[op][0].bytes for op in rows) / PASS == pytest.approx(14, rel=2e-3)


def test_a_resnet9_layer_makes_four_and_nine_passes():
    x, w, vector, flops = meta(512, 128, 16, 16), vectors(128, 128, 3, 3), vectors(128), 2 * 512 * 256 * 128 * 128 * 9
    forward = conv_bn_relu_cost(x, w, vector, vector, None, 1e-5, None, None, False)
    backward = conv_bn_relu_backward_cost(x, x, x, vectors(5, 128), w, None, False, False)
    assert forward.bytes / x.nbytes == pytest.approx(4, rel=2e-2)
    assert backward.bytes / x.nbytes == pytest.approx(9, rel=2e-2)
    assert flops < forward.flops < 1.01 * flops
    assert 2 * flops < backward.flops < 2.01 * flops


PROJECTION = {"k": 128, "stride": 2}


@pytest.mark.parametrize(
    ("stored", "options", "forward", "backward"),
    [
        ((), {}, 5, 17),
        # Two activations, each written and read again; what forward has stored, backward does not store again.
        (("conv_fprop",), {}, 9, 17),
        (("conv_wgrad",), {}, 5, 21),
        (("conv_fprop", "conv_wgrad"), {}, 9, 17),
        # h, y and the projection are each half of x, of which conv3 reads a quarter. Forward: conv1 1.5, conv3 0.75,
        # conv2 1.5. Backward: dgrads of conv2 1.5, of conv3 0.5 and a quarter of x, of conv1 0.5, x, that quarter and
        # dz; bn applies 1.5 and 3; wgrads 1, 1.5 and 0.75.
        ((), PROJECTION, 3.75, 1.5 + 0.75 + 2.75 + 4.5 + 3.25),
    ],
    ids=["identity", "fprop_stored", "wgrad_stored", "both_stored", "projection"],
)
def test_passes_of_a_preact_block(monkeypatch, stored, options, forward, backward):
    prefer_stored(monkeypatch, *stored)
    given = tuple(operands("preact_block", "meta", images=512, **{"c": 64, "k": 64, "size": 32} | options).values())
    kept = backward_of(given, *fused_preact._forward(*given))
    costs = fused_preact.preact_block_cost(*given), fused_preact.preact_block_backward_cost(*kept)
    assert [cost.bytes / PASS for cost in costs] == [pytest.approx(passes, rel=1e-2) for passes in (forward, backward)]
    assert [t.numel() > 0 for t in kept[5:7]] == [len(stored) == 2] * 2
    if not options:
        flops = 2 * LAYER.flops(512)
        assert flops < costs[0].flops < 1.01 * flops
        assert 2 * flops < costs[1].flops < 2.01 * flops
