"""Problems for the three convolution ops."""

import contextlib
import dataclasses
import random
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from kernel_checks import channels_last
from torch import Tensor

from kernels import tiles
from kernels.conv_shape import ConvShape
from kernels.tiles import FORMS, PROLOGUES, Gpu, Tile

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
CASES = {  # images, layer; tiles of 32 rows and 16 channels unless the case is about the default
    "one_image_one_tile": (1, ConvShape(16, 32, 4, 8)),
    "partial_last_tile": (3, ConvShape(16, 16, 4, 4)),
    "map_smaller_than_filter": (2, ConvShape(16, 16, 1, 1)),
    "odd_map": (2, ConvShape(16, 32, 5, 7)),
    "several_channel_blocks": (2, ConvShape(48, 32, 4, 4)),
    "stride2": (2, ConvShape(32, 16, 8, 8, stride=2)),
    "stride2_odd": (3, ConvShape(16, 32, 5, 7, stride=2)),
    "stride2_one_pixel": (1, ConvShape(16, 16, 1, 1, stride=2)),
    "pointwise": (2, ConvShape(16, 32, 4, 8, R=1)),
    "projection_1x1": (2, ConvShape(32, 16, 8, 8, R=1, stride=2)),
    "projection_1x1_odd": (2, ConvShape(16, 16, 5, 3, R=1, stride=2)),
    "c_not_multiple_of_tile": (2, ConvShape(48, 80, 6, 6)),
}
DEFAULT = {"c_not_multiple_of_tile"}


class Conv(NamedTuple):
    """A convolution op as its tests see it: what may be given to it, and what its results must satisfy.

    `operands(case, options, dtype, device)`; `check(op, case, options, dtype, device, far)`, where x's mean is `far`
    standard deviations from zero. `of_any_tile` are (options, dtype, far).
    """

    op: Callable
    options: tuple[str, ...]
    operands: Callable[..., list]
    check: Callable[..., None]
    of_any_tile: tuple[tuple[str, torch.dtype, float], ...]


def use(monkeypatch, tile: Tile) -> None:
    monkeypatch.setattr(tiles, "tile", lambda *_: tile)


def use_tile(monkeypatch, case: str, descriptors: bool = False, **changes) -> None:
    """Let the ops run with small tiles, so that a small problem has several, or with the default one in its case.

    `changes` are to the small tiles: form, prologue, ...
    """
    default = tiles.default_tile

    def tile(op: str, shape: ConvShape, dtype: torch.dtype, gpu: Gpu) -> Tile:
        if case in DEFAULT:
            return default(op, shape, dtype, gpu.capability)
        blocks, split = ((16, 16, 32), 3) if op == "conv_wgrad" else ((32, 16, 16), 1)
        small = Tile(*blocks, num_warps=4, num_stages=1, descriptors=descriptors, SPLIT=split)
        return dataclasses.replace(small, **changes)

    monkeypatch.setattr(tiles, "tile", tile)


def check_of_mutants(conv: Conv, *problems: tuple[str, str, dict]) -> Callable[[ModuleType, torch.device], None]:
    """The check that a module with the op must pass, and a mutant must not: (case, options, changes of a small tile).

    The problem that caught a mutant comes first for the next one, which is often its like.
    """
    order = list(problems)

    def check(changed: ModuleType, device: torch.device) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for problem in tuple(order):
                case, options, changes = problem
                use_tile(patch, case, **changes)
                try:
                    conv.check(getattr(changed, conv.op._name), case, options, torch.float16, device)
                except Exception:
                    order.remove(problem)
                    order.insert(0, problem)
                    raise

    return check


def random_tiles(op: str, count: int) -> list[tuple[int, ConvShape, Tile]]:
    """(images, layer, tile): a fixed sample of what `Tile.check` allows, over odd maps, widths and channels."""
    choose = random.Random(op).choice
    found: dict[tuple[int, ConvShape, Tile], None] = {}
    while len(found) < count:
        channels = choose((16, 32, 48, 80)), choose((16, 32, 48, 80))
        shape = ConvShape(
            *channels, choose((1, 4, 5, 8)), choose((1, 4, 7, 8, 16)), choose((1, 3, 3, 3)), choose((1, 1, 2))
        )
        blocks = [choose((16, 32, 64)) for _ in range(3)]
        split, taps = (choose((1, 2, 5)), choose((1, 3))) if op == "conv_wgrad" else (1, 1)
        form, prologue = choose(FORMS), choose(PROLOGUES)
        tile = Tile(*blocks, 4, 1, choose((True, False)), split, taps, form, prologue)
        with contextlib.suppress(ValueError):
            tile.check(op, shape)
            found[choose((1, 3)), shape, tile] = None
    return list(found)


def problem_of(case: str | tuple[int, ConvShape]) -> tuple[int, ConvShape]:
    """(images, layer) of a case, by its name or as it is."""
    return CASES[case] if isinstance(case, str) else case


def activation(
    case: str | tuple[int, ConvShape], which: str, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Tensor:
    """x, w, or y (also for what has y's shape) of the case."""
    n, shape = problem_of(case)
    extents = {
        "x": (n, shape.C, shape.H, shape.W),
        "w": (shape.K, shape.C, shape.R, shape.R),
        "y": (n, shape.K, shape.P, shape.Q),
    }
    scale = (shape.C * shape.R**2) ** -0.5 if which == "w" else 1.0
    return channels_last(*extents[which], dtype=dtype, seed=seed, device=device, scale=scale)


def affine(channels: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(scale, shift) of a batch norm: shifts of both signs, so that the padding's zero differs from relu(shift)."""
    generator = torch.Generator().manual_seed(seed)
    scale, shift = torch.rand(channels, generator=generator) + 0.5, torch.randn(channels, generator=generator)
    return scale.to(device), shift.to(device)


def in_double(values: list) -> list:
    return [x.double() if isinstance(x, Tensor) else x for x in values]


def nhwc(*shape: int) -> Tensor:
    return channels_last(*shape, dtype=torch.float16, seed=0, device=torch.device("cpu"))
