"""The prologue in fp16 against float64: means far from zero, scales near it, NaN, and what it is compiled to."""

import pytest
import torch
from ahead_of_time import Build, compile_all
from kernel_checks import assert_as_accurate, assert_caught, mutant

pytest.importorskip("triton")

import prologue_kernel
from prologue_kernel import relu_affine_kernel

from kernels import prologue


def compute(x, scale, shift, nan_is_zero=True):
    out = torch.empty_like(x)
    relu_affine_kernel[(1,)](x, scale, shift, out, *x.shape, nan_is_zero)
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


@pytest.mark.parametrize(
    ("mean", "sigma"), [(0, 1), (3, 1), (-16, 1), (400, 1), (-400, 1), (8000, 20), (0, 1e4), (1e-3, 1e-4), (0.1, 0)]
)
def test_it_is_as_accurate_as_fp32_rounded(device, mean, sigma):
    check(device, mean, sigma)


@pytest.mark.parametrize("scale", [0.0, 1e-6, -1e-6])
def test_a_scale_near_zero_leaves_the_shift(device, scale):
    """And a pivot -shift / scale that fp16 does not reach."""
    x, _, shift = channels(1.0, 1.0, device)
    scale, shift[0] = torch.full_like(shift, scale), 0.0
    truth = torch.relu(x.double() * scale.double() + shift.double())
    assert_as_accurate(compute(x, scale, shift), torch.relu(x.float() * scale + shift).half(), truth)


def test_nan_is_zero_or_stays(device):
    x, scale, shift = channels(0.0, 1.0, device)
    x[0] = torch.nan
    assert (compute(x, scale, shift, True)[0] == 0).all()
    assert compute(x, scale, shift, False)[0].isnan().all()
    x, shift[5] = torch.zeros_like(x), torch.nan
    assert compute(x, scale, shift, False)[:, 5].isnan().all()


MUTANTS = {
    "no_bias": ("(shift + pivot.to(tl.float32) * scale)", "(0.0 * shift)"),
    "no_pivot": ("tl.maximum(-shift / scale, -16384.0)", "tl.maximum(0.0 * shift, 0.0)"),
    "no_limits": ("tl.minimum(tl.maximum(-shift / scale, -16384.0), 16384.0)", "(-shift / scale)"),
    "no_relu": ("return tl.where(z > 0.0, z, 0.0)", "return tl.where(z == z, z, 0.0)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(device, monkeypatch, tmp_path, name):
    changed = mutant(prologue, tmp_path, *MUTANTS[name])
    monkeypatch.setattr(prologue, "halves", changed.halves)
    monkeypatch.setattr(prologue, "relu_affine", changed.relu_affine)

    def checks():
        check(device, 0.0, 1.0)
        check(device, 400.0, 1.0)
        test_a_scale_near_zero_leaves_the_shift(device, 0.0)

    assert_caught(checks)


def test_two_elements_take_two_or_three_instructions():
    """Packed subtraction and multiply-add; and a packed maximum that turns NaN into zero, or the ReLU of the latter."""
    signature = {"x_ptr": "*fp16", "scale_ptr": "*fp32", "shift_ptr": "*fp32", "out_ptr": "*fp16"}
    pairs = 256 * 64 // 2 // 128  # of a thread
    for nan_is_zero in (True, False):
        constants = {"ROWS": 256, "C": 64, "NAN_IS_ZERO": nan_is_zero}
        types, options = signature | dict.fromkeys(constants, "constexpr"), {"num_warps": 4}
        path = prologue_kernel.__file__
        (facts,) = compile_all([Build(path, "relu_affine_kernel", types, constants, tuple(signature), options=options)])
        assert not facts.error
        assert facts.count("HADD2") - facts.count("HADD2.F32") + facts.count("HFMA2") == 2 * pairs
        assert facts.count("HFMA2", "RELU") == (0 if nan_is_zero else pairs)
        assert facts.count("HMNMX2") == (pairs if nan_is_zero else 0)
