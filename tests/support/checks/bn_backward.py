"""Operands of batch norm's backward ops, the check that their mutants fail, and the mutants."""

import torch
from kernel_checks import Mutants, assert_as_accurate, channels_last

from kernels import bn_backward as module
from kernels import bn_stats
from kernels.bn_backward import bn_backward_reference
from kernels.bn_stats import bn_finalize_reference, bn_stats_reference


def problem(
    shape: tuple[int, ...], pool: bool, dtype: torch.dtype, seed: int, device="cpu", mean: float = 0.0
) -> tuple:
    """(dy, x, norm) with the norm of x itself."""
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(seed)
    gamma, beta = (torch.randn(c, generator=generator).to(device) for _ in range(2))
    x = channels_last(*shape, dtype=torch.float32, seed=seed, device=device).add(mean).to(dtype)
    dy = channels_last(n, c, *((h // 2, w // 2) if pool else (h, w)), dtype=dtype, seed=seed + 1, device=device)
    return dy, x, bn_finalize_reference(bn_stats_reference(x), gamma, beta, 1e-5)


def backward(under_test, dy, x, norm, n, pool) -> tuple[torch.Tensor, ...]:
    coefficients = under_test.bn_coefficients(under_test.bn_backward_reduce(dy, x, norm, pool), norm, n)
    return under_test.bn_backward_apply(dy, x, norm, coefficients, pool), coefficients[0], coefficients[1]


def compare(under_test, dy, x, norm, pool=False, n=None) -> None:
    n = x.numel() / x.shape[1] if n is None else n
    ours, baseline = backward(under_test, dy, x, norm, n, pool), bn_backward_reference(dy, x, norm, n, pool)
    truth = bn_backward_reference(dy.double(), x.double(), norm.double(), n, pool)
    for name, *values in zip(("dx", "dgamma", "dbeta"), ours, baseline, truth, strict=True):
        assert_as_accurate(*values, name)


def check(under_test, _device) -> None:
    bn_stats.MAX_PROGRAMS = 3
    try:
        compare(under_test, *problem((7, 24, 7, 9), False, torch.float32, 0, mean=1.0))
        compare(under_test, *problem((7, 24, 8, 10), True, torch.float32, 0, mean=1.0), True)
        compare(under_test, *problem((2, 80, 4, 4), False, torch.float16, 0))
        norm = torch.rand(5, 20)
        partials = torch.randn(2, 1100, 20)
        dgamma, dbeta = under_test.bn_coefficients(partials, norm, 100.0)[:2]
        torch.testing.assert_close(dbeta, partials[0].sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(dgamma, norm[2] * partials[1].sum(0), rtol=1e-4, atol=1e-4)
        ties = torch.ones(1, 16, 2, 2).contiguous(memory_format=torch.channels_last)
        dy, norm = torch.ones(1, 16, 1, 1), torch.ones(5, 16)
        ours = under_test.bn_backward_apply(dy, ties, norm, torch.zeros(4, 16), True)
        assert ours[0, :, 0, 0].eq(1).all()
        assert ours.sum() == 16
    finally:
        bn_stats.MAX_PROGRAMS = 660


MUTANTS = {
    "reduce_dropped_row_mask": ("mask = (rows < M) & mask_c\n        if", "mask = (rows >= 0) & mask_c\n        if"),
    "apply_dropped_row_mask": ("    mask = (rows < M) & mask_c\n    dy", "    mask = (rows >= 0) & mask_c\n    dy"),
    "apply_dropped_channel_mask": ("    mask = (rows < M) & mask_c\n    dy", "    mask = rows < M\n    dy"),
    "relu_mask_forgotten_in_reduce": ("dz = tl.where(z > 0.0, dy, 0.0)\n        sum_dz", "dz = dy\n        sum_dz"),
    "relu_mask_forgotten_in_apply": ("dz = tl.where(x * scale + shift > 0.0, dy, 0.0)", "dz = dy"),
    "not_centred": ("sum_dz_x += dz * (x - mean)", "sum_dz_x += dz * x"),
    "rstd_forgotten": ("-scale * rstd * dgamma * per_pixel", "-scale * dgamma * per_pixel"),
    "mean_gradient_forgotten": ("scale * dz + (b * (x - mean) + c)", "scale * dz + b * (x - mean)"),
    "divided_by_nothing": ("-scale * sum_dz * per_pixel", "-scale * sum_dz"),
    "forgotten_step": ("for _ in range(steps):", "for _ in range(steps - 1):"),
    "last_tiles_unread": ("range(0, T, BLOCK_T)", "range(0, T - 1, T)"),
    "passes_forgotten": ("        lanes_dz += dz\n", "        lanes_dz = dz\n"),
    "last_pass_forgotten": ("tl.sum(lanes_dz_x + dz_x, axis=0)", "tl.sum(lanes_dz_x, axis=0)"),
    "dropped_tile_mask": ("mask = (offs_t < T)[:, None] &", "mask = (offs_t >= 0)[:, None] &"),
    "window_of_three": ("tl.static_range(4)", "tl.static_range(3)"),
    "second_of_equal_maxima": ("better = z > best_z", "better = z >= best_z"),
    "gradient_to_the_whole_window": ("tl.where(which == i, dz, 0.0)", "dz"),
    "winner_of_another_window": ("tl.where(better, i, which)", "tl.where(better, 3 - i, which)"),
}


def launch(changed) -> None:
    for pool in (False, True):
        backward(changed, *problem((4, 64, 8, 8), pool, torch.float16, 0), 64, pool)


ROWS = {"bn_backward": Mutants(module, MUTANTS, check, launch)}
