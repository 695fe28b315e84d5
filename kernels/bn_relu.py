"""Batch norm, ReLU, pool and residual as one differentiable op, from the statistics that left with its input.

    y = maxpool2x2?(relu(bn(x))) + residual?

x, residual, y  fp16, bf16 or fp32 [N, C, H, W] channels_last; y and residual are [N, C, H/2, W/2] with the pool
partials        fp32 [3, T, C], x's statistics by tiles: `kernels.bn_stats.bn_stats(x)`, or a convolution's epilogue
gamma, beta     fp32 [C]
norm            fp32 [5, C] = (mean, var, rstd, scale, shift), see `kernels.bn_stats`; not differentiable

The gradient of x is batch norm's whole gradient, the part through its statistics included, so that nothing flows back
through `partials`. For backward x and norm are kept, not y.

Passes over an activation: forward 2 (bn_apply), backward 5 (bn_backward_reduce 2, bn_backward_apply 3).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bn_apply import bn_apply, bn_apply_cost
from kernels.bn_backward import bn_backward_apply, bn_backward_reduce, bn_coefficients
from kernels.bn_stats import bn_finalize, bn_finalize_cost
from kernels.cost import Cost
from kernels.metered_cost import BODIES


def bn_relu_reference(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    residual: Tensor | None = None,
    pool: bool = False,
) -> Tensor:
    """The formula above by the batch's statistics, in PyTorch."""
    y = F.relu(F.batch_norm(x, None, None, gamma, beta, training=True, eps=eps))
    if pool:
        y = F.max_pool2d(y, 2)
    return y if residual is None else y + residual


@torch.library.custom_op("cifar::bn_relu", mutates_args=())
def bn_relu(
    x: Tensor,
    partials: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    constant: bool = False,
    residual: Tensor | None = None,
    pool: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, norm). `constant`: the statistics are not x's own (evaluation), and no gradient reaches x through them.

    Raises ValueError or TypeError for operands other than the module's docstring has them, and for odd maps with the
    pool.
    """
    return _forward(x, partials, gamma, beta, eps, constant, residual, pool)


def _forward(x, partials, gamma, beta, eps, constant=False, residual=None, pool=False):
    norm = bn_finalize(partials, gamma, beta, eps)
    return bn_apply(x, norm[3], norm[4], residual, pool), norm


BODIES[torch.ops.cifar.bn_relu.default] = _forward


@bn_relu.register_fake
def _(x, partials, gamma, beta, eps, constant=False, residual=None, pool=False):
    norm = partials.new_empty((5, partials.shape[2]))
    return bn_apply(x, norm[3], norm[4], residual, pool), norm


def _setup_context(ctx, inputs, output) -> None:
    x, _, _, _, _, ctx.constant, residual, ctx.pool = inputs
    ctx.has_residual = residual is not None
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1])


def _backward(ctx, dy: Tensor, _):
    x, norm = ctx.saved_tensors
    # A gradient arrives in whatever layout its producer chose: a mean over pixels sends one of stride 0.
    dy = dy.contiguous(memory_format=torch.channels_last)
    n = math.inf if ctx.constant else x.numel() / x.shape[1]
    coefficients = bn_coefficients(bn_backward_reduce(dy, x, norm, ctx.pool), norm, n)
    dx = bn_backward_apply(dy, x, norm, coefficients, ctx.pool)
    return dx, None, coefficients[0], coefficients[1], None, None, dy if ctx.has_residual else None, None


bn_relu.register_autograd(_backward, setup_context=_setup_context)


def bn_relu_cost(
    x: Tensor,
    partials: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    constant: bool = False,
    residual: Tensor | None = None,
    pool: bool = False,
) -> Cost:
    """Forward: bn_finalize and bn_apply."""
    return bn_finalize_cost(partials, gamma, beta, eps) + bn_apply_cost(x, gamma, beta, residual, pool)
