"""The prologue in fp16 against float64: means far from zero, scales near it, NaN, and what it is compiled to."""

import pytest
import torch
from ahead_of_time import Build, compile_all

pytest.importorskip("triton")

import prologue_kernel
from checks.prologue import channels, check, check_scale_near_zero, compute


@pytest.mark.parametrize(
    ("mean", "sigma"), [(0, 1), (3, 1), (-16, 1), (400, 1), (-400, 1), (8000, 20), (0, 1e4), (1e-3, 1e-4), (0.1, 0)]
)
def test_it_is_as_accurate_as_fp32_rounded(device, mean, sigma):
    check(device, mean, sigma)


@pytest.mark.parametrize("scale", [0.0, 1e-6, -1e-6])
def test_a_scale_near_zero_leaves_the_shift(device, scale):
    check_scale_near_zero(device, scale)


def test_nan_is_zero_or_stays(device):
    x, scale, shift = channels(0.0, 1.0, device)
    x[0] = torch.nan
    assert (compute(x, scale, shift, True)[0] == 0).all()
    assert compute(x, scale, shift, False)[0].isnan().all()
    x, shift[5] = torch.zeros_like(x), torch.nan
    assert compute(x, scale, shift, False)[:, 5].isnan().all()


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
