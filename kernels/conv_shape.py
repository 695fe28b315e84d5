"""The layers that the three convolution kernels compute, the kernels' contract, and boxes of pixels.

A tile's rows are pixels of y in the order of memory. Where they form a box of the map, a tensor descriptor loads them,
shifted by a tap of the filter, with one instruction that also fills what lies outside; the tile is the same as with
pointers. At stride 2 the box is one of the view [N, H/2, 2, W/2, 2C], in which the pixels that one tap reads are dense
(rank 5 is the limit of the hardware's descriptors).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from kernels.contract import check_activation, check_fp32, check_like
from kernels.jit import INTERPRETED


@dataclass(frozen=True)
class ConvShape:
    """One convolution layer without its batch: x[N,H,W,C] * w[K,R,R,C] -> y[N,P,Q,K], zero padding of R//2.

    Raises ValueError for what the kernels do not compute: other filters than 3x3 and 1x1, other strides than 1 and 2,
    channels that are not multiples of 16.
    """

    C: int
    K: int
    H: int
    W: int
    R: int = 3
    stride: int = 1

    def __post_init__(self) -> None:
        if self.R not in (1, 3):
            raise ValueError(f"the filter is {self.R} pixels wide, expected 3x3 or 1x1")
        if self.stride not in (1, 2):
            raise ValueError(f"stride is {self.stride}, expected 1 or 2")
        for name, channels in (("C", self.C), ("K", self.K)):
            if channels < 16 or channels % 16:
                raise ValueError(f"{name} is {channels} channels, expected a multiple of 16: use the reference ops")
        if self.H < 1 or self.W < 1:
            raise ValueError(f"the map is {self.H}x{self.W}, expected at least 1x1")

    @property
    def P(self) -> int:
        """Height of y: H / stride, rounded up."""
        return (self.H - 1) // self.stride + 1

    @property
    def Q(self) -> int:
        """Width of y."""
        return (self.W - 1) // self.stride + 1

    @property
    def of_dgrad(self) -> "ConvShape":
        """The layer whose dgrad a block runs for this one: itself, but for a projection the same one at stride 1.

        Of a strided 1x1 convolution only the pixels that it saw get a gradient, and they are as many as y has.
        """
        return ConvShape(self.C, self.K, self.P, self.Q, 1) if self.R == 1 else self

    def seen(self, x: Tensor) -> Tensor:
        """The part of x [N,C,H,W] that the filter reads: all of it, or where it is 1x1 every stride-th pixel."""
        return x if self.R > 1 else x[:, :, :: self.stride, :: self.stride]

    def flops(self, images: int) -> int:
        """Multiplications and additions of fprop, dgrad and wgrad alike; the padding's zeros count, as in PyTorch."""
        return 2 * images * self.P * self.Q * self.K * self.C * self.R**2

    @classmethod
    def of(cls, x: Tensor, w: Tensor, stride: int) -> "ConvShape":
        """The layer that convolves x [N,C,H,W] with w [K,C,R,R]. Symbolic extents become constants."""
        return cls(*map(int, (x.shape[1], w.shape[0], x.shape[2], x.shape[3], w.shape[2], stride)))

    def __str__(self) -> str:
        return f"{self.C}x{self.H}x{self.W}-{self.K}x{self.R}x{self.R}-s{self.stride}"


def _layer(c: int, k: int, size: int, stride: int = 1, r: int = 3) -> ConvShape:
    return ConvShape(c, k, size, size, r, stride)


# The convolutions of the article's two networks but for the first of each, whose C = 3 stays with the library.
RESNET_LAYERS = (
    _layer(64, 64, 32),
    _layer(64, 128, 32, stride=2),
    _layer(64, 128, 32, stride=2, r=1),
    _layer(128, 128, 16),
    _layer(128, 256, 16, stride=2),
    _layer(128, 256, 16, stride=2, r=1),
    _layer(256, 256, 8),
    _layer(256, 256, 8, stride=2),
    _layer(256, 256, 8, stride=2, r=1),
    _layer(256, 256, 4),
)
RESNET9_LAYERS = (
    _layer(64, 128, 32),
    _layer(128, 128, 16),
    _layer(128, 256, 16),
    _layer(256, 512, 8),
    _layer(512, 512, 4),
)


def parse(text: str) -> ConvShape:
    """The `ConvShape` that prints as `text`. Raises ValueError if none does."""
    try:
        x, w, stride = text.split("-")
        (c, h, width), (k, r, _) = (map(int, extents.split("x")) for extents in (x, w))
        shape = ConvShape(c, k, h, width, r, int(stride.removeprefix("s")))
    except ValueError:
        shape = None
    if str(shape) != text:
        raise ValueError(f"shape is {text!r}, expected CxHxW-KxRxR-sSTRIDE, as in 64x32x32-128x3x3-s2")
    return shape


def flop_formula(name: str) -> Callable:
    """Decorates the FLOP formula of the op called `name`, "namespace::op": without one FlopCounterMode counts zero."""
    namespace, _, op = name.partition("::")
    return register_flop_formula(getattr(getattr(torch.ops, namespace), op))


def check_operand(name: str, x: Tensor) -> None:
    """Raise unless `x` is an activation or a weight that the convolution kernels take."""
    check_activation(name, x)
    check_offsets(name, x.numel())
    if x.data_ptr() % 16:
        raise ValueError(f"{name}'s memory begins at an address that is no multiple of 16 bytes: use {name}.clone()")
    if INTERPRETED and x.dtype == torch.bfloat16:
        raise TypeError(f"{name} is bfloat16, which Triton's interpreter multiplies wrongly: use float16 or float32")


def check_offsets(name: str, elements: int) -> None:
    """Raise unless the kernels' 32-bit offsets reach all of a tensor's `elements`."""
    if elements >= 2**31:
        raise ValueError(
            f"{name} has {elements} elements, expected fewer than 2**31 (offsets are 32 bits): split the batch or the "
            "channels"
        )


def check_weight(w: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless w is [K, C, R, R], channels_last, with the dtype and on the device of `like`."""
    check_operand("w", w)
    check_like("w", w, like_name, w.shape, like)
    if w.shape[2] != w.shape[3]:
        raise ValueError(f"w has shape {list(w.shape)}, expected a square filter [K, C, R, R]")


def check_affine(
    prefix: str, scale: Tensor | None, shift: Tensor | None, channels: int, like_name: str, like: Tensor
) -> None:
    """Raise unless `prefix`scale and `prefix`shift are both None, or both fp32 [channels] on the device of `like`."""
    if (scale is None) != (shift is None):
        raise ValueError(f"{prefix}scale and {prefix}shift go together, expected both or neither")
    if scale is not None:
        check_fp32(f"{prefix}scale", scale, (channels,), like_name, like)
        check_fp32(f"{prefix}shift", shift, (channels,), like_name, like)


def box(rows: int, p: int, q: int) -> tuple[int, int] | None:
    """(TN, TH) such that a box of TN images, TH lines and q columns is `rows` consecutive pixels of [N, p, q] maps.

    None if there is none: a box's sides are powers of two, and it must divide the map or consist of whole maps.
    """
    if q & (q - 1) or rows % q:
        return None
    lines = rows // q
    if lines <= p:
        return (1, lines) if p % lines == 0 else None
    return (lines // p, p) if lines % p == 0 else None


def boxes_fit(rows: int, shape: ConvShape) -> bool:
    """Whether every tile of `rows` pixels of y's map is a box, and x at stride 2 has the view that they are of."""
    even = shape.stride == 1 or (shape.H % 2 == 0 and shape.W % 2 == 0)
    return even and box(rows, shape.P, shape.Q) is not None


def lines_fit(rows: int, shape: ConvShape) -> bool:
    """Whether `rows` pixels can be a line of each of several images: the width is a power of two and divides them."""
    return shape.Q & (shape.Q - 1) == 0 and rows % shape.Q == 0


def activation_descriptor(x: Tensor, rows: int, block_c: int, stride: int = 1, nan: bool = False):
    """A tensor descriptor of x [N,C,H,W]: boxes of `rows` pixels of [N, H/stride, W/stride] maps by `block_c` channels.

    Pixels outside of x read as zero, or as NaN if `nan`. `boxes_fit` must hold.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    n, c, h, w = x.shape
    images, lines = box(rows, h // stride, w // stride)
    if stride == 1:
        extents, block = [n, h, w, c], [images, lines, w, block_c]
    else:
        extents, block = [n, h // 2, 2, w // 2, 2 * c], [images, lines, 1, w // 2, block_c]
    return TensorDescriptor(x, extents, _contiguous_strides(extents), block, "nan" if nan else "zero")


def pixel_descriptor(x: Tensor, pixels: int, block_c: int):
    """A tensor descriptor of x [N,C,H,W] as the matrix [NHW, C] that it is in memory, boxes of [pixels, block_c]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    c = x.shape[1]
    return TensorDescriptor(x, [x.numel() // c, c], [c, 1], [pixels, block_c])


def line_descriptor(x: Tensor, rows: int, block_c: int, nan: bool = False):
    """Like `activation_descriptor` at stride 1, but the `rows` pixels of a box are a line each of several images."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    n, c, h, w = x.shape
    extents = [n, h, w, c]
    return TensorDescriptor(
        x, extents, _contiguous_strides(extents), [rows // w, 1, w, block_c], "nan" if nan else "zero"
    )


def weight_descriptor(w: Tensor, block_k: int, block_c: int):
    """A tensor descriptor of w [K,C,R,R] as the matrix [K, R*R*C] that it is in memory, boxes of [block_k, block_c]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    extents = [w.shape[0], w[0].numel()]
    return TensorDescriptor(w, extents, _contiguous_strides(extents), [block_k, block_c])


def _contiguous_strides(extents: list[int]) -> list[int]:
    strides = [1]
    for extent in reversed(extents[1:]):
        strides.insert(0, strides[0] * extent)
    return strides
