"""Where a device's time went: every nanosecond in which anything ran, and every gap between.

Concurrent kernels are not counted twice: each nanosecond of the union over all streams goes to one category, by the
order of `CATEGORIES`, and within it to the kernel that has been running longest.
"""

import itertools
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from profiling.categories import CATEGORIES, categorise
from profiling.trace import Kernel, Trace


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
    """Time within the active steps in which nothing ran on the device.

    host_ns        the next kernel had not been launched when the gap began
    sync_ns        nor could it be: the host was waiting for the device then
    launch_gap_ns  it had been launched, and had yet to start
    """

    host_ns: int
    sync_ns: int
    launch_gap_ns: int


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
        ends = [round(ns / self.steps) for ns in itertools.accumulate(self.total.by_category.values())]
        starts = [0, *ends[:-1]]
        return {c: end - start for c, start, end in zip(self.total.by_category, starts, ends, strict=True)}

    @property
    def by_kernel(self) -> dict[KernelKey, KernelTime]:
        """Calls and nanoseconds of a step."""
        return {key: KernelTime(*(n / self.steps for n in time)) for key, time in self.total.by_kernel.items()}


def sweep(kernels: Iterable[Kernel], category_of: Callable[[Kernel], str] = categorise) -> Attribution:
    """Attribute the union of `kernels`, in n log n. Raises ValueError for a category that is not in CATEGORIES."""
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
    first and after the last, nor of steps that are missing in between. In a gap that begins while the host waits for
    the device, the host had nothing queued because it was waiting; a wait that begins later, on a device that is idle
    already, is not what kept it.
    """
    if trace.lacks or not trace.steps:
        return None
    waits = sorted((start, end) for start, end, _ in trace.syncs)
    wait_starts = [start for start, _ in waits]
    latest_ends = list(itertools.accumulate((end for _, end in waits), max))
    host = sync = launch_gap = 0
    busy_until, number = None, None
    for kernel in sorted(trace.kernels, key=lambda k: (k.start_ns, k.launch_ns is None, k.launch_ns)):
        index = trace.step_of(kernel)
        of = None if index is None else trace.steps[index].number
        adjacent = number is not None and of is not None and abs(of - number) <= 1
        if busy_until is not None and kernel.start_ns > busy_until and adjacent:
            gap = kernel.start_ns - busy_until
            # Of the waits that began before the gap, the one that lasted longest.
            before = bisect_left(wait_starts, busy_until)
            if kernel.launch_ns <= busy_until:
                launch_gap += gap
            elif before and latest_ends[before - 1] >= busy_until:
                sync += gap
            else:
                host += gap
        if busy_until is None or kernel.end_ns > busy_until:
            busy_until, number = kernel.end_ns, of
    return Idle(host, sync, launch_gap)
