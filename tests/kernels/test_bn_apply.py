"""relu(x * scale + shift), with pool and residual, against float64."""

import pytest
import torch
from kernel_checks import assert_as_accurate

pytest.importorskip("triton")

from checks.bn_apply import double, problem

from kernels import jit
from kernels.bn_apply import bn_apply, bn_apply_cost, bn_apply_reference
from kernels.cost import Cost

interpreted = pytest.mark.skipif(not jit.INTERPRETED, reason="out-of-bounds mutants need the interpreter's guard")

DTYPES = [pytest.param(torch.float16, id="fp16"), pytest.param(torch.float32, id="fp32")]
CASES = [  # shape, pool, residual
    pytest.param((1, 16, 5, 7), False, False, id="one_image_odd_map"),
    pytest.param((3, 24, 5, 7), False, True, id="c_not_multiple_of_tile"),
    pytest.param((5, 16, 9, 9), False, True, id="partial_last_tile"),
    pytest.param((2, 80, 4, 4), False, False, id="partial_channel_tile"),
    pytest.param((2, 256, 4, 4), True, False, id="pool_several_channel_tiles"),
    pytest.param((3, 16, 10, 14), True, True, id="pool_partial_last_tile"),
    pytest.param((1, 5, 2, 2), True, False, id="pool_to_one_pixel_odd_c"),
    pytest.param((1, 16, 1, 1), False, True, id="one_pixel"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "pool", "residual"), CASES)
def test_matches_float64(device, shape, pool, residual, dtype):
    for seed in range(3):
        arguments = problem(shape, pool, residual, dtype, seed, device)
        ours, baseline = bn_apply(*arguments), bn_apply_reference(*arguments)
        assert_as_accurate(ours, baseline, bn_apply_reference(*double(arguments)))
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours, bn_apply(*arguments)), "repeats bit for bit"


@pytest.mark.parametrize("pool", [False, True], ids=["plain", "pool"])
def test_nan_stays_nan(device, pool):
    """A diverged network must look diverged: neither ReLU nor the pool may turn NaN into a number. PyTorch's do not."""
    for corner in range(4):
        arguments = problem((1, 16, 4, 4), pool, False, torch.float32, 0, device)
        arguments[0][0, 3, corner // 2, corner % 2] = torch.nan
        assert torch.equal(bn_apply(*arguments).isnan(), bn_apply_reference(*arguments).isnan())
        assert bn_apply(*arguments).isnan().sum() == 1


def test_registration(device):
    torch.library.opcheck(bn_apply, problem((2, 24, 4, 6), True, True, torch.float16, 0, device))


def test_compiles_into_one_graph(device):
    arguments = problem((2, 24, 4, 6), True, True, torch.float16, 0, device)
    compiled = torch.compile(lambda *a: bn_apply(*a) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), bn_apply(*arguments) * 2)


def replaced(position: int, change, device) -> list:
    arguments = list(problem((2, 16, 4, 6), True, True, torch.float16, 0, device))
    arguments[position] = change(arguments[position])
    return arguments


@pytest.mark.parametrize(
    ("position", "change", "error", "message"),
    [
        pytest.param(0, lambda x: x[:0], ValueError, "x has shape .* non-empty", id="zero_images"),
        pytest.param(0, lambda x: x.contiguous(), ValueError, "x has strides", id="nchw"),
        pytest.param(0, lambda x: x.int(), TypeError, "x is torch.int32", id="dtype"),
        pytest.param(0, lambda x: x[:, :, :3].clone(), ValueError, "even height and width", id="odd_map"),
        pytest.param(1, lambda x: x[:8], ValueError, "scale has shape", id="channels"),
        pytest.param(2, lambda x: x.half(), TypeError, "shift is torch.float16", id="shift_dtype"),
        pytest.param(3, lambda x: x[:, :, :1], ValueError, "residual has", id="residual_shape"),
        pytest.param(3, lambda x: x.float(), TypeError, "residual is torch.float32", id="residual_dtype"),
        pytest.param(3, lambda x: x.contiguous(), ValueError, "residual has strides", id="residual_nchw"),
    ],
)
def test_contract(device, position, change, error, message):
    arguments = replaced(position, change, device)
    with pytest.raises(error, match=message):
        bn_apply(*arguments)


def test_cost():
    """Passes of 64x32x32 maps of 512 images, fp16: 2; with a residual 3; with the pool 1.25."""
    x = torch.empty(512, 64, 32, 32, dtype=torch.float16, device="meta")
    c, one_pass = torch.empty(64, device="meta"), 2 * 512 * 64 * 32 * 32
    assert bn_apply_cost(x, c, c) == Cost(3 * x.numel(), 2 * one_pass + 512)
    assert bn_apply_cost(x, c, c, x) == Cost(4 * x.numel(), 3 * one_pass + 512)
    assert bn_apply_cost(x, c, c, None, True) == Cost(3 * x.numel(), one_pass + one_pass // 4 + 512)
