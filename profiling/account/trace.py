"""The kernels, steps and host calls of a profiled pass, from the Chrome trace that torch.profiler wrote.

A kernel finds the operation that it belongs to through its launch: the kernel's correlation id names a call of the
CUDA or HIP runtime, and that call lies, on its thread, inside of the operations and annotations that led to it. A
kernel belongs to the step in which it was launched, however much later it ran. Kernels of one graph launch share its
correlation id. Without a GPU the operations themselves are what ran: each one's own time, less that of the ones inside.

Times are integer nanoseconds on the trace's clock. What is not needed (Python frames, memory events, flow arrows) is
dropped as it is read, so that memory goes with what is kept and not with the file.
"""

import functools
import json
import re
import sys
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from profiling.account.host_calls import HostCalls, Scope
from profiling.account.launches import DeviceWork, Launch, Launches
from profiling.account.trace_events import TraceEvents

LONGEST_NAME = 4096
"""Characters of a name that are kept."""
LONGEST_DIMS = 1 << 16
"""Characters of dims; longer ones are left out."""
LONGEST_KERNEL_NS = 60 * 10**9
"""A kernel that lasts longer than this and than all the rest of its trace was not timed: profilers are known to write
durations that overflow (AMD-AGI/TraceLens#669)."""

_LATEST_NS = 1 << 61
_DEVICE_WORK = {"kernel": "kernel", "gpu_memcpy": "memcpy", "gpu_memset": "memset"}
_STEP = re.compile(r"ProfilerStep#(\d{1,9})")
_WRAPPER = re.compile(r"profiler::|\[pytorch\|profiler")  # the profiler's own operations
_BLOCKING_COPY = re.compile(r"(cuda|hip)memcpy(2d|3d)?|hipmemcpywithstream")


class Kernel(NamedTuple):
    """Something that ran: a kernel or a copy on a device, or without a device a piece of an operation's own time.

    kind         "kernel", "memcpy", "memset", or "cpu"; then the stream is the thread's number and the device is -1
    correlation  of the launch; for kind "cpu" a number that the pieces of one operation share
    ops          operations and annotations around the launch, the outermost first
    dims         extents of the inputs of the innermost op that has any, as JSON text; "" if none has
    launch_ns    when the launch began, None if the trace does not have it
    graph        the graph launch it came from, None if it was launched alone
    node         of that graph, by the number that CUPTI gives it ("graph node id"); None where the trace has none
    """

    name: str
    start_ns: int
    end_ns: int
    stream: int
    device: int
    kind: str
    correlation: int
    ops: tuple[str, ...] = ()
    dims: str = ""
    launch_ns: int | None = None
    graph: int | None = None
    node: int | None = None


class Step(NamedTuple):
    """A training step on the host's clock."""

    number: int
    start_ns: int
    end_ns: int


@dataclass
class Trace:
    """A profiled pass.

    kernels  by their start
    steps    as the profiler marked them; where it marked none, all that was launched is one
    syncs    (start_ns, end_ns) of the host's calls that wait for the device, by their start
    on_gpu   whether a device beside the host was at work, even if none of its kernels were recorded
    lacks    a sentence for everything that is missing: busy times may be too small then, and gaps too large
    lost     starts of the launches within the steps whose kernels are missing; `missing` is their sentence
    calls    what the host did
    """

    kernels: list[Kernel]
    steps: list[Step]
    syncs: list[tuple[int, int]]
    on_gpu: bool
    lacks: list[str]
    lost: list[int] = field(default_factory=list)
    calls: HostCalls = field(default_factory=HostCalls)

    def step_of(self, kernel: Kernel) -> int | None:
        """Index of the step in which `kernel` was launched, None if in none."""
        return None if kernel.launch_ns is None else self.step_at(kernel.launch_ns)

    def step_at(self, time_ns: int) -> int | None:
        """Index of the step that the host was in, None if in none."""
        index = bisect_right(self.steps, time_ns, key=lambda step: step.start_ns) - 1
        return index if index >= 0 and time_ns < self.steps[index].end_ns else None


def missing(launches: int) -> str:
    """The lack of a trace without the kernels of so many launches."""
    return f"trace incomplete: the kernels of {launches} launches are missing"


def read(path: Path) -> Trace:
    """The trace at `path`, .json or .json.gz. Of a damaged one what could be read; `lacks` says that it is.

    Raises OSError where the file cannot be opened or read.
    """
    events, kept = TraceEvents(path), _Kept()
    for event in events:
        kept.add(event)
    kept.link()
    on_gpu = bool(kept.device_work or any(kept.launches))
    kernels = list(kept.linked_kernels() if on_gpu else kept.cpu_pieces())
    kernels.sort(key=lambda kernel: (kernel.start_ns, kernel.end_ns))
    times = [launch.start_ns for _, launch in kept.launches] if on_gpu else [k.start_ns for k in kernels]
    steps = sorted(kept.steps, key=lambda step: step.start_ns)
    if steps and times and not any(steps[-1].start_ns <= time < steps[-1].end_ns for time in times):
        steps.pop()  # a stub: the profiler ended there
    if not steps and times:  # of a program that has none: one step is all that it launched
        steps = [Step(0, min(times), max(times) + 1)]
    lost = kept.launches_without_kernels(steps) if kernels else []
    lacks = events.lacks + kept.lacks(kernels) + ([missing(len(lost))] if lost else [])
    return Trace(kernels, steps, sorted(kept.syncs), on_gpu, lacks, lost, kept.calls)


class _Kept:
    """The events that are kept, and the links between them."""

    def __init__(self) -> None:
        self.device_work: list[DeviceWork] = []
        self.launches = Launches()
        self.captures: list[tuple[int, bool]] = []
        self.syncs: list[tuple[int, int]] = []
        self.steps: list[Step] = []
        self.calls = HostCalls()
        self.threads: dict[tuple[Any, Any], int] = {}
        self.malformed = self.endless = 0
        self.launch_of: list[Launch | None] = []

    def add(self, event: dict[str, Any]) -> None:
        """Keep what is needed of `event`, or count it as malformed."""
        try:
            if event.get("ph") == "X":
                self._add(event, event.get("cat"))
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError):
            self.malformed += 1

    def _add(self, event: dict[str, Any], category: Any) -> None:
        if category in _DEVICE_WORK:
            args = event["args"]
            where = _integer(args.get("stream", event.get("tid"))), _integer(args.get("device", event.get("pid")))
            ids = _integer(args.get("correlation", -1)), _integer(args.get("External id", -1))
            node = args.get("graph node id")  # as libkineto names it; 0 for what was launched alone
            node = node if type(node) is int and node > 0 else None
            kind = _DEVICE_WORK[category]
            self.device_work.append(DeviceWork(_name(event), *_interval(event), *where, kind, *ids, node))
        elif category in ("cpu_op", "user_annotation"):
            name = _name(event)
            if step := _STEP.fullmatch(name):
                self.steps.append(Step(int(step[1]), *_interval(event)))
            elif not _WRAPPER.match(name):
                args = event.get("args", {})
                extents, external = args.get("Input Dims"), _integer(args.get("External id", -1))
                dims = json.dumps(extents, separators=(",", ":")) if isinstance(extents, list) and any(extents) else ""
                dims = dims if len(dims) <= LONGEST_DIMS else ""
                annotation = category == "user_annotation"
                self.calls.add(self._thread(event), *_interval(event), name, dims, external, annotation)
        elif category is not None and category.endswith(("_runtime", "_driver")):
            name, (start, end) = _name(event), _interval(event)
            kind, waits = _runtime_call(name)
            if waits:
                self.syncs.append((start, end))
            if kind in ("begin capture", "end capture"):
                self.captures.append((start, kind == "begin capture"))
            elif kind:
                launch = Launch(start, end, self._thread(event), event.get("pid"), kind)
                self.launches.add(_integer(event["args"]["correlation"]), launch)

    def _thread(self, event: dict[str, Any]) -> int:
        return self.threads.setdefault((event.get("pid"), event.get("tid")), len(self.threads))

    def link(self) -> None:
        """Find the launch of each work of the device; leave out doubles and what lasted longer than it can."""
        times = [work.start_ns for work in self.device_work]
        times += [time for _, launch in self.launches for time in (launch.start_ns, launch.end_ns)]
        longest = max(LONGEST_KERNEL_NS, max(times, default=0) - min(times, default=0))
        work = list(dict.fromkeys(self.device_work))
        self.device_work = [one for one in work if one.end_ns - one.start_ns <= longest]
        self.endless = len(work) - len(self.device_work)
        self.launch_of = self.launches.pair(self.device_work)

    def linked_kernels(self) -> Iterator[Kernel]:
        """The device's work, each with what led to its launch."""
        sharing = Counter(work.correlation for work in self.device_work)
        by_thread = defaultdict(list)
        for launch in {launch for launch in self.launch_of if launch}:
            by_thread[launch.thread].append(launch)
        scopes: dict[Launch, Scope] = {}
        for thread, launches in by_thread.items():
            launches.sort()
            scopes.update(zip(launches, self.calls.scopes(thread, [at.start_ns for at in launches]), strict=True))
        graphs: dict[int, Launch] = {}
        others: dict[Launch, int] = {}  # graph launches of an id that another has: no id is negative
        for (*work, correlation, _, node), launch in zip(self.device_work, self.launch_of, strict=True):
            if launch is None:
                # Only a graph has several kernels to one launch, so it is known as one even if its launch is lost.
                graph = correlation if correlation > 0 and sharing[correlation] > 1 else None
                yield Kernel(*work, correlation, graph=graph, node=node)
                continue
            if "DtoH" in work[0] and "Pageable" in work[0]:  # the call returns when the copy is done
                self.syncs.append((launch.start_ns, launch.end_ns))
            graph = None
            if launch.kind == "graph":
                first = graphs.setdefault(correlation, launch)
                graph = correlation if first == launch else others.setdefault(launch, -2 - len(others))
            yield Kernel(*work, correlation, *scopes[launch], launch.start_ns, graph, node)

    def cpu_pieces(self) -> Iterator[Kernel]:
        """The pieces of operations, which are what ran where there is no device."""
        for start, end, thread, number, scope in self.calls.pieces():
            yield Kernel(scope.ops[-1], start, end, thread, -1, "cpu", number, *scope, start)

    def lacks(self, kernels: list[Kernel]) -> list[str]:
        """Sentences on what is missing of this trace."""
        lacks = []
        if self.malformed:
            lacks.append(f"trace incomplete: {self.malformed} events were malformed and left out")
        if self.endless:
            many = f"{self.endless} kernels last longer than the rest of the trace and {LONGEST_KERNEL_NS / 1e9:g} s"
            lacks.append(f"trace incomplete: {many}; they are left out")
        if not kernels:
            many = sum(1 for _ in self.launches)
            lacks.append(f"trace incomplete: {many} launches, but no kernels" if many else "the trace holds no work")
        if lost := self._kernels_without_launches():
            lacks.append(f"trace incomplete: the launches of {lost} kernels are missing")
        return lacks

    def launches_without_kernels(self, steps: list[Step]) -> list[int]:
        """Their starts within the steps. A launch during a capture runs nothing and is no loss."""
        ran = {(work.correlation, at) for work, at in zip(self.device_work, self.launch_of, strict=True)}
        first, last = (steps[0].start_ns, steps[-1].end_ns) if steps else (-_LATEST_NS, _LATEST_NS)
        captures = sorted(self.captures)
        times = [time for time, _ in captures]
        lost = []
        for correlation, launch in self.launches:
            if launch.kind != "copy" and (correlation, launch) not in ran and first <= launch.start_ns < last:
                before = bisect_left(times, launch.start_ns)
                if not (before and captures[before - 1][1]):
                    lost.append(launch.start_ns)
        return lost

    def _kernels_without_launches(self) -> int:
        """Their number without leftovers, which a profiler finds running when it begins.

        Leftovers come before everything that was launched since, and their operation is not in the trace.
        """
        orphans = [work for work in self.device_work if work.correlation not in self.launches]
        known = self.calls.externals_among({work.external for work in orphans}) - {-1, 0}  # what has no operation
        linked = (work.start_ns for work in self.device_work if work.correlation in self.launches)
        first = min(linked, default=-_LATEST_NS)
        return sum(work.start_ns > first or work.external in known for work in orphans)


@functools.lru_cache(maxsize=4096)
def _runtime_call(name: str) -> tuple[str | None, bool]:
    """(what a runtime call puts on the device if anything, whether it waits for the device)."""
    call = name.lower()
    waits = "synchronize" in call or _BLOCKING_COPY.fullmatch(call) is not None
    for word in ("begin capture", "end capture"):
        if word.replace(" ", "") in call:
            return word, waits
    if "graphlaunch" in call:
        return "graph", waits
    if "launch" in call and "kernel" in call:
        return "kernel", waits
    return ("copy" if re.search("launch|memcpy|memset|copy", call) else None), waits


def _name(event: dict[str, Any]) -> str:
    name = event["name"]
    if not isinstance(name, str):
        raise TypeError
    return sys.intern(_writable(name))


def _writable(text: str) -> str:
    """`text` without lone surrogates, which no file could hold, and not too long."""
    return text[:LONGEST_NAME].encode("utf-8", "replace").decode()


def _integer(value: Any) -> int:
    if type(value) is not int or abs(value) >= _LATEST_NS:
        raise ValueError
    return value


def _interval(event: dict[str, Any]) -> tuple[int, int]:
    start, duration = _ns(event["ts"]), _ns(event["dur"])
    if duration < 0:
        raise ValueError
    return start, start + duration


def _ns(microseconds: int | str) -> int:
    """Exactly, but for digits behind the third. Raises ValueError or ArithmeticError for what is not a time."""
    if isinstance(microseconds, int):
        return _integer(_integer(microseconds) * 1000)
    whole, _, fraction = microseconds.partition(".")
    if whole.isdigit() and fraction.isdigit() and len(fraction) <= 3:
        return _integer(int(whole) * 1000 + int(fraction.ljust(3, "0")))
    ns = Decimal(microseconds).scaleb(3)
    if not abs(ns) < _LATEST_NS:
        raise ValueError
    return int(ns.to_integral_value())
