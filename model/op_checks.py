"""Each call of a kernel's op, compared with the op's reference in float64 on the same operands."""

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kernels import tiles
from kernels.accuracy import relative_error
from kernels.augment import augment_reference
from kernels.bn_apply import bn_apply_reference
from kernels.bn_backward import bn_backward_reference
from kernels.bn_stats import bn_finalize_reference, bn_stats_reference
from kernels.contract import dtype_name
from kernels.conv_dgrad import conv_dgrad_reference
from kernels.conv_fprop import conv_fprop_reference
from kernels.conv_shape import ConvShape
from kernels.conv_wgrad import conv_wgrad_reference
from kernels.metered_cost import BODIES
from kernels.sgd import sgd_reference

OP_LIMIT_S = 60
"""Limit for one op: its launch and, on a cold cache, some seconds of compiling; or Triton's interpreter on a busy
machine."""

OWN_ERRORS = 4
TOLERANCE = 0.01
"""An op's relative error (L2) against float64 may be so many times its reference's in the op's own dtype, or this.

Rounding to fp16 is 3e-4 and to bf16 2e-3. A ReLU at the edge, which fp32 and float64 decide differently, moves all of a
channel's pixels that have that value in fp16: up to 3e-3 of a gradient. One wrong tile among 4096 is 1.6e-2, and a
wrong tap 0.3.
"""


class OpChecks(TorchDispatchMode):
    """While it is entered, every op of this project is checked, also those that ops call.

    `begin(place)` hears of each op before it runs, so that whoever watches knows it if the process dies. An op that
    takes longer than `OP_LIMIT_S` ends the process by SIGALRM, which also reaches one that waits for a GPU.

    wrong      a line for each different op that was wrong: its shape, tile and error
    unchecked  a line for each whose reference could not run
    """

    def __init__(self, begin: Callable[[str], Any] = lambda place: None):
        super().__init__()
        self.begin = begin
        self.wrong: dict[str, str] = {}
        self.unchecked: dict[str, str] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op in BODIES:
            with self:
                return BODIES[op](*args, **kwargs)
        if op.namespace != "cifar":
            return op(*args, **kwargs)
        name = op._schema.name.removeprefix("cifar::")
        place = describe(name, args)
        self.begin(place)
        written = [i for i, arg in enumerate(op._schema.arguments) if arg.alias_info and arg.alias_info.is_write]
        before = tree_map_only(Tensor, torch.clone, args) if written else args
        with _time_limit():
            result = op(*args, **kwargs)
            if args[0].is_cuda:
                torch.cuda.synchronize(args[0].device)
        if place not in self.wrong:
            self._check(name, place, [args[i] for i in written] if written else result, before, kwargs)
        return result

    def _check(self, name: str, place: str, result: Any, args: tuple, kwargs: dict) -> None:
        try:
            reference = REFERENCES[name]
            truth = comparable(name, reference(*_in_float64(args), **_in_float64(kwargs)), args)
            theirs = comparable(name, reference(*tree_map_only(Tensor, torch.clone, args), **kwargs), args)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a library that lacks a convolution in float64 says nothing against the kernel
            self.unchecked[place] = f"{place}: {type(error).__name__}"
            return
        for mine, other, exact in zip(comparable(name, result, args), theirs, truth, strict=True):
            error, own = relative_error(mine, exact), relative_error(other, exact)
            if not error <= max(OWN_ERRORS * own, TOLERANCE):
                self.wrong[place] = (
                    f"{place}, is wrong: relative error {error:.2g} against float64, PyTorch's own is {own:.1g}"
                )


def describe(name: str, args: tuple) -> str:
    """Op, shape and dtype, and a convolution's tile: "conv_fprop 64x32x32-64x3x3-s1 fp16, tile 128x64x64..."."""
    x = args[0]
    dtype = _SHORT.get(x.dtype, dtype_name(x.dtype))
    if name not in _CONV_SHAPES:
        return f"{name} {'x'.join(map(str, x.shape))} {dtype}"
    shape = _CONV_SHAPES[name](*args)
    return f"{name} {shape} {dtype}, tile {tiles.tile(name, shape, x.dtype, tiles.gpu_of(x.device))}"


_SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_CONV_SHAPES: dict[str, Callable[..., ConvShape]] = {
    "conv_fprop": lambda x, w, stride=1, *_: ConvShape.of(x, w, stride),
    "conv_dgrad": lambda dy, w, h, v, stride=1, *_: ConvShape(w.shape[1], w.shape[0], h, v, w.shape[2], stride),
    "conv_wgrad": lambda x, dy, size, stride=1, *_: ConvShape(x.shape[1], dy.shape[1], *x.shape[2:], size, stride),
}


def comparable(name: str, result: Any, args: tuple) -> list[Tensor]:
    """The part of an op's result, or of its reference's, that is compared: nothing in it depends on the tiles."""
    if name == "sgd":  # of w what it moved by, which is small beside w
        return [result[0].double() - args[0].double(), *(t for t in result[1:] if t is not None)]
    if name == "bn_finalize" or name == "bn_coefficients":
        return list(result)  # rows of very different sizes
    if name == "bn_stats":
        return _moments(result)
    if name == "bn_backward_reduce":
        return list(result.double().sum(1))
    if name in ("bn_stats_add", "conv_fprop"):
        return [result[0], *_moments(result[1])]
    if name == "conv_dgrad":
        return [result[0], *(result[1].double().sum(1) if result[1].shape[1] else ())]
    return [result]


def _moments(partials: Tensor) -> list[Tensor]:
    """[mean, var] of [3, T, C] partials; of no tiles, nothing."""
    if not partials.shape[1]:
        return []
    count, means, m2 = partials.double()
    n = count.sum(0)
    mean = (count * means).sum(0) / n
    return [mean, (m2 + count * (means - mean).square()).sum(0) / n]


def _bn_stats_add(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    y = x + residual
    return y, bn_stats_reference(y)


def _bn_backward_reduce(dy: Tensor, x: Tensor, norm: Tensor, pool: bool = False) -> Tensor:
    _, dgamma, dbeta = bn_backward_reference(dy, x, norm, math.inf, pool)
    return torch.stack([dbeta, dgamma / norm[2]])[:, None]


def _bn_coefficients(partials: Tensor, norm: Tensor, n: float) -> Tensor:
    _, _, rstd, scale, _ = norm
    dbeta, centred = partials.sum(1)
    dgamma = rstd * centred
    return torch.stack([dgamma, dbeta, -scale * rstd * dgamma / n, -scale * dbeta / n])


def _bn_backward_apply(dy: Tensor, x: Tensor, norm: Tensor, coefficients: Tensor, pool: bool = False) -> Tensor:
    through_relu, _, _ = bn_backward_reference(dy, x, norm, math.inf, pool)
    mean, b, c = norm[0, :, None, None], coefficients[2, :, None, None], coefficients[3, :, None, None]
    return (through_relu + (b * (x - mean) + c)).to(x.dtype)


def _sgd(w, dw, v, copy, rates, step, bad_step, momentum, decay) -> tuple[Tensor | None, ...]:
    if w.dtype != torch.float64:
        sgd_reference(w, dw, v, copy, rates, step, bad_step, momentum, decay)
        return w, v, copy, bad_step
    if int(bad_step) < 0 and dw.isfinite().all():  # PyTorch's fused optimiser takes no rate in float64
        g = dw + decay * w
        if v is not None:
            v = momentum * v + g
            g = g + momentum * v
        w = w - rates[step.clamp(max=len(rates) - 1)] * g
    return w, v, None if copy is None else w, bad_step


REFERENCES: dict[str, Callable[..., Any]] = {
    "augment": augment_reference,
    "bn_apply": bn_apply_reference,
    "bn_backward_apply": _bn_backward_apply,
    "bn_backward_reduce": _bn_backward_reduce,
    "bn_coefficients": _bn_coefficients,
    "bn_finalize": bn_finalize_reference,
    "bn_stats": bn_stats_reference,
    "bn_stats_add": _bn_stats_add,
    "conv_dgrad": conv_dgrad_reference,
    "conv_fprop": conv_fprop_reference,
    "conv_wgrad": conv_wgrad_reference,
    "sgd": _sgd,
}
"""Each op in PyTorch, on operands of any dtype."""


def _in_float64(operands: Any) -> Any:
    """Fresh operands in float64; integers stay, and so do names of dtypes but for float ones."""
    wide = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t.clone(), operands)
    return tree_map_only(torch.dtype, lambda dtype: torch.float64 if dtype.is_floating_point else dtype, wide)


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    signal.alarm(OP_LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
