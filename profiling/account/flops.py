"""FLOPs of a network, counted on the meta device: nothing is computed and nothing depends on the machine.

A multiply-add is two FLOPs; convolutions and matrix products count, the rest does not.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class FlopsPerImage(NamedTuple):
    """One image [3, 32, 32], forward alone and forward with backward (no gradient with respect to the image)."""

    forward: int
    training: int


def flops_per_image(build: Callable[[], nn.Module]) -> FlopsPerImage:
    """Count the network that `build()` makes; it is called on the meta device."""
    batch = 2
    with torch.device("meta"):
        network, x = build(), torch.empty(batch, 3, 32, 32)
    with FlopCounterMode(display=False) as forward:
        y = network(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return FlopsPerImage(
        forward.get_total_flops() // batch, (forward.get_total_flops() + backward.get_total_flops()) // batch
    )
