"""The networks' building blocks from the ops of this package, glued by autograd.

The functions of `kernels.reference`, with its signatures and its meaning; see there for shapes and dtypes. This is the
step between `kernels.batchnorm` and `kernels.fused`: every convolution but the first is ours, with batch norm's work on
both sides of it. In the pre-activation block a batch norm is a handful of PyTorch operations on [C] vectors, through
which autograd finds the gradient of the statistics by itself; `kernels.fused` writes that gradient out by hand.

The statistics that travel from block to block are partials (see `kernels.bn_stats`), differentiable.
"""

import torch.nn.functional as F
from torch import Tensor

from kernels.augment import augment
from kernels.bn_relu import bn_relu
from kernels.bn_stats import bn_finalize_reference, bn_stats_reference
from kernels.conv_fprop import conv_fprop
from kernels.reference import BatchNorm, Statistics, conv
from kernels.running_statistics import partials_for, update_running
from kernels.sgd import sgd

__all__ = ["augment", "conv_bn_relu", "preact_block", "sgd", "stem"]


def stem(x: Tensor, w: Tensor, bn: BatchNorm | None = None) -> tuple[Tensor, Statistics]:
    """`kernels.reference.stem`: the library's convolution, since three channels fill no matrix instruction."""
    y = conv(x, w)
    return (y if bn is None else _bn_relu(y, None, bn)), None


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
    """`kernels.reference.preact_block`; the activations relu(bn(.)) exist only inside of the convolutions.

    Raises ValueError or TypeError for what `kernels.conv_fprop` does not compute: widths that are not multiples of 16.
    """
    affine1 = _affine(x, statistics, bn1)
    h, partials = conv_fprop(x, w1.to(x.dtype), stride, *affine1, statistics=bn2.training)
    if w3 is None:
        shortcut, shortcut_affine = x, affine1
    else:
        shortcut, _ = conv_fprop(x, w3.to(x.dtype), stride, *affine1, statistics=False)
        shortcut_affine = (None, None)
    affine2 = _affine(h, partials, bn2)
    y, partials = conv_fprop(h, w2.to(x.dtype), 1, *affine2, shortcut, *shortcut_affine, statistics=bn1.training)
    return y, partials if bn1.training else None


def conv_bn_relu(
    x: Tensor, w: Tensor, bn: BatchNorm, pool: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """`kernels.reference.conv_bn_relu`; a pool that comes last is part of the apply kernel and needs even maps.

    Raises ValueError or TypeError for what `kernels.conv_fprop` does not compute: widths that are not multiples of 16.
    """
    pool_first = pool == "first"
    y, partials = conv_fprop(x, w.to(x.dtype), statistics=bn.training and not pool_first)
    if pool_first:
        y, partials = F.max_pool2d(y, 2), None
    return _bn_relu(y, partials, bn, residual, pool == "last")


def _affine(x: Tensor, statistics: Statistics, bn: BatchNorm) -> tuple[Tensor, Tensor]:
    """(scale, shift) of bn(x), differentiable in x through its statistics."""
    norm = bn_finalize_reference(partials_for(bn, x, statistics, bn_stats_reference), bn.gamma, bn.beta, bn.eps)
    update_running(bn, norm.detach())
    return norm[3], norm[4]


def _bn_relu(
    x: Tensor, statistics: Statistics, bn: BatchNorm, residual: Tensor | None = None, pool: bool = False
) -> Tensor:
    """relu(bn(x)) by one op, whose backward has the gradient of the statistics in it."""
    partials = partials_for(bn, x, statistics)
    y, norm = bn_relu(x, partials, bn.gamma, bn.beta, bn.eps, not bn.training, residual, pool)
    update_running(bn, norm)
    return y
