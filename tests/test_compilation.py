import threading

import pytest
import torch

from kernels import reference
from model.compilation import compile_kernels
from model.network import ResNet, ResNet9


class Watched:
    """The reference ops, and who called them with what; `fails` says which of them raise."""

    stem = staticmethod(reference.stem)

    def __init__(self, fails: bool = False):
        self.calls, self.backward, self.fails = [], [], fails

    def preact_block(self, x, statistics, bn1, w1, bn2, w2, w3, stride):
        self.watch(x, w1, w3 is not None, stride)
        return reference.preact_block(x, statistics, bn1, w1, bn2, w2, w3, stride)

    def conv_bn_relu(self, x, w, bn, pool=None, residual=None):
        self.watch(x, w, residual is not None, pool)
        return reference.conv_bn_relu(x, w, bn, pool, residual)

    def watch(self, x, w, other, how):
        if self.fails:
            raise RuntimeError("out of resource")
        assert x.is_contiguous(memory_format=torch.channels_last)
        self.calls.append((x.shape[1], x.shape[2], w.shape[0], other, how))
        thread = threading.get_ident()
        x.register_hook(lambda g: self.backward.append(thread == threading.get_ident()))


BLOCKS = {  # channels, side of the map, filters, has a projection or a residual, stride or pool
    ResNet: [
        (4, 32, 4, False, 1),
        (4, 32, 6, True, 2),
        (6, 16, 6, False, 1),
        (6, 16, 8, True, 2),
        (8, 8, 8, False, 1),
        (8, 8, 8, True, 2),
        (8, 4, 8, False, 1),
    ],
    ResNet9: [
        (4, 32, 6, False, "last"),
        (6, 16, 6, False, None),
        (6, 16, 6, True, None),
        (6, 16, 8, False, "last"),
        (8, 8, 8, False, "last"),
        (8, 4, 8, False, None),
        (8, 4, 8, True, None),
    ],
}


def networks(build, ops):
    with torch.device("meta"):
        shapes = build((8, 24, 16, 16))
    return build((8, 24, 16, 16), ops).to(memory_format=torch.channels_last), shapes


@pytest.mark.parametrize("build", [ResNet, ResNet9])
def test_every_different_block_runs_forward_and_backward_once(build):
    ops = Watched()
    compile_kernels(*networks(build, ops), torch.zeros(2, 3, 32, 32))
    assert sorted(map(str, ops.calls)) == sorted(map(str, BLOCKS[build]))
    assert ops.backward == [True] * len(BLOCKS[build]), "in the thread of its forward"


def test_a_kernel_that_fails_is_left_for_the_step():
    network, shapes = networks(ResNet9, Watched(fails=True))
    compile_kernels(network, shapes, torch.zeros(2, 3, 32, 32))
    with pytest.raises(RuntimeError, match="out of resource"):
        network(torch.zeros(2, 3, 32, 32))
