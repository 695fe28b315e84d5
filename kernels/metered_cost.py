"""The cost of an op that is made of other ops: the sum of theirs, at the shapes that it calls them with."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kernels.augment import augment_cost
from kernels.bn_apply import bn_apply_cost
from kernels.bn_backward import bn_backward_apply_cost, bn_backward_reduce_cost, bn_coefficients_cost
from kernels.bn_stats import bn_finalize_cost, bn_stats_add_cost, bn_stats_cost
from kernels.conv_dgrad import conv_dgrad_cost
from kernels.conv_fprop import conv_fprop_cost
from kernels.conv_wgrad import conv_wgrad_cost
from kernels.cost import Cost
from kernels.sgd import sgd_cost

COSTS = {
    torch.ops.cifar.augment.default: augment_cost,
    torch.ops.cifar.bn_apply.default: bn_apply_cost,
    torch.ops.cifar.bn_stats.default: bn_stats_cost,
    torch.ops.cifar.bn_stats_add.default: bn_stats_add_cost,
    torch.ops.cifar.bn_finalize.default: bn_finalize_cost,
    torch.ops.cifar.bn_backward_reduce.default: bn_backward_reduce_cost,
    torch.ops.cifar.bn_coefficients.default: bn_coefficients_cost,
    torch.ops.cifar.bn_backward_apply.default: bn_backward_apply_cost,
    torch.ops.cifar.conv_fprop.default: conv_fprop_cost,
    torch.ops.cifar.conv_dgrad.default: conv_dgrad_cost,
    torch.ops.cifar.conv_wgrad.default: conv_wgrad_cost,
    torch.ops.cifar.sgd.default: sgd_cost,
}
"""The cost of each op that is a kernel, from the operands that it is called with."""

BODIES: dict[torch._ops.OpOverload, Callable[..., object]] = {}
"""The function behind each op that is made of other ops of this package; the op's own module adds it."""


def metered_cost(body: Callable[..., object], *operands: object) -> Cost:
    """The cost of the ops of this package that `body(*operands)` calls, found on fake copies: nothing is computed.

    Casts of weights and PyTorch's own operations are not counted.
    """
    cost = Cost(0, 0)

    class Meter(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            nonlocal cost
            if op in COSTS:
                cost += COSTS[op](*args, **(kwargs or {}))
            return op(*args, **(kwargs or {}))

    with FakeTensorMode() as mode, Meter():
        body(*tree_map_only(Tensor, mode.from_tensor, operands))
    return cost
