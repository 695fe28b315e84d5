"""The networks' building blocks, fused: convolutions with batch norm in their prologues and epilogues.

The functions of `kernels.reference`, with its signatures and its meaning; see there for shapes and dtypes, and
`kernels.fused_preact` and `kernels.fused_conv_bn_relu` for what is fused. This module is an implementation of them that
leaves a convolution to the library where the tile table has measured it as the faster; `implementation` makes one that
does not.

The statistics that travel from block to block are the partials of `kernels.bn_stats`, or None where the next block is
to take them itself.
"""

import functools
from types import SimpleNamespace

from torch import Tensor

from kernels import fused_conv_bn_relu, fused_preact
from kernels.augment import augment
from kernels.batchnorm import stem
from kernels.reference import BatchNorm, Statistics
from kernels.running_statistics import check_has_statistics, partials_for, running_partials, update_running
from kernels.sgd import sgd

CONVOLUTIONS = ("table", "ours")

__all__ = ["augment", "conv_bn_relu", "implementation", "preact_block", "sgd", "stem"]


def implementation(conv: str = "table") -> SimpleNamespace:
    """An implementation whose convolutions are chosen by the tile "table", or all "ours".

    Its blocks are plain values: a network that keeps them can be copied. Raises ValueError for any other choice.
    """
    if conv not in CONVOLUTIONS:
        raise ValueError(f"conv is {conv!r}, expected one of {', '.join(CONVOLUTIONS)}")
    forced = conv == "ours"
    return SimpleNamespace(
        stem=stem,
        preact_block=functools.partial(preact_block, forced=forced),
        conv_bn_relu=functools.partial(conv_bn_relu, forced=forced),
        augment=augment,
        sgd=sgd,
    )


def preact_block(
    x: Tensor,
    statistics: Statistics,
    bn1: BatchNorm,
    w1: Tensor,
    bn2: BatchNorm,
    w2: Tensor,
    w3: Tensor | None = None,
    stride: int = 1,
    *,
    forced: bool = False,
) -> tuple[Tensor, Statistics]:
    """`kernels.reference.preact_block`; the statistics are those of x and of y.

    Raises ValueError or TypeError for widths that are not multiples of 16, and for what `kernels.fused_preact` refuses.
    """
    if bn1.training != bn2.training:
        raise ValueError("one batch norm of the block is training and the other is not, expected both or neither")
    y, partials, h, norm1, norm2, _, _ = fused_preact.preact_block(
        x,
        partials_for(bn1, x, statistics),
        bn1.gamma,
        bn1.beta,
        w1,
        bn2.gamma,
        bn2.beta,
        w2,
        w3,
        None if bn2.training else running_partials(bn2),
        stride,
        bn1.eps,
        bn2.eps,
        forced,
    )
    check_has_statistics(bn2, h)
    update_running(bn1, norm1)
    update_running(bn2, norm2)
    return y, partials if bn1.training else None


def conv_bn_relu(
    x: Tensor,
    w: Tensor,
    bn: BatchNorm,
    pool: str | None = None,
    residual: Tensor | None = None,
    *,
    forced: bool = False,
) -> Tensor:
    """`kernels.reference.conv_bn_relu`; both pools need even maps.

    Raises ValueError or TypeError for widths that are not multiples of 16, and for what `kernels.fused_conv_bn_relu`
    refuses.
    """
    running = None if bn.training else running_partials(bn)
    out, y, norm = fused_conv_bn_relu.conv_bn_relu(x, w, bn.gamma, bn.beta, running, bn.eps, pool, residual, forced)
    check_has_statistics(bn, out if pool == "first" else y)
    update_running(bn, norm)
    return out
