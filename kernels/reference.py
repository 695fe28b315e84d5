"""The networks' building blocks in PyTorch: library convolutions and library batch norm.

x, y     activations [N, C, H, W], channels_last in memory, fp16, bf16 or fp32
w        fp32 master weights [K, C, R, S], cast to the activations' dtype on use, so that gradients arrive in fp32; or
         copies of them in that dtype
gamma, beta, running_mean, running_var    fp32 [C]

Every implementation of these blocks has the same three functions. A block maps (x, its statistics) to (y, its
statistics): an implementation whose convolutions compute the statistics of what they write hands them to the next
block, and what they are is its own affair. Here they are None, because the library's batch norm reads x itself.
"""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

Statistics = Any


class BatchNorm(NamedTuple):
    """One batch norm as tensors; the running statistics are updated in place while `training`.

    With a list of `updates` an implementation may put its update there, see `kernels.running_statistics`, for the
    list's owner to make all of them together.
    """

    gamma: Tensor
    beta: Tensor
    running_mean: Tensor
    running_var: Tensor
    training: bool
    momentum: float
    eps: float
    updates: list | None = None


def conv(x: Tensor, w: Tensor, stride: int = 1) -> Tensor:
    """Convolve [N,C,H,W] with [K,C,R,S] to [N,K,P,Q]; zero padding of R//2, so that stride 1 keeps the map's size."""
    return F.conv2d(x, w.to(x.dtype), stride=stride, padding=w.shape[-1] // 2)


def bn_relu(x: Tensor, bn: BatchNorm) -> Tensor:
    """relu(batch_norm(x)), by the batch's statistics while training and by the running ones otherwise."""
    y = F.batch_norm(x, bn.running_mean, bn.running_var, bn.gamma, bn.beta, bn.training, bn.momentum, bn.eps)
    return F.relu(y, inplace=True)


def stem(x: Tensor, w: Tensor, bn: BatchNorm | None = None) -> tuple[Tensor, Statistics]:
    """The first convolution, [N,3,H,W] to [N,K,H,W], with a BN-ReLU behind it if `bn` is given."""
    y = conv(x, w)
    return (y if bn is None else bn_relu(y, bn)), None


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
    """The article's residual block: a = relu(bn1(x)); y = conv2(relu(bn2(conv1(a)))) + shortcut(a).

    The shortcut starts from a, not from x, and is the identity, or the 1x1 convolution w3 [K,C,1,1] where the block
    changes the map's size or depth. w1 [K,C,3,3] carries the stride, w2 is [K,K,3,3].
    """
    a = bn_relu(x, bn1)
    y = conv(bn_relu(conv(a, w1, stride), bn2), w2)
    y += a if w3 is None else conv(a, w3, stride)
    return y, None


def conv_bn_relu(
    x: Tensor, w: Tensor, bn: BatchNorm, pool: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """ResNet9's block: relu(bn(conv(x))), a 2x2 max-pool `"last"` or `"first"` (before the batch norm), + residual?."""
    y = conv(x, w)
    if pool == "first":
        y = F.max_pool2d(y, 2)
    y = bn_relu(y, bn)
    if pool == "last":
        y = F.max_pool2d(y, 2)
    return y if residual is None else y + residual
