"""The tiles that tuning tries for a convolution: blocks, warps and stages, forms, prologues, taps and parts."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from kernels import tiles
from kernels.conv_shape import ConvShape, boxes_fit, lines_fit
from kernels.tiles import Gpu, Tile
from profiling.device.specifications import LIMITS, MULTIPROCESSORS, REGISTERS

RESIDENT = 96 * 1024
"""Elements of fp16, 192 KB, that the taps of lines and the three boxes of a line may take of a block's 227 KB."""


def candidates(op: str, shape: ConvShape, dtype: torch.dtype, gpu: Gpu) -> list[Tile]:
    """The tile in use, the default, and others around it: at most sixty.

    Blocks and warps vary together. Each pair has a plain version, one with another stage and one with pointers for
    descriptors; for wgrad one with half the parts. fp32 has no matrix instruction, and keeps its default.
    """
    found = [tiles.tile(op, shape, dtype, gpu), tiles.default_tile(op, shape, dtype, gpu.capability)]
    if dtype != torch.float32:
        n, k = (shape.C, shape.K) if op == "conv_dgrad" else (shape.K, shape.C)
        make = _wgrad_candidates(shape, dtype, gpu) if op == "conv_wgrad" else _candidates(n, k, shape, gpu)
        found += [form for tile in make for form in (tile, *_forms(op, tile, shape, dtype)) if _fits(form, dtype, gpu)]
    return list(dict.fromkeys(found))


def _candidates(n: int, k: int, shape: ConvShape, gpu: Gpu) -> Iterator[Tile]:
    """For fprop and dgrad, which cut n channels into BLOCK_N and sum over k others in steps of BLOCK_K."""
    block_k = min(k & -k, 64)
    for block_m, block_n, warps in _blocks((64, 128, 256), _powers(n, 256)):
        descriptors = _descriptors(block_m, shape, gpu)
        plain = Tile(block_m, block_n, block_k, warps, 3, descriptors)
        yield from (plain, replace(plain, num_stages=4), replace(plain, descriptors=False))


def _wgrad_candidates(shape: ConvShape, dtype: torch.dtype, gpu: Gpu) -> Iterator[Tile]:
    """Blocks and taps, each with one wave of parts and with half of it; and the default with other fields varied."""
    default = tiles.default_tile("conv_wgrad", shape, dtype, gpu.capability)
    halves = gpu.capability >= (9, 0) and dtype == torch.float16
    variants = {"prologue": ("fp32", "fp16x2", "stored") if halves else ("stored",), "num_stages": (2, 3, 4)}
    variants |= {
        "SPLIT": (2 * default.SPLIT, max(1, default.SPLIT // 4)),
        "BLOCK_K": (32, 128),
        "descriptors": (False,),
    }
    yield from (replace(default, **{name: value}) for name, values in variants.items() for value in values)
    about = {"descriptors": _descriptors(64, shape, gpu), "prologue": "fp16x2" if halves else "fp32"}
    for taps in (1, 3) if shape.R == 3 and shape.stride == 1 else (1,):
        for block_m, block_n, warps in _blocks(_powers(shape.C, 128), _powers(shape.K, 256), taps):
            registers = taps * block_m * block_n // (32 * warps) + 64
            wave = MULTIPROCESSORS * max(1, REGISTERS // (32 * warps * registers))
            split = max(1, wave // (shape.R**2 // taps * (shape.C // block_m) * (shape.K // block_n)))
            for parts in (split, max(1, split // 2)):
                yield Tile(block_m, block_n, 64, warps, 3, SPLIT=parts, TAPS=taps, **about)


def _blocks(sides_m: Sequence[int], sides_n: Sequence[int], taps: int = 1) -> Iterator[tuple[int, int, int]]:
    """(BLOCK_M, BLOCK_N, warps) with 64 to 128 accumulator registers a thread, or fewer with four warps; three taps may
    have 192."""
    for block_m, block_n, warps in itertools.product(sides_m, sides_n, (4, 8)):
        registers = taps * block_m * block_n // (32 * warps)
        if 64 <= registers <= (128 if taps == 1 else 192) or (registers < 64 and warps == 4):
            yield block_m, block_n, warps


def _powers(channels: int, largest: int) -> list[int]:
    """Powers of two from 64 to `largest` that divide `channels`, or the largest that does."""
    power = min(channels & -channels, largest)
    return [b for b in (64, 128, 256) if b <= power] or [power]


def _descriptors(rows: int, shape: ConvShape, gpu: Gpu) -> bool:
    return gpu.capability >= (9, 0) and boxes_fit(rows, shape)


def _fits(tile: Tile, dtype: torch.dtype, gpu: Gpu) -> bool:
    """Whether the operands in flight fit into a block's shared memory."""
    limits = LIMITS.get(10 * gpu.capability[0] + gpu.capability[1], LIMITS[80])
    operands = (tile.BLOCK_M + tile.TAPS * tile.BLOCK_N) * tile.BLOCK_K * dtype.itemsize * tile.num_stages
    return operands <= limits.block_shared_bytes


def _forms(op: str, tile: Tile, shape: ConvShape, dtype: torch.dtype) -> Iterator[Tile]:
    """For fprop and dgrad the other forms of a tile of three stages: columns of the large blocks, lines whose taps fit.

    fprop's columns read a stored activation; its rows and lines compute it, in fp16 where they can. At 128 channels
    lines of 64 filters load least; a multiprocessor holds two programs of 32 filters in one stage.
    """
    if op == "conv_wgrad" or not tile.descriptors or tile.num_stages != 3:
        return
    fprop, k = op == "conv_fprop", shape.C if op == "conv_fprop" else shape.K
    if fprop and dtype == torch.float16:
        yield replace(tile, prologue="fp16x2")
    if tile.BLOCK_N >= 64 and 128 * 32 * tile.num_warps <= tile.BLOCK_M * tile.BLOCK_N:  # accumulators, a thread's 128
        for stages in (2, 3) if tile.num_warps == 4 else (3, 4):
            yield replace(tile, form="columns", num_stages=stages, prologue="stored" if fprop else "fp32")
    for block_n, stages in ((64, 2), (32, 1)):
        lines = replace(tile, BLOCK_M=16 * tile.num_warps, BLOCK_N=block_n, BLOCK_K=k, form="lines", num_stages=stages)
        if fprop and dtype == torch.float16:
            lines = replace(lines, prologue="fp16x2")
        fits = (9 * block_n + 3 * lines.BLOCK_M) * k <= RESIDENT and (shape.K if fprop else shape.C) % block_n == 0
        if fits and shape.R == 3 and shape.stride == 1 and lines_fit(lines.BLOCK_M, shape):
            yield lines
