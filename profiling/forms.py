"""The forms of a product that tuning tries beside tiles in rows."""

from collections.abc import Iterator
from dataclasses import replace

from kernels.conv_shape import ConvShape, lines_fit
from kernels.tiles import Tile

RESIDENT = 64 * 1024
"""Elements of fp16 that the taps of lines and the three boxes of a line may take of a block's 227 KB."""


def forms(op: str, tile: Tile, shape: ConvShape) -> Iterator[Tile]:
    """For dgrad the other forms of a tile of three stages: columns of the large blocks, lines whose taps fit."""
    if op != "conv_dgrad" or not tile.descriptors or tile.num_stages != 3:
        return
    if tile.BLOCK_N >= 64 and tile.BLOCK_M * tile.BLOCK_N >= 128 * 128:
        yield replace(tile, form="columns", num_stages=2 if tile.num_warps == 4 else 4)
    for block_n in (64, 32):
        lines = replace(tile, BLOCK_M=16 * tile.num_warps, BLOCK_N=block_n, form="lines", num_stages=2)
        fits = (9 * block_n + 3 * lines.BLOCK_M) * shape.K <= RESIDENT and shape.C % block_n == 0
        if fits and shape.R == 3 and shape.stride == 1 and lines_fit(lines.BLOCK_M, shape):
            yield lines
