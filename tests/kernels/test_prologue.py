"""The prologue in fp16 against float64: means far from zero, scales near it, NaN."""

import pytest
import torch

pytest.importorskip("triton")

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
