"""Kernels and layers on the roofline: how fast each was, and how fast its FLOPs and bytes would have let it be."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from profiling.account.work import Dims, Work, family

NEARLY_ALL = 0.9
"""Share of an op's time in one kernel above which that kernel did the op's work."""
MOST = 0.5
"""The same on a CPU, where the rest is of the op's wrappers."""

PER_ELEMENT = {
    "batch norm": 6,
    "batch norm backward": 9,
    "relu": 1,
    "relu backward": 1,
    "add": 1,
    "max_pool2d_with_indices": 1,
    "max_pool2d_with_indices_backward": 1,
}
"""FLOPs for each element of the largest operand of an op whose FLOPs nothing counts; a comparison is one.

Batch norm's are those of `kernels.bn_stats`, `bn_apply` and `bn_backward` without ReLU: Welford's update 4, the affine
map 2; the two sums 4, the gradient's map 5. A copy or a cast does none and has no place on a roofline, nor has the
arithmetic of PyTorch's augmentation, much of which is on indices.
"""


class Timed(NamedTuple):
    """A kernel of the profiled pass: `calls` and `ns` in all of its steps together.

    op and dims are of the operation that launched it, dims as a trace writes them: the JSON text of a list of extents.
    """

    name: str
    op: str
    category: str
    dims: str
    calls: int
    ns: float


class Roofs(NamedTuple):
    """FLOP/s and bytes/s that bound every kernel of a device; None is not known."""

    flops_per_s: float | None
    bytes_per_s: float | None


@dataclass(frozen=True)
class Row:
    """A kernel or a layer. Times are per step, FLOPs and bytes per call; None is not known.

    roof_fraction is the time that the roofs allow over the time taken; `bound` names the roof that is the lower one.
    `per_element` is the entry of PER_ELEMENT that the FLOPs are modelled by, None where they are counted.
    """

    name: str
    op: str
    category: str
    shape: str
    calls_per_step: float
    ns_per_step: float
    share: float
    flops: int | None
    bytes: int | None
    flops_per_s: float | None
    bytes_per_s: float | None
    intensity: float | None
    bound: str | None
    roof_fraction: float | None
    per_element: int | None
    status: str
    source: str

    def to_json(self) -> dict[str, Any]:
        """The record of report.json."""
        return asdict(self)


def kernel_rows(timed: Sequence[Timed], work: Sequence[Work], steps: float, roofs: Roofs) -> list[Row]:
    """A row for each kernel of `steps` profiled steps, by falling time; FLOPs and bytes where its op's are known."""
    ops, rows = _Ops(timed, work, steps, roofs), []
    for t in timed:
        of_op = ops.of(t)
        shape = of_op[0].layer if of_op else "x".join(map(str, max(_extents(t.dims), key=math.prod, default=())))
        rows.append(ops.row(t.name, shape, t, t.calls / steps, t.ns, ops.done_by(t)))
    return sorted(rows, key=lambda row: -row.ns_per_step)


def layer_rows(timed: Sequence[Timed], work: Sequence[Work], steps: float, roofs: Roofs) -> list[Row]:
    """A row for each convolution layer and pass: all kernels of category "convolution" that its op launched.

    Where dgrad and wgrad cannot be told apart they are one row, "backward".
    """
    ops, rows = _Ops(timed, work, steps, roofs), []
    groups: dict[tuple[str, str], list[Timed]] = defaultdict(list)
    for t in timed:
        of_op = ops.of(t)
        if t.category == "convolution" and of_op and of_op[0].family in ("fprop", "dgrad", "wgrad"):
            families = {w.family for w in ops.named(t) or ops.done_by(t) or of_op}
            groups[of_op[0].layer, families.pop() if len(families) == 1 else "backward"].append(t)
    for (layer, gradient), members in groups.items():
        first, ns = members[0], sum(t.ns for t in members)
        done = [w for w in ops.of(first) if gradient in ("backward", w.family)]
        rows.append(ops.row(f"{layer} {gradient}", layer, first, float(ops.calls(first)), ns, done))
    return sorted(rows, key=lambda row: -row.ns_per_step)


class _Ops:
    """The ops of a step by what a trace of `steps` shows of them."""

    def __init__(self, timed: Sequence[Timed], work: Sequence[Work], steps: float, roofs: Roofs):
        self.steps, self.roofs, self.total_ns = steps, roofs, sum(t.ns for t in timed)
        self.rows: dict[Dims, list[Work]] = defaultdict(list)
        for w in work:
            self.rows[w.key].append(w)
        self.ns: dict[tuple[Dims, str], float] = defaultdict(float)
        self.longest: dict[tuple[Dims, str], float] = defaultdict(float)
        for t in timed:
            self.ns[_key(t), t.category] += t.ns
            for w in self.named(t):
                self.longest[w.key, w.family] = max(self.longest[w.key, w.family], t.ns)

    def of(self, t: Timed) -> list[Work]:
        """The work in a step of the op that launched the kernel, over all its calls."""
        return self.rows.get(_key(t), [])

    def calls(self, t: Timed) -> int:
        """The calls of that op in a step. A convolution's backward is two rows and one call."""
        return max(Counter(w.family for w in self.of(t)).values(), default=0)

    def named(self, t: Timed) -> list[Work]:
        """The part of it that the kernel's name names; on a CPU, where an op is its own kernel, no name does."""
        return [w for w in self.of(t) if w.family in t.name.lower() and t.name != t.op]

    def done_by(self, t: Timed) -> list[Work]:
        """The part of it that is this kernel's; nothing where the op's kernels cannot be told apart.

        They can by their names, of which the longest kernel did the work and not, say, a reduction after it; or where
        one takes nearly all of the time. On a CPU the one of an op and its wrappers that takes most did the work.
        """
        key, on_cpu = _key(t), t.name == t.op
        if named := self.named(t):
            return [w for w in named if t.ns >= self.longest[key, w.family]]
        if not on_cpu and t.category != max((c for k, c in self.ns if k == key), key=lambda c: self.ns[key, c]):
            return []  # a cast or a copy to another layout before it
        enough = (MOST if on_cpu else NEARLY_ALL) * self.ns[key, t.category]
        return self.of(t) if t.ns > enough else []

    def row(self, name: str, shape: str, of: Timed, calls: float, ns: float, work: Sequence[Work]) -> Row:
        """A row of `calls` a step and `ns` in all steps; `work` is done in a step, in all calls of the op of `of`."""
        flops = sum(w.flops for w in work) // self.calls(of) if work else 0
        moved = sum(w.bytes for w in work) // self.calls(of) if work else 0
        per_element = PER_ELEMENT.get(work[0].family) if work and work[0].dims and not flops else None
        counted = "FLOPs and bytes: modelled"
        if per_element:
            flops = per_element * max(map(math.prod, work[0].dims))
            counted = f"FLOPs: modelled, {per_element} for each element; bytes: modelled"
        seconds, needs = ns / self.steps / calls / 1e9, {}
        if flops and self.roofs.flops_per_s:
            needs["compute"] = flops / self.roofs.flops_per_s
        if moved and self.roofs.bytes_per_s:
            needs["memory"] = moved / self.roofs.bytes_per_s
        bound = max(needs, key=needs.__getitem__) if needs else None
        return Row(
            name=name,
            op=of.op,
            category=of.category,
            shape=shape,
            calls_per_step=calls,
            ns_per_step=ns / self.steps,
            share=ns / self.total_ns if self.total_ns else 0.0,
            flops=flops or None,
            bytes=moved or None,
            flops_per_s=flops / seconds if flops and seconds else None,
            bytes_per_s=moved / seconds if moved and seconds else None,
            intensity=flops / moved if flops and moved else None,
            bound=bound,
            roof_fraction=needs[bound] / seconds if bound and seconds else None,
            per_element=per_element,
            status="measured",
            source=f"time: torch.profiler; {counted}, each operand and result once",
        )


def _extents(dims: str) -> list[tuple[int, ...]]:
    try:
        return [tuple(d) for d in json.loads(dims) if d and all(isinstance(n, int) for n in d)]
    except (ValueError, TypeError, RecursionError):
        return []


def _key(t: Timed) -> Dims:
    return Dims(family(t.op), frozenset(_extents(t.dims)[:3]))
