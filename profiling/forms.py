"""The forms of a product that tuning tries beside tiles in rows."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from kernels.conv_shape import ConvShape, lines_fit
from kernels.tiles import Tile

RESIDENT = 64 * 1024
"""Elements of fp16 that the taps of lines and the three boxes of a line may take of a block's 227 KB."""


def forms(op: str, tile: Tile, shape: ConvShape, dtype: torch.dtype) -> Iterator[Tile]:
    """For fprop and dgrad the other forms of a tile of three stages: columns of the large blocks, lines whose taps fit.

    fprop's columns read a stored activation, and its lines compute it in fp16 where they can.
    """
    if op == "conv_wgrad" or not tile.descriptors or tile.num_stages != 3:
        return
    fprop, k = op == "conv_fprop", shape.C if op == "conv_fprop" else shape.K
    if tile.BLOCK_N >= 64 and 128 * 32 * tile.num_warps <= tile.BLOCK_M * tile.BLOCK_N:  # accumulators, a thread's 128
        stages = 2 if tile.num_warps == 4 else 4
        yield replace(tile, form="columns", num_stages=stages, prologue="stored" if fprop else "fp32")
    for block_n in (64, 32):
        lines = replace(tile, BLOCK_M=16 * tile.num_warps, BLOCK_N=block_n, form="lines", num_stages=2)
        if fprop and dtype == torch.float16:
            lines = replace(lines, prologue="fp16x2")
        fits = (9 * block_n + 3 * lines.BLOCK_M) * k <= RESIDENT and (shape.K if fprop else shape.C) % block_n == 0
        if fits and shape.R == 3 and shape.stride == 1 and lines_fit(lines.BLOCK_M, shape):
            yield lines
