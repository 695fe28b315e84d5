"""A convolution and the batch-norm work beside it, by our kernels or around the library's, as the tile table says.

`fprop`, `dgrad` and `wgrad` take the same operands and give the same results either way, so that a block is written
once. Our kernels do batch norm's work while they load and store; around the library's convolution the elementwise
kernels do it, in passes of their own. `forced` means ours even where the table has measured the library as the faster.

Weights arrive as fp32 masters and are cast to the activations' dtype here, or as copies in that dtype; dw leaves in
fp32 either way.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import tiles
from kernels.bn_apply import bn_apply
from kernels.bn_backward import bn_backward_reduce
from kernels.bn_stats import bn_stats, bn_stats_add
from kernels.contract import check_activation
from kernels.conv_dgrad import conv_dgrad
from kernels.conv_fprop import conv_fprop
from kernels.conv_shape import ConvShape
from kernels.conv_wgrad import conv_wgrad
from kernels.reference import conv


@dataclass
class Activation:
    """relu(x * scale + shift): our kernels recompute it as they load x; it is stored if the library or a tile asks.

    x       fp16, bf16 or fp32 [N, C, H, W] channels_last
    norm    fp32 [5, C] = (mean, var, rstd, scale, shift), see `kernels.bn_stats`; None: the activation is x itself
    stored  the activation where somebody has stored it; of no elements or None where nobody has
    """

    x: Tensor
    norm: Tensor | None = None
    stored: Tensor | None = None

    @property
    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """(scale, shift)."""
        return (None, None) if self.norm is None else (self.norm[3], self.norm[4])

    @property
    def operands(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(x, scale, shift) to compute the activation from, or (the activation, None, None) where it is stored."""
        if self.stored is not None and self.stored.numel():
            return self.stored, None, None
        return self.x, *self.affine

    def store(self) -> Tensor:
        """The activation itself; two passes, read x and write it, the first time."""
        if self.norm is None:
            return self.x
        if self.operands[1] is not None:
            self.stored = bn_apply(self.x, *self.affine)
        return self.stored

    def kept(self, needed: bool) -> Tensor:
        """The tensor to save for backward: the activation if it is `needed` and already stored, else no elements."""
        return self.stored if needed and self.stored is not None else self.x.new_empty(0)


def check_weight(name: str, w: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Raise unless `w` is of `shape` [K, C, R, R], channels_last, on x's device, and C and K suit the kernels.

    It is a master weight in fp32, or its copy in x's dtype.
    """
    if w.dtype not in (torch.float32, x.dtype):
        raise TypeError(f"{name} is {w.dtype}, expected a master weight in torch.float32 or a copy in x's {x.dtype}")
    check_activation(name, w)
    if tuple(w.shape) != shape or w.device != x.device:
        raise ValueError(
            f"{name} has shape {list(w.shape)} on {w.device}, expected {list(shape)} on {x.device} for x of "
            f"{x.shape[1]} channels"
        )
    if shape[0] % 16 or shape[1] % 16:
        raise ValueError(
            f"{name} takes {shape[1]} channels to {shape[0]}, expected widths of multiples of 16: or use ops=batchnorm"
        )


def runs_library(op: str, shape: ConvShape, dtype: torch.dtype, gpu: tiles.Gpu, forced: bool) -> bool:
    """Whether the library is to run `op` ("conv_fprop", "conv_dgrad", "conv_wgrad") at `shape`."""
    return not forced and tiles.prefers_library(op, shape, dtype, gpu)


def stores(op: str, shape: ConvShape, dtype: torch.dtype, gpu: tiles.Gpu, forced: bool) -> bool:
    """Whether `op` reads a stored activation: the library does, and our kernel where its tile says so."""
    return runs_library(op, shape, dtype, gpu, forced) or tiles.tile(op, shape, dtype, gpu).prologue == "stored"


def fprop(
    a: Activation,
    w: Tensor,
    stride: int = 1,
    residual: Activation | None = None,
    statistics: bool = True,
    forced: bool = False,
) -> tuple[Tensor, Tensor]:
    """(y, partials) of y = conv(a, w) + residual; without `statistics` the partials are of no tiles, [3, 0, K].

    Passes: ours 2, 2 more where the tile has `a` stored, and 1 for the residual; around the library 5 (a stored 2, conv
    2, statistics 1), 7 with a residual that is stored already.
    """
    w = w.to(a.x.dtype)
    how = ("conv_fprop", ConvShape.of(a.x, w, stride), w.dtype, tiles.gpu_of(a.x.device), forced)
    if stores(*how):
        a.store()
    if not runs_library(*how):
        of_residual = (None, None, None) if residual is None else residual.operands
        x, scale, shift = a.operands
        return conv_fprop(x, w, stride, scale, shift, *of_residual, statistics)
    y = conv(a.store(), w, stride).contiguous(memory_format=torch.channels_last)
    if residual is not None and statistics:
        return bn_stats_add(y, residual.store())
    if residual is not None:
        y += residual.store()
    return y, bn_stats(y) if statistics else y.new_empty((3, 0, len(w)), dtype=torch.float32)


def dgrad(
    dy: Tensor,
    w: Tensor,
    height: int,
    width: int,
    stride: int = 1,
    shortcut: Tensor | None = None,
    a: Activation | None = None,
    forced: bool = False,
) -> tuple[Tensor, Tensor]:
    """(dz, partials) as `kernels.conv_dgrad`: the gradient of an input of `height` by `width` pixels, plus `shortcut`.

    Given `a`, the convolution's input, the partials are the two sums of its batch norm's backward and dz may be masked
    by its ReLU or not, which is the same to `kernels.bn_backward`; without it they are of no tiles, [2, 0, C].

    Passes: ours 2, 1 for a and 1 for the shortcut; around the library 2, 2 for a and 3 for the shortcut.
    """
    w = w.to(dy.dtype)
    shape = ConvShape(w.shape[1], w.shape[0], height, width, w.shape[2], stride)
    if not runs_library("conv_dgrad", shape, dy.dtype, tiles.gpu_of(dy.device), forced):
        of_a = (None, None, None, None) if a is None else (a.x, *a.affine, a.norm[0])
        return conv_dgrad(dy, w, height, width, stride, shortcut, *of_a)
    size = (dy.shape[0], shape.C, height, width)
    da = torch.nn.grad.conv2d_input(size, w, dy, stride=stride, padding=shape.R // 2)
    da = da.contiguous(memory_format=torch.channels_last)
    if shortcut is not None:
        apart = 1 if shortcut.shape == da.shape else stride
        da[:, :, ::apart, ::apart] += shortcut
    if a is None:
        return da, da.new_empty((2, 0, shape.C), dtype=torch.float32)
    return da, bn_backward_reduce(da, a.x, a.norm)


def wgrad(a: Activation, dy: Tensor, size: int, stride: int = 1, forced: bool = False) -> Tensor:
    """dw fp32 [K, C, size, size] channels_last.

    Passes: ours 2, the library's 2; 2 more for the library, or for a tile that wants it, if `a` is not stored yet.
    """
    how = _wgrad(a.x, dy.shape[1], size, stride, forced)
    if stores(*how):
        a.store()
    if not runs_library(*how):
        x, scale, shift = a.operands
        return conv_wgrad(x, dy, size, stride, scale, shift)
    extents = (dy.shape[1], a.x.shape[1], size, size)
    dw = torch.nn.grad.conv2d_weight(a.store(), extents, dy, stride=stride, padding=size // 2)
    return dw.to(torch.float32, memory_format=torch.channels_last)


def wgrad_stores(x: Tensor, filters: int, size: int, stride: int, forced: bool) -> bool:
    """Whether `wgrad` of this layer reads the convolution's input stored."""
    return stores(*_wgrad(x, filters, size, stride, forced))


def _wgrad(x: Tensor, filters: int, size: int, stride: int, forced: bool) -> tuple:
    """Operands of `stores` and `runs_library`."""
    shape = ConvShape(*map(int, (x.shape[1], filters, x.shape[2], x.shape[3], size, stride)))
    return "conv_wgrad", shape, x.dtype, tiles.gpu_of(x.device), forced


def triton_share(layers: Iterable[tuple[int, ...]], dtype: torch.dtype, gpu: tiles.Gpu, forced: bool = False) -> float:
    """The share of a training step's convolution FLOPs that our kernels run, 0..1.

    `layers` are a network's convolutions as (C, K, H, W, R, stride), each as often as it occurs: `traced_layers`. One
    with C = 3 is the network's first, which is the library's and sends no gradient to its input.
    """
    ours = total = 0
    for layer in layers:
        c, k, h, w, r, _ = layer
        if c == 3:
            total += 2 * 2 * h * w * k * c * r * r
            continue
        shape = ConvShape(*layer)
        total += 3 * shape.flops(1)
        for op, of_op in (("conv_fprop", shape), ("conv_dgrad", shape.of_dgrad), ("conv_wgrad", shape)):
            ours += 0 if runs_library(op, of_op, dtype, gpu, forced) else shape.flops(1)
    return ours / total


def traced_layers(forward: Callable[[], object]) -> list[tuple[int, int, int, int, int, int]]:
    """(C, K, H, W, R, stride) of every convolution that `forward` calls in PyTorch: the reference network, on meta."""
    layers = []

    class Trace(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.aten.convolution.default:
                x, w, _, stride = args[:4]
                layers.append((x.shape[1], w.shape[0], x.shape[2], x.shape[3], w.shape[2], stride[0]))
            return op(*args, **(kwargs or {}))

    with Trace():
        forward()
    return layers
