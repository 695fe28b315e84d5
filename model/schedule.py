"""The learning rate over a run: piecewise linear in epochs, and as a table that a step can read on its device."""

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from model.config import Config


def piecewise_linear(x: float, knots: Sequence[float], values: Sequence[float]) -> float:
    """Linear interpolation; two knots at the same place are a jump, whose later value holds from there on."""
    i = bisect.bisect_right(knots, x)
    if i == 0 or i == len(knots):
        return values[max(i - 1, 0)]
    (x0, x1), (y0, y1) = knots[i - 1 : i + 1], values[i - 1 : i + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def learning_rate(config: Config, steps_per_epoch: int, number: int) -> float:
    """The schedule after `number` steps. The article takes it at the end of a step, so that the first one moves."""
    return piecewise_linear(number / steps_per_epoch, config.lr_epochs, config.lr_values)


def rate_table(config: Config, steps_per_epoch: int) -> Tensor:
    """fp32 [steps + 1]: after each number of steps of the run, what the summed loss's gradient is multiplied by.

    That is the learning rate over the batch size. The last entry holds for ever after.
    """
    steps = config.epochs * steps_per_epoch
    return torch.tensor([learning_rate(config, steps_per_epoch, n) / config.batch_size for n in range(steps + 1)])
