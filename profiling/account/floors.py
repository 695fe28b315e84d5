"""The least time that a training step can take on a machine, by how its conv-BN-ReLU layers are cut into kernels.

Each kernel takes the larger of its FLOPs over the machine's rate and its bytes over the machine's bandwidth; kernels
follow each other. What differs between the cuts is how often an activation passes through memory (a pass is one read or
one write of it). Counted are the convolutions, their batch norms, ReLUs and shortcuts, and the update; left out are the
classifier, the loss, augmentation, and casts of weights, which are taken to be kept in 16 bits.

V100: 125 TFLOP/s and 0.9 TB/s; H200: 790 and 4.3. Thirty-five epochs of the article's network at batch 512, seconds:

    eager       19 passes a layer    74.4    13.6
    compiled    16                   64.6    11.6
    reductions  14                   60.4    10.7
    fused       10                   46.8     8.0
    limit        9                   41.9     7.1
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from profiling.account.work import Work

CONVOLUTIONS = ("fprop", "dgrad", "wgrad")
_COUNTED = (*CONVOLUTIONS, "matrix product", "optimiser")
_NATURAL = {"batch norm": 2, "batch norm backward": 3, "relu": 2, "relu backward": 3, "add": 3, "add backward": 3}
"""Passes that `profiling.account.work` counts: every operand and result once."""


@dataclass(frozen=True)
class Fusion:
    """One way to cut a layer into kernels.

    passes       of a conv-BN-ReLU layer, forward and backward, with 6 for the convolution itself
    elementwise  passes of each elementwise family over its activation; a family that is not named is part of another
    prologues    whether dgrad reads the ReLU's mask too, and dgrad and wgrad the batch norm's input, to make dy of dz
    """

    name: str
    passes: int
    elementwise: dict[str, int]
    says: str
    prologues: bool = False


CUTS = (
    Fusion(
        "eager",
        19,
        {"batch norm": 3, "relu": 2, "relu backward": 3, "batch norm backward": 5, "add": 3, "add backward": 3},
        "convolution 6; batch norm 3 (statistics read, apply reads and writes), ReLU 2; its backward 3, batch norm's 5",
    ),
    Fusion(
        "compiled",
        16,
        {"batch norm": 3, "batch norm backward": 7, "add": 3},
        "convolution 6; statistics 1, apply with ReLU 2; backward's sums 3, apply with the mask 4",
    ),
    Fusion(
        "compiled, reductions fused",
        14,
        {"batch norm": 3, "batch norm backward": 5, "add": 3},
        "convolution 6; statistics 1, apply with ReLU 2; backward's sums 2, apply 3, the mask recomputed",
    ),
    Fusion(
        "limit",
        9,
        {},
        "convolution 6, its prologues and epilogues doing all the rest: dgrad reads the mask's operand too, dgrad and "
        "wgrad each make dy as they load it, one pass more; shortcuts cost nothing",
        prologues=True,
    ),
)
"""Derived from the ops of the network in eager PyTorch."""

FUSED_PASSES = 10
FUSED_SAYS = (
    "convolution 6, statistics in its epilogue and BN-ReLU in the next one's prologue; dgrad reads the mask's operand "
    "and leaves the sums, batch norm's backward 3; as this project's kernels do it"
)


def kernels(rows: Sequence[Work], fusion: Fusion) -> list[Work]:
    """The kernels with their bytes that remain in this cut of `rows`, a step of the reference network."""
    kept = []
    for row in rows:
        name = "add backward" if row.family == "add" and row.backward else row.family
        if name in fusion.elementwise:
            kept.append(replace(row, bytes=row.bytes * fusion.elementwise[name] // _NATURAL[name]))
        elif row.family in _COUNTED:
            extra = 0
            if fusion.prologues and row.family in ("dgrad", "wgrad"):
                dy, x, w = (math.prod(extents) for extents in row.dims[:3])
                masked = (
                    row.family == "dgrad" and row.dims[2][2] > 1
                )  # a projection's input is masked in the other branch
                extra = row.bytes // (dy + x + w) * (dy + x * masked)
            kept.append(replace(row, bytes=row.bytes + extra))
    return kept


def fused_kernels(rows: Sequence[Work]) -> list[Work]:
    """The kernels of a step of the fused network, `rows`, that the other cuts count too."""
    ours = ("bn_stats", "bn_finalize", "bn_apply", "bn_backward_reduce", "bn_coefficients", "bn_backward_apply")
    return [row for row in rows if row.family in (*_COUNTED, *ours)]


def floor_ns(rows: Sequence[Work], flops_per_s: float, bytes_per_s: float) -> float:
    """Nanoseconds for one step: each kernel the larger of compute and memory."""
    return 1e9 * sum(max(row.flops / flops_per_s, row.bytes / bytes_per_s) for row in rows)
