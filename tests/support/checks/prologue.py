"""Operands of the prologue in fp16, the check that its mutants fail, and the mutants."""

import pytest
import torch
from kernel_checks import Mutants, assert_as_accurate
from prologue_kernel import relu_affine_kernel

from kernels import prologue
from kernels.jit import INTERPRETED, triton


def compute(x, scale, shift, nan_is_zero=True):
    out = torch.empty_like(x)
    kernel = triton.jit(relu_affine_kernel.fn)  # anew: what is compiled once does not see that a mutant is called
    kernel[(1,)](x, scale, shift, out, *x.shape, nan_is_zero)
    return out


def channels(mean: float, sigma: float, device) -> tuple[torch.Tensor, ...]:
    """x fp16 [256, 64] of that mean and deviation, with the scale and shift of its batch norm, fp32."""
    generator = torch.Generator().manual_seed(0)
    x = (mean + sigma * torch.randn(256, 64, generator=generator)).half()
    gamma, beta = torch.rand(64, generator=generator) + 0.5, torch.randn(64, generator=generator)
    gamma[::3] *= -1
    scale = gamma / x.float().std(0).clamp(min=1e-3)
    return x.to(device), scale.to(device), (beta - x.float().mean(0) * scale).to(device)


def check(device, mean: float, sigma: float) -> None:
    x, scale, shift = channels(mean, sigma, device)
    for nan_is_zero in (True, False):
        truth = torch.relu(x.double() * scale.double() + shift.double())
        baseline = torch.relu(x.float() * scale + shift).half()
        assert_as_accurate(compute(x, scale, shift, nan_is_zero), baseline, truth, f"mean {mean}, sigma {sigma}")


MUTANTS = {
    "no_bias": ("(shift + pivot.to(tl.float32) * scale)", "(0.0 * shift)"),
    "no_pivot": ("tl.maximum(-shift / scale, -16384.0)", "tl.maximum(0.0 * shift, 0.0)"),
    "no_limits": ("tl.minimum(tl.maximum(-shift / scale, -16384.0), 16384.0)", "(-shift / scale)"),
    "no_relu": ("return tl.where(z > 0.0, z, 0.0)", "return tl.where(z == z, z, 0.0)")
    if INTERPRETED
    else ("max.f16x2 $0, z, zero;", "mov.b32 $0, z;"),
}


def check_scale_near_zero(device, scale: float) -> None:
    """The shift alone is left, with a pivot -shift / scale that fp16 does not reach."""
    x, _, shift = channels(1.0, 1.0, device)
    scale, shift[0] = torch.full_like(shift, scale), 0.0
    truth = torch.relu(x.double() * scale.double() + shift.double())
    assert_as_accurate(compute(x, scale, shift), torch.relu(x.float() * scale + shift).half(), truth)


def check_mutant(changed, device) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prologue, "halves", changed.halves)
        patch.setattr(prologue, "relu_affine", changed.relu_affine)
        check(device, 0.0, 1.0)
        check(device, 400.0, 1.0)
        check_scale_near_zero(device, 0.0)


ROWS = {"prologue": Mutants(prologue, MUTANTS, check_mutant, guarded=False)}
