"""The layers that the convolution kernels compute, their names, and boxes of pixels."""

import itertools

import pytest
import torch

from kernels.conv_shape import RESNET9_LAYERS, RESNET_LAYERS, ConvShape, box, boxes_fit, parse
from kernels.tiles import OPS, default_tile

LAYERS = RESNET_LAYERS + RESNET9_LAYERS


def test_a_shape_reads_back_as_printed():
    assert [parse(str(shape)) for shape in LAYERS] == list(LAYERS)
    assert str(ConvShape(64, 128, 32, 32, stride=2)) == "64x32x32-128x3x3-s2"


@pytest.mark.parametrize("text", ["", "64x32x32-128x3x3", "64x32-128x3x3-s1", "64x32x32-128x3x1-s1", "64x8x8-64x3x3-2"])
def test_text_that_is_no_shape_is_named(text):
    with pytest.raises(ValueError, match=f"shape is '{text}', expected CxHxW"):
        parse(text)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("height", [1, 2, 5, 8])
def test_the_map_of_y_is_the_librarys(height, size, stride):
    shape = ConvShape(16, 16, height, 7, size, stride)
    x, w = torch.empty(1, 16, height, 7, device="meta"), torch.empty(16, 16, size, size, device="meta")
    y = torch.nn.functional.conv2d(x, w, stride=stride, padding=size // 2)
    assert y.shape[2:] == (shape.P, shape.Q)


def test_a_box_is_consecutive_pixels():
    """Every box of a tiling lies where the tile's rows do: TN whole maps, or TH whole lines of one."""
    sizes = itertools.product((16, 32, 128, 1024), (1, 2, 3, 4, 5, 8, 32), (1, 2, 3, 4, 7, 8, 32))
    found = [(rows, p, q, *box(rows, p, q)) for rows, p, q in sizes if box(rows, p, q)]
    assert len(found) > 50
    for rows, p, q, images, lines in found:
        assert images * lines * q == rows
        assert (images == 1 and p % lines == 0) or lines == p
        assert all(side & (side - 1) == 0 for side in (images, lines, q)), "a tensor's sides are powers of two"
    assert box(128, 5, 7) is box(128, 24, 8) is box(16, 32, 32) is None


def test_every_layer_of_the_networks_runs_with_descriptors_on_hopper():
    for shape, op in itertools.product(LAYERS, OPS):
        tile = default_tile(op, shape, torch.float16, (9, 0))
        assert boxes_fit(tile.BLOCK_K if op == "conv_wgrad" else tile.BLOCK_M, shape)
    assert not boxes_fit(128, ConvShape(16, 16, 5, 7))
    assert not boxes_fit(16, ConvShape(16, 16, 7, 7, stride=2)), "x has no view of pairs of lines"
