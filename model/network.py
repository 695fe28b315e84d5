"""The article's two networks, built from an implementation of `kernels.reference`'s three blocks.

`ResNet` is the network of the article's Parts 1 to 3 (a pre-activation ResNet18 with widths 64-128-256-256), `ResNet9`
that of Part 4. The modules own parameters and running statistics; what is computed with them is `ops`, given once, at
the constructor, so that every implementation has the same state_dict; `model.implementation` chooses it.
"""

from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import reference
from kernels.running_statistics import make_updates

if TYPE_CHECKING:
    pass

ARTICLE_WIDTHS = (64, 128, 256, 256)
RESNET9_WIDTHS = (64, 128, 256, 512)
NETWORKS = ("resnet", "resnet9")


class BatchNorm(nn.Module):
    """Owns gamma, beta [C] and the running statistics, in fp32; calling it bundles them for an op, with `updates`.

    `uniform_gamma` draws gamma from U(0, 1) as PyTorch 0.4 did (all rungs of the article down to 154 s ran that way);
    PyTorch has started it at 1 since.
    """

    def __init__(self, channels: int, uniform_gamma: bool = False, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels) if uniform_gamma else torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.momentum, self.eps = momentum, eps

    def forward(self, updates: list | None = None) -> reference.BatchNorm:
        running = self.running_mean, self.running_var
        return reference.BatchNorm(self.weight, self.bias, *running, self.training, self.momentum, self.eps, updates)


def conv_weight(c: int, k: int, size: int = 3) -> nn.Parameter:
    """fp32 [K, C, size, size], channels_last, initialised as `nn.Conv2d` does: U(-b, b) with b = 1 / sqrt(C R S)."""
    bound = (c * size * size) ** -0.5
    w = torch.empty(k, c, size, size).uniform_(-bound, bound)
    return nn.Parameter(w.to(memory_format=torch.channels_last))


class PreactBlock(nn.Module):
    """BN-ReLU, conv, BN-ReLU, conv, and a shortcut from the first ReLU; see `kernels.reference.preact_block`."""

    def __init__(self, ops: ModuleType, c: int, k: int, stride: int, uniform_gamma: bool):
        super().__init__()
        self.op, self.stride = ops.preact_block, stride
        self.bn1 = BatchNorm(c, uniform_gamma)
        self.conv1 = conv_weight(c, k)
        self.bn2 = BatchNorm(k, uniform_gamma)
        self.conv2 = conv_weight(k, k)
        self.conv3 = conv_weight(c, k, 1) if stride != 1 or c != k else None

    def forward(
        self, x: Tensor, statistics: reference.Statistics, updates: list | None = None
    ) -> tuple[Tensor, reference.Statistics]:
        bn1, bn2 = self.bn1(updates), self.bn2(updates)
        return self.op(x, statistics, bn1, self.conv1, bn2, self.conv2, self.conv3, self.stride)


class ResNet(nn.Module):
    """The article's network: [N,3,32,32] images to [N,10] logits; 5,205,834 parameters at the article's widths.

    prep conv; four stages of two pre-activation blocks, strides 1-2-2-2; max and average pooling concatenated; a linear
    layer. There is no BN-ReLU after the last addition. `prep_bn_relu` adds the group after the first convolution that
    the 341 s entry had and the 323 s one dropped: it is redundant, since the first block begins with another.

    Raises ValueError if `widths` are not four multiples of 8.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = ARTICLE_WIDTHS,
        ops: ModuleType = reference,
        prep_bn_relu: bool = False,
        uniform_gamma: bool = False,
    ):
        super().__init__()
        _check_widths(widths)
        self.stem = ops.stem
        self.prep = conv_weight(3, widths[0])
        self.prep_bn = BatchNorm(widths[0], uniform_gamma) if prep_bn_relu else None
        blocks, c = [], widths[0]
        for stage, k in enumerate(widths):
            blocks += [
                PreactBlock(ops, c, k, stride=1 if stage == 0 else 2, uniform_gamma=uniform_gamma),
                PreactBlock(ops, k, k, stride=1, uniform_gamma=uniform_gamma),
            ]
            c = k
        self.blocks = nn.ModuleList(blocks)
        self.linear = nn.Linear(2 * c, 10)

    def forward(self, x: Tensor) -> Tensor:
        updates = []  # of all running statistics, made in one launch
        x, statistics = self.stem(x, self.prep, None if self.prep_bn is None else self.prep_bn(updates))
        for block in self.blocks:
            x, statistics = block(x, statistics, updates)
        make_updates(updates)
        pooled = torch.cat([x.amax((2, 3)), x.mean((2, 3))], dim=1)
        return F.linear(pooled, self.linear.weight.to(x.dtype), self.linear.bias.to(x.dtype))


class ConvBnRelu(nn.Module):
    """conv 3x3, BN, ReLU, and where asked for a 2x2 max-pool and a residual; see `kernels.reference.conv_bn_relu`."""

    def __init__(self, ops: ModuleType, c: int, k: int, uniform_gamma: bool, pool: str | None = None):
        super().__init__()
        self.op, self.pool = ops.conv_bn_relu, pool
        self.conv = conv_weight(c, k)
        self.bn = BatchNorm(k, uniform_gamma)

    def forward(self, x: Tensor, residual: Tensor | None = None, updates: list | None = None) -> Tensor:
        return self.op(x, self.conv, self.bn(updates), self.pool, residual)


class ResNet9(nn.Module):
    """The article's Part 4 network: [N,3,32,32] to logits [N,10]; 6,573,120 parameters at widths 64-128-256-512.

    prep; three layers that each halve the map, the first and the last with a residual pair; 4x4 max-pool; a linear
    layer without bias, scaled by 0.125. `pool_first` pools before batch norm, whose work is then a quarter (Part 8).

    Raises ValueError if `widths` are not four multiples of 8.
    """

    def __init__(
        self,
        widths: tuple[int, ...] = RESNET9_WIDTHS,
        ops: ModuleType = reference,
        uniform_gamma: bool = False,
        pool_first: bool = False,
    ):
        super().__init__()
        _check_widths(widths)
        w0, w1, w2, w3 = widths
        pool = "first" if pool_first else "last"
        self.stem = ops.stem
        self.prep = conv_weight(3, w0)
        self.prep_bn = BatchNorm(w0, uniform_gamma)
        self.layer1 = ConvBnRelu(ops, w0, w1, uniform_gamma, pool)
        self.residual1 = nn.ModuleList(ConvBnRelu(ops, w1, w1, uniform_gamma) for _ in range(2))
        self.layer2 = ConvBnRelu(ops, w1, w2, uniform_gamma, pool)
        self.layer3 = ConvBnRelu(ops, w2, w3, uniform_gamma, pool)
        self.residual3 = nn.ModuleList(ConvBnRelu(ops, w3, w3, uniform_gamma) for _ in range(2))
        self.linear = nn.Linear(w3, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        updates = []  # of all running statistics, made in one launch
        x, _ = self.stem(x, self.prep, self.prep_bn(updates))
        x = self.layer1(x, updates=updates)
        x = self.residual1[1](self.residual1[0](x, updates=updates), x, updates)
        x = self.layer3(self.layer2(x, updates=updates), updates=updates)
        x = self.residual3[1](self.residual3[0](x, updates=updates), x, updates)
        make_updates(updates)
        return 0.125 * F.linear(x.amax((2, 3)), self.linear.weight.to(x.dtype))


def _check_widths(widths: tuple[int, ...]) -> None:
    # oneDNN's weight gradient of a 1x1 convolution with stride 2 corrupts memory at 4 channels on CPUs without AVX-512
    # (channels_last, fp32; seen with torch 2.11 and 2.13); and 16-byte loads take 8 channels of 16 bits.
    if len(widths) != 4 or any(w < 1 or w % 8 for w in widths):
        raise ValueError(f"widths must be four positive multiples of 8, one per stage; got {widths}")
