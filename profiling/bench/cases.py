"""The benchmark's cases: every op at every layer shape of both networks, at the article's widths.

A case names an op, its variant (the work fused into it) and a layer: "CxHxW-KxRxR-sSTRIDE" for a convolution, "CxHxW"
of x for the rest.
"""

import torch

from kernels.augment import augment, augment_cost, augment_reference
from kernels.conv_shape import RESNET9_LAYERS, RESNET_LAYERS
from profiling.bench import batchnorm_cases as batchnorm
from profiling.bench.case import Case, OperandFactory
from profiling.bench.conv_cases import conv_dgrad_case, conv_fprop_case, conv_wgrad_case

# (C, side of the map) of a block's sum, and of x of a BN-ReLU: alone, with pool, with residual.
SUMS = ((64, 32), (128, 16), (256, 8), (256, 4))
PLAIN = (*SUMS, (512, 4))
POOLED = ((128, 32), (256, 16), (512, 8))
RESIDUAL = ((128, 16), (512, 4))
BACKWARD = (*((*m, "") for m in PLAIN), *((*m, "pool") for m in POOLED))
FORWARD = (*BACKWARD, *((*m, "residual") for m in RESIDUAL))
LAYERS = tuple(dict.fromkeys(RESNET_LAYERS + RESNET9_LAYERS))

SHORT = (
    "augment 3x32x32",
    "conv_fprop[prologue,statistics] 64x32x32-64x3x3-s1",
    "conv_fprop[prologue,statistics] 64x32x32-128x3x3-s2",
    "conv_fprop[prologue,statistics] 128x16x16-128x3x3-s1",
    "conv_fprop[prologue,statistics] 256x8x8-256x3x3-s1",
    "bn_stats 64x32x32",
    "bn_relu 64x32x32",
    "bn_backward 64x32x32",
    "conv_dgrad[mask,sums] 64x32x32-64x3x3-s1",
    "conv_dgrad[mask,sums] 128x16x16-128x3x3-s1",
    "conv_wgrad[prologue] 64x32x32-64x3x3-s1",
    "conv_wgrad[prologue] 128x16x16-128x3x3-s1",
)
"""The dozen where the article's network spends most of a step, one of every kind."""


def cases() -> tuple[Case, ...]:
    """Every case, in the order of a training step."""
    return (
        augment_case(),
        *(conv_fprop_case(shape, variant) for shape in LAYERS for variant in ("", "statistics", "prologue,statistics")),
        *(batchnorm.bn_stats_case(*m) for m in PLAIN + POOLED),
        *(batchnorm.bn_stats_add_case(*m) for m in SUMS),
        *(batchnorm.bn_finalize_case(*m) for m in PLAIN + POOLED),
        *(batchnorm.bn_apply_case(*m) for m in FORWARD),
        *(batchnorm.bn_relu_case(*m) for m in FORWARD),
        *(batchnorm.bn_backward_reduce_case(*m) for m in BACKWARD),
        *(batchnorm.bn_coefficients_case(*m) for m in BACKWARD),
        *(batchnorm.bn_backward_apply_case(*m) for m in BACKWARD),
        *(batchnorm.bn_backward_case(*m) for m in BACKWARD),
        *(conv_dgrad_case(shape.of_dgrad, "") for shape in LAYERS),
        *(conv_dgrad_case(shape, "mask,sums") for shape in LAYERS if shape.R > 1),
        *(conv_wgrad_case(shape, variant) for shape in LAYERS for variant in ("", "prologue")),
    )


def augment_case() -> Case:
    def operands(d: OperandFactory) -> tuple:
        dataset = 100 * d.batch
        choices = [d.integers(high, dataset, 1, dtype=torch.int32) for high in (9, 9, 2, 25, 25)]
        mean, rstd = 120 * d.positive(3), d.positive(3) / 60
        index = d.integers(dataset, d.batch, dtype=torch.int64)
        images = d.integers(256, dataset, 32, 32, 3, dtype=torch.uint8)
        return images, index, torch.cat(choices, 1), mean, rstd, 4, 8, d.dtype

    return Case("augment", "", "3x32x32", operands, augment_reference, augment, augment_cost)
