"""A benchmark's parts: operands at a layer's shape, one op beside PyTorch doing the same work, and the check of its
result, which comes before any timing."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kernels.accuracy import allowed_error, relative_error
from kernels.bn_stats import bn_finalize_reference, bn_stats_reference
from kernels.conv_shape import ConvShape
from kernels.cost import Cost

EPS = 1e-5


@dataclass(frozen=True)
class OperandFactory:
    """Makes operands: `batch` images of `dtype` on `device`, random, equal for equal seeds.

    Values are off zero on average, so that sums over pixels do not cancel, and never all alike. `untouched` leaves
    memory as it is, for launches that are only recorded.
    """

    batch: int
    device: torch.device
    dtype: torch.dtype = torch.float16
    untouched: bool = False
    seed: int = 0

    @functools.cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)

    def activation(self, channels: int, height: int, width: int | None = None) -> Tensor:
        """[batch, C, H, W], normal around means that differ by channel."""
        x = self._normal(self.batch, channels, height, width or height)
        if not self.untouched:
            x += 0.5 + torch.linspace(-0.5, 0.5, channels, device=self.device)[:, None, None]
        return x.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def gradient(self, channels: int, height: int, width: int) -> Tensor:
        """An activation over 256: wgrad's sums over a batch's pixels stay below fp16's 65504."""
        x = self.activation(channels, height, width)
        return x if self.untouched else x / 256

    def weight(self, shape: ConvShape) -> Tensor:
        """[K, C, R, R], scaled to keep the deviation through a convolution."""
        w = self._normal(shape.K, shape.C, shape.R, shape.R)
        if not self.untouched:
            w *= (shape.C * shape.R**2) ** -0.5
        return w.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def positive(self, *extents: int) -> Tensor:
        """fp32 in 0.5..1.5."""
        if self.untouched:
            return torch.empty(extents, device=self.device)
        return torch.rand(extents, generator=self._generator, device=self.device) + 0.5

    def normal(self, *extents: int) -> Tensor:
        """fp32, of deviation 1 around 0.25."""
        return torch.empty(extents, device=self.device) if self.untouched else self._normal(*extents) + 0.25

    def integers(self, high: int, *extents: int, dtype: torch.dtype) -> Tensor:
        """0..high-1."""
        if self.untouched:
            return torch.empty(extents, dtype=dtype, device=self.device)
        return torch.randint(high, extents, generator=self._generator, device=self.device, dtype=dtype)

    def norm(self, x: Tensor) -> Tensor:
        """norm [5, C] of x; its gamma and beta leave about two thirds of x above zero."""
        channels = x.shape[1]
        if self.untouched:
            return torch.empty(5, channels, device=self.device)
        return bn_finalize_reference(bn_stats_reference(x), self.positive(channels), self.normal(channels), EPS)

    def _normal(self, *extents: int) -> Tensor:
        if self.untouched:
            return torch.empty(extents, dtype=self.dtype, device=self.device)
        return torch.randn(extents, generator=self._generator, device=self.device)


@dataclass(frozen=True)
class Case:
    """One row of the benchmark.

    operands    draws the tuple that `library`, `ours`, `hybrid` and `cost` take
    library     PyTorch; returns the tensor or tensors to compare. With `gradient_of` it is the forward function, and
                its gradient in the operands of those numbers is timed, for dy, the last operand
    ours        this project's op; `comparable` converts its result to the library's form, outside of the clock
    cost        FLOPs and compulsory bytes of `ours`
    hybrid      for a convolution: the library's, with our batch-norm kernels around it
    """

    op: str
    variant: str
    shape: str
    operands: Callable[[OperandFactory], tuple]
    library: Callable[..., Any]
    ours: Callable[..., Any]
    cost: Callable[..., Cost]
    comparable: Callable[[Any], Any] = lambda result: result
    hybrid: Callable[..., Any] | None = None
    gradient_of: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The case's name, such as "conv_fprop[statistics] 64x32x32-64x3x3-s1"."""
        return f"{self.op}[{self.variant}] {self.shape}" if self.variant else f"{self.op} {self.shape}"

    def call(self, function: Callable[..., Any], operands: tuple) -> Callable[[], Any]:
        """The call to time of `library`, eager or compiled: on the operands, or its gradient."""
        if not self.gradient_of:
            return lambda: function(*operands)
        leaves = [x.detach().requires_grad_(i in self.gradient_of) for i, x in enumerate(operands)]
        y, wrt = function(*leaves), [leaves[i] for i in self.gradient_of]
        return lambda: torch.autograd.grad(y, wrt, operands[-1], retain_graph=True)


def tensors(result: Any) -> list[Tensor]:
    """The tensors among operands or results, in their order."""
    return [x for x in (result if isinstance(result, (tuple, list)) else [result]) if torch.is_tensor(x)]


class Correctness:
    """Compares results of a case with the library's in float64; `baseline` is PyTorch's in the same dtype."""

    def __init__(self, case: Case, operands: tuple, dtype: torch.dtype):
        wide = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, operands)
        wide = tuple(torch.float64 if isinstance(x, torch.dtype) else x for x in wide)
        self.truth, self.baseline, self.dtype = tensors(case.call(case.library, wide)()), None, dtype

    def refusal(self, result: Any) -> str | None:
        """The fault of a result by our kernels, None if it is right."""
        return disagreement(tensors(result), self.baseline, self.truth, self.dtype)

    def library_refusal(self, result: Any) -> str | None:
        """The same of a result by PyTorch, which needs half of the digits."""
        return disagreement(tensors(result), None, self.truth, self.dtype)


def verified(case: Case, device: torch.device, dtype: torch.dtype, batch: int, judge: torch.device) -> str | None:
    """The fault of our kernels' result for `case` on `device`, None if it is right.

    The rest is computed on `judge`: the CPU, so that a program which watches the device sees our kernels alone, or
    the device itself where the CPU would take minutes.
    """
    operands = case.operands(OperandFactory(batch, judge, dtype))
    gate = Correctness(case, operands, dtype)
    gate.baseline = tensors(case.call(case.library, operands)())
    result = case.ours(*tree_map_only(Tensor, lambda x: x.to(device), operands))
    return gate.refusal(case.comparable(tree_map_only(Tensor, lambda x: x.to(judge), result)))


def disagreement(
    result: list[Tensor], baseline: list[Tensor] | None, truth: list[Tensor], dtype: torch.dtype
) -> str | None:
    """The fault of `result`, None if it is right.

    `allowed_error` bounds its relative L2 error against float64 by that of `baseline`, PyTorch's result from the same
    operands. Without a baseline it must have half of the digits of `dtype`.
    """
    if [x.shape for x in result] != [x.shape for x in truth]:
        return f"shapes {[list(x.shape) for x in result]}, expected {[list(x.shape) for x in truth]}"
    for i, (x, exact) in enumerate(zip(result, truth, strict=True)):
        error, allowed = relative_error(x, exact), torch.finfo(dtype).eps ** 0.5
        if baseline is not None:
            allowed = allowed_error(relative_error(baseline[i], exact), x.dtype)
        if not error <= allowed:  # False for NaN
            return f"output {i} is off by {error:.2g} against float64, {allowed:.2g} allowed"
    return None


def with_arguments(function: Callable[..., Any], arguments: Callable[..., tuple]) -> Callable[..., Any]:
    """`function` as one of a case's operands: `arguments` converts them."""
    return lambda *operands: function(*arguments(*operands))


def per_channel(v: Tensor) -> Tensor:
    return v[:, None, None]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, var


def moments_of(partials: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, var) of merged partials, as `moments` has them."""
    count, means, m2 = partials
    n = count.sum(0)
    mean = (count * means).sum(0) / n
    return mean, (m2 + count * (means - mean).square()).sum(0) / n


def affine_relu(x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """relu(x * scale + shift) by the library's batch norm, which casts on the fly, unlike eager multiplication."""
    return F.relu(F.batch_norm(x, mean, var, scale, shift, False, 0.0, EPS), inplace=True)


def affine(d: OperandFactory, channels: int) -> tuple[Tensor, ...]:
    """(scale, shift, mean, var) of a batch norm that only scales and shifts."""
    mean = torch.zeros(channels, device=d.device)
    return d.positive(channels), d.normal(channels), mean, torch.full_like(mean, 1 - EPS)


def with_moments(result: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """(y, mean, var) of (y, partials); without partials, y alone."""
    y, partials = result
    return (y, *moments_of(partials)) if partials.shape[1] else (y,)


def masked(dy: Tensor, x: Tensor, norm: Tensor, pool: bool) -> Tensor:
    """dz, in x's map."""
    z = x * per_channel(norm[3]) + per_channel(norm[4])
    if not pool:
        return torch.where(z > 0, dy, 0.0)
    z, winner = F.max_pool2d(z, 2, return_indices=True)
    return F.max_unpool2d(torch.where(z > 0, dy, 0.0), winner, 2)


def sums(dz: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(dz.dtype, torch.float32)
    return dz.sum((0, 2, 3), dtype=wide), (dz * (x - per_channel(mean))).sum((0, 2, 3))
