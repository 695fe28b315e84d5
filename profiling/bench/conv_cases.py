"""The cases of the convolution kernels, of which the tuning command times those with everything fused."""

import torch.nn.functional as F
from torch import Tensor

from kernels.bn_apply import bn_apply
from kernels.bn_backward import bn_backward_reduce
from kernels.bn_stats import bn_stats
from kernels.conv_dgrad import conv_dgrad, conv_dgrad_cost
from kernels.conv_fprop import conv_fprop, conv_fprop_cost
from kernels.conv_shape import ConvShape
from kernels.conv_wgrad import conv_wgrad, conv_wgrad_cost
from profiling.bench.case import (
    Case,
    OperandFactory,
    affine,
    affine_relu,
    masked,
    moments,
    sums,
    with_arguments,
    with_moments,
)
from profiling.device.ceilings import conv_backward


def conv_fprop_case(shape: ConvShape, variant: str) -> Case:
    prologue, statistics = "prologue" in variant, "statistics" in variant

    def operands(d: OperandFactory) -> tuple:
        return d.activation(shape.C, shape.H, shape.W), d.weight(shape), *affine(d, shape.C)

    def convolve(a: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(a, w, stride=shape.stride, padding=shape.R // 2)

    def library(x, w, scale, shift, mean, var) -> tuple[Tensor, ...]:
        y = convolve(affine_relu(x, scale, shift, mean, var) if prologue else x, w)
        return (y, *moments(y)) if statistics else (y,)

    def hybrid(x, w, scale, shift, mean, var) -> tuple[Tensor, Tensor]:
        y = convolve(bn_apply(x, scale, shift) if prologue else x, w)
        return y, bn_stats(y) if statistics else y.new_empty((3, 0, shape.K))

    def arguments(x, w, scale, shift, mean, var) -> tuple:
        no_residual = (None,) * 3
        return x, w, shape.stride, *((scale, shift) if prologue else (None, None)), *no_residual, statistics

    ours, cost = with_arguments(conv_fprop, arguments), with_arguments(conv_fprop_cost, arguments)
    return Case("conv_fprop", variant, str(shape), operands, library, ours, cost, with_moments, hybrid)


def conv_dgrad_case(shape: ConvShape, variant: str) -> Case:
    fused = bool(variant)

    def operands(d: OperandFactory) -> tuple:
        x, dy = d.activation(shape.C, shape.H, shape.W), d.activation(shape.K, shape.P, shape.Q)
        return dy, x, d.weight(shape), d.norm(x)

    def library(dy, x, w, norm) -> tuple[Tensor, ...]:
        da = conv_backward(dy, x, w, shape, 0)
        if not fused:
            return (da,)
        dz = masked(da, x, norm, pool=False)
        return dz, *sums(dz, x, norm[0])

    def hybrid(dy, x, w, norm) -> tuple[Tensor, ...]:
        """Batch norm's backward kernels mask on load, so that nobody writes dz."""
        da = conv_backward(dy, x, w, shape, 0)
        return (da, bn_backward_reduce(da, x, norm), x, norm) if fused else (da, None)

    def arguments(dy, x, w, norm) -> tuple:
        mask = (x, norm[3], norm[4], norm[0]) if fused else (None,) * 4
        return dy, w, shape.H, shape.W, shape.stride, None, *mask

    def comparable(result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        dz, partials, *unmasked = result
        if unmasked:
            dz = masked(dz, *unmasked, pool=False)
        return (dz, *partials.sum(1)) if fused else (dz,)

    ours, cost = with_arguments(conv_dgrad, arguments), with_arguments(conv_dgrad_cost, arguments)
    return Case("conv_dgrad", variant, str(shape), operands, library, ours, cost, comparable, hybrid)


def conv_wgrad_case(shape: ConvShape, variant: str) -> Case:
    prologue = bool(variant)

    def operands(d: OperandFactory) -> tuple:
        x, dy = d.activation(shape.C, shape.H, shape.W), d.gradient(shape.K, shape.P, shape.Q)
        return x, dy, d.weight(shape), *affine(d, shape.C)

    def library(x, dy, w, scale, shift, mean, var) -> Tensor:
        a = affine_relu(x, scale, shift, mean, var) if prologue else x
        return conv_backward(dy, a, w, shape, 1)

    def hybrid(x, dy, w, scale, shift, mean, var) -> Tensor:
        return conv_backward(dy, bn_apply(x, scale, shift) if prologue else x, w, shape, 1)

    def arguments(x, dy, w, scale, shift, mean, var) -> tuple:
        return x, dy, shape.R, shape.stride, *((scale, shift) if prologue else (None, None))

    ours, cost = with_arguments(conv_wgrad, arguments), with_arguments(conv_wgrad_cost, arguments)
    return Case("conv_wgrad", variant, str(shape), operands, library, ours, cost, hybrid=hybrid)
