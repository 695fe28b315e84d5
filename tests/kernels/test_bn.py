"""Batch norm's ops against float64: statistics and their merging, the affine map, backward, and the whole."""

import math

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_as_accurate, channels_last, mostly_slow

pytest.importorskip("triton")

from checks import bn_apply as applies
from checks import bn_backward as backwards
from checks.bn_stats import by_tiles, merged, partials_of

from kernels import bn_stats as module
from kernels.bn_apply import bn_apply, bn_apply_reference
from kernels.bn_backward import bn_backward_reference, bn_coefficients
from kernels.bn_relu import bn_relu, bn_relu_reference
from kernels.bn_stats import bn_finalize, bn_finalize_reference, bn_stats, bn_stats_add, bn_stats_reference

EPS = 1e-5
DTYPES = pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, id="fp16"), pytest.param(torch.float32, id="fp32")]
)
POOL = pytest.mark.parametrize("pool", [False, True], ids=["plain", "pool"])
TILES = pytest.mark.parametrize(  # T, C
    ("tiles", "channels"),
    mostly_slow([(1, 16), (2, 24), (63, 5), (512, 80), (513, 512), (4096, 64), (5000, 24)], 0, 1, 2),
)
NOT_FINITE = pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "minus_inf"])
STATS = mostly_slow(
    [  # shape, MAX_PROGRAMS
        pytest.param((1, 16, 5, 7), 660, id="one_image_odd_map"),
        pytest.param((3, 24, 5, 7), 660, id="c_not_multiple_of_tile"),
        pytest.param((5, 16, 9, 9), 660, id="partial_last_tile"),
        pytest.param((2, 256, 4, 4), 660, id="several_channel_tiles"),
        pytest.param((7, 32, 7, 9), 2, id="several_steps_partial_last_step"),
        pytest.param((4, 80, 6, 6), 3, id="several_steps_and_channel_tiles"),
        pytest.param((2, 5, 3, 3), 660, id="odd_c"),
        pytest.param((3, 1, 4, 4), 660, id="one_channel"),
        pytest.param((1, 16, 1, 1), 660, id="one_pixel"),
    ],
    *(0, 1, 4),
)


@DTYPES
@pytest.mark.parametrize(("shape", "programs"), STATS)
def test_stats_match_float64(device, monkeypatch, shape, programs, dtype):
    monkeypatch.setattr(module, "MAX_PROGRAMS", programs)
    for seed in range(3):
        x = channels_last(*shape, dtype=dtype, seed=seed, device=device) + seed
        ours, baseline, truth = bn_stats(x), by_tiles(x), by_tiles(x.double())
        assert torch.equal(ours[0], baseline[0])
        assert ours[0, :, 0].sum() == x.numel() // shape[1]
        assert_as_accurate(ours[1], baseline[1], truth[1], "mean")
        assert_as_accurate(ours[2], baseline[2], truth[2], "M2")
        assert torch.equal(ours, bn_stats(x)), "repeats bit for bit"


@DTYPES
@pytest.mark.parametrize(("shape", "programs"), STATS)
def test_stats_add_is_the_sum_and_its_statistics(device, monkeypatch, shape, programs, dtype):
    monkeypatch.setattr(module, "MAX_PROGRAMS", programs)
    x, residual = (channels_last(*shape, dtype=dtype, seed=seed, device=device) for seed in (0, 1))
    y, partials = bn_stats_add(x, residual)
    assert torch.equal(y, x + residual)
    assert y.stride() == x.stride()
    assert torch.equal(partials, bn_stats(y)), "of y as stored"


def test_the_gradient_of_the_sum_reaches_both(device):
    x, residual, dy = (channels_last(2, 16, 3, 3, dtype=torch.float32, seed=s, device=device) for s in range(3))
    x.requires_grad_(), residual.requires_grad_()
    y, partials = bn_stats_add(x, residual)
    assert not partials.requires_grad
    assert not bn_stats(x).requires_grad
    assert all(torch.equal(gradient, dy) for gradient in torch.autograd.grad(y, (x, residual), dy))


@pytest.mark.parametrize(
    ("dtype", "mean", "sigma"), [(torch.float16, 500.0, 2.0), (torch.float32, 3000.0, 1.0)], ids=["fp16", "fp32"]
)
def test_statistics_of_a_large_mean_do_not_cancel(device, monkeypatch, dtype, mean, sigma):
    """In fp32 sum(x^2) / n - mean^2 errs by about mean^2 eps: here a hundredth of the variance, or all of it."""
    monkeypatch.setattr(module, "MAX_PROGRAMS", 4)
    x = channels_last(6, 16, 16, 16, dtype=torch.float32, seed=0, device=device, scale=sigma).add(mean).to(dtype)
    truth = merged(by_tiles(x.double()))
    ours = bn_finalize(bn_stats(x), torch.ones(16, device=device), torch.zeros(16, device=device), 0.0).double()
    assert ((ours[0] - truth[0]).abs() < 4 * torch.finfo(torch.float32).eps * mean).all()
    assert ((ours[2].pow(-2) - truth[1]).abs() < 1e-4 * truth[1]).all()


@pytest.mark.parametrize(
    ("mean", "apart", "empty"),
    [(0.0, 1.0, 0), (500.0, 1.0, 2), (1000.0, 280.0, 1)],
    ids=["the_first_tile_is_empty", "far", "apart"],
)
@TILES
def test_finalize_matches_float64(device, tiles, channels, mean, apart, empty):
    """A mean of 400 sigma, and tiles whose means are 400 of a tile's sigma from each other, too."""
    partials = partials_of(tiles, channels, tiles, device, mean, apart, empty if tiles > 1 else None)
    gamma, beta = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)
    ours, baseline = bn_finalize(partials, gamma, beta, EPS), bn_finalize_reference(partials, gamma, beta, EPS)
    truth = bn_finalize_reference(partials.double(), gamma.double(), beta.double(), EPS)
    for row, name in enumerate(("mean", "var", "rstd", "scale", "shift")):
        assert_as_accurate(ours[row], baseline[row], truth[row], name)


def test_the_norm_is_batch_norm_s(device):
    """Against the definition rather than against our reference of it: unbiased var, eps within the root."""
    x = channels_last(4, 8, 3, 5, dtype=torch.float32, seed=0, device=device, scale=0.01)
    gamma, beta = torch.rand(8, device=device) + 0.5, torch.randn(8, device=device)
    norm = bn_finalize(bn_stats(x), gamma, beta, 1e-2).double()
    dims, x = (0, 2, 3), x.double()
    rstd = (x.var(dims, correction=0) + 1e-2).rsqrt()
    expected = torch.stack([x.mean(dims), x.var(dims), rstd, gamma * rstd, beta - x.mean(dims) * gamma * rstd])
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of the interpreter
@NOT_FINITE
@pytest.mark.parametrize("tile", [0, 598], ids=["first", "last"])
def test_finalize_keeps_what_is_not_finite_to_its_channel(device, tile, value):
    """A tile's mean: the channel has then no statistics, as by the reference, and the other channels keep theirs."""
    partials = partials_of(600, 20, 0, device)
    gamma, others = torch.ones(20, device=device), torch.arange(20, device=device) != 3
    before = bn_finalize(partials, gamma, gamma, EPS)
    partials[1, tile, 3] = value
    norm, reference = (f(partials, gamma, gamma, EPS) for f in (bn_finalize, bn_finalize_reference))
    assert not reference[:, 3].isfinite().any()
    assert not norm[:, 3].isfinite().any()
    assert torch.equal(norm[:, others], before[:, others])


@DTYPES
@pytest.mark.parametrize(
    ("shape", "pool", "residual"),
    [
        pytest.param((1, 16, 5, 7), False, False, id="one_image_odd_map"),
        pytest.param((3, 24, 5, 7), False, True, id="c_not_multiple_of_tile"),
        pytest.param((5, 16, 9, 9), False, True, id="partial_last_tile"),
        pytest.param((2, 80, 4, 4), False, False, id="partial_channel_tile"),
        pytest.param((2, 256, 4, 4), True, False, id="pool_several_channel_tiles"),
        pytest.param((3, 16, 10, 14), True, True, id="pool_partial_last_tile"),
        pytest.param((1, 5, 2, 2), True, False, id="pool_to_one_pixel_odd_c"),
        pytest.param((1, 16, 1, 1), False, True, id="one_pixel"),
    ],
)
def test_apply_matches_float64(device, shape, pool, residual, dtype):
    for seed in range(3):
        arguments = applies.problem(shape, pool, residual, dtype, seed, device)
        ours, baseline = bn_apply(*arguments), bn_apply_reference(*arguments)
        assert_as_accurate(ours, baseline, bn_apply_reference(*applies.double(arguments)))
        assert ours.is_contiguous(memory_format=torch.channels_last)


@POOL
def test_apply_passes_nan_on(device, pool):
    """A diverged network must look diverged: neither ReLU nor the pool may turn NaN into a number. PyTorch's do not."""
    for corner in range(4):
        arguments = applies.problem((1, 16, 4, 4), pool, False, torch.float32, 0, device)
        arguments[0][0, 3, corner // 2, corner % 2] = torch.nan
        ours = bn_apply(*arguments).isnan()
        assert torch.equal(ours, bn_apply_reference(*arguments).isnan())
        assert ours.sum() == 1


@DTYPES
@pytest.mark.parametrize(
    ("shape", "pool", "programs"),
    mostly_slow(
        [
            pytest.param((1, 16, 5, 7), False, 660, id="one_image_odd_map"),
            pytest.param((3, 24, 5, 7), False, 660, id="c_not_multiple_of_tile"),
            pytest.param((5, 16, 9, 9), False, 660, id="partial_last_tile"),
            pytest.param((2, 256, 4, 4), False, 660, id="several_channel_tiles"),
            pytest.param((7, 32, 7, 9), False, 2, id="several_steps_partial_last_step"),
            pytest.param((3, 16, 10, 14), True, 660, id="pool_partial_last_tile"),
            pytest.param((6, 80, 6, 8), True, 2, id="pool_several_steps"),
            pytest.param((2, 5, 2, 2), True, 660, id="pool_to_one_pixel_odd_c"),
        ],
        *(0, 1, 4, 5),
    ),
)
def test_backward_matches_float64(device, monkeypatch, shape, pool, programs, dtype):
    monkeypatch.setattr(module, "MAX_PROGRAMS", programs)
    for seed in range(3):
        given = backwards.problem(shape, pool, dtype, seed, device)
        backwards.compare(backwards.module, *given, pool)
    for first, second in zip(*(backwards.backward(backwards.module, *given, 560, pool) for _ in range(2)), strict=True):
        assert torch.equal(first, second), "repeats bit for bit"


@POOL
def test_the_backward_reference_is_batch_norm_s_gradient(pool):
    """Autograd's gradient of PyTorch's own batch norm, in float64."""
    dy, x, _ = backwards.problem((3, 6, 4, 6), pool, torch.float64, 0)
    x, gamma, beta = (t.double().requires_grad_() for t in (x, torch.randn(6), torch.randn(6)))
    y = bn_relu_reference(x, gamma, beta, EPS, None, pool)
    expected = torch.autograd.grad(y, (x, gamma, beta), dy)
    norm = bn_finalize_reference(bn_stats_reference(x.detach()), gamma.detach(), beta.detach(), EPS)
    for ours, truth in zip(bn_backward_reference(dy, x.detach(), norm, 3 * 4 * 6, pool), expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "mean"), [(torch.float16, 100.0), (torch.float32, 3000.0)], ids=["fp16", "fp32"])
def test_backward_of_a_large_mean_does_not_cancel(device, dtype, mean):
    """sum(dz * x) - mean * sum(dz) and b * x + c would lose log2(mean) bits."""
    for seed in range(3):
        dy, x, norm = backwards.problem((6, 16, 8, 8), False, dtype, seed, device, mean)
        norm[4] = 1e6  # every z is positive: the mask, which shift's rounding decides, is not the question
        backwards.compare(backwards.module, dy, x, norm)


def test_backward_of_constant_statistics(device):
    """n = infinity: dx = scale * dz, and dgamma and dbeta as ever."""
    dy, x, norm = backwards.problem((3, 24, 5, 7), False, torch.float32, 0, device)
    backwards.compare(backwards.module, dy, x, norm, n=math.inf)
    dx = backwards.backward(backwards.module, dy, x, norm, math.inf, False)[0]
    z = x * norm[3, :, None, None] + norm[4, :, None, None]
    assert torch.equal(dx, torch.where(z > 0, dy, 0.0) * norm[3, :, None, None])


def test_backward_of_a_masked_gradient_is_the_same(device):
    """A convolution whose epilogue has applied the mask hands over such a one."""
    dy, x, norm = backwards.problem((3, 24, 5, 7), False, torch.float16, 0, device)
    z = x.float() * norm[3, :, None, None] + norm[4, :, None, None]
    dz = torch.where(z > 0, dy, 0.0).contiguous(memory_format=torch.channels_last)
    both = (backwards.backward(backwards.module, gradient, x, norm, 105, False) for gradient in (dy, dz))
    assert all(torch.equal(ours, masked) for ours, masked in zip(*both, strict=True))


def test_the_first_of_equal_maxima_gets_the_gradient(device):
    x = torch.ones(1, 16, 2, 2, device=device).contiguous(memory_format=torch.channels_last)
    norm = torch.zeros(5, 16, device=device)
    norm[2:4] = 1
    dy = torch.full((1, 16, 1, 1), 3.0, device=device).contiguous(memory_format=torch.channels_last)
    dx = backwards.backward(backwards.module, dy, x, norm, math.inf, True)[0]
    assert torch.equal(dx[0, :, 0, 0], torch.full((16,), 3.0, device=device))
    assert dx.sum() == 16 * 3


@TILES
def test_coefficients_match_float64(device, tiles, channels):
    generator = torch.Generator().manual_seed(tiles)
    partials = torch.randn(2, tiles, channels, generator=generator).add(1).to(device)
    norm = torch.rand(5, channels, generator=generator).to(device)

    def by_hand(partials, norm):
        (sum_dz, sum_dz_x), rstd, scale = partials.sum(1), norm[2], norm[3]
        dgamma = rstd * sum_dz_x
        return torch.stack([dgamma, sum_dz, -scale * rstd * dgamma / 100, -scale * sum_dz / 100])

    rows = bn_coefficients(partials, norm, 100.0), by_hand(partials, norm), by_hand(partials.double(), norm.double())
    for name, *values in zip(("dgamma", "dbeta", "b", "c"), *rows, strict=True):
        assert_as_accurate(*values, name)


@NOT_FINITE
@pytest.mark.parametrize("tile", [0, 599], ids=["first", "last"])
def test_coefficients_keep_what_is_not_finite_to_its_channel(device, tile, value):
    partials, norm = torch.ones(2, 600, 20, device=device), torch.ones(5, 20, device=device)
    before, others = bn_coefficients(partials, norm, 100.0), torch.arange(20, device=device) != 3
    partials[:, tile, 3] = value
    found = bn_coefficients(partials, norm, 100.0)
    assert not found[:, 3].isfinite().any()
    assert torch.equal(found[:, others], before[:, others])


def problem(shape: tuple[int, ...], pool: bool, residual: bool, dtype: torch.dtype, seed: int, device) -> tuple:
    """[x, gamma, beta, residual or None] that ask for gradients, and dy."""
    x, gamma, beta, skip, _ = applies.problem(shape, pool, residual, dtype, seed, device)
    dy = applies.problem(shape, pool, True, dtype, seed + 2, device)[3]
    return [t if t is None else t.requires_grad_() for t in (x, gamma, beta, skip)], dy


def with_gradients(y, inputs, dy) -> tuple[torch.Tensor, ...]:
    return y, *torch.autograd.grad(y, [t for t in inputs if t is not None], dy)


def reference(inputs, dy, pool) -> tuple[torch.Tensor, ...]:
    return with_gradients(bn_relu_reference(*inputs[:3], EPS, inputs[3], pool), inputs, dy)


def ours(inputs, dy, pool) -> tuple[torch.Tensor, ...]:
    x, gamma, beta, residual = inputs
    return with_gradients(bn_relu(x, bn_stats(x), gamma, beta, EPS, False, residual, pool)[0], inputs, dy)


@DTYPES
@pytest.mark.parametrize(
    ("shape", "pool", "residual"),
    mostly_slow(
        [
            pytest.param((1, 16, 5, 7), False, False, id="one_image_odd_map"),
            pytest.param((3, 24, 5, 7), False, True, id="c_not_multiple_of_tile"),
            pytest.param((2, 256, 4, 4), True, False, id="pool_several_channel_tiles"),
            pytest.param((3, 48, 6, 10), True, True, id="pool_and_residual"),
        ],
        *(1, 3),
    ),
)
def test_the_whole_matches_float64(device, shape, pool, residual, dtype):
    for seed in range(3):
        inputs, dy = problem(shape, pool, residual, dtype, seed, device)
        exact = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
        rows = ours(inputs, dy, pool), reference(inputs, dy, pool), reference(exact, dy.double(), pool)
        for name, *values in zip(("y", "dx", "dgamma", "dbeta", "dresidual"), *rows, strict=False):
            assert_as_accurate(*values, name)


def test_constant_statistics_are_evaluation(device):
    (x, gamma, beta, _), dy = problem((3, 24, 5, 7), False, False, torch.float32, 0, device)
    mean, var = torch.randn(24, device=device), torch.rand(24, device=device) + 0.5
    partials = torch.stack([torch.ones_like(mean), mean, var])[:, None]

    def evaluate(*inputs):
        x, gamma, beta = inputs
        y = F.batch_norm(x, mean.to(gamma), var.to(gamma), gamma, beta, training=False, eps=EPS)
        return with_gradients(y.relu(), inputs, dy.to(x))

    y, _ = bn_relu(x, partials, gamma, beta, EPS, constant=True)
    truths = evaluate(*(t.detach().double().requires_grad_() for t in (x, gamma, beta)))
    for values in zip(with_gradients(y, (x, gamma, beta), dy), evaluate(x, gamma, beta), truths, strict=True):
        assert_as_accurate(*values)


@pytest.mark.parametrize("layout", ["nchw", "stride_0"])
def test_a_gradient_in_any_layout(device, layout):
    inputs, dy = problem((2, 16, 4, 4), False, False, torch.float32, 0, device)
    dy = dy.contiguous() if layout == "nchw" else dy[:, :, :1, :1].expand(-1, -1, 4, 4)
    expected = ours(inputs, dy.contiguous(memory_format=torch.channels_last), False)
    assert all(torch.equal(a, b) for a, b in zip(ours(inputs, dy, False), expected, strict=True))


def test_only_x_and_the_norm_are_kept(device):
    """The activation that leaves is not needed for the backward pass: the mask is recomputed."""
    (x, gamma, beta, residual), _ = problem((2, 16, 4, 4), True, True, torch.float16, 0, device)
    partials, kept = bn_stats(x), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        bn_relu(x, partials, gamma, beta, EPS, False, residual, True)
    assert sum(kept) == x.nbytes + 5 * 16 * 4
