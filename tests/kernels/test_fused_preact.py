"""The pre-activation block as ops: registration, cost, contract; and mutants of what it hands from kernel to kernel."""

import pytest
import torch
from block_cases import check_evaluation, check_training, no_overflow_checks, prefer_stored  # noqa: F401
from kernel_checks import channels_last
from torch import Tensor

pytest.importorskip("triton")

from kernels import fused_preact as module
from kernels import jit
from kernels.conv_shape import ConvShape
from kernels.fused_preact import (
    preact_block,
    preact_block_backward,
    preact_block_backward_cost,
    preact_block_cost,
)

pytestmark = pytest.mark.usefixtures("no_overflow_checks")


def operands(
    device, images: int = 2, c: int = 16, k: int = 16, size: int = 4, stride: int = 1, evaluation: bool = False
) -> dict[str, object]:
    """Operands of `preact_block` by name; on the meta device nothing is computed."""

    def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        if str(device) == "meta":
            return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
        return channels_last(*shape, dtype=dtype, seed=seed, device=device)

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, device=device)

    projected = stride != 1 or c != k
    return {
        "x": normal(images, c, size, size, dtype=torch.float16),
        "partials": ones(3, 1, c),
        "gamma1": ones(c),
        "beta1": ones(c),
        "w1": normal(k, c, 3, 3, seed=1),
        "gamma2": ones(k),
        "beta2": ones(k),
        "w2": normal(k, k, 3, 3, seed=2),
        "w3": normal(k, c, 1, 1, seed=3) if projected else None,
        "running2": ones(3, 1, k) if evaluation else None,
        "stride": stride,
        "eps1": 1e-5,
        "eps2": 1e-5,
        "forced": False,
    }


def backward_operands(forward: dict[str, object], *results: Tensor) -> dict[str, object]:
    y, _, h, norm1, norm2, a, b = results
    w1, w2, w3, stride = (forward[name] for name in ("w1", "w2", "w3", "stride"))
    saved = {"x": forward["x"], "h": h, "norm1": norm1, "norm2": norm2, "a": a, "b": b}
    return {"dy": y, **saved, "w1": w1, "w2": w2, "w3": w3, "stride": stride, "constant": False, "forced": False}


@pytest.mark.parametrize(
    "options",
    [{"c": 16, "k": 32, "stride": 2}, {"evaluation": True}],
    ids=["projection_in_training", "identity_in_evaluation"],
)
@pytest.mark.slow
def test_registration(device, options):
    arguments = operands(device, **options)
    for name in ("x", "gamma1", "beta2", "w1"):
        arguments[name].requires_grad_()
    torch.library.opcheck(preact_block, tuple(arguments.values()))


@pytest.mark.parametrize("options", [{}, {"c": 16, "k": 32, "stride": 2}], ids=["identity", "projection"])
@pytest.mark.slow
def test_registration_of_backward(device, options):
    arguments = operands(device, **options)
    backward = backward_operands(arguments, *preact_block(*arguments.values()))
    torch.library.opcheck(preact_block_backward, tuple(backward.values()))


def meta_backward(forward: dict[str, object]) -> list:
    return list(backward_operands(forward, *module._forward(*forward.values())).values())


def test_an_identity_block_makes_five_and_seventeen_passes():
    arguments = operands("meta", images=512, c=64, k=64, size=32)
    one_pass, flops = arguments["x"].numel() * 2, 2 * ConvShape(64, 64, 32, 32).flops(512)
    forward, backward = preact_block_cost(*arguments.values()), preact_block_backward_cost(*meta_backward(arguments))
    assert forward.bytes / one_pass == pytest.approx(5, rel=1e-2)
    assert backward.bytes / one_pass == pytest.approx(17, rel=1e-2)
    assert flops < forward.flops < 1.01 * flops
    assert 2 * flops < backward.flops < 2.01 * flops


@pytest.mark.parametrize(
    ("ops", "forward", "backward"),
    [(("conv_fprop",), 9, 17), (("conv_wgrad",), 5, 21), (("conv_fprop", "conv_wgrad"), 9, 17)],
    ids=["fprop", "wgrad", "both"],
)
def test_storing_an_activation_makes_two_passes_once(monkeypatch, ops, forward, backward):
    """Of two: a and b. What forward has stored, backward does not store again."""
    prefer_stored(monkeypatch, *ops)
    arguments = operands("meta", images=512, c=64, k=64, size=32)
    one_pass = arguments["x"].numel() * 2
    assert preact_block_cost(*arguments.values()).bytes / one_pass == pytest.approx(forward, rel=1e-2)
    kept = meta_backward(arguments)
    assert preact_block_backward_cost(*kept).bytes / one_pass == pytest.approx(backward, rel=1e-2)
    assert [t.numel() > 0 for t in kept[5:7]] == [len(ops) == 2] * 2


def test_a_projection_block_s_passes():
    """h, y and the projection are each half of x, of which conv3 reads a quarter. Forward: conv1 1.5, conv3 0.75, conv2
    1.5 (reads two, writes one).

    Backward: dgrads of conv2 1.5, of conv3 0.5 and a quarter of x, of conv1 0.5, x, that quarter and dz; bn applies 1.5
    and 3; wgrads 1, 1.5 and 0.75.
    """
    arguments = operands("meta", images=512, c=64, k=128, size=32, stride=2)
    one_pass = arguments["x"].numel() * 2
    forward, backward = preact_block_cost(*arguments.values()), preact_block_backward_cost(*meta_backward(arguments))
    assert forward.bytes / one_pass == pytest.approx(3.75, rel=1e-2)
    assert backward.bytes / one_pass == pytest.approx(1.5 + 0.75 + 2.75 + 4.5 + 3.25, rel=1e-2)


def nhwc(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return channels_last(*shape, dtype=dtype, seed=0, device=torch.device("cpu"))


@pytest.mark.skipif(not jit.INTERPRETED, reason="CPU tensors")
@pytest.mark.parametrize(
    ("options", "changes", "error", "message"),
    [
        pytest.param({}, {"x": nhwc(2, 16, 4, 4)[:0]}, ValueError, "x has shape .* non-empty", id="zero_images"),
        pytest.param({}, {"x": nhwc(2, 16, 4, 4).contiguous()}, ValueError, "x .* channels_last", id="nchw"),
        pytest.param({}, {"x": nhwc(2, 16, 4, 4).double()}, TypeError, "x is torch.float64", id="dtype"),
        pytest.param({}, {"x": nhwc(2, 16, 4, 4).bfloat16()}, TypeError, "bfloat16.*interpreter", id="bf16"),
        pytest.param(
            {}, {"w1": nhwc(16, 16, 3, 3).bfloat16()}, TypeError, "w1 is torch.bfloat16, expected a m", id="w1"
        ),
        pytest.param({}, {"w2": nhwc(16, 32, 3, 3).float()}, ValueError, r"w2 .* expected \[16, 16, 3, 3\]", id="w2"),
        pytest.param({"c": 24}, {}, ValueError, "w1 takes 24 channels to 16, .* multiples of 16", id="c_of_24"),
        pytest.param({"k": 8}, {}, ValueError, "w1 takes 16 channels to 8, .* multiples of 16", id="k_of_8"),
        pytest.param({"k": 32}, {"w3": None}, ValueError, r"w3 is None, expected a projection", id="no_projection"),
        pytest.param({"stride": 2}, {"w3": None}, ValueError, r"w3 is None, .* stride 2", id="no_projection_stride_2"),
        pytest.param({}, {"stride": 3, "w3": nhwc(16, 16, 1, 1).float()}, ValueError, "stride is 3", id="stride_3"),
        pytest.param({}, {"gamma1": torch.ones(8)}, ValueError, "gamma has shape", id="gamma"),
        pytest.param({}, {"partials": torch.ones(3, 0, 16)}, ValueError, "partials has shape", id="no_partials"),
    ],
)
def test_contract(device, options, changes, error, message):
    with pytest.raises(error, match=message):
        preact_block(*(operands(device, **options) | changes).values())


@pytest.mark.parametrize(
    ("name", "message"),
    [("dy", r"dy has shape .* expected \[2, 16, 4, 4\]"), ("h", r"h has shape .* expected \[2, 16, 4, 4\]")],
)
def test_contract_of_backward(device, name, message):
    arguments = operands(device)
    backward = backward_operands(arguments, *preact_block(*arguments.values()))
    with pytest.raises(ValueError, match=message):
        preact_block_backward(*(backward | {name: backward[name][:1]}).values())
