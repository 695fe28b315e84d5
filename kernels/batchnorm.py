"""The networks' building blocks: library convolutions, and batch norm by the kernels of this package.

The functions of `kernels.reference`, with its signatures and its meaning; see there for shapes and dtypes. The
statistics that travel from block to block are the partials of `kernels.bn_stats`, or None where the next block is to
take them itself. A conv-BN-ReLU layer makes 14 passes over its activations, forward and backward (counted in
`kernels.bn_backward`); a residual addition leaves its sum's statistics, which saves the next batch norm a pass.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.augment import augment
from kernels.bn_relu import bn_relu
from kernels.bn_stats import bn_stats_add
from kernels.reference import BatchNorm, Statistics, conv
from kernels.running_statistics import partials_for, update_running
from kernels.sgd import sgd

__all__ = ["augment", "conv_bn_relu", "preact_block", "sgd", "stem"]


def stem(x: Tensor, w: Tensor, bn: BatchNorm | None = None) -> tuple[Tensor, Statistics]:
    """`kernels.reference.stem`."""
    y = conv(x, w)
    return (y if bn is None else _normalise(y, None, bn)), None


def preact_block(
    x: Tensor,
    statistics: Statistics,
    bn1: BatchNorm,
    w1: Tensor,
    bn2: BatchNorm,
    w2: Tensor,
    w3: Tensor | None = None,
    stride: int = 1,
) -> tuple[Tensor, Statistics]:
    """`kernels.reference.preact_block`; the statistics are those of x and of y."""
    a = _normalise(x, statistics, bn1)
    y = conv(_normalise(conv(a, w1, stride), None, bn2), w2)
    shortcut = a if w3 is None else conv(a, w3, stride)
    if bn1.training:
        return bn_stats_add(y, shortcut)
    return y + shortcut, None


def conv_bn_relu(
    x: Tensor, w: Tensor, bn: BatchNorm, pool: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """`kernels.reference.conv_bn_relu`; a pool that comes last is part of the apply kernel and needs even maps."""
    y = conv(x, w)
    if pool == "first":
        y = F.max_pool2d(y, 2)
    return _normalise(y, None, bn, residual, pool == "last")


def _normalise(
    x: Tensor, statistics: Statistics, bn: BatchNorm, residual: Tensor | None = None, pool: bool = False
) -> Tensor:
    """bn_relu by x's statistics while training, updating the running ones, and by the running ones otherwise."""
    y, norm = bn_relu(
        x,
        partials_for(bn, x, statistics),
        bn.gamma,
        bn.beta,
        bn.eps,
        constant=not bn.training,
        residual=residual,
        pool=pool,
    )
    update_running(bn, norm)
    return y
