"""ResNet9's layer as ops: registration, cost, contract, mutants."""

import pytest
import torch
from block_cases import check_training, no_overflow_checks  # noqa: F401
from kernel_checks import channels_last
from torch import Tensor

pytest.importorskip("triton")

from kernels import jit
from kernels.conv_shape import ConvShape
from kernels.fused_conv_bn_relu import (
    conv_bn_relu,
    conv_bn_relu_backward,
    conv_bn_relu_backward_cost,
    conv_bn_relu_cost,
)

pytestmark = pytest.mark.usefixtures("no_overflow_checks")


def operands(device, c: int = 16, k: int = 32, size: int = 4, pool: str | None = None) -> dict[str, object]:
    """Operands of `conv_bn_relu` by name, with a residual."""
    pooled = size if pool is None else size // 2
    return {
        "x": channels_last(2, c, size, size, dtype=torch.float16, seed=0, device=device),
        "w": channels_last(k, c, 3, 3, dtype=torch.float32, seed=1, device=device),
        "gamma": torch.ones(k, device=device),
        "beta": torch.ones(k, device=device),
        "running": None,
        "eps": 1e-5,
        "pool": pool,
        "residual": channels_last(2, k, pooled, pooled, dtype=torch.float16, seed=2, device=device),
        "forced": False,
    }


def backward_operands(forward: dict[str, object], out: Tensor, y: Tensor, norm: Tensor) -> dict[str, object]:
    kept = {"x": forward["x"], "y": y, "norm": norm, "w": forward["w"]}
    return {"dout": out, **kept, "pool": forward["pool"], "constant": False, "forced": False}


@pytest.mark.parametrize("pool", ["first", "last"])
@pytest.mark.slow
def test_registration(device, pool):
    arguments = operands(device, pool=pool)
    for name in ("x", "w", "gamma", "residual"):
        arguments[name].requires_grad_()
    torch.library.opcheck(conv_bn_relu, tuple(arguments.values()))


@pytest.mark.parametrize("pool", [None, "first"])
@pytest.mark.slow
def test_registration_of_backward(device, pool):
    arguments = operands(device, pool=pool)
    backward = backward_operands(arguments, *conv_bn_relu(*arguments.values()))
    torch.library.opcheck(conv_bn_relu_backward, tuple(backward.values()))


def test_a_layer_makes_four_and_nine_passes():
    x = torch.empty(512, 128, 16, 16, dtype=torch.float16, device="meta").to(memory_format=torch.channels_last)
    w = torch.empty(128, 128, 3, 3, device="meta").to(memory_format=torch.channels_last)
    vector = torch.empty(128, device="meta")
    one_pass, flops = x.numel() * 2, ConvShape(128, 128, 16, 16).flops(512)
    forward = conv_bn_relu_cost(x, w, vector, vector, None, 1e-5, None, None, False)
    backward = conv_bn_relu_backward_cost(x, x, x, torch.empty(5, 128, device="meta"), w, None, False, False)
    assert forward.bytes / one_pass == pytest.approx(4, rel=2e-2)
    assert backward.bytes / one_pass == pytest.approx(9, rel=2e-2)
    assert flops < forward.flops < 1.01 * flops
    assert 2 * flops < backward.flops < 2.01 * flops


def nhwc(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return channels_last(*shape, dtype=dtype, seed=0, device=torch.device("cpu"))


@pytest.mark.skipif(not jit.INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize(
    ("options", "changes", "error", "message"),
    [
        pytest.param({}, {"x": nhwc(2, 16, 4, 4)[:0]}, ValueError, "x has shape .* non-empty", id="zero_images"),
        pytest.param({}, {"x": nhwc(2, 16, 4, 4).contiguous()}, ValueError, "x .* channels_last", id="nchw"),
        pytest.param({}, {"x": nhwc(2, 16, 4, 4).double()}, TypeError, "x is torch.float64", id="dtype"),
        pytest.param(
            {}, {"w": nhwc(32, 16, 3, 3).bfloat16()}, TypeError, "w is torch.bfloat16, expected a master", id="w"
        ),
        pytest.param({}, {"w": nhwc(32, 16, 1, 1).float()}, ValueError, r"w .* expected \[32, 16, 3, 3\]", id="w_1x1"),
        pytest.param({"c": 8}, {}, ValueError, "w takes 8 channels to 32, .* multiples of 16", id="c_of_8"),
        pytest.param({}, {"pool": "middle"}, ValueError, "pool is 'middle', expected one of", id="pool"),
        pytest.param({"size": 5, "pool": "last"}, {}, ValueError, "even height and width", id="odd_last"),
        pytest.param({"size": 5, "pool": "first"}, {}, ValueError, "even height and width", id="odd_first"),
        pytest.param({}, {"residual": nhwc(2, 32, 2, 2)}, ValueError, "residual has shape", id="residual"),
    ],
)
def test_contract(device, options, changes, error, message):
    with pytest.raises(error, match=message):
        conv_bn_relu(*(operands(device, **options) | changes).values())
