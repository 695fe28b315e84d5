"""The FLOPs and compulsory bytes of a training step, op by op.

Nothing depends on the machine. A multiply-add is two FLOPs; convolutions and matrix products
count as `FlopCounterMode` counts them, this package's kernels by their own `*_cost`. Bytes are of operands and results,
each once: an op that reads a tensor twice costs more than that, and `profiling.account.floors` knows how much.
PyTorch's fused optimiser is one pass: weights, gradients and momentum read, weights and momentum written.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from kernels import bn_relu, fused, tiles  # noqa: F401  (so that BODIES is complete)
from kernels.cost import nbytes
from kernels.metered_cost import BODIES, COSTS
from profiling.account.categories import AUGMENTATION

VERSION = 1

FAMILIES = {
    op: family
    for family, ops in {
        "fprop": "convolution _convolution conv2d cudnn_convolution mkldnn_convolution conv_fprop",
        "conv backward": "convolution_backward mkldnn_convolution_backward",
        "dgrad": "conv_dgrad",
        "wgrad": "conv_wgrad",
        "matrix product": "mm addmm",
        "batch norm": "native_batch_norm cudnn_batch_norm miopen_batch_norm",
        "batch norm backward": "native_batch_norm_backward cudnn_batch_norm_backward miopen_batch_norm_backward",
        "relu": "relu relu_ clamp_min clamp_min_",
        "relu backward": "threshold_backward",
        "add": "add add_",
        "cast": "_to_copy copy_",
        "optimiser": "_fused_sgd_ sgd",
    }.items()
    for op in ops.split()
}
"""Ops of PyTorch that do the same work under different names: as counted here, and as a trace shows them."""

_FREE = {"detach", "empty", "empty_like", "new_empty", "_unsafe_view"}  # they move nothing, nor do views


def as_on(device: torch.device) -> AbstractContextManager[None]:
    """Model ops as this device runs them: some of its tiles have an activation stored by one more kernel."""
    return tiles.as_on(tiles.gpu_of(device))


class Dims(NamedTuple):
    """Extents of an op's tensors without regard to order, by which a kernel in a trace is recognised as this op's."""

    family: str
    extents: frozenset[tuple[int, ...]]


@dataclass(frozen=True)
class Work:
    """One op of a step.

    op         as a trace names it, "aten::convolution"
    family     ops that do the same work share it; all ops that make a batch are "augment"
    layer      the convolution as `ConvShape` prints it, else the extents of the op's largest operand, "512x64x32x32"
    dims       extents of its tensor operands
    backward   whether it runs after the loss
    flops      0 where they are not worth counting
    """

    op: str
    family: str
    layer: str
    dims: tuple[tuple[int, ...], ...]
    backward: bool
    flops: int
    bytes: int

    @property
    def key(self) -> Dims:
        """The key that its kernels in a trace share."""
        return Dims(family(self.op), frozenset(self.dims[:3]))


def family(op: str) -> str:
    """The family of an op by its name in a trace; its own name where nothing else does the same."""
    name = op.rpartition("::")[2].partition(".")[0]
    return FAMILIES.get(name, name)


def work_of(
    forward: Callable[[], Tensor],
    update: Callable[[], None] = lambda: None,
    on_op: Callable[[list[Work]], None] = lambda rows: None,
) -> list[Work]:
    """The ops of a step in the order in which they run: `forward()` to the loss, its backward, `update()`.

    Both work on tensors of the meta device. What `forward` does under `record_function(AUGMENTATION)` makes the batch.
    `on_op` gets the rows of each op, but for the update's, just after it has run.
    """
    meter = _Meter(on_op)
    with meter:
        loss = forward()
        meter.backward = True
        loss.backward()
        meter.on_op = lambda rows: None
        update()
    return meter.rows


class _Meter(TorchDispatchMode):
    def __init__(self, on_op: Callable[[list[Work]], None]) -> None:
        super().__init__()
        self.on_op, self.backward = on_op, False
        self.rows: list[Work] = []
        self.annotations: list[str] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing compiles a metered step, and skipping would import torch._dynamo."""
        return False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op in BODIES:  # an op that calls ops: those are the kernels
            with self:
                return BODIES[op](*args, **kwargs)
        name = op._schema.name
        if name == "profiler::_record_function_enter_new":
            self.annotations.append(args[0])
        elif name == "profiler::_record_function_exit":
            self.annotations.pop()
        elif name == "aten::_fused_sgd_":  # it has no kernel for the meta device
            weights, gradients, momenta = args[:3]
            moved = nbytes(*weights, *gradients, *momenta, *weights, *momenta)
            self.rows.append(Work(name, "optimiser", "parameters", (), True, 0, moved))
            return None
        out = op(*args, **kwargs)
        rows = self._rows(op, args, kwargs, out)
        if AUGMENTATION in self.annotations:
            rows = [replace(row, family="augment") for row in rows]
        self.rows.extend(rows)
        self.on_op(rows)
        return out

    def _rows(self, op, args, kwargs, out) -> list[Work]:
        namespace, _, name = op._schema.name.partition("::")
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if not operands or name in _FREE or (namespace == "aten" and op.is_view):
            return []
        dims = tuple(tuple(map(int, t.shape)) for t in operands)
        if op is torch.ops.aten.convolution_backward.default:  # two kernels, if both gradients are asked for
            dy, x, w, wanted = *args[:3], args[-1]
            flops = 2 * dy.numel() * math.prod(w.shape[1:])
            gradients = [gradient for gradient, is_wanted in zip(("dgrad", "wgrad"), wanted, strict=False) if is_wanted]
            what = _layer(x.shape, w.shape, dy.shape), dims, True, flops, nbytes(dy, x, w)
            return [Work("aten::convolution_backward", gradient, *what) for gradient in gradients]
        largest = max(operands, key=torch.numel)
        layer = "x".join(map(str, largest.shape)) or "scalar"
        if name in ("convolution", "conv_fprop"):
            layer = _layer(operands[0].shape, operands[1].shape, results[0].shape)
        elif name == "conv_dgrad":
            layer = _layer(results[0].shape, operands[1].shape, operands[0].shape)
        elif name == "conv_wgrad":
            layer = _layer(operands[0].shape, results[0].shape, operands[1].shape)
        if op in COSTS:
            cost = COSTS[op](*args, **kwargs)
            flops, moved = cost.flops, cost.bytes
        else:
            count = flop_registry.get(op._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            moved = nbytes(*operands, *results)
        return [Work(f"{namespace}::{name}", family(name), layer, dims, self.backward, flops, moved)]


def _layer(x, w, y) -> str:
    stride = -(-x[2] // y[2])
    return f"{x[1]}x{x[2]}x{x[3]}-{w[0]}x{w[2]}x{w[3]}-s{stride}"


def from_json(record: dict[str, Any]) -> list[Work]:
    """The ops of records/work.json. Raises ValueError for another version or a damaged record."""
    if record.get("version") != VERSION:
        raise ValueError(f"work is of version {record.get('version')!r}, expected {VERSION}")
    try:
        return [Work(**row | {"dims": tuple(map(tuple, row["dims"]))}) for row in record["ops"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"work has an op of another form: {error}") from None


class FlopsPerImage(NamedTuple):
    """One image [3, 32, 32], forward alone and forward with backward (no gradient with respect to the image)."""

    forward: int
    training: int


def flops_per_image(build: Callable[[], nn.Module]) -> FlopsPerImage:
    """Count the network that `build()` makes, on two images on the CPU.

    The meta device would be cheaper, but its batch norm imports torch._dynamo: 1.4 s at the start of every run.
    """
    batch = 2
    with torch.random.fork_rng(devices=()):
        network = build()
        rows = work_of(lambda: network(torch.zeros(batch, 3, 32, 32)).sum())
    forward = sum(row.flops for row in rows if not row.backward)
    return FlopsPerImage(forward // batch, sum(row.flops for row in rows) // batch)
