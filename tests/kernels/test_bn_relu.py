"""Batch norm, ReLU, pool and residual as one differentiable op, against PyTorch's autograd in float64."""

import pytest
import torch
from kernel_checks import assert_as_accurate, channels_last, mostly_slow

pytest.importorskip("triton")

from kernels.bn_relu import bn_relu, bn_relu_cost, bn_relu_reference
from kernels.bn_stats import bn_stats
from kernels.cost import Cost

EPS = 1e-5
DTYPES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.float32, id="fp32")]
CASES = [  # shape, pool, residual
    pytest.param((1, 16, 5, 7), False, False, id="one_image_odd_map"),
    pytest.param((3, 24, 5, 7), False, True, id="c_not_multiple_of_tile"),
    pytest.param((2, 256, 4, 4), True, False, id="pool_several_channel_tiles"),
    pytest.param((3, 48, 6, 10), True, True, id="pool_and_residual"),
]


def problem(shape: tuple[int, ...], pool: bool, residual: bool, dtype: torch.dtype, seed: int, device) -> tuple:
    """(x, gamma, beta, residual or None) that ask for gradients, and dy."""
    n, c, h, w = shape
    out = (n, c, h // 2, w // 2) if pool else shape
    generator = torch.Generator().manual_seed(seed)
    x = channels_last(*shape, dtype=dtype, seed=seed, device=device)
    gamma, beta = (torch.randn(c, generator=generator).to(device) for _ in range(2))
    inputs = [x, gamma, beta, channels_last(*out, dtype=dtype, seed=seed + 1, device=device) if residual else None]
    return [t if t is None else t.requires_grad_() for t in inputs], channels_last(
        *out, dtype=dtype, seed=seed + 2, device=device
    )


def reference(inputs, dy, pool) -> tuple[torch.Tensor, ...]:
    x, gamma, beta, residual = inputs
    y = bn_relu_reference(x, gamma, beta, EPS, residual, pool)
    return y, *torch.autograd.grad(y, [t for t in inputs if t is not None], dy)


def ours(inputs, dy, pool) -> tuple[torch.Tensor, ...]:
    x, gamma, beta, residual = inputs
    y, _ = bn_relu(x, bn_stats(x), gamma, beta, EPS, False, residual, pool)
    return y, *torch.autograd.grad(y, [t for t in inputs if t is not None], dy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "pool", "residual"), mostly_slow(CASES, "c_not_multiple_of_tile", "pool_and_residual")
)
def test_values_and_gradients_match_float64(device, shape, pool, residual, dtype):
    for seed in range(3):
        inputs, dy = problem(shape, pool, residual, dtype, seed, device)
        exact = [t if t is None else t.detach().double().requires_grad_() for t in inputs]
        names = ("y", "dx", "dgamma", "dbeta", "dresidual")
        truths = reference(exact, dy.double(), pool)
        for name, a, b, truth in zip(names, ours(inputs, dy, pool), reference(inputs, dy, pool), truths, strict=False):
            assert_as_accurate(a, b, truth, name)


def test_constant_statistics_are_evaluation(device):
    (x, gamma, beta, _), dy = problem((3, 24, 5, 7), False, False, torch.float32, 0, device)
    mean, var = torch.randn(24, device=device), torch.rand(24, device=device) + 0.5
    partials = torch.stack([torch.ones_like(mean), mean, var])[:, None]

    def evaluate(x, gamma, beta):
        y = torch.nn.functional.batch_norm(x, mean.to(gamma), var.to(gamma), gamma, beta, training=False, eps=EPS)
        y = y.relu()
        return y, *torch.autograd.grad(y, (x, gamma, beta), dy.to(x))

    y, _ = bn_relu(x, partials, gamma, beta, EPS, constant=True)
    results = (y, *torch.autograd.grad(y, (x, gamma, beta), dy))
    truths = evaluate(*(t.detach().double().requires_grad_() for t in (x, gamma, beta)))
    for a, b, truth in zip(results, evaluate(x, gamma, beta), truths, strict=True):
        assert_as_accurate(a, b, truth)


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
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        bn_relu(x, partials, gamma, beta, EPS, False, residual, True)
    assert sum(kept) == x.numel() * 2 + 5 * 16 * 4


@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pool"])
@pytest.mark.slow
def test_repeats_bit_for_bit(device, pool):
    arguments = (*problem((5, 24, 8, 6), pool, True, torch.float16, 0, device), pool)
    assert all(torch.equal(a, b) for a, b in zip(ours(*arguments), ours(*arguments), strict=True))


@pytest.mark.slow
def test_registration(device):
    (x, gamma, beta, residual), _ = problem((2, 24, 4, 6), True, True, torch.float16, 0, device)
    torch.library.opcheck(bn_relu, (x, bn_stats(x), gamma, beta, EPS, False, residual, True))
    torch.library.opcheck(bn_relu, (x, bn_stats(x), gamma, beta, EPS, True))


@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pool"])
def test_compiles_into_one_graph_forward_and_backward(device, pool):
    inputs, dy = problem((2, 24, 4, 6), pool, True, torch.float16, 0, device)

    def block(x, gamma, beta, residual):
        return bn_relu(x, bn_stats(x), gamma, beta, EPS, False, residual, pool)[0]

    y = torch.compile(block, fullgraph=True, backend="aot_eager")(*inputs)
    compiled = (y, *torch.autograd.grad(y, inputs, dy))
    assert all(torch.equal(a, b) for a, b in zip(compiled, ours(inputs, dy, pool), strict=True))


def test_contract(device):
    (x, gamma, beta, residual), _ = problem((2, 16, 4, 6), False, True, torch.float16, 0, device)
    partials = bn_stats(x)
    with pytest.raises(ValueError, match="gamma has shape"):
        bn_relu(x, partials, gamma[:8], beta, EPS)
    with pytest.raises(ValueError, match="scale has shape"):
        bn_relu(x[:, :8].contiguous(memory_format=torch.channels_last), partials, gamma, beta, EPS)
    with pytest.raises(ValueError, match="residual has shape"):
        bn_relu(x, partials, gamma, beta, EPS, False, residual, True)
    with pytest.raises(TypeError, match=r"beta is torch\.float16"):
        bn_relu(x, partials, gamma, beta.half(), EPS)


def test_cost():
    """The finalize's 2.5 kB beside two passes."""
    x, c = torch.empty(512, 64, 32, 32, dtype=torch.float16, device="meta"), torch.empty(64, device="meta")
    cost = bn_relu_cost(x, torch.empty(3, 1, 64, device="meta"), c, c, EPS)
    assert cost == Cost(3 * x.numel() + 2 * 3 * 64, 2 * 2 * x.numel() + 2 * 256 + 3 * 256 + 7 * 256)
