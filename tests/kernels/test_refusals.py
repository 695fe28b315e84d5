"""Operands that an op refuses, each with one line that names what was wrong."""

import pytest
import torch
from checks.ops import OPS, operands
from kernel_checks import channels_last

pytest.importorskip("triton")

from kernels import jit

half, single, double, nchw = torch.Tensor.half, torch.Tensor.float, torch.Tensor.double, torch.Tensor.contiguous


def empty(x):
    return x[:0]


def few(x):
    """8 channels, or rows of a vector."""
    return x[:8]


def shaped(*shape: int):
    """The same of another shape."""
    return lambda x: channels_last(*shape, dtype=x.dtype, seed=0, device=x.device)


def huge(*shape: int):
    """Memory that is not touched."""
    return lambda x: torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def unaligned(x):
    """The same values, which begin 2 bytes behind a multiple of 16."""
    n, c, h, w = x.shape
    return x.new_zeros(x.numel() + 1)[1:].view(n, h, w, c).permute(0, 3, 1, 2)


def sliced(x):
    """Every second channel of twice as many."""
    return torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, ::2]


def refused(op: str, error: type[Exception], message: str, /, **changes) -> object:
    """A row: a change is the operand's new value, or makes it of the good one; "options" are of the good operands."""
    return pytest.param(op, changes, error, message, id=f"{op}: {message}")


HUGE_DZ = {"dy": huge(2**15, 16, 16, 16), "w": shaped(16, 64, 1, 1), "height": 32, "width": 32, "stride": 2}
HUGE_PARTS = {"x": huge(1, 2**14, 1, 1), "dy": huge(1, 2**14, 1, 1), "scale": None, "shift": None}
ROWS = [
    refused("augment", TypeError, "images is torch.float32", images=single),
    refused("augment", ValueError, "images has strides", images=lambda x: x.permute(0, 3, 1, 2)),
    refused("augment", ValueError, "N, H, W, 3", images=lambda x: x[..., :2].contiguous()),
    refused("augment", TypeError, "index is torch.int32", index=torch.Tensor.int),
    refused("augment", ValueError, r"expected \[B\]", index=lambda x: x[None]),
    refused("augment", ValueError, "choices has shape", choices=lambda x: x[:3]),
    refused("augment", TypeError, "choices is torch.int64", choices=torch.Tensor.long),
    refused("augment", TypeError, "mean is torch.float64", mean=double),
    refused("augment", ValueError, "rstd has shape", rstd=lambda x: x[:2]),
    refused("augment", ValueError, "pad 8", pad=8),
    refused("augment", ValueError, "cutout 9", cutout=9),
    refused("augment", TypeError, "dtype is torch.int8", dtype=torch.int8),
    refused("bn_apply", ValueError, "x has shape .* non-empty", x=empty),
    refused("bn_apply", ValueError, "x has strides", x=nchw),
    refused("bn_apply", TypeError, "x is torch.int32", x=torch.Tensor.int),
    refused("bn_apply", ValueError, "even height and width", x=shaped(2, 16, 3, 6)),
    refused("bn_apply", ValueError, "scale has shape", scale=few),
    refused("bn_apply", TypeError, "shift is torch.float16", shift=half),
    refused("bn_apply", ValueError, "residual has", residual=lambda x: x[:, :, :1]),
    refused("bn_apply", TypeError, "residual is torch.float32", residual=single),
    refused("bn_apply", ValueError, "residual has strides", residual=nchw),
    refused("bn_stats", ValueError, "non-empty", x=empty),
    refused("bn_stats", ValueError, "expected channels_last", x=nchw),
    refused("bn_stats", ValueError, "N, C, H, W", x=lambda x: x[0]),
    refused("bn_stats", TypeError, "torch.float64", x=double),
    refused("bn_stats", ValueError, "x has strides .* expected channels_last", x=sliced),
    refused("bn_stats", ValueError, "channels_last", x=lambda x: nchw(x)[:1].expand(2, -1, -1, -1)),
    refused("bn_stats_add", TypeError, "residual is torch.float32", residual=single),
    refused("bn_stats_add", ValueError, "residual has shape", residual=lambda x: x[:1]),
    refused("bn_finalize", ValueError, "gamma has shape", gamma=few),
    refused("bn_finalize", ValueError, "partials has shape", partials=lambda x: x[:2]),
    refused("bn_finalize", TypeError, "beta is torch.float16", beta=half),
    *(
        row
        for op in ("bn_backward_reduce", "bn_backward_apply")
        for row in (
            refused(op, TypeError, "dy is torch.float32", dy=single),
            refused(op, ValueError, "dy has strides", dy=nchw),
            refused(op, ValueError, "dy has shape", dy=lambda x: x[:1]),
            refused(op, ValueError, "dy has strides .*, 0", dy=lambda x: x[..., :1].expand(-1, -1, -1, 3)),
            refused(op, ValueError, "x has shape .* non-empty", x=empty),
            refused(op, ValueError, "even height and width", x=shaped(2, 16, 3, 6)),
            refused(op, ValueError, "norm has shape .*4, 16", norm=lambda x: x[:4]),
            refused(op, ValueError, "norm has shape .*5, 8", norm=lambda x: x[:, :8].clone()),
        )
    ),
    refused("bn_backward_apply", ValueError, "coefficients has shape", coefficients=lambda x: x[:, :8].clone()),
    refused("bn_coefficients", ValueError, "n is 0", n=0.0),
    refused("bn_coefficients", ValueError, "partials has shape", partials=lambda x: torch.cat([x, x])),
    refused("bn_relu", ValueError, "gamma has shape", gamma=few),
    refused("bn_relu", ValueError, "scale has shape", x=shaped(2, 8, 4, 6)),
    refused("bn_relu", ValueError, "residual has shape", pool=False),
    refused("bn_relu", TypeError, "beta is torch.float16", beta=half),
    refused("conv_fprop", ValueError, "x has shape .* non-empty", x=empty),
    refused("conv_fprop", ValueError, "x has strides .* expected channels_last", x=nchw),
    refused("conv_fprop", ValueError, "w has strides .* expected channels_last", w=nchw),
    refused("conv_fprop", ValueError, "x .* channels_last: use", x=sliced),
    refused("conv_fprop", TypeError, "w is torch.float32, expected x's", w=single),
    refused("conv_fprop", TypeError, "x is torch.float64", x=double),
    refused("conv_fprop", ValueError, r"expected \[K, 16, R, R\]", w=shaped(32, 48, 3, 3)),
    refused("conv_fprop", ValueError, "C is 24 .* multiple of 16", x=shaped(2, 24, 4, 4), w=shaped(32, 24, 3, 3)),
    refused("conv_fprop", ValueError, "C is 3 .* multiple of 16", x=shaped(2, 3, 4, 4), w=shaped(32, 3, 3, 3)),
    refused("conv_fprop", ValueError, "K is 8 .* multiple of 16", w=shaped(8, 16, 3, 3)),
    refused("conv_fprop", ValueError, "5 pixels wide", w=shaped(32, 16, 5, 5)),
    refused("conv_fprop", ValueError, "square", w=shaped(32, 16, 3, 1)),
    refused("conv_fprop", ValueError, "stride is 3", stride=3),
    refused("conv_fprop", ValueError, "x's memory .* no multiple of 16", x=unaligned),
    refused("conv_fprop", ValueError, "scale and shift go together", shift=None),
    refused("conv_fprop", TypeError, "scale is torch.float16", scale=half),
    refused("conv_fprop", ValueError, "shift has shape", shift=few),
    refused("conv_fprop", ValueError, "residual has shape", stride=2),
    refused("conv_fprop", ValueError, "without a residual", residual=None),
    refused("conv_fprop", ValueError, "x has 2147483648 elements, .* split the batch", x=huge(2**15, 64, 32, 32)),
    refused("conv_fprop", ValueError, "y has 2147483648 .* split", x=huge(2**13, 16, 64, 64), w=shaped(64, 16, 1, 1)),
    refused("conv_fprop", ValueError, "w has 2147483648 elements", w=huge(2**27, 16, 1, 1)),
    refused("conv_dgrad", ValueError, "dy has shape .* non-empty", dy=empty),
    refused("conv_dgrad", ValueError, "dy .* channels_last", dy=nchw),
    refused("conv_dgrad", TypeError, "w is torch.float32, expected dy's", w=single),
    refused("conv_dgrad", ValueError, r"expected \[2, 64, 4, 4\]", w=shaped(64, 16, 3, 3)),
    refused("conv_dgrad", ValueError, r"expected \[2, 32, 5, 4\]", height=5),
    refused("conv_dgrad", ValueError, r"expected \[2, 32, 5, 4\] .* at stride 2", height=9, width=8, stride=2),
    refused("conv_dgrad", ValueError, "C is 8 .* multiple of 16", w=shaped(32, 8, 3, 3)),
    refused("conv_dgrad", ValueError, "shortcut has shape", shortcut=shaped(2, 16, 2, 2)),
    refused("conv_dgrad", ValueError, "go together", scale=None, shift=None, mean=None),
    refused("conv_dgrad", ValueError, "mean go together", mean=None),
    refused("conv_dgrad", ValueError, "mean has shape", mean=few),
    refused("conv_dgrad", ValueError, "x has shape", x=shaped(2, 16, 4, 2)),
    refused("conv_dgrad", ValueError, "shortcut's memory", shortcut=unaligned),
    refused("conv_dgrad", ValueError, "x's memory begins at an address", x=unaligned),
    refused("conv_dgrad", ValueError, "dz has 2147483648 elements, .* split the batch", **HUGE_DZ),
    refused("conv_wgrad", ValueError, "x has shape .* non-empty", x=empty, dy=empty),
    refused("conv_wgrad", ValueError, "x .* channels_last", x=nchw),
    refused("conv_wgrad", ValueError, "dy .* channels_last", dy=nchw),
    refused("conv_wgrad", TypeError, "dy is torch.float32, expected x's", dy=single),
    refused("conv_wgrad", ValueError, r"dy has shape .* \[2, 32, 2, 2\]", stride=2),
    refused("conv_wgrad", ValueError, "dy has shape .3", dy=shaped(3, 32, 4, 4)),
    refused("conv_wgrad", ValueError, "5 pixels wide", size=5),
    refused("conv_wgrad", ValueError, "C is 8 .* multiple of 16", x=shaped(2, 8, 4, 4)),
    refused("conv_wgrad", ValueError, "go together", shift=None),
    refused("conv_wgrad", ValueError, "shift has shape", shift=few),
    refused("conv_wgrad", ValueError, "parts .* has 2415919104 elements", **HUGE_PARTS),
    refused("conv_bn_relu", ValueError, "x has shape .* non-empty", x=empty),
    refused("conv_bn_relu", ValueError, "x .* channels_last", x=nchw),
    refused("conv_bn_relu", TypeError, "x is torch.float64", x=double),
    refused("conv_bn_relu", TypeError, "w is torch.bfloat16, expected a master", w=torch.Tensor.bfloat16),
    refused("conv_bn_relu", ValueError, r"w .* expected \[32, 16, 3, 3\]", w=shaped(32, 16, 1, 1)),
    refused("conv_bn_relu", ValueError, "w takes 8 channels to 32, .* multiples of 16", options={"c": 8}),
    refused("conv_bn_relu", ValueError, "pool is 'middle', expected one of", pool="middle"),
    refused("conv_bn_relu", ValueError, "even height and width for", options={"size": 5, "pool": "last"}),
    refused("conv_bn_relu", ValueError, "5x5, expected even height", options={"size": 5, "pool": "first"}),
    refused("conv_bn_relu", ValueError, "residual has shape", residual=shaped(2, 32, 2, 2)),
    refused("preact_block", ValueError, "x has shape .* non-empty", x=empty),
    refused("preact_block", ValueError, "x .* channels_last", x=nchw),
    refused("preact_block", TypeError, "x is torch.float64", x=double),
    refused("preact_block", TypeError, "w1 is torch.bfloat16, expected a m", w1=torch.Tensor.bfloat16),
    refused("preact_block", ValueError, r"w2 .* expected \[16, 16, 3, 3\]", w2=shaped(16, 32, 3, 3)),
    refused("preact_block", ValueError, "w1 takes 24 channels to 16, .* multiples of 16", options={"c": 24}),
    refused("preact_block", ValueError, "w1 takes 16 channels to 8, .* multiples of 16", options={"k": 8}),
    refused("preact_block", ValueError, "w3 is None, expected a projection", options={"k": 32}, w3=None),
    refused("preact_block", ValueError, "w3 is None, .* stride 2", options={"stride": 2}, w3=None),
    refused("preact_block", ValueError, "stride is 3", options={"stride": 2}, stride=3),
    refused("preact_block", ValueError, "gamma has shape", gamma1=few),
    refused("preact_block", ValueError, "partials has shape", partials=lambda x: x[:, :0]),
    refused("preact_block_backward", ValueError, r"dy has .* expected \[2, 16, 4, 4\]", dy=lambda x: x[:1]),
    refused("preact_block_backward", ValueError, r"h has .* expected \[2, 16, 4, 4\]", h=lambda x: x[:1]),
    refused("sgd", TypeError, "w is torch.float16", w=half),
    refused("sgd", ValueError, "dw has shape", dw=lambda x: x[1:]),
    refused("sgd", ValueError, "copy is torch.float32", copy=single),
    refused("sgd", ValueError, "rates has shape", rates=empty),
    refused("sgd", ValueError, "step is torch.int32", step=torch.Tensor.int),
    refused("sgd", ValueError, r"bad_step is torch.int64 \[\]", bad_step=lambda x: x[0]),
    refused("sgd", ValueError, "momentum is 0.0", momentum=0.0),
]
if jit.INTERPRETED:
    ROWS += [
        refused("conv_fprop", TypeError, "x is bfloat16.*interpreter", x=torch.Tensor.bfloat16),
        refused("preact_block", TypeError, "x is bfloat16.*interpreter", x=torch.Tensor.bfloat16),
    ]


@pytest.mark.parametrize(("op", "changes", "error", "message"), ROWS)
def test_refused(device, op, changes, error, message):
    given = operands(op, device, **changes.get("options", {}))
    for name, change in changes.items():
        if name != "options":
            given[name] = change(given[name]) if callable(change) else change
    with pytest.raises(error, match=message):
        OPS[op](**given)


def test_device_without_kernels_is_named():
    """Called past the dispatcher, which takes the meta device for a fake tensor's."""
    with pytest.raises(ValueError, match="device meta"):
        OPS["bn_finalize"]._init_fn(**operands("bn_finalize", "meta"))
