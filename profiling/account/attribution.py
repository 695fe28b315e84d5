"""The attribution of a device's time: every nanosecond in which anything ran, and every gap between.

Each nanosecond of the union over all streams of a device goes to one category, by the order of `CATEGORIES`, and in it
to the kernel that has been running longest. A gap goes to what the host did until it launched the next kernel.

The replay of a CUDA graph is one launch: nothing in the trace says which operation put a kernel into the graph. But the
graph is the step, captured: its kernels are those of a step run eagerly, in that order. So the
kernels of each replay are given the operations of the eager step by name and order. That holds only while each replay
has all its kernels, which `profiling.account.cross_check` verifies.
"""

import itertools
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from profiling.account.categories import CATEGORIES, categorise, host_work
from profiling.account.host_calls import union
from profiling.account.trace import Kernel, Trace


class KernelKey(NamedTuple):
    """Kernels with equal keys are counted together; `op` is the operation around the launch, "" if none is known."""

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
    """busy_ns, the union over all streams, is the sum of by_category and of by_kernel's `ns`."""

    busy_ns: int
    by_category: dict[str, int]
    by_kernel: dict[KernelKey, KernelTime]


class Idle(NamedTuple):
    """Time within the active steps in which nothing ran on the device, by what kept it waiting.

    All but the last are of kernels not yet launched when the device ran dry, by what the host did until it launched.
    A host that was waiting just then counts as waiting all along, but for a batch that it made since.
    """

    data_ns: int = 0  # made a batch, or waited for one
    sync_ns: int = 0  # waited for the device: `.item()`, a synchronisation, a copy that blocks
    optimiser_ns: int = 0  # was in the optimiser's step
    launch_ns: int = 0  # was in another operation; or had launched the kernel, which had yet to start
    python_ns: int = 0  # was in no operation
    queued_ns: int = 0  # had launched the kernel before the device ran dry, and it had yet to start


CAUSES = (
    "waiting for data",
    "waiting in a synchronisation",
    "in the optimiser's step",
    "launching kernels",
    "in Python",
    "between queued kernels",
)
"""The fields of `Idle` in words, in their order."""
LONGEST_QUEUED_NS = 1_000_000
"""A launched kernel on an empty device starts within microseconds (41 in the median of a published V100 trace)."""


class PerStep(NamedTuple):
    """The number of active steps, and the attribution of all their kernels together."""

    steps: int
    total: Attribution


def apportioned(numbers: Iterable[float], times: int, over: float) -> list[int]:
    """Each of `numbers` times `times` over `over` as an integer; they sum to their rounded sum."""
    return _differences([round(total * times / over) for total in itertools.accumulate(numbers)])


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
    shares = apportioned([sum(one.by_category[c] for one in each) for c in CATEGORIES], 1, len(each))
    return Attribution(sum(shares), dict(zip(CATEGORIES, shares, strict=True)), dict(by_kernel))


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
    # Per category, the kernels that have started, the earliest first; an ended one is dropped when it comes first.
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
    by_kernel: dict[KernelKey, list[int]] = defaultdict(lambda: [0, 0, 0])
    counted: set[int] = set()
    for kernel, category, share in zip(order, categories, ns, strict=True):
        by_category[category] += share
        total = by_kernel[KernelKey(category, kernel.name, kernel.ops[-1] if kernel.ops else "", kernel.dims)]
        # On a CPU an operation comes in as many pieces as others are called inside of it.
        total[0] += kernel.kind != "cpu" or kernel.correlation not in counted
        total[1] += share
        total[2] += kernel.end_ns - kernel.start_ns
        if kernel.kind == "cpu":
            counted.add(kernel.correlation)
    return Attribution(sum(ns), by_category, {key: KernelTime(*total) for key, total in by_kernel.items()})


def per_step(trace: Trace) -> PerStep | None:
    """The attribution of the kernels that were launched in the active steps; None for a trace without steps."""
    if not trace.steps:
        return None
    return PerStep(len(trace.steps), sweep(k for k in trace.kernels if trace.step_of(k) is not None))


def idle(trace: Trace) -> Idle | None:
    """The gaps between the kernels of the active steps, by what they waited for; None for an incomplete trace.

    Only what lies between two kernels that were launched in steps is a gap: nothing is known of the time before the
    first and after the last, nor of steps that are missing in between. Of several devices, the mean of each.
    """
    if trace.lacks or not trace.steps:
        return None
    wait_starts = [start for start, _ in trace.syncs]
    latest_ends = list(itertools.accumulate((end for _, end in trace.syncs), max))
    data, sync, optimiser = (
        trace.calls.within(lambda op, _, work=work: host_work(op) == work) for work in ("data", "sync", "optimiser")
    )
    other = trace.calls.within(lambda op, annotation: not annotation)
    # Each includes all before it, so that a time in several goes to the first.
    doing = list(itertools.accumulate([data, sync + trace.syncs, optimiser, other], lambda a, b: union(a + b)))
    until = [_covered_until(intervals) for intervals in doing]
    found = dict.fromkeys(Idle._fields, 0)
    for start, kernel in _gaps(trace):
        if kernel.launch_ns <= start:
            found["queued_ns"] += kernel.start_ns - start
            continue
        launched = min(kernel.launch_ns, kernel.start_ns)
        shares = _differences([covered(launched) - covered(start) for covered in until] + [launched - start])
        before = bisect_left(wait_starts, start)
        if before and latest_ends[before - 1] >= start:  # one of the waits that began before lasted until then
            shares = [shares[0], kernel.start_ns - start - shares[0]]
        else:
            found["launch_ns"] += kernel.start_ns - launched
        for cause, ns in zip(Idle._fields, shares, strict=False):
            found[cause] += ns
    devices = {kernel.device for kernel in trace.kernels if trace.step_of(kernel) is not None}
    return Idle(*apportioned(found.values(), 1, max(len(devices), 1)))


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
    """Per device, (when nothing ran any more, the next kernel), where the kernels around it are of adjacent steps."""
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
    """A function of a time: how much of all time before it the `intervals`, disjoint and sorted, cover."""
    starts = [start for start, _ in intervals]
    before = list(itertools.accumulate((end - start for start, end in intervals), initial=0))

    def until(time: int) -> int:
        begun = bisect_right(starts, time)
        return before[begun] - max(0, intervals[begun - 1][1] - time) if begun else 0

    return until


_Operations = tuple[tuple[str, ...], str]  # ops and dims of a kernel


def attribute_replays(kernels: Sequence[Kernel], eager: Iterable[Kernel]) -> list[Kernel]:
    """`kernels`, by their start; those of replays with the operations of the same step run eagerly, of `eager`.

    By name, and among kernels of one name by order: branches of a graph may run in another order than they were
    captured in. A kernel of a name that the eager step did not have is left to its name. Where the trace has the nodes
    of a graph, each is given what most replays say of it, so that two branches that changed places once do no harm.
    """
    learned: dict[str, list[_Operations]] = defaultdict(list)
    for kernel in sorted(eager, key=lambda kernel: kernel.start_ns):
        if kernel.graph is None:
            learned[kernel.name].append((kernel.ops, kernel.dims))
    met: Counter[tuple[int, str]] = Counter()
    votes: dict[int, Counter[_Operations]] = defaultdict(Counter)
    found: list[_Operations | None] = []
    for kernel in kernels:
        entry, alike, at = None, learned.get(kernel.name, ()), (kernel.graph, kernel.name)
        if kernel.graph is not None and met[at] < len(alike):
            entry = alike[met[at]]
            met[at] += 1
            if kernel.node is not None:
                votes[kernel.node][entry] += 1
        found.append(entry)
    said = {node: entries.most_common(1)[0][0] for node, entries in votes.items()}
    entries = [entry and said.get(kernel.node, entry) for kernel, entry in zip(kernels, found, strict=True)]
    return [k._replace(ops=e[0], dims=e[1]) if e else k for k, e in zip(kernels, entries, strict=True)]
