"""Problems for the three convolution ops, and what their machine code must look like."""

import contextlib
import random

import torch
from ahead_of_time import SHARED_LIMIT, Build, Facts
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
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# Instructions that a warp issues in the main loop for each matrix instruction. The limits are a little above what ptxas
# makes of the default tiles; on 9.x the schedulers, which issue one a clock, must not be busier than the tensor cores.
INSTRUCTION_BUDGET = {80: 12, 100: 102}
MACS_A_CLOCK = 2048  # of a Hopper multiprocessor's tensor cores, whose instruction is four warps', one a scheduler


def use_tile(monkeypatch, case: str, descriptors: bool = False, **changes) -> None:
    """Let the ops run with small tiles, so that a small problem has several, or with the default one in its case.

    `changes` are to the small tiles: form, prologue, ...
    """
    default = tiles.default_tile

    def tile(op: str, shape: ConvShape, dtype: torch.dtype, gpu: Gpu) -> Tile:
        if case in DEFAULT:
            return default(op, shape, dtype, gpu.capability)
        blocks, split = ((16, 16, 32), 3) if op == "conv_wgrad" else ((32, 16, 16), 1)
        return Tile(*blocks, num_warps=4, num_stages=1, descriptors=descriptors, SPLIT=split, **changes)

    monkeypatch.setattr(tiles, "tile", tile)


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


def activation(
    case: str | tuple[int, ConvShape], which: str, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Tensor:
    """x, w, or y (also for what has y's shape) of the case, by its name or as (images, layer)."""
    n, shape = CASES[case] if isinstance(case, str) else case
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


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def in_double(arguments: list) -> list:
    return [a.double() if isinstance(a, Tensor) else a for a in arguments]


def nhwc(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return channels_last(*shape, dtype=dtype, seed=0, device=torch.device("cpu"))


def unaligned(n: int, c: int, h: int, w: int) -> Tensor:
    """An fp16 activation that begins 2 bytes behind a multiple of 16."""
    return torch.zeros(n * c * h * w + 1, dtype=torch.float16)[1:].view(n, h, w, c).permute(0, 3, 1, 2)


def assert_machine_code(build: Build, facts: Facts) -> None:
    """No spills, no local memory, no serialised matrix instructions, no operand overwritten before it is read, TMA from
    sm_90 on, few instructions for an MMA."""
    name, arch = f"{facts.label} on sm_{facts.arch}", facts.arch
    assert not facts.error, (name, facts.error)
    assert (facts.spill_bytes, facts.local_bytes, facts.notes, facts.overwritten) == (0, 0, [], 0), name
    assert facts.shared_bytes <= SHARED_LIMIT[arch], name
    matrix = MATRIX_INSTRUCTION[arch]
    assert facts.count(matrix) > 0, name
    assert build.constexprs.get("DESCRIPTORS", True) == (arch >= 90) == (facts.count("UTMALDG") > 0), name
    if arch == 80:
        assert facts.count("LDGSTS", ".128") > 0 or facts.count("LDG", ".128") > 0, name
    loop, matrices = facts.main_loop()
    # There is no loop where it was unrolled, and none to speak of in the few steps of a 1x1 filter.
    if loop and build.constexprs.get("R", 3) == 3:
        budget = facts.macs_per_matrix_step() / MACS_A_CLOCK if arch == 90 else INSTRUCTION_BUDGET[arch]
        assert sum(loop.values()) <= budget * sum(matrices.values()), (name, loop, matrices)


def operands_are_shared(facts: Facts) -> bool:
    """Whether a Hopper GPU's matrix instructions take both operands from shared memory: no warp loads one of them."""
    loop, _ = facts.main_loop()
    return not any(name.startswith("LDSM") for name in loop)


def layer_operands(shape: ConvShape, device: torch.device) -> tuple[Tensor, ...]:
    """x, w, y of a layer at 512 images, and fp32 [C] and [K]; uninitialised, for launches that are only recorded."""
    extents = (512, shape.C, shape.H, shape.W), (shape.K, shape.C, shape.R, shape.R), (512, shape.K, shape.P, shape.Q)
    x, w, y = (torch.empty(e, dtype=torch.float16, device=device, memory_format=torch.channels_last) for e in extents)
    return x, w, y, torch.empty(shape.C, device=device), torch.empty(shape.K, device=device)
