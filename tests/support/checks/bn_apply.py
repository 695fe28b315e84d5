"""Operands of `bn_apply`, the check that its mutants fail, and the mutants."""

import torch
from kernel_checks import Mutants, assert_as_accurate, channels_last

from kernels import bn_apply as module
from kernels.bn_apply import bn_apply_reference


def problem(shape: tuple[int, ...], pool: bool, residual: bool, dtype: torch.dtype, seed: int, device="cpu") -> tuple:
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(seed)
    scale, shift = (torch.randn(c, generator=generator).to(device) for _ in range(2))
    x = channels_last(*shape, dtype=dtype, seed=seed, device=device)
    out = (n, c, h // 2, w // 2) if pool else shape
    return x, scale, shift, channels_last(*out, dtype=dtype, seed=seed + 1, device=device) if residual else None, pool


def double(arguments: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, torch.Tensor) else a for a in arguments)


def check(under_test, _device) -> None:
    for shape, pool, residual in (
        ((3, 24, 9, 9), False, True),
        ((3, 24, 10, 14), True, False),
        ((2, 80, 4, 4), False, False),
    ):
        arguments = problem(shape, pool, residual, torch.float32, 0)
        ours, baseline = under_test.bn_apply(*arguments), bn_apply_reference(*arguments)
        assert_as_accurate(ours, baseline, bn_apply_reference(*double(arguments)))
    x = channels_last(1, 16, 2, 2, dtype=torch.float32, seed=0, device="cpu")
    x[0, 0, 1, 1] = torch.nan
    arguments = (x, torch.ones(16), torch.ones(16), None, True)
    assert torch.equal(under_test.bn_apply(*arguments).isnan(), bn_apply_reference(*arguments).isnan())


MUTANTS = {
    "dropped_row_mask": ("mask = (rows < M) & mask_c", "mask = (rows >= 0) & mask_c"),
    "dropped_channel_mask": ("mask = (rows < M) & mask_c", "mask = rows < M"),
    "dropped_store_mask": ("y_ptr.dtype.element_ty), mask=mask)", "y_ptr.dtype.element_ty))"),
    "relu_forgotten": ("y = tl.where(z <= 0.0, 0.0, z)", "y = z"),
    "relu_swallows_nan": ("y = tl.where(z <= 0.0, 0.0, z)", "y = tl.where(z > 0.0, z, 0.0)"),
    "pool_swallows_nan": ("(other > z) | (other != other)", "other > z"),
    "residual_before_the_relu": (
        "z = tl.load(x_ptr + rows * C + offs_c, mask=mask, other=0.0).to(tl.float32) * scale + shift",
        "z = tl.load(x_ptr + rows * C + offs_c, mask=mask, other=0.0).to(tl.float32) * scale + shift\n"
        "        if residual_ptr is not None:\n"
        "            z += tl.load(residual_ptr + rows * C + offs_c, mask=mask, other=0.0).to(tl.float32) * 0.5",
    ),
    "shift_forgotten": ("other = x * scale + shift", "other = x * scale"),
    "window_of_three": ("tl.static_range(1, 4)", "tl.static_range(1, 3)"),
    "window_in_one_row": ("(i // 2) * 2 * POOLED_W + i % 2", "i"),
    "windows_overlap": ("(rows % POOLED_W) * 2", "(rows % POOLED_W)"),
    "forgotten_partial_tile": ("(triton.cdiv(rows, block_m), triton", "(rows // block_m, triton"),
    "forgotten_channel_tile": ("triton.cdiv(channels, block_c))", "channels // block_c)"),
}


def launch(changed) -> None:
    for pool in (False, True):
        changed.bn_apply(*problem((8, 64, 8, 8), pool, True, torch.float16, 0))


ROWS = {"bn_apply": Mutants(module, MUTANTS, check, launch)}
