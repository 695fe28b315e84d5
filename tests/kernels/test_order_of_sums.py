"""The results of the convolutions on GPUs without tensor-memory access are held to the bit: the order of their sums is.

A step's operands are small integers times a power of two of the step's own. So a step's product is exact, whoever
computes it, and what fp32 loses depends on the order in which the steps are added. Here it is written down: taps before
channels, and of the weights' gradient pixels within a part before parts.
"""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from block_cases import no_overflow_checks  # noqa: F401
from kernel_checks import mostly_slow
from torch import Tensor
from torch.nn.functional import conv2d
from torch.nn.grad import conv2d_input, conv2d_weight

from kernels import jit, tiles
from kernels.conv_dgrad import conv_dgrad
from kernels.conv_fprop import conv_fprop
from kernels.conv_shape import ConvShape
from kernels.conv_wgrad import conv_wgrad

pytestmark = [
    pytest.mark.skipif(not jit.INTERPRETED, reason="a GPU rounds within a step, too, in fp32"),
    pytest.mark.usefixtures("no_overflow_checks"),
]
SHAPES = pytest.mark.parametrize(
    "shape",
    mostly_slow(
        [
            ConvShape(128, 128, 8, 8),
            ConvShape(128, 64, 5, 7),
            ConvShape(128, 128, 8, 8, stride=2),
            ConvShape(128, 128, 8, 8, R=1, stride=2),
        ],
        1,
    ),
    ids=str,
)
IMAGES = 3


def default(op: str, shape: ConvShape) -> tiles.Tile:
    """fp16 tiles of an A100."""
    return tiles.default_tile(op, shape, torch.float16, (8, 0))


@pytest.fixture(autouse=True)
def tiles_of_fp16(monkeypatch):
    """The fp16 tiles for operands in fp32, whose results show every bit of a sum; wgrad with few parts."""

    def tile(op, shape, dtype, gpu):
        return replace(default(op, shape), SPLIT=3) if op == "conv_wgrad" else default(op, shape)

    monkeypatch.setattr(tiles, "tile", tile)


def integers(*extents: int, seed: int) -> Tensor:
    drawn = torch.randint(-3, 4, extents, generator=torch.Generator().manual_seed(seed)).float()
    return drawn.contiguous(memory_format=torch.channels_last)


def powers(count: int) -> Tensor:
    """A power of two for each step, so far apart that fp32 cannot hold a sum of several."""
    return 2.0 ** torch.tensor([0, -26, -13])[torch.arange(count) % 3]


def in_order(terms: Iterable[Tensor]) -> Tensor:
    """The fp32 sum of exact fp64 terms, one after the other."""
    total = 0.0
    for term in terms:
        assert torch.equal(term.float().double(), term)
        total = total + term.float()
    return total


def weights(shape: ConvShape, side: int) -> tuple[Tensor, list[Tensor]]:
    """w, and its fp64 parts of a step each, zero elsewhere: taps, and within a tap blocks of 64 channels of a side."""
    w = integers(shape.K, shape.C, shape.R, shape.R, seed=1).double()
    blocks = [(tap, first) for tap in range(shape.R**2) for first in range(0, w.shape[side], 64)]
    steps = []
    for (tap, first), power in zip(blocks, powers(len(blocks)).tolist(), strict=True):
        at = [slice(None), slice(None), tap // shape.R, tap % shape.R]
        at[side] = slice(first, first + 64)
        steps.append(torch.zeros_like(w))
        steps[-1][tuple(at)] = w[tuple(at)] * power
    return sum(steps).float().contiguous(memory_format=torch.channels_last), steps


@SHAPES
@pytest.mark.parametrize("prologue", [False, True], ids=["plain", "prologue"])
def test_fprop(shape, prologue):
    x, (w, steps) = integers(IMAGES, shape.C, shape.H, shape.W, seed=0), weights(shape, 1)
    scale, shift = (torch.full((shape.C,), 2.0), integers(1, shape.C, 1, 1, seed=2).flatten())
    residual = integers(IMAGES, shape.K, shape.P, shape.Q, seed=3)
    a = torch.relu(2 * x + shift[:, None, None]) if prologue else x
    y, _ = conv_fprop(x, w, shape.stride, *((scale, shift) if prologue else (None, None)), residual)
    terms = [conv2d(a.double(), step, stride=shape.stride, padding=shape.R // 2) for step in steps]
    assert torch.equal(y, in_order([*terms, residual.double()]))
    assert not torch.equal(y, in_order([residual.double(), *terms]))
    assert len(terms) < 3 or not torch.equal(y, in_order([*terms[::-1], residual.double()]))


@SHAPES
def test_dgrad(shape):
    dy, (w, steps) = integers(IMAGES, shape.K, shape.P, shape.Q, seed=0), weights(shape, 0)
    shortcut, x = (integers(IMAGES, shape.C, shape.H, shape.W, seed=seed) for seed in (2, 3))
    ones, zeros = torch.ones(shape.C), torch.zeros(shape.C)
    dz, _ = conv_dgrad(dy, w, shape.H, shape.W, shape.stride, shortcut, x, ones, zeros, zeros)
    terms = [conv2d_input(x.shape, step, dy.double(), shape.stride, shape.R // 2) for step in steps]
    assert torch.equal(dz, in_order([*terms, shortcut.double()]) * (x > 0))
    if shape.R == 3:  # a strided 1x1 filter has two steps for each pixel at most
        assert not torch.equal(dz, in_order([*terms[::-1], shortcut.double()]) * (x > 0))


@pytest.mark.parametrize(
    "shape", mostly_slow([ConvShape(64, 64, 4, 4), ConvShape(128, 64, 7, 5, stride=2)], 0), ids=str
)
def test_wgrad(shape):
    """3 parts of 5 steps of 64 pixels. At stride 2 the pixels of a step are of one parity, as dy's are."""
    n = 15 * 64 // (shape.P * shape.Q)
    x, dy = integers(n, shape.C, shape.H, shape.W, seed=0), integers(n, shape.K, shape.P, shape.Q, seed=1)
    image, h, v = torch.meshgrid(*map(torch.arange, (n, shape.H, shape.W)), indexing="ij")
    step = ((image * shape.P + h // shape.stride) * shape.Q + v // shape.stride) // 64
    x *= powers(15)[step][:, None]
    dw = conv_wgrad(x, dy, 3, shape.stride)
    terms = [
        conv2d_weight(torch.where((step == i)[:, None], x, 0.0).double(), dw.shape, dy.double(), shape.stride, 1)
        for i in range(15)
    ]
    assert torch.equal(dw, in_order(in_order(terms[i : i + 5]).double() for i in range(0, 15, 5)))
    assert not torch.equal(dw, in_order(terms))


@pytest.mark.parametrize(
    ("op", "shape", "words"),
    [
        ("conv_fprop", ConvShape(64, 64, 32, 32), "128x64x64 4 warps 3 stages pointers"),
        ("conv_fprop", ConvShape(64, 128, 32, 32, R=1, stride=2), "128x64x64 4 warps 3 stages pointers"),
        ("conv_fprop", ConvShape(512, 512, 4, 4), "128x64x64 4 warps 3 stages pointers"),
        ("conv_dgrad", ConvShape(64, 64, 32, 32), "128x64x64 4 warps 3 stages pointers"),
        ("conv_dgrad", ConvShape(256, 512, 8, 8), "128x64x64 4 warps 3 stages pointers"),
        ("conv_wgrad", ConvShape(64, 64, 32, 32), "64x64x64 4 warps 3 stages pointers split 56"),
        ("conv_wgrad", ConvShape(64, 128, 32, 32, R=1, stride=2), "64x128x64 4 warps 3 stages pointers split 512"),
        ("conv_wgrad", ConvShape(256, 256, 8, 8), "128x128x64 4 warps 3 stages pointers split 14"),
    ],
    ids=str,
)
def test_default_tiles(op, shape, words):
    """The sizes of a step and of a part decide the order, too."""
    assert str(default(op, shape)) == words
