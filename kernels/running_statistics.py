"""The statistics that a batch norm normalises by, and the running ones, which live outside of the ops.

While training they are the batch's, as partials [3, T, C] (see `kernels.bn_stats`), and the running statistics move
towards them afterwards; in evaluation they are the running ones, given to the same kernels as a single tile.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.bn_stats import bn_stats
from kernels.reference import BatchNorm, Statistics


def partials_for(
    bn: BatchNorm, x: Tensor, statistics: Statistics = None, take: Callable[[Tensor], Tensor] = bn_stats
) -> Tensor:
    """The partials by which `bn` is to normalise x [N, C, H, W]: `statistics` if they came with x, else `take(x)`.

    In evaluation they are `running_partials`. Raises ValueError as `check_has_statistics` does.
    """
    check_has_statistics(bn, x)
    if not bn.training:
        return running_partials(bn)
    return take(x) if statistics is None else statistics


def running_partials(bn: BatchNorm) -> Tensor:
    """fp32 [3, 1, C]: one tile of one pixel, which has just the running mean and the running variance."""
    return torch.stack([torch.ones_like(bn.running_mean), bn.running_mean, bn.running_var])[:, None]


def check_has_statistics(bn: BatchNorm, x: Tensor) -> None:
    """Raise ValueError if `bn` in training would see a single value per channel, whose variance is zero."""
    if bn.training and x.numel() == x.shape[1]:
        raise ValueError(f"batch norm needs more than one value per channel in training, got {list(x.shape)}")


def update_running(bn: BatchNorm, norm: Tensor) -> None:
    """Move the running statistics by `bn.momentum` towards norm [5, C] = (mean, unbiased var, ...), if training.

    At once; or, where `bn.updates` is a list, when its owner calls `make_updates`.
    """
    if bn.training:
        both = [(bn.running_mean, norm[0], bn.momentum), (bn.running_var, norm[1], bn.momentum)]
        if bn.updates is None:
            make_updates(both)
        else:
            bn.updates.extend(both)


def make_updates(updates: list[tuple[Tensor, Tensor, float]]) -> None:
    """running += momentum * (batch - running), in place, for each (running, batch, momentum); on a GPU in one launch.

    All are fp32 [C], none of the running ones occurs twice.
    """
    if updates:
        with torch.no_grad():
            torch._foreach_lerp_(*map(list, zip(*updates, strict=True)))
