"""Where a device's time went: every nanosecond in which anything ran, and every gap between.

Concurrent kernels are not counted twice: each nanosecond of the union over all streams of a device goes to one
category, by the order of `CATEGORIES`, and within it to the kernel that has been running longest. A gap goes to what
the host did in it, until it launched the next kernel.
"""

import itertools
from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from profiling.account.categories import CATEGORIES, categorise, host_work
from profiling.account.host_calls import union
from profiling.account.trace import Kernel, Trace


class KernelKey(NamedTuple):
    """What is counted together; `op` is the operation around the launch, "" if none is known."""

    category: str
    name: str
    op: str
    dims: str


class KernelTime(NamedTuple):
    """`ns` is the kernel's share of the union, `own_ns` the sum of its durations; `calls` may be a mean."""

    calls: float
    ns: float
    own_ns: float


@dataclass(frozen=True)
class Attribution:
    """busy_ns, the union over all streams, is the sum of by_category and of by_kernel's `ns`; span_ns has the gaps."""

    busy_ns: int
    span_ns: int
    by_category: dict[str, int]
    by_kernel: dict[KernelKey, KernelTime]


class Idle(NamedTuple):
    """Time within the active steps in which nothing ran on the device, by what kept it waiting; CAUSES in words.

    Where the next kernel had not been launched when the device ran dry, by what the host did until it was:

    data_ns       made a batch, or waited for one
    sync_ns       waited for the device: `.item()`, a synchronisation, a copy that blocks; or it was waiting when the
                  device ran dry, so that it could not have launched anything, and made no batch since
    optimiser_ns  was in the optimiser's step
    launch_ns     was in another operation, or had launched the kernel, which had yet to start
    python_ns     was in no operation

    queued_ns     the next kernel had been launched before the device ran dry, and had yet to start
    """

    data_ns: int = 0
    sync_ns: int = 0
    optimiser_ns: int = 0
    launch_ns: int = 0
    python_ns: int = 0
    queued_ns: int = 0


CAUSES = (
    "waiting for data",
    "waiting in a synchronisation",
    "in the optimiser's step",
    "launching kernels",
    "in Python",
    "between queued kernels",
)
"""Of `Idle`, in the order of its fields."""
LONGEST_QUEUED_NS = 1_000_000
"""A launched kernel on an empty device starts within microseconds (41 in the median of a published V100 trace)."""


@dataclass(frozen=True)
class PerStep:
    """Means over `steps` active steps; of `total`, the attribution of all their kernels."""

    steps: int
    total: Attribution

    @property
    def busy_ns(self) -> int:
        """Of a step, rounded."""
        return round(self.total.busy_ns / self.steps)

    @property
    def by_category(self) -> dict[str, int]:
        """Whole nanoseconds of a step that sum to `busy_ns`."""
        shares = _divided(self.total.by_category.values(), self.steps)
        return dict(zip(self.total.by_category, shares, strict=True))

    @property
    def by_kernel(self) -> dict[KernelKey, KernelTime]:
        """Calls and nanoseconds of a step."""
        return {key: KernelTime(*(n / self.steps for n in time)) for key, time in self.total.by_kernel.items()}


def _divided(numbers: Iterable[int], by: int) -> list[int]:
    """Integers that sum to the rounded sum of `numbers` / `by`."""
    return _differences([round(total / by) for total in itertools.accumulate(numbers)])


def _differences(sums: list[int]) -> list[int]:
    return [end - start for start, end in zip([0, *sums], sums, strict=False)]


def sweep(kernels: Iterable[Kernel], category_of: Callable[[Kernel], str] = categorise) -> Attribution:
    """Attribute the union of `kernels`, in n log n; of several devices, which run side by side, the mean of each.

    Raises ValueError for a category that is not in CATEGORIES.
    """
    each = [_sweep(of, category_of) for of in _by_device(kernels)]
    if len(each) < 2:
        return each[0] if each else _sweep([], category_of)
    by_kernel: dict[KernelKey, KernelTime] = defaultdict(lambda: KernelTime(0, 0, 0))
    for key, time in itertools.chain.from_iterable(one.by_kernel.items() for one in each):
        by_kernel[key] = KernelTime(*(a + b / len(each) for a, b in zip(by_kernel[key], time, strict=True)))
    shares = _divided([sum(one.by_category[c] for one in each) for c in CATEGORIES], len(each))
    span_ns = round(sum(one.span_ns for one in each) / len(each))
    return Attribution(sum(shares), span_ns, dict(zip(CATEGORIES, shares, strict=True)), dict(by_kernel))


def _by_device(kernels: Iterable[Kernel]) -> Iterable[list[Kernel]]:
    devices: dict[int, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        devices[kernel.device].append(kernel)
    return devices.values()


def _sweep(kernels: list[Kernel], category_of: Callable[[Kernel], str]) -> Attribution:
    order = sorted(kernels, key=lambda kernel: kernel.start_ns)
    categories = [category_of(kernel) for kernel in order]
    ranks = [CATEGORIES.index(category) for category in categories]
    ns = [0] * len(order)
    # Of each category the kernels that have started, the earliest first; one that has ended goes when it comes first.
    running: list[deque[int]] = [deque() for _ in CATEGORIES]
    following = 0
    times = sorted({time for kernel in order for time in (kernel.start_ns, kernel.end_ns)})
    for start, end in itertools.pairwise(times):
        while following < len(order) and order[following].start_ns == start:
            running[ranks[following]].append(following)
            following += 1
        for queue in running:
            while queue and order[queue[0]].end_ns <= start:
                queue.popleft()
            if queue:
                ns[queue[0]] += end - start
                break
    by_category = dict.fromkeys(CATEGORIES, 0)
    for category, share in zip(categories, ns, strict=True):
        by_category[category] += share
    span_ns = times[-1] - times[0] if times else 0
    return Attribution(sum(ns), span_ns, by_category, _by_kernel(order, categories, ns))


def _by_kernel(order: list[Kernel], categories: list[str], ns: list[int]) -> dict[KernelKey, KernelTime]:
    sums: dict[KernelKey, list[int]] = defaultdict(lambda: [0, 0, 0])
    counted: set[int] = set()
    for kernel, category, share in zip(order, categories, ns, strict=True):
        op = kernel.ops[-1] if kernel.ops else ""
        total = sums[KernelKey(category, kernel.name, op, kernel.dims)]
        # On a CPU an operation comes in as many pieces as others are called inside of it.
        total[0] += kernel.kind != "cpu" or kernel.correlation not in counted
        total[1] += share
        total[2] += kernel.end_ns - kernel.start_ns
        if kernel.kind == "cpu":
            counted.add(kernel.correlation)
    return {key: KernelTime(*total) for key, total in sums.items()}


def per_step(trace: Trace, category_of: Callable[[Kernel], str] = categorise) -> PerStep | None:
    """The attribution of the kernels that were launched in the active steps; None for a trace without steps."""
    if not trace.steps:
        return None
    return PerStep(len(trace.steps), sweep((k for k in trace.kernels if trace.step_of(k) is not None), category_of))


def idle(trace: Trace) -> Idle | None:
    """The gaps between the kernels of the active steps, by what they waited for; None for an incomplete trace.

    Only what lies between two kernels that were launched in steps is a gap: nothing is known of the time before the
    first and after the last, nor of steps that are missing in between. Of several devices, the mean of each.
    """
    if trace.lacks or not trace.steps:
        return None
    waits = sorted((start, end) for start, end, _ in trace.syncs)
    wait_starts = [start for start, _ in waits]
    latest_ends = list(itertools.accumulate((end for _, end in waits), max))
    data, sync, optimiser = (
        trace.calls.within(lambda op, _, work=work: host_work(op) == work) for work in ("data", "sync", "optimiser")
    )
    other = trace.calls.within(lambda op, annotation: not annotation)
    # Each with all before it, so that a time in several is the first one's.
    doing = list(itertools.accumulate([data, sync + waits, optimiser, other], lambda a, b: union(a + b)))
    until = [_covered_until(intervals) for intervals in doing]
    found = dict.fromkeys(Idle._fields, 0)
    for start, kernel in _gaps(trace):
        if kernel.launch_ns <= start:
            found["queued_ns"] += kernel.start_ns - start
            continue
        launched = min(kernel.launch_ns, kernel.start_ns)
        shares = _differences([covered(launched) - covered(start) for covered in until] + [launched - start])
        before = bisect_left(wait_starts, start)
        if before and latest_ends[before - 1] >= start:  # of the waits that began before, the one that lasted longest
            shares = [shares[0], kernel.start_ns - start - shares[0]]
        else:
            found["launch_ns"] += kernel.start_ns - launched
        for cause, ns in zip(Idle._fields, shares, strict=False):
            found[cause] += ns
    devices = {kernel.device for kernel in trace.kernels if trace.step_of(kernel) is not None}
    return Idle(*_divided(found.values(), max(len(devices), 1)))


def doubt(trace: Trace) -> str | None:
    """A sentence if kernels that had been launched left their device empty for longer than a launch explains."""
    waited = [kernel.start_ns - start for start, kernel in _gaps(trace) if kernel.launch_ns <= start]
    long = [ns for ns in waited if ns > LONGEST_QUEUED_NS]
    if not long:
        return None
    return (
        f"{len(long)} kernels that had been launched took more than {LONGEST_QUEUED_NS / 1e6:g} ms to begin on an "
        f"empty device, up to {max(long) / 1e6:.3g} ms: kernels may be missing from the trace, or an event held these "
        "back."
    )


def _gaps(trace: Trace) -> Iterator[tuple[int, Kernel]]:
    """Of each device, (when nothing ran any more, the kernel that was next) where both are of steps side by side."""
    for kernels in _by_device(trace.kernels):
        busy_until, number = None, None
        for kernel in sorted(kernels, key=lambda k: (k.start_ns, k.launch_ns is None, k.launch_ns)):
            index = trace.step_of(kernel)
            of = None if index is None else trace.steps[index].number
            adjacent = number is not None and of is not None and abs(of - number) <= 1
            if busy_until is not None and kernel.start_ns > busy_until and adjacent:
                yield busy_until, kernel
            if busy_until is None or kernel.end_ns > busy_until:
                busy_until, number = kernel.end_ns, of


def _covered_until(intervals: list[tuple[int, int]]) -> Callable[[int], int]:
    """How much of the time until then they cover; they are disjoint, by their start."""
    starts = [start for start, _ in intervals]
    before = list(itertools.accumulate((end - start for start, end in intervals), initial=0))

    def until(time: int) -> int:
        begun = bisect_right(starts, time)
        return before[begun] - max(0, intervals[begun - 1][1] - time) if begun else 0

    return until
