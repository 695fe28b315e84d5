"""References of the statistics by tiles, the check that mutants of `bn_stats` fail, and the mutants."""

import torch
from kernel_checks import Mutants, assert_as_accurate, channels_last

from kernels import bn_stats as module
from kernels.bn_stats import bn_finalize_reference, bn_stats_reference, reduction_grid, tile


def by_tiles(x: torch.Tensor) -> torch.Tensor:
    """The reference's partials of every tile that the kernel makes, in at least fp32."""
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    _, steps = reduction_grid(len(rows), x.shape[1])
    size = steps * tile(x.shape[1])[0]
    tiles = [part.t().reshape(1, x.shape[1], -1, 1) for part in rows.split(size)]
    return torch.cat([bn_stats_reference(part) for part in tiles], dim=1)


def merged(partials: torch.Tensor) -> torch.Tensor:
    """(mean, biased variance) of all tiles in float64."""
    count, mean, m2 = partials.double()
    total = (count * mean).sum(0) / count.sum(0)
    return torch.stack([total, (m2 + count * (mean - total).square()).sum(0) / count.sum(0)])


def partials_of(
    tiles: int, channels: int, seed: int, device, mean: float = 0.0, apart: float = 1.0, empty: int | None = 2
) -> torch.Tensor:
    """Partials of 2 to 256 rows, every third from `empty` on empty; sigma is 0.7 in a tile, `apart` between them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(2, 257, (tiles, 1), generator=generator).expand(-1, channels).float()
    if empty is not None:
        count = count * (torch.arange(tiles)[:, None] % 3 != empty)
    means = mean + apart * torch.randn(tiles, channels, generator=generator)
    m2 = count * torch.rand(tiles, channels, generator=generator)
    return torch.stack([count, means * (count > 0), m2]).to(device)


def check(under_test, _device) -> None:
    """A mutant must fail: fp32, several steps, partial tiles, C not a multiple of the tile, uneven merging."""
    under_test.MAX_PROGRAMS = 3
    try:
        x = channels_last(7, 24, 7, 9, dtype=torch.float32, seed=0, device="cpu", scale=0.05) + 3
        gamma, beta = torch.rand(24) + 0.5, torch.randn(24)
        half = channels_last(7, 24, 7, 9, dtype=torch.float16, seed=0, device="cpu") + 3
        y, added = under_test.bn_stats_add(half, half)
        truth, baseline = by_tiles((half + half).double()), by_tiles(half + half)
        assert torch.equal(y, half + half)
        for row in range(3):
            assert_as_accurate(added[row], baseline[row], truth[row])
        for partials in (under_test.bn_stats(x), partials_of(600, 20, 0, "cpu", 1.0)):
            affine = gamma[: partials.shape[2]], beta[: partials.shape[2]]
            ours, baseline = (f(partials, *affine, 1e-3) for f in (under_test.bn_finalize, bn_finalize_reference))
            truth = bn_finalize_reference(partials.double(), *(t.double() for t in affine), 1e-3)
            for row in range(5):
                assert_as_accurate(ours[row], baseline[row], truth[row])
        truth = merged(under_test.bn_stats(x))
        torch.testing.assert_close(truth[0], x.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
        torch.testing.assert_close(truth[1], x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=0)
    finally:
        under_test.MAX_PROGRAMS = 660


MUTANTS = {
    "dropped_row_mask": ("mask = valid & mask_c[None, :]", "mask = (rows >= 0)[:, None] & mask_c[None, :]"),
    "dropped_channel_mask": ("mask = valid & mask_c[None, :]", "mask = valid & (offs_c >= 0)[None, :]"),
    "padding_rows_counted": ("weight = tl.where(valid, 1.0, 0.0)", "weight = tl.where(valid, 1.0, 1.0)"),
    "forgotten_partial_tile": ("return triton.cdiv(row_blocks, steps), steps", "return row_blocks // steps, steps"),
    "forgotten_step": ("for _ in range(steps):", "for _ in range(steps - 1):"),
    "unrounded_statistics": ("x = x.to(y_ptr.dtype.element_ty)\n", "x = x * 1.0\n"),
    "residual_forgotten_in_statistics": ("offs, x, mask=mask)", "offs, x, mask=mask)\n            x = x * 0.5"),
    "chan_without_the_means": ("m2 + count * deviation * deviation", "m2"),
    "lanes_without_the_means": ("tile_m2 + delta * delta * (n * share)", "tile_m2"),
    "lanes_of_the_last_tile_s_weight": ("(n * share)", "tile_n"),
    "pivot_forgotten": ("    mean += pivot\n", ""),
    "unweighted_tiles": ("mean += delta * share", "mean += delta * 0.5"),
    "empty_tiles_divided_by": ("share = tile_n / tl.maximum(total, 1.0)", "share = tile_n / total"),
    "lanes_that_forget": ("        n = total\n", "        n = tile_n\n"),
    "only_one_pass": ("range(0, T, BLOCK_T)", "range(0, tl.minimum(T, BLOCK_T), BLOCK_T)"),
    "other_tiles_in_a_lane": ("offs_t = t + tl.arange(0, BLOCK_T)", "offs_t = t // 2 + tl.arange(0, BLOCK_T)"),
    "dropped_tile_mask": ("mask = (offs_t < T)[:, None] &", "mask = (offs_t >= 0)[:, None] &"),
    "finalize_dropped_channel_mask": ("gamma_ptr + offs_c, mask=mask_c, other=0.0)", "gamma_ptr + offs_c)"),
    "missing_eps": ("m2 / tl.maximum(n, 1.0) + eps", "m2 / tl.maximum(n, 1.0)"),
    "biased_running_variance": ("m2 / tl.maximum(n - 1.0, 1.0)", "m2 / tl.maximum(n, 1.0)"),
    "last_tiles_unread": ("range(0, T, BLOCK_T)", "range(0, T - 1, T)"),
}


def launch(changed) -> None:
    x = torch.empty(8, 64, 8, 8, dtype=torch.float16, memory_format=torch.channels_last)
    changed.bn_stats_add(x, x)
    changed.bn_finalize(torch.empty(3, 2, 64), torch.empty(64), torch.empty(64), 1e-5)


ROWS = {"bn_stats": Mutants(module, MUTANTS, check, launch)}
