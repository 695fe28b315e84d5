"""ResNet9's layer, forward and backward, each as one op.

    y = conv(x);  z = y, or maxpool2x2(y) with pool "first"
    out = maxpool2x2?(relu(bn(z))) + residual?              the pool if it is "last"

x              fp16, bf16 or fp32 [N, C, H, W] channels_last
w              fp32 [K, C, 3, 3] channels_last; stride 1
gamma, beta    fp32 [K]
y              x's dtype [N, K, H, W] channels_last
out, residual  x's dtype [N, K, H, W], or [N, K, H/2, W/2] with either pool
norm           fp32 [5, K] = (mean, var, rstd, scale, shift) of z

Saved for backward: x, y and norm. Neither relu(bn(y)) nor the pool's choices are: both are recomputed from y.

Passes over an activation, without a pool: forward 4 (conv with the statistics 2, apply 2), backward 9 (reduce 2, apply
3, dgrad 2, wgrad 2); the library's convolution has one more, for the statistics. The layer's input and output are
stored activations, which the seam between layers asks for, so that no batch norm can move into the next convolution.
A pool that comes first is the library's, which is run once more in backward.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bn_apply import bn_apply, output_shape
from kernels.bn_backward import bn_backward_apply, bn_backward_reduce, bn_coefficients
from kernels.bn_stats import bn_finalize, bn_stats
from kernels.contract import check_activation, check_fp32, check_like
from kernels.conv_dispatch import Activation, check_weight, dgrad, fprop, wgrad
from kernels.conv_shape import ConvShape, flop_formula
from kernels.cost import Cost
from kernels.metered_cost import BODIES, metered_cost

POOLS = (None, "first", "last")


@torch.library.custom_op("cifar::conv_bn_relu", mutates_args=())
def conv_bn_relu(
    x: Tensor,
    w: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running: Tensor | None,
    eps: float,
    pool: str | None,
    residual: Tensor | None,
    forced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, y, norm). With `running`, a single tile of partials, the statistics are constants (evaluation).

    Differentiable in x, w, gamma, beta and residual, from out; the gradient through the statistics is part of it.

    Raises ValueError or TypeError for operands other than the module's docstring has them, and for a pool of odd maps.
    """
    _check(x, w, pool)
    return _forward(x, w, gamma, beta, running, eps, pool, residual, forced)


def _forward(x, w, gamma, beta, running, eps, pool, residual, forced):
    pool_first = pool == "first"
    y, partials = fprop(Activation(x), w, statistics=running is None and not pool_first, forced=forced)
    z = F.max_pool2d(y, 2) if pool_first else y
    if running is not None:
        partials = running
    elif pool_first:
        partials = bn_stats(z)
    norm = bn_finalize(partials, gamma, beta, eps)
    return bn_apply(z, norm[3], norm[4], residual, pool == "last"), y, norm


conv_bn_relu.register_fake(_forward)
BODIES[torch.ops.cifar.conv_bn_relu.default] = _forward


@torch.library.custom_op("cifar::conv_bn_relu_backward", mutates_args=())
def conv_bn_relu_backward(
    dout: Tensor,
    x: Tensor,
    y: Tensor,
    norm: Tensor,
    w: Tensor,
    pool: str | None,
    constant: bool,
    forced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, coefficients), these fp32 [4, K] = (dgamma, dbeta, ..), see `kernels.bn_backward`.

    `constant`: no gradient reaches x through the statistics. Not differentiable.

    Raises ValueError or TypeError for operands other than the module's docstring has them.
    """
    shape = _check(x, w, pool)
    check_like("y", y, "x", (x.shape[0], shape.K, shape.H, shape.W), x)
    check_like("dout", dout, "x", output_shape(y, pool is not None), x)
    check_fp32("norm", norm, (5, shape.K), "x", x)
    return _backward(dout, x, y, norm, w, pool, constant, forced)


def _backward(dout, x, y, norm, w, pool, constant, forced):
    z, winners = F.max_pool2d(y, 2, return_indices=True) if pool == "first" else (y, None)
    n = math.inf if constant else z.numel() / z.shape[1]
    coefficients = bn_coefficients(bn_backward_reduce(dout, z, norm, pool == "last"), norm, n)
    dy = bn_backward_apply(dout, z, norm, coefficients, pool == "last")
    if pool == "first":
        dy = torch.ops.aten.max_pool2d_with_indices_backward(dy, y, [2, 2], [2, 2], [0, 0], [1, 1], False, winners)
    dx, _ = dgrad(dy, w, *x.shape[2:], forced=forced)
    return dx, wgrad(Activation(x), dy, 3, forced=forced), coefficients


conv_bn_relu_backward.register_fake(_backward)
BODIES[torch.ops.cifar.conv_bn_relu_backward.default] = _backward


def _check(x: Tensor, w: Tensor, pool: str | None) -> ConvShape:
    check_activation("x", x)
    check_weight("w", w, (w.shape[0], x.shape[1], 3, 3), x)
    if pool not in POOLS:
        raise ValueError(f"pool is {pool!r}, expected one of {POOLS}")
    output_shape(x, pool is not None)
    return ConvShape.of(x, w, 1)


def _setup_context(ctx, inputs, output) -> None:
    x, w, _, _, running, _, ctx.pool, residual, ctx.forced = inputs
    ctx.constant, ctx.has_residual = running is not None, residual is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for y would be a pass over memory
    ctx.save_for_backward(x, *output[1:], w)


def _autograd(ctx, dout: Tensor, *_):
    # A gradient arrives in whatever layout its producer chose: a mean over pixels sends one of stride 0.
    dout = dout.contiguous(memory_format=torch.channels_last)
    dx, dw, of_bn = conv_bn_relu_backward(dout, *ctx.saved_tensors, ctx.pool, ctx.constant, ctx.forced)
    return dx, dw, of_bn[0], of_bn[1], None, None, None, dout if ctx.has_residual else None, None


conv_bn_relu.register_autograd(_autograd, setup_context=_setup_context)


@flop_formula("cifar::conv_bn_relu")
def _flops(x_shape, w_shape, *_, **__) -> int:
    n, c, h, w = x_shape
    return ConvShape(c, w_shape[0], h, w).flops(n)


@flop_formula("cifar::conv_bn_relu_backward")
def _backward_flops(dout_shape, x_shape, y_shape, norm_shape, w_shape, *_, **__) -> int:
    """A dgrad and a wgrad."""
    return 2 * _flops(x_shape, w_shape)


def conv_bn_relu_cost(*operands: Tensor | float | str | None) -> Cost:
    """Cost of `conv_bn_relu` on these operands by our kernels: the four passes above, and [C] vectors."""
    return metered_cost(_forward, *operands[:-1], True)


def conv_bn_relu_backward_cost(*operands: Tensor | str | bool | None) -> Cost:
    """Cost of `conv_bn_relu_backward` on these operands by our kernels: the nine passes above, and [C] vectors."""
    return metered_cost(_backward, *operands[:-1], True)
