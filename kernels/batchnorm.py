"""The networks' building blocks: library convolutions, and batch norm by the kernels of this package.

Three functions with the signatures and the meaning of `kernels.reference`; see there for shapes and dtypes. The
statistics that travel from block to block are the partials of `kernels.bn_stats`, or None where the next block is to
take them itself. A conv-BN-ReLU layer makes 14 passes over its activations, forward and backward (counted in
`kernels.bn_backward`); a residual addition leaves its sum's statistics, which saves the next batch norm a pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bn_relu import bn_relu
from kernels.bn_stats import bn_stats, bn_stats_add
from kernels.reference import BatchNorm, Statistics, conv


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
    if not bn.training:
        # One tile of one pixel has just this mean and this variance.
        running = torch.stack([torch.ones_like(bn.running_mean), bn.running_mean, bn.running_var])[:, None]
        return bn_relu(x, running, bn.gamma, bn.beta, bn.eps, constant=True, residual=residual, pool=pool)[0]
    if x.numel() == x.shape[1]:
        raise ValueError(f"batch norm needs more than one value per channel in training, got {list(x.shape)}")
    partials = bn_stats(x) if statistics is None else statistics
    y, norm = bn_relu(x, partials, bn.gamma, bn.beta, bn.eps, residual=residual, pool=pool)
    with torch.no_grad():
        bn.running_mean.lerp_(norm[0], bn.momentum)
        bn.running_var.lerp_(norm[1], bn.momentum)
    return y
