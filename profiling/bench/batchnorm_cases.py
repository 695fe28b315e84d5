"""The cases of the batch-norm kernels; each builder takes the channels and the side of x [batch, C, side, side]."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import bn_backward, bn_stats
from kernels.bn_apply import bn_apply, bn_apply_cost
from kernels.bn_backward import bn_backward_apply, bn_backward_reduce, bn_coefficients
from kernels.bn_relu import bn_relu, bn_relu_cost, bn_relu_reference
from kernels.bn_stats import bn_finalize_reference, bn_stats_reference, reduction_grid
from kernels.cost import Cost
from profiling.bench.case import (
    EPS,
    Case,
    OperandFactory,
    affine,
    affine_relu,
    masked,
    moments,
    moments_of,
    per_channel,
    sums,
    with_arguments,
    with_moments,
)


def bn_stats_case(c: int, size: int) -> Case:
    def operands(d: OperandFactory) -> tuple:
        return (d.activation(c, size),)

    ours, cost = bn_stats.bn_stats, bn_stats.bn_stats_cost
    return Case("bn_stats", "", _map(c, size), operands, moments, ours, cost, moments_of)


def bn_stats_add_case(c: int, size: int) -> Case:
    def operands(d: OperandFactory) -> tuple:
        return d.activation(c, size), d.activation(c, size)

    def library(x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        y = x + residual
        return y, *moments(y)

    ours, cost = bn_stats.bn_stats_add, bn_stats.bn_stats_add_cost
    return Case("bn_stats_add", "", _map(c, size), operands, library, ours, cost, with_moments)


def bn_finalize_case(c: int, size: int) -> Case:
    def operands(d: OperandFactory) -> tuple:
        tiles, _ = reduction_grid(d.batch * size**2, c)
        count = torch.full((tiles, c), 64.0, device=d.device)
        partials = torch.stack([count, d.normal(tiles, c), 64 * d.positive(tiles, c)])
        return partials, d.positive(c), d.normal(c), EPS

    ours, cost = bn_stats.bn_finalize, bn_stats.bn_finalize_cost
    return Case("bn_finalize", "", _map(c, size), operands, bn_finalize_reference, ours, cost)


def bn_apply_case(c: int, size: int, variant: str) -> Case:
    pool = variant == "pool"

    def operands(d: OperandFactory) -> tuple:
        return d.activation(c, size), *affine(d, c), d.activation(c, size) if variant == "residual" else None

    def library(x, scale, shift, mean, var, residual) -> Tensor:
        y = affine_relu(x, scale, shift, mean, var)
        y = F.max_pool2d(y, 2) if pool else y
        return y if residual is None else y + residual

    def arguments(x, scale, shift, mean, var, residual) -> tuple:
        return x, scale, shift, residual, pool

    ours, cost = with_arguments(bn_apply, arguments), with_arguments(bn_apply_cost, arguments)
    return Case("bn_apply", variant, _map(c, size), operands, library, ours, cost)


def bn_relu_case(c: int, size: int, variant: str) -> Case:
    """The whole forward of a batch norm in training, from x: the library takes its statistics in the same call."""
    pool = variant == "pool"

    def operands(d: OperandFactory) -> tuple:
        residual = d.activation(c, size) if variant == "residual" else None
        return d.activation(c, size), d.positive(c), d.normal(c), residual

    def library(x, gamma, beta, residual) -> Tensor:
        return bn_relu_reference(x, gamma, beta, EPS, residual, pool)

    def ours(x, gamma, beta, residual) -> Tensor:
        return bn_relu(x, bn_stats.bn_stats(x), gamma, beta, EPS, residual=residual, pool=pool)[0]

    def cost(x, gamma, beta, residual) -> Cost:
        partials = x.new_empty((3, reduction_grid(x.numel() // c, c)[0], c), dtype=torch.float32, device="meta")
        apply_cost = bn_relu_cost(x, partials, gamma, beta, EPS, residual=residual, pool=pool)
        return bn_stats.bn_stats_cost(x) + apply_cost

    return Case("bn_relu", variant, _map(c, size), operands, library, ours, cost)


def bn_backward_reduce_case(c: int, size: int, variant: str) -> Case:
    def operands(d: OperandFactory) -> tuple:
        return *_gradient_operands(d, c, size, variant), variant == "pool"

    def library(dy: Tensor, x: Tensor, norm: Tensor, pool: bool) -> tuple[Tensor, Tensor]:
        return sums(masked(dy, x, norm, pool), x, norm[0])

    def comparable(partials: Tensor) -> tuple[Tensor, ...]:
        return tuple(partials.sum(1))

    cost = bn_backward.bn_backward_reduce_cost
    return Case("bn_backward_reduce", variant, _map(c, size), operands, library, bn_backward_reduce, cost, comparable)


def bn_coefficients_case(c: int, size: int, variant: str) -> Case:
    def operands(d: OperandFactory) -> tuple:
        tiles, _ = reduction_grid(d.batch * _side_of_dy(size, variant) ** 2, c, variant == "pool")
        return d.normal(2, tiles, c), d.positive(5, c), d.batch * float(size**2)

    def library(partials: Tensor, norm: Tensor, n: float) -> Tensor:
        dbeta, centred = partials.sum(1)
        dgamma = norm[2] * centred
        return torch.stack([dgamma, dbeta, -norm[3] * norm[2] * dgamma / n, -norm[3] * dbeta / n])

    cost = bn_backward.bn_coefficients_cost
    return Case("bn_coefficients", variant, _map(c, size), operands, library, bn_coefficients, cost)


def bn_backward_apply_case(c: int, size: int, variant: str) -> Case:
    def operands(d: OperandFactory) -> tuple:
        return *_gradient_operands(d, c, size, variant), d.normal(4, c) / 16, variant == "pool"

    def library(dy: Tensor, x: Tensor, norm: Tensor, coefficients: Tensor, pool: bool) -> Tensor:
        mean, _, _, scale, _ = map(per_channel, norm)
        b, c = map(per_channel, coefficients[2:])
        return (scale * masked(dy, x, norm, pool) + b * (x - mean) + c).to(x.dtype)

    cost = bn_backward.bn_backward_apply_cost
    return Case("bn_backward_apply", variant, _map(c, size), operands, library, bn_backward_apply, cost)


def bn_backward_case(c: int, size: int, variant: str) -> Case:
    """The whole backward of a BN-ReLU: our three kernels beside autograd's.

    With the pool autograd's dx is a percent or two off: rounded to fp16, two of a window may be equal that were not,
    and the first then gets the gradient. Ours may be off by twice that.
    """
    pool = variant == "pool"

    def operands(d: OperandFactory) -> tuple:
        x, gamma, beta = d.activation(c, size), d.positive(c), d.normal(c)
        norm = d.norm(x) if d.untouched else bn_finalize_reference(bn_stats_reference(x), gamma, beta, EPS)
        return x, gamma, beta, norm, d.activation(c, _side_of_dy(size, variant))

    def library(x, gamma, beta, norm, dy) -> Tensor:
        return bn_relu_reference(x, gamma, beta, EPS, pool=pool)

    def ours(x, gamma, beta, norm, dy) -> tuple[Tensor, ...]:
        coefficients = bn_coefficients(bn_backward_reduce(dy, x, norm, pool), norm, x.numel() / c)
        return bn_backward_apply(dy, x, norm, coefficients, pool), coefficients[0], coefficients[1]

    def cost(x, gamma, beta, norm, dy) -> Cost:
        partials = torch.empty(2, reduction_grid(dy.numel() // c, c, pool)[0], c, device="meta")
        return (
            bn_backward.bn_backward_reduce_cost(dy, x, norm, pool)
            + bn_backward.bn_coefficients_cost(partials, norm, math.inf)
            + bn_backward.bn_backward_apply_cost(dy, x, norm, norm[:4], pool)
        )

    return Case("bn_backward", variant, _map(c, size), operands, library, ours, cost, gradient_of=(0, 1, 2))


def _map(c: int, size: int) -> str:
    return f"{c}x{size}x{size}"


def _side_of_dy(size: int, variant: str) -> int:
    return size // 2 if variant == "pool" else size


def _gradient_operands(d: OperandFactory, c: int, size: int, variant: str) -> tuple[Tensor, Tensor, Tensor]:
    """(dy, x, norm)."""
    x = d.activation(c, size)
    return d.activation(c, _side_of_dy(size, variant)), x, d.norm(x)
