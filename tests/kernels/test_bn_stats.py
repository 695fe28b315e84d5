"""Statistics by tiles and their merging, against float64."""

import pytest
import torch
from kernel_checks import assert_as_accurate, channels_last, mostly_slow

pytest.importorskip("triton")

from checks.bn_stats import by_tiles, merged, partials_of

from kernels import bn_stats as module
from kernels import jit
from kernels.bn_stats import (
    bn_finalize,
    bn_finalize_cost,
    bn_finalize_reference,
    bn_stats,
    bn_stats_add,
    bn_stats_add_cost,
    bn_stats_cost,
    reduction_grid,
)
from kernels.cost import Cost

interpreted = pytest.mark.skipif(not jit.INTERPRETED, reason="out-of-bounds mutants need the interpreter's guard")

DTYPES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.float32, id="fp32")]
CASES = [  # shape, MAX_PROGRAMS
    pytest.param((1, 16, 5, 7), 660, id="one_image_odd_map"),
    pytest.param((3, 24, 5, 7), 660, id="c_not_multiple_of_tile"),
    pytest.param((5, 16, 9, 9), 660, id="partial_last_tile"),
    pytest.param((2, 256, 4, 4), 660, id="several_channel_tiles"),
    pytest.param((7, 32, 7, 9), 2, id="several_steps_partial_last_step"),
    pytest.param((4, 80, 6, 6), 3, id="several_steps_and_channel_tiles"),
    pytest.param((2, 5, 3, 3), 660, id="odd_c"),
    pytest.param((3, 1, 4, 4), 660, id="one_channel"),
    pytest.param((1, 16, 1, 1), 660, id="one_pixel"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "programs"), mostly_slow(CASES, 0, 1, 4))
def test_bn_stats_matches_float64(device, monkeypatch, shape, programs, dtype):
    monkeypatch.setattr(module, "MAX_PROGRAMS", programs)
    for seed in range(3):
        x = channels_last(*shape, dtype=dtype, seed=seed, device=device) + seed
        ours, baseline, truth = bn_stats(x), by_tiles(x), by_tiles(x.double())
        assert torch.equal(ours[0], baseline[0])
        assert ours[0, :, 0].sum() == x.numel() // shape[1]
        assert_as_accurate(ours[1], baseline[1], truth[1], "mean")
        assert_as_accurate(ours[2], baseline[2], truth[2], "M2")
        assert torch.equal(ours, bn_stats(x)), "repeats bit for bit"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "programs"), mostly_slow(CASES, 0, 1, 4))
def test_bn_stats_add_is_the_sum_and_its_statistics(device, monkeypatch, shape, programs, dtype):
    monkeypatch.setattr(module, "MAX_PROGRAMS", programs)
    x, residual = (channels_last(*shape, dtype=dtype, seed=seed, device=device) for seed in (0, 1))
    y, partials = bn_stats_add(x, residual)
    assert torch.equal(y, x + residual)
    assert y.stride() == x.stride()
    assert torch.equal(partials, bn_stats(y)), "of y as stored"


@pytest.mark.parametrize(
    ("dtype", "mean", "sigma"), [(torch.float16, 500.0, 2.0), (torch.float32, 3000.0, 1.0)], ids=["fp16", "fp32"]
)
def test_nothing_cancels_where_the_mean_is_large(device, monkeypatch, dtype, mean, sigma):
    """In fp32 sum(x^2) / n - mean^2 errs by about mean^2 eps: here a hundredth of the variance, or all of it."""
    monkeypatch.setattr(module, "MAX_PROGRAMS", 4)
    x = channels_last(6, 16, 16, 16, dtype=torch.float32, seed=0, device=device, scale=sigma).add(mean).to(dtype)
    truth = merged(by_tiles(x.double()))
    ours = bn_finalize(bn_stats(x), torch.ones(16, device=device), torch.zeros(16, device=device), 0.0).double()
    assert ((ours[0] - truth[0]).abs() < 4 * torch.finfo(torch.float32).eps * mean).all()
    assert ((ours[2].pow(-2) - truth[1]).abs() < 1e-4 * truth[1]).all()


LAYERS = [(1, 16), (2, 24), (63, 5), (512, 80), (513, 512), (4096, 64), (5000, 24)]  # T, C


@pytest.mark.parametrize(
    ("mean", "apart", "empty"),
    [(0.0, 1.0, 0), (500.0, 1.0, 2), (1000.0, 280.0, 1)],
    ids=["the_first_tile_is_empty", "far", "apart"],
)
@pytest.mark.parametrize(("tiles", "channels"), mostly_slow(LAYERS, 0, 1, 2))
def test_bn_finalize_matches_float64(device, tiles, channels, mean, apart, empty):
    """A mean of 400 sigma, and tiles whose means are 400 of a tile's sigma from each other, too."""
    partials = partials_of(tiles, channels, tiles, device, mean, apart, empty if tiles > 1 else None)
    gamma, beta = torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)
    ours, baseline = bn_finalize(partials, gamma, beta, 1e-5), bn_finalize_reference(partials, gamma, beta, 1e-5)
    truth = bn_finalize_reference(partials.double(), gamma.double(), beta.double(), 1e-5)
    for row, name in enumerate(("mean", "var", "rstd", "scale", "shift")):
        assert_as_accurate(ours[row], baseline[row], truth[row], name)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=["nan", "inf", "minus_inf"])
@pytest.mark.parametrize("tile", [0, 598], ids=["first", "last"])
def test_what_is_not_finite_stays_in_its_channel(device, tile, value):
    """A tile's mean: the channel has then no statistics, as by the reference, and the other channels keep theirs."""
    partials = partials_of(600, 20, 0, device)
    gamma = torch.ones(20, device=device)
    before = bn_finalize(partials, gamma, gamma, 1e-5)
    partials[1, tile, 3] = value
    norm, reference = (f(partials, gamma, gamma, 1e-5) for f in (bn_finalize, bn_finalize_reference))
    assert not reference[:, 3].isfinite().any()
    assert not norm[:, 3].isfinite().any()
    others = torch.arange(20, device=device) != 3
    assert torch.equal(norm[:, others], before[:, others])


def test_the_norm_is_batch_norms(device):
    """Against the definition rather than against our reference of it: unbiased var, eps within the root."""
    x = channels_last(4, 8, 3, 5, dtype=torch.float32, seed=0, device=device, scale=0.01)
    gamma, beta = torch.rand(8, device=device) + 0.5, torch.randn(8, device=device)
    norm = bn_finalize(bn_stats(x), gamma, beta, 1e-2).double()
    dims, x = (0, 2, 3), x.double()
    rstd = (x.var(dims, correction=0) + 1e-2).rsqrt()
    expected = torch.stack([x.mean(dims), x.var(dims), rstd, gamma * rstd, beta - x.mean(dims) * gamma * rstd])
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=1e-9)


def test_the_gradient_of_the_sum_reaches_both(device):
    x, residual, dy = (channels_last(2, 16, 3, 3, dtype=torch.float32, seed=s, device=device) for s in range(3))
    x.requires_grad_(), residual.requires_grad_()
    y, partials = bn_stats_add(x, residual)
    assert not partials.requires_grad
    assert not bn_stats(x).requires_grad
    assert all(torch.equal(gradient, dy) for gradient in torch.autograd.grad(y, (x, residual), dy))


def test_registration(device):
    x = channels_last(2, 24, 3, 5, dtype=torch.float16, seed=0, device=device)
    torch.library.opcheck(bn_stats, (x,))
    torch.library.opcheck(bn_stats_add, (x.clone().requires_grad_(), x.clone().requires_grad_()))
    torch.library.opcheck(
        bn_finalize, (bn_stats(x), torch.ones(24, device=device), torch.ones(24, device=device), 1e-5)
    )


def test_compiles_into_one_graph(device):
    def step(x, residual, gamma, beta):
        y, partials = bn_stats_add(x, residual)
        return y * 2, bn_finalize(partials + bn_stats(x), gamma, beta, 1e-5)

    x = channels_last(2, 24, 3, 5, dtype=torch.float16, seed=0, device=device).requires_grad_()
    arguments = (x, x.detach() + 1, torch.ones(24, device=device), torch.ones(24, device=device))
    ours = torch.compile(step, fullgraph=True, backend="aot_eager")(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(ours, step(*arguments), strict=True))
    ours[0].sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        pytest.param(torch.zeros(0, 16, 4, 4), ValueError, "non-empty", id="zero_images"),
        pytest.param(torch.zeros(2, 16, 4, 4), ValueError, "expected channels_last", id="nchw"),
        pytest.param(torch.zeros(2, 16, 4), ValueError, "N, C, H, W", id="three_dimensions"),
        pytest.param(torch.zeros(2, 16, 4, 4).double(), TypeError, "torch.float64", id="dtype"),
        pytest.param(torch.zeros(2, 16, 4, 4)[:, :8], ValueError, "expected channels_last", id="non_contiguous"),
        pytest.param(torch.zeros(1, 16, 4, 4).expand(2, -1, -1, -1), ValueError, "channels_last", id="stride_0"),
    ],
)
def test_contract_of_x(device, x, error, message):
    with pytest.raises(error, match=message):
        bn_stats(x.to(device))


def test_contract_of_the_rest(device):
    x = channels_last(2, 16, 4, 4, dtype=torch.float16, seed=0, device=device)
    ones = torch.ones(16, device=device)
    with pytest.raises(TypeError, match=r"residual is torch\.float32"):
        bn_stats_add(x, x.float())
    with pytest.raises(ValueError, match="residual has shape"):
        bn_stats_add(x, x[:1])
    with pytest.raises(ValueError, match="gamma has shape"):
        bn_finalize(torch.ones(3, 2, 16, device=device), ones[:8], ones, 1e-5)
    with pytest.raises(ValueError, match="partials has shape"):
        bn_finalize(torch.ones(2, 2, 16, device=device), ones, ones, 1e-5)
    with pytest.raises(TypeError, match=r"beta is torch\.float16"):
        bn_finalize(torch.ones(3, 2, 16, device=device), ones, ones.half(), 1e-5)
    with pytest.raises(ValueError, match="device meta"):
        bn_finalize._init_fn(*(t.to("meta") for t in (torch.ones(3, 2, 16, device=device), ones, ones)), 1e-5)


def test_cost():
    """64x32x32 maps of 512 images in fp16: 67.1 MB a pass; 5 programs on each of 132 multiprocessors make the tiles."""
    x = torch.empty(512, 64, 32, 32, dtype=torch.float16, device="meta")
    rows = 512 * 32 * 32
    tiles, steps = reduction_grid(rows, 64)
    assert (tiles - 1) * steps * 32 < rows <= tiles * steps * 32
    assert tiles <= 660
    one_pass, partials = 2 * rows * 64, 3 * tiles * 64 * 4
    assert bn_stats_cost(x) == Cost(4 * rows * 64, one_pass + partials)
    assert bn_stats_add_cost(x, x) == Cost(5 * rows * 64, 3 * one_pass + partials)
    c = torch.empty(64, device="meta")
    assert bn_finalize_cost(torch.empty(3, tiles, 64, device="meta"), c, c, 1e-5).bytes == partials + 7 * 64 * 4
