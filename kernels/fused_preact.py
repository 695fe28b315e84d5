"""The article's residual block, forward and backward, each as one op.

    a = relu(bn1(x));  h = conv1(a);  b = relu(bn2(h));  y = conv2(b) + (a, or conv3(a))

x               fp16, bf16 or fp32 [N, C, H, W] channels_last, with its partials fp32 [3, T, C] (see `kernels.bn_stats`)
w1, w2, w3      fp32 [K, C, 3, 3], [K, K, 3, 3], [K, C, 1, 1] channels_last; conv1 and conv3 carry the stride. There is
                no w3 where the shortcut is the identity: stride 1 and C = K
gamma*, beta*   fp32 [C] and [K]
h, y            x's dtype [N, K, P, Q] channels_last; y's partials leave with it, for the next block
norm1, norm2    fp32 [5, C] and [5, K] = (mean, var, rstd, scale, shift)

a and b are never stored: conv1 and conv3 recompute a from x as they load it, conv2 recomputes b from h, and adds the
identity shortcut recomputed from x. Saved for backward: x, h, norm1, norm2. Backward:

    dz2 = conv2's dgrad of dy, masked by b > 0, with both reductions of bn2's backward;  dh = bn2's dx
    dz1 = conv1's dgrad of dh, plus the shortcut's gradient (dy, or conv3's dgrad of it), masked by a > 0, with both
          reductions of bn1's;  dx = bn1's dx
    dw1, dw2, dw3 = wgrads with a and b recomputed on load

Passes over an activation of an identity block: forward 5 (conv1 2, conv2 3), backward 17 (dgrads 3 and 4, bn applies 3
and 3, wgrads 2 and 2). Where the tile table names the library for a convolution, `kernels.conv_dispatch` stores what it
needs; what was stored in forward and is needed again is kept for backward.
"""

import math

import torch
from torch import Tensor

from kernels.bn_backward import bn_backward_apply, bn_coefficients
from kernels.bn_stats import bn_finalize
from kernels.contract import check_activation, check_fp32, check_like
from kernels.conv_dispatch import Activation, check_weight, dgrad, fprop, wgrad, wgrad_stores
from kernels.conv_shape import ConvShape, flop_formula
from kernels.cost import Cost
from kernels.metered_cost import BODIES, metered_cost


@torch.library.custom_op("cifar::preact_block", mutates_args=())
def preact_block(
    x: Tensor,
    partials: Tensor,
    gamma1: Tensor,
    beta1: Tensor,
    w1: Tensor,
    gamma2: Tensor,
    beta2: Tensor,
    w2: Tensor,
    w3: Tensor | None,
    running2: Tensor | None,
    stride: int,
    eps1: float,
    eps2: float,
    forced: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, partials of y, h, norm1, norm2, a, b); a and b are of no elements unless they are kept for backward.

    With `running2` the statistics are constants (evaluation): `partials` for bn1 and `running2` for bn2, each a single
    tile; the partials of y are then of no tiles, [3, 0, K]. Differentiable in x, the gammas, betas and
    weights, from y; the gradient through the statistics is part of it.

    Raises ValueError or TypeError for operands other than the module's docstring has them.
    """
    _check(x, w1, w2, w3, stride)
    return _forward(x, partials, gamma1, beta1, w1, gamma2, beta2, w2, w3, running2, stride, eps1, eps2, forced)


def _forward(x, partials, gamma1, beta1, w1, gamma2, beta2, w2, w3, running2, stride, eps1, eps2, forced):
    training = running2 is None
    norm1 = bn_finalize(partials, gamma1, beta1, eps1)
    a = Activation(x, norm1)
    h, partials_h = fprop(a, w1, stride, statistics=training, forced=forced)
    norm2 = bn_finalize(partials_h if training else running2, gamma2, beta2, eps2)
    b = Activation(h, norm2)
    shortcut = a if w3 is None else Activation(fprop(a, w3, stride, statistics=False, forced=forced)[0])
    y, partials_y = fprop(b, w2, 1, shortcut, statistics=training, forced=forced)
    filters = len(w1)
    a_needed = wgrad_stores(x, filters, 3, stride, forced) or (
        w3 is not None and wgrad_stores(x, filters, 1, stride, forced)
    )
    kept = a.kept(a_needed), b.kept(wgrad_stores(h, filters, 3, 1, forced))
    return y, partials_y, h, norm1, norm2, *kept


preact_block.register_fake(_forward)
BODIES[torch.ops.cifar.preact_block.default] = _forward


@torch.library.custom_op("cifar::preact_block_backward", mutates_args=())
def preact_block_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    norm1: Tensor,
    norm2: Tensor,
    a: Tensor,
    b: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor | None,
    stride: int,
    constant: bool,
    forced: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(dx, coefficients1, coefficients2, [dw1, dw2, and dw3 if there is a w3]).

    The coefficients are fp32 [4, C] and [4, K] = (dgamma, dbeta, ..), see `kernels.bn_backward`. `constant`: no
    gradient reaches x through the statistics. Not differentiable.

    Raises ValueError or TypeError for operands other than the module's docstring has them.
    """
    shape = _check(x, w1, w2, w3, stride)
    check_like("dy", dy, "x", (x.shape[0], shape.K, shape.P, shape.Q), x)
    check_like("h", h, "x", dy.shape, x)
    check_fp32("norm1", norm1, (5, shape.C), "x", x)
    check_fp32("norm2", norm2, (5, shape.K), "h", h)
    return _backward(dy, x, h, norm1, norm2, a, b, w1, w2, w3, stride, constant, forced)


def _backward(dy, x, h, norm1, norm2, a, b, w1, w2, w3, stride, constant, forced):
    a, b = Activation(x, norm1, a), Activation(h, norm2, b)
    n1, n2 = (math.inf if constant else t.numel() / t.shape[1] for t in (x, h))
    dz, sums = dgrad(dy, w2, *h.shape[2:], a=b, forced=forced)
    coefficients2 = bn_coefficients(sums, norm2, n2)
    dh = bn_backward_apply(dz, h, norm2, coefficients2)
    # A strided 1x1 convolution sends a gradient only to the pixels it saw: that of the same convolution at stride 1.
    shortcut = dy if w3 is None else dgrad(dy, w3, *dy.shape[2:], forced=forced)[0]
    dz, sums = dgrad(dh, w1, *x.shape[2:], stride, shortcut, a, forced)
    coefficients1 = bn_coefficients(sums, norm1, n1)
    dx = bn_backward_apply(dz, x, norm1, coefficients1)
    dw = [wgrad(a, dh, 3, stride, forced), wgrad(b, dy, 3, 1, forced)]
    if w3 is not None:
        dw.append(wgrad(a, dy, 1, stride, forced))
    return dx, coefficients1, coefficients2, dw


preact_block_backward.register_fake(_backward)
BODIES[torch.ops.cifar.preact_block_backward.default] = _backward


def _check(x, w1, w2, w3, stride) -> ConvShape:
    """The layer that conv1 is."""
    check_activation("x", x)
    c, k = x.shape[1], w1.shape[0]
    check_weight("w1", w1, (k, c, 3, 3), x)
    check_weight("w2", w2, (k, k, 3, 3), x)
    if w3 is not None:
        check_weight("w3", w3, (k, c, 1, 1), x)
    elif stride != 1 or c != k:
        raise ValueError(
            f"w3 is None, expected a projection [{k}, {c}, 1, 1]: the block has stride {stride} and takes {c} channels "
            f"to {k}, so that its shortcut cannot be the identity"
        )
    return ConvShape.of(x, w1, stride)


def _setup_context(ctx, inputs, output) -> None:
    x, _, _, _, w1, _, _, w2, w3, running2, ctx.stride, _, _, ctx.forced = inputs
    ctx.constant = running2 is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for h would be a pass over memory
    ctx.save_for_backward(x, *output[2:], w1, w2, w3)


def _autograd(ctx, dy: Tensor, *_):
    # A gradient arrives in whatever layout its producer chose: a mean over pixels sends one of stride 0.
    dy = dy.contiguous(memory_format=torch.channels_last)
    dx, of_bn1, of_bn2, dw = preact_block_backward(dy, *ctx.saved_tensors, ctx.stride, ctx.constant, ctx.forced)
    dw1, dw2, dw3 = (*dw, None)[:3]
    return dx, None, of_bn1[0], of_bn1[1], dw1, of_bn2[0], of_bn2[1], dw2, dw3, *[None] * 5


preact_block.register_autograd(_autograd, setup_context=_setup_context)


@flop_formula("cifar::preact_block")
def _flops(x_shape, partials, gamma1, beta1, w1_shape, gamma2, beta2, w2_shape, w3_shape, running2, stride, *_, **__):
    n, c, h, w = x_shape
    conv1 = ConvShape(c, w1_shape[0], h, w, 3, stride)
    conv2 = ConvShape(conv1.K, conv1.K, conv1.P, conv1.Q)
    conv3 = 0 if w3_shape is None else ConvShape(c, conv1.K, h, w, 1, stride).flops(n)
    return conv1.flops(n) + conv2.flops(n) + conv3


@flop_formula("cifar::preact_block_backward")
def _backward_flops(dy_shape, x_shape, h_shape, norm1, norm2, a, b, w1_shape, w2_shape, w3_shape, stride, *_, **__):
    """A dgrad and a wgrad for each convolution."""
    return 2 * _flops(x_shape, None, None, None, w1_shape, None, None, w2_shape, w3_shape, None, stride)


def preact_block_cost(*operands: Tensor | float | None) -> Cost:
    """Cost of `preact_block` by our kernels: the five passes above if an identity, and [C] vectors."""
    return metered_cost(_forward, *operands[:-1], True)


def preact_block_backward_cost(*operands: Tensor | float | None) -> Cost:
    """Cost of `preact_block_backward` by our kernels: the seventeen passes above if an identity, and [C] vectors."""
    return metered_cost(_backward, *operands[:-1], True)
