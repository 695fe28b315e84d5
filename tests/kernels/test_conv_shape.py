"""The layers that the convolution kernels compute, their names, and boxes of pixels."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.conv_shape import RESNET9_LAYERS, RESNET_LAYERS, ConvShape, box, boxes_fit, parse
from kernels.tiles import OPS, default_tile
from model.network import ResNet, ResNet9


class Convolutions(TorchDispatchMode):
    """The layers of the convolutions that run under it."""

    def __init__(self):
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.convolution.default:
            x, w, _, stride = args[:4]
            self.seen.append((x.shape[1], w.shape[0], *x.shape[2:], w.shape[2], stride[0]))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize(("network", "layers"), [(ResNet, RESNET_LAYERS), (ResNet9, RESNET9_LAYERS)])
def test_the_layers_are_the_networks(network, layers):
    with torch.device("meta"), Convolutions() as convolutions:
        network()(torch.empty(1, 3, 32, 32))
    traced = {ConvShape(*extents) for extents in convolutions.seen if extents[0] > 3}
    assert traced == set(layers)
    assert len(layers) == len(set(layers))


def test_a_shape_reads_back_as_printed():
    for shape in RESNET_LAYERS + RESNET9_LAYERS:
        assert parse(str(shape)) == shape
    assert str(ConvShape(64, 128, 32, 32, stride=2)) == "64x32x32-128x3x3-s2"


@pytest.mark.parametrize("text", ["", "64x32x32-128x3x3", "64x32-128x3x3-s1", "64x32x32-128x3x1-s1", "64x8x8-64x3x3-2"])
def test_what_is_no_shape_is_named(text):
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
    found = 0
    for rows in (16, 32, 128, 1024):
        for p in (1, 2, 3, 4, 5, 8, 32):
            for q in (1, 2, 3, 4, 7, 8, 32):
                sides = box(rows, p, q)
                if sides is None:
                    continue
                images, lines = sides
                assert images * lines * q == rows
                assert (images == 1 and p % lines == 0) or lines == p
                assert all(side & (side - 1) == 0 for side in (images, lines, q)), "a tensor's sides are powers of two"
                found += 1
    assert found > 50
    assert box(128, 5, 7) is box(128, 24, 8) is box(16, 32, 32) is None


def test_every_layer_of_the_networks_runs_with_descriptors_on_hopper():
    for shape in RESNET_LAYERS + RESNET9_LAYERS:
        for op in OPS:
            tile = default_tile(op, shape, torch.float16, (9, 0))
            assert boxes_fit(tile.BLOCK_K if op == "conv_wgrad" else tile.BLOCK_M, shape)
    assert not boxes_fit(128, ConvShape(16, 16, 5, 7))
    assert not boxes_fit(16, ConvShape(16, 16, 7, 7, stride=2)), "x has no view of pairs of lines"
