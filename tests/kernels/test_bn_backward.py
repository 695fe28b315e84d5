"""The backward reductions, their coefficients and dx, against float64; the reference itself against autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_as_accurate, mostly_slow

pytest.importorskip("triton")

from checks.bn_backward import backward, compare, problem

from kernels import bn_backward as module
from kernels import bn_stats, jit
from kernels.bn_backward import (
    bn_backward_apply,
    bn_backward_apply_cost,
    bn_backward_reduce,
    bn_backward_reduce_cost,
    bn_backward_reference,
    bn_coefficients,
    bn_coefficients_cost,
)
from kernels.bn_stats import bn_finalize_reference, bn_stats_reference
from kernels.cost import Cost

interpreted = pytest.mark.skipif(not jit.INTERPRETED, reason="out-of-bounds mutants need the interpreter's guard")

DTYPES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.float32, id="fp32")]
CASES = [  # shape, pool, MAX_PROGRAMS
    pytest.param((1, 16, 5, 7), False, 660, id="one_image_odd_map"),
    pytest.param((3, 24, 5, 7), False, 660, id="c_not_multiple_of_tile"),
    pytest.param((5, 16, 9, 9), False, 660, id="partial_last_tile"),
    pytest.param((2, 256, 4, 4), False, 660, id="several_channel_tiles"),
    pytest.param((7, 32, 7, 9), False, 2, id="several_steps_partial_last_step"),
    pytest.param((3, 16, 10, 14), True, 660, id="pool_partial_last_tile"),
    pytest.param((6, 80, 6, 8), True, 2, id="pool_several_steps"),
    pytest.param((2, 5, 2, 2), True, 660, id="pool_to_one_pixel_odd_c"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "pool", "programs"), mostly_slow(CASES, 0, 1, 4, 5))
def test_matches_float64(device, monkeypatch, shape, pool, programs, dtype):
    monkeypatch.setattr(bn_stats, "MAX_PROGRAMS", programs)
    for seed in range(3):
        compare(module, shape, pool, dtype, seed, device)


@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pool"])
def test_the_reference_is_batch_norms_gradient(pool):
    """Autograd's gradient of PyTorch's own batch norm, in float64."""
    dy, x, _ = problem((3, 6, 4, 6), pool, torch.float64, 0)
    x, gamma, beta = (t.double().requires_grad_() for t in (x, torch.randn(6), torch.randn(6)))
    y = F.relu(F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-5))
    expected = torch.autograd.grad(F.max_pool2d(y, 2) if pool else y, (x, gamma, beta), dy)
    norm = bn_finalize_reference(bn_stats_reference(x.detach()), gamma.detach(), beta.detach(), 1e-5)
    for ours, truth in zip(bn_backward_reference(dy, x.detach(), norm, 3 * 4 * 6, pool), expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float16, 100.0), (torch.float32, 3000.0)], ids=["fp16", "fp32"])
def test_nothing_cancels_where_the_mean_is_large(device, dtype, mean):
    """sum(dz * x) - mean * sum(dz) and b * x + c would lose log2(mean) bits."""
    for seed in range(3):
        dy, x, norm = problem((6, 16, 8, 8), False, dtype, seed, device, mean)
        norm[4] = (
            1e6  # every z is positive: the mask, which shift's rounding decides at such means, is not the question
        )
        n = x.numel() / 16
        ours, baseline = backward(module, dy, x, norm, n, False), bn_backward_reference(dy, x, norm, n)
        truth = bn_backward_reference(dy.double(), x.double(), norm.double(), n)
        for name, *values in zip(("dx", "dgamma", "dbeta"), ours, baseline, truth, strict=True):
            assert_as_accurate(*values, name)


def test_constant_statistics(device):
    """n = infinity: dx = scale * dz, and dgamma and dbeta as ever."""
    compare(module, (3, 24, 5, 7), False, torch.float32, 0, device, n=math.inf)
    dy, x, norm = problem((3, 24, 5, 7), False, torch.float32, 0, device)
    dx = backward(module, dy, x, norm, math.inf, False)[0]
    z = x * norm[3, :, None, None] + norm[4, :, None, None]
    assert torch.equal(dx, torch.where(z > 0, dy, 0.0) * norm[3, :, None, None])


def test_a_masked_gradient_gives_the_same(device):
    """What a convolution whose epilogue has applied the mask hands over."""
    dy, x, norm = problem((3, 24, 5, 7), False, torch.float16, 0, device)
    z = x.float() * norm[3, :, None, None] + norm[4, :, None, None]
    dz = torch.where(z > 0, dy, 0.0).contiguous(memory_format=torch.channels_last)
    for ours, masked in zip(
        backward(module, dy, x, norm, 105, False), backward(module, dz, x, norm, 105, False), strict=True
    ):
        assert torch.equal(ours, masked)


LAYERS = [(1, 16), (2, 24), (63, 5), (512, 80), (513, 512), (4096, 64), (5000, 24)]  # T, C


@pytest.mark.parametrize(("tiles", "channels"), mostly_slow(LAYERS, 0, 1, 2))
def test_coefficients_match_float64(device, tiles, channels):
    generator = torch.Generator().manual_seed(tiles)
    partials = torch.randn(2, tiles, channels, generator=generator).add(1).to(device)
    norm = torch.rand(5, channels, generator=generator).to(device)
    ours = bn_coefficients(partials, norm, 100.0)

    def by_hand(partials, norm):
        (sum_dz, sum_dz_x), rstd, scale = partials.sum(1), norm[2], norm[3]
        dgamma = rstd * sum_dz_x
        return torch.stack([dgamma, sum_dz, -scale * rstd * dgamma / 100, -scale * sum_dz / 100])

    baseline, truth = by_hand(partials, norm), by_hand(partials.double(), norm.double())
    for row, name in enumerate(("dgamma", "dbeta", "b", "c")):
        assert_as_accurate(ours[row], baseline[row], truth[row], name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("tile", [0, 599], ids=["first", "last"])
def test_what_is_not_finite_stays_in_its_channel(device, tile, value):
    partials, norm = torch.ones(2, 600, 20, device=device), torch.ones(5, 20, device=device)
    before = bn_coefficients(partials, norm, 100.0)
    partials[:, tile, 3] = value
    found = bn_coefficients(partials, norm, 100.0)
    assert not found[:, 3].isfinite().any()
    others = torch.arange(20, device=device) != 3
    assert torch.equal(found[:, others], before[:, others])


@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pool"])
def test_repeats_bit_for_bit(device, monkeypatch, pool):
    monkeypatch.setattr(bn_stats, "MAX_PROGRAMS", 3)
    arguments = (*problem((7, 24, 8, 10), pool, torch.float16, 0, device), 560, pool)
    for first, second in zip(backward(module, *arguments), backward(module, *arguments), strict=True):
        assert torch.equal(first, second)


def test_the_first_of_equal_maxima_gets_the_gradient(device):
    x = torch.ones(1, 16, 2, 2, device=device).contiguous(memory_format=torch.channels_last)
    norm = torch.zeros(5, 16, device=device)
    norm[2:4] = 1
    dy = torch.full((1, 16, 1, 1), 3.0, device=device).contiguous(memory_format=torch.channels_last)
    dx = backward(module, dy, x, norm, math.inf, True)[0]
    assert torch.equal(dx[0, :, 0, 0], torch.full((16,), 3.0, device=device))
    assert dx.sum() == 16 * 3


@pytest.mark.slow
def test_registration(device):
    for pool in (False, True):
        dy, x, norm = problem((2, 24, 4, 6), pool, torch.float16, 0, device)
        partials = bn_backward_reduce(dy, x, norm, pool)
        coefficients = bn_coefficients(partials, norm, 48.0)
        torch.library.opcheck(bn_backward_reduce, (dy, x, norm, pool))
        torch.library.opcheck(bn_coefficients, (partials, norm, 48.0))
        torch.library.opcheck(bn_backward_apply, (dy, x, norm, coefficients, pool))


def replaced(position: int, change, device) -> list:
    arguments = [*problem((2, 16, 4, 6), True, torch.float16, 0, device), True]
    arguments[position] = change(arguments[position])
    return arguments


@pytest.mark.parametrize(
    ("position", "change", "error", "message"),
    [
        pytest.param(0, lambda x: x.float(), TypeError, "dy is torch.float32", id="dy_dtype"),
        pytest.param(0, lambda x: x.contiguous(), ValueError, "dy has strides", id="dy_nchw"),
        pytest.param(0, lambda x: x[:1], ValueError, "dy has shape", id="dy_shape"),
        pytest.param(0, lambda x: x[..., :1].expand(-1, -1, -1, 3), ValueError, "dy has strides", id="stride_0"),
        pytest.param(1, lambda x: x[:0], ValueError, "x has shape .* non-empty", id="zero_images"),
        pytest.param(1, lambda x: x[:, :, :3].clone(), ValueError, "even height and width", id="odd_map"),
        pytest.param(2, lambda x: x[:4], ValueError, "norm has shape", id="norm_rows"),
        pytest.param(2, lambda x: x[:, :8].clone(), ValueError, "norm has shape", id="channels"),
    ],
)
def test_contract(device, position, change, error, message):
    arguments = replaced(position, change, device)
    with pytest.raises(error, match=message):
        bn_backward_reduce(*arguments)
    with pytest.raises(error, match=message):
        bn_backward_apply(*arguments[:3], torch.zeros(4, 16, device=device), arguments[3])


def test_contract_of_the_coefficients(device):
    with pytest.raises(ValueError, match="n is 0"):
        bn_coefficients(torch.zeros(2, 3, 16, device=device), torch.zeros(5, 16, device=device), 0.0)
    with pytest.raises(ValueError, match="partials has shape"):
        bn_coefficients(torch.zeros(3, 3, 16, device=device), torch.zeros(5, 16, device=device), 1.0)
    dy, x, norm = problem((2, 16, 4, 6), False, torch.float16, 0, device)
    with pytest.raises(ValueError, match="coefficients has shape"):
        bn_backward_apply(dy, x, norm, torch.zeros(4, 8, device=device))


def test_cost():
    """Passes of 64x32x32 maps of 512 images, fp16: reduce 2, apply 3; with the pool dy is a quarter of one."""
    x = torch.empty(512, 64, 32, 32, dtype=torch.float16, device="meta")
    pooled = torch.empty(512, 64, 16, 16, dtype=torch.float16, device="meta")
    norm, coefficients = torch.empty(5, 64, device="meta"), torch.empty(4, 64, device="meta")
    one_pass, norm_bytes = 2 * x.numel(), 5 * 64 * 4
    tiles, _ = bn_stats.reduction_grid(512 * 32 * 32, 64)
    partial_bytes = 2 * tiles * 64 * 4
    assert bn_backward_reduce_cost(x, x, norm) == Cost(6 * x.numel(), 2 * one_pass + norm_bytes + partial_bytes)
    apply_cost = bn_backward_apply_cost(x, x, norm, coefficients)
    assert apply_cost == Cost(7 * x.numel(), 3 * one_pass + norm_bytes + 4 * 64 * 4)
    assert bn_backward_apply_cost(pooled, x, norm, coefficients, True).bytes == apply_cost.bytes - one_pass * 3 // 4
    partials = torch.empty(2, tiles, 64, device="meta")
    assert bn_coefficients_cost(partials, norm, 1.0).bytes == partial_bytes + norm_bytes + 4 * 64 * 4
