"""Every op is accepted as it is, and refused by name when one line of its kernel is wrong."""

import sys

import pytest
import torch
from kernel_checks import channels_last, mutant

pytest.importorskip("triton")

from kernels import (
    augment,
    bn_apply,
    bn_backward,
    bn_stats,
    conv_dgrad_kernels,
    conv_fprop_kernels,
    conv_wgrad,
    sgd,
)
from kernels.accuracy import relative_error
from model import op_checks
from model.op_checks import OpChecks

GENERATOR = torch.Generator()


def normal(*extents):
    return torch.randn(extents, generator=GENERATOR)


def activation(channels, size, seed):
    return channels_last(2, channels, size, size, dtype=torch.float32, seed=seed, device=torch.device("cpu"))


def norm(x):
    return bn_stats.bn_finalize_reference(bn_stats.bn_stats_reference(x), 1 + 0.2 * normal(16), normal(16), 1e-5)


def of_sgd():
    rates = torch.tensor([0.5, 0.1])
    return normal(100), normal(100), normal(100), torch.zeros(100).half(), rates, *torch.tensor([[1], [-1]]), 0.9, 0.1


def of_augment():
    images = torch.randint(256, (3, 32, 32, 3), generator=GENERATOR, dtype=torch.uint8)
    choices = torch.tensor([[1, 2, 1, 3, 4]] * 3, dtype=torch.int32)
    return images, torch.tensor([2, 0]), choices, 100 + normal(3), 0.01 + 0.001 * normal(3), 2, 5, torch.float32


def of_conv(stride=1, k=16):
    x, w, affine = activation(16, 8, 1), activation(16, 3, 2)[:1].repeat(k, 1, 1, 1), norm(activation(16, 8, 1))[3:]
    w = (w * (1 + torch.arange(k)[:, None, None, None])).contiguous(memory_format=torch.channels_last)
    return x, w, affine, activation(k, 8 // stride, 3)


def of_fprop():
    x, w, affine, residual = of_conv()
    return x, w, 1, *affine, residual, None, None, True


def of_dgrad():
    x, w, affine, dy = of_conv(stride=2)
    return dy, w, 8, 8, 2, None, x, *affine, norm(x)[0]


def of_wgrad():
    x, _, affine, dy = of_conv(stride=2)
    return x, dy, 3, 2, *affine


def of_backward(pool=True):
    x = activation(16, 8, 1)
    return activation(16, 4, 2), x, norm(x), pool


CASES = {  # the op's module, a line of its kernel, what it becomes, its operands
    "augment": (augment, "tl.where(flip != 0, W - 1 - w, w)", "w", of_augment),
    "sgd": (sgd, "g += momentum * v", "g = v", of_sgd),
    "bn_stats": (bn_stats, "weight = tl.where(valid, 1.0, 0.0)", "weight = 1.0", lambda: (activation(16, 7, 1),)),
    "bn_stats_add": (
        bn_stats,
        "x = x.to(tl.float32) + tl.load",
        "x = x.to(tl.float32) - tl.load",
        lambda: (activation(16, 8, 1), activation(16, 8, 2)),
    ),
    "bn_finalize": (
        bn_stats,
        "mean += delta * share",
        "mean = mean + delta",
        lambda: (torch.stack([torch.full((600, 16), 9.0), *normal(2, 600, 16).abs()]), normal(16), normal(16), 0.1),
    ),
    "bn_apply": (
        bn_apply,
        "(i // 2) * 2 * POOLED_W + i % 2",
        "i % 2",
        lambda: (activation(16, 8, 1), normal(16), normal(16), None, True),
    ),
    "bn_backward_reduce": (bn_backward, "sum_dz_x += dz * (x - mean)", "sum_dz_x += dz * x", of_backward),
    "bn_coefficients": (
        bn_backward,
        "-scale * sum_dz * per_pixel",
        "-sum_dz * per_pixel",
        lambda: (normal(2, 3, 16), norm(activation(16, 8, 1)), 128.0),
    ),
    "bn_backward_apply": (
        bn_backward,
        "tl.where(which == i, dz, 0.0)",
        "dz",
        lambda: (*of_backward()[:3], normal(4, 16), True),
    ),
    "conv_fprop": (
        conv_fprop_kernels,
        "tl.minimum(N * P * Q - first, BLOCK_M).to(tl.float32)",
        "(BLOCK_M + 0.0 * N)",
        of_fprop,
    ),
    "conv_dgrad": (conv_dgrad_kernels, "keep = z > 0.0", "keep = z == z", of_dgrad),
    "conv_wgrad": (conv_wgrad, "r >> 1, s >> 1, r & 1, s & 1", "r >> 1, s >> 1, 0, 0", of_wgrad),
}  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    GENERATOR.manual_seed(0)


def run(name, operands):
    checks, begun = OpChecks(lambda place: begun.append(place)), []
    with checks:
        getattr(torch.ops.cifar, name)(*operands)
    assert len(begun) == 1
    assert not checks.unchecked
    return checks.wrong, begun[0]


@pytest.mark.parametrize("name", CASES)
def test_a_right_op_is_accepted(name):
    wrong, place = run(name, CASES[name][3]())
    assert not wrong
    assert place.startswith(name)


@pytest.mark.parametrize("name", CASES)
def test_an_op_whose_kernel_is_wrong_by_a_line_is_refused(monkeypatch, tmp_path, name):
    module, old, new, operands = CASES[name]
    changed = mutant(module, tmp_path, old, new)
    for owner in (module, sys.modules[module.__name__.removesuffix("_kernels")]):  # whose op launches them
        for kernel in [kernel for kernel in vars(owner) if kernel.endswith("_kernel") and hasattr(changed, kernel)]:
            monkeypatch.setattr(owner, kernel, getattr(changed, kernel))
    wrong, place = run(name, operands())
    assert list(wrong) == [place]
    assert f"{place}, is wrong: relative error " in wrong[place]


def test_every_op_of_the_project_has_a_reference():
    from kernels.metered_cost import COSTS

    assert {op._schema.name.removeprefix("cifar::") for op in COSTS} == set(op_checks.REFERENCES) == set(CASES)


def test_a_convolution_is_named_with_shape_and_tile():
    x, w, _, _ = of_conv(k=32)
    assert op_checks.describe("conv_fprop", (x.half(), w, 2)) == (
        "conv_fprop 16x8x8-32x3x3-s2 fp16, tile 1024x32x16 4 warps 1 stages pointers"
    )
    assert op_checks.describe("bn_stats", (x,)) == "bn_stats 2x16x8x8 fp32"


def test_not_finite_results_are_wrong_unless_expected():
    truth = torch.tensor([1.0, 2.0])
    assert (
        relative_error(torch.tensor([1.0, torch.nan]), truth) == relative_error(truth * torch.inf, truth) == torch.inf
    )
    assert relative_error(truth, truth) == 0
    assert relative_error(truth, 0 * truth) == pytest.approx(5**0.5)


def test_an_op_whose_reference_cannot_run_is_said_to_be_unchecked(monkeypatch):
    def missing(*_):
        raise RuntimeError("no engine for float64")

    monkeypatch.setitem(op_checks.REFERENCES, "bn_stats", missing)
    checks = OpChecks()
    with checks:
        torch.ops.cifar.bn_stats(activation(16, 8, 1))
    assert not checks.wrong
    assert list(checks.unchecked.values()) == ["bn_stats 2x16x8x8 fp32: RuntimeError"]
