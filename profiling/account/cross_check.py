"""Checks of each profiled step against all else that is known of it.

CUPTI, from which torch.profiler has its kernels, loses and falsifies some of a replayed graph's: dropped where a
session begins, without a length, of wrong durations (pytorch/kineto#1165, pytorch/pytorch#192021; CUDA 12.9 and 13.0).
Such a trace looks like any other. But a step is the same work each time, one of them was run eagerly, and CUDA events
timed them all. A step that disagrees is refused by name and left out. Where too few are left, kernel times are those of
the eager step, if it stands, and the account is incomplete.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

from profiling.account.attribution import attribute_replays
from profiling.account.host_calls import union
from profiling.account.trace import Kernel, Trace, missing

JITTER_NS = 1_000
"""Error of a kernel's times: torch.cuda._annotate_cuda_graph_trace takes an overlap of that much on one stream for a
jitter of CUPTI's timestamps, and more for a fault."""
OVERLAP = 0.03
"""Share of a step's kernel time that may lie under other kernels of its stream, where it is counted once. On an H200
cuDNN's dgrads launch their successor early (programmatic dependent launch): 1.0 to 1.6 % of a step of the reference."""
DIFFERENCE = 0.10
"""Difference of a step's kernel times, summed by name, from another's, beside JITTER_NS a kernel. Work and clocks are
the same, and caches move times by some per cent; a smaller lie moves the account by less than what it is read for."""
BEYOND_EVENTS = 0.02
"""Share by which the kernels of a step may outlast the CUDA events around it: both are on the GPU's own clock."""
FEWEST = 5
"""Believed steps below which the others are no longer taken for the exception."""

LOST, SURPLUS, TWICE = "kernels are missing", "kernels are too many", "kernels are recorded twice"
NO_LENGTH, OVERLAPPING = "kernels have no length", "kernels overlap on one stream"
TOO_LONG, APART = "kernels ran longer than the step", "kernels lie further apart than the step was long"
DIFFERENT = "kernel times are not those of other steps"


Faults = dict[int, tuple[str, str]]  # (reason, detail) of steps by their index


class Refused(NamedTuple):
    """A step by the profiler's number; the reason in words that other steps share, the detail in its own figures."""

    step: int
    reason: str
    detail: str


@dataclass(frozen=True)
class Judged:
    """The believed steps of a pass.

    trace        with the believed steps and their kernels, replayed ones given their operations; None if none stands
    images       trained in those steps
    steps        that were recorded, but for the eager one; `refused` are those of them that are left out
    eager_step   the profiler's number of the step that was run eagerly, None if none was
    fell_back    the one step in `trace` is that one, for want of others
    """

    trace: Trace | None
    images: float
    steps: int
    refused: list[Refused]
    eager_step: int | None
    fell_back: bool
    lacks: list[str]

    @property
    def said(self) -> str:
        """The beginning of a sentence on the refused steps, one of each reason with its figures; "" without any."""
        if not self.refused:
            return ""
        reasons = Counter(one.reason for one in self.refused).most_common()
        first = {one.reason: f"step {one.step}: {one.detail}" for one in reversed(self.refused)}
        each = [f"{why} ({f'{n}; ' if len(reasons) > 1 else ''}{first[why]})" for why, n in reasons]
        return f"{len(self.refused)} of {self.steps} profiled steps refused: {', '.join(each)}"

    @property
    def source(self) -> str:
        """The source of the kernels' times."""
        if self.fell_back:
            return "torch.profiler, one step run eagerly in a pass of its own, as its graph replays were refused"
        left = f", {self.steps - len(self.refused)} of its {self.steps} steps" if self.refused else ""
        return f"torch.profiler, a pass of its own{left}"


def judge(trace: Trace, profile: dict[str, Any], timed_ns: float | None) -> Judged:
    """Judge the steps of `trace`. On a CPU, where operations time themselves, all are believed.

    `profile` is records/profile.json, `timed_ns` how long a step took without the profiler, None if that is not known.
    """
    pass_ = _Pass(trace, profile, timed_ns)
    replays = [i for i in range(len(trace.steps)) if i != pass_.eager]
    if not trace.on_gpu or not replays:
        return pass_.judged(pass_.only(replays) if trace.steps else trace, replays, {})
    faults = pass_.faults()
    believed = [i for i in replays if i not in faults]
    refused = {i: faults[i] for i in replays if i in faults}
    stands = pass_.eager is not None and pass_.eager not in faults
    if refused and len(believed) < FEWEST:
        said = pass_.judged(None, believed, refused).said
        if stands:
            lack = f"{said}. Too few are left: the kernel times are those of the one step that was run eagerly."
            return pass_.judged(pass_.only([pass_.eager]), [pass_.eager], refused, lack, fell_back=True)
        eager = "no step was run eagerly"
        if pass_.eager is not None:
            eager = f"the eager one too: {', '.join(faults[pass_.eager])}"
        lack = f"{said}; {eager}. What the device's time was made of is not known."
        return pass_.judged(None, [], refused, *trace.lacks, lack)
    kept, lack = pass_.only(believed), []
    if any(kernel.graph is not None for kernel in kept.kernels):
        if stands:
            kept = replace(kept, kernels=attribute_replays(kept.kernels, pass_.kernels[pass_.eager]))
        else:
            why = "" if pass_.eager is None else f" (refused: {', '.join(faults[pass_.eager])})"
            lack = [f"trace incomplete: what a graph replay should hold was not learned from an eager step{why}"]
    return pass_.judged(replace(kept, lacks=kept.lacks + lack), believed, refused)


class _Pass:
    """A trace with what is known of each of its steps, by the step's index."""

    def __init__(self, trace: Trace, profile: dict[str, Any], timed_ns: float | None):
        count = len(trace.steps)
        self.trace, self.timed_ns = trace, timed_ns
        images = profile["step_images"]
        aligned = len(images) == len(profile["step_ns"]) == count
        self.images = images if aligned else [sum(images) / max(len(images), 1)] * count
        self.event_ns = profile["step_ns"] if aligned else [None] * count
        eager = profile["eager_step"]
        self.eager = eager if eager in range(count) else None
        self.kernels: list[list[Kernel]] = [[] for _ in trace.steps]
        for kernel in trace.kernels:
            if (index := trace.step_of(kernel)) is not None:
                self.kernels[index].append(kernel)

    def judged(
        self, trace: Trace | None, believed: Sequence[int], refused: Faults, *lacks: str, fell_back=False
    ) -> Judged:
        steps = self.trace.steps
        return Judged(
            trace=trace,
            images=sum(self.images[i] for i in believed),
            steps=len(steps) - (self.eager is not None),
            refused=[Refused(steps[i].number, *fault) for i, fault in sorted(refused.items())],
            eager_step=None if self.eager is None else steps[self.eager].number,
            fell_back=fell_back,
            lacks=[*(trace.lacks if trace else ()), *lacks],
        )

    def only(self, indices: Sequence[int]) -> Trace:
        """The trace with those steps and what was launched in them; what it lacks elsewhere is no lack."""
        trace = self.trace
        inside = [at for at in trace.lost if trace.step_at(at) in indices]
        lacks = [lack for lack in trace.lacks if lack != missing(len(trace.lost))]
        known = {None, *indices}
        kept = [kernel for kernel in trace.kernels if trace.step_of(kernel) in known]
        lacks += [missing(len(inside))] if inside else []
        return replace(trace, kernels=kept, steps=[trace.steps[i] for i in indices], lacks=lacks, lost=inside)

    def faults(self) -> Faults:
        """(reason, detail) of each step that cannot be believed."""
        every = range(len(self.trace.steps))
        found = {i: fault for i in every if (fault := self._by_itself(i))}
        if self.eager is not None and self.eager not in found:  # before others are compared with it
            found |= self._by_overlap([self.eager])
        eager = self.eager if self.eager not in found else None
        replays = [i for i in every if i != self.eager]
        alike: dict[float, list[int]] = defaultdict(list)  # an epoch's short last batch is another graph
        for i in replays:
            alike[self.images[i]].append(i)
        for images, steps in alike.items():
            model = eager if eager is not None and self.images[eager] == images else None
            found = self._by_count(steps, model) | found
            found |= self._by_time([i for i in steps if i not in found], model)
        # Last, so that the kernels of one step that was refused cannot spoil others.
        return found | self._by_overlap([i for i in every if i not in found])

    def _by_itself(self, i: int) -> tuple[str, str] | None:
        kernels = self.kernels[i]
        lost = sum(self.trace.step_at(at) == i for at in self.trace.lost)
        if lost or not kernels:
            return LOST, f"those of {lost} launches" if lost else "there are none"
        if none := sum(kernel.end_ns <= kernel.start_ns for kernel in kernels):
            return NO_LENGTH, f"{none} of {len(kernels)}"
        busy = _busy_ns(kernels)
        graph = [kernel for kernel in kernels if kernel.graph is not None]
        span = max(k.end_ns for k in graph) - min(k.start_ns for k in graph) if graph else 0
        if event := self.event_ns[i]:
            most = event * (1 + BEYOND_EVENTS) + JITTER_NS
            if busy > most:
                return TOO_LONG, f"{_ms(busy)} of kernels in a step of {_ms(event)}"
            if span > most:
                return APART, f"{_ms(span)} from the first to the last in a step of {_ms(event)}"
        most = (self.timed_ns or math.inf) * (1 + DIFFERENCE) + JITTER_NS * len(kernels)
        if busy > most and self.images[i] == max(self.images):
            return TOO_LONG, f"{_ms(busy)} of kernels; a step without the profiler took {_ms(self.timed_ns)}"
        return None

    def _by_count(self, steps: list[int], model: int | None) -> Faults:
        """Against the kernels of the eager step `model`, and the nodes that most replays of the graph have."""
        graphs = {i: [kernel for kernel in self.kernels[i] if kernel.graph is not None] for i in steps}
        if model is None and not any(graphs.values()):
            return {}
        counts = Counter(len(kernels) for kernels in graphs.values())
        if model is not None:
            expected = sum(kernel.graph is None for kernel in self.kernels[model])
        else:
            expected = max(counts, key=lambda n: (counts[n], n))
        seen = Counter(node for kernels in graphs.values() for node in {k.node for k in kernels if k.node})
        nodes = {node for node, count in seen.items() if 2 * count > len(steps)}
        found = {}
        for i, kernels in graphs.items():
            launches = Counter((kernel.graph, kernel.node) for kernel in kernels if kernel.node)
            lost = len(nodes - {kernel.node for kernel in kernels})
            detail = f"{len(kernels)} recorded, {expected} expected"
            if len(kernels) < expected or lost:
                found[i] = LOST, detail + (f", {lost} of the graph's nodes without one" if lost else "")
            elif max(launches.values(), default=1) > 1:
                found[i] = TWICE, f"{sum(n > 1 for n in launches.values())} nodes of one launch"
            elif len(kernels) > expected:
                found[i] = SURPLUS, detail
        return found

    def _by_time(self, steps: list[int], model: int | None) -> Faults:
        """Kernel times by name against those of `model`, or against the medians of `steps`."""
        times = {i: _by_name(self.kernels[i]) for i in steps}
        names = set().union(*times.values())
        if model is not None:
            usual, whose = _by_name(self.kernels[model]), "the eager step"
        else:
            usual, whose = {name: median(of[name] for of in times.values()) for name in names}, "the median step"
        total, found = sum(usual.values()), {}
        for i, of in times.items():
            apart = sum(abs(of[name] - usual.get(name, 0)) for name in {*of, *usual})
            if apart > DIFFERENCE * total + JITTER_NS * len(self.kernels[i]):
                sums = f"{_ms(sum(of.values()))} in all, {whose} {_ms(total)}"
                found[i] = DIFFERENT, f"{sums}; kernel by kernel {_ms(apart)} apart"
        return found

    def _by_overlap(self, steps: list[int]) -> Faults:
        streams: dict[tuple[int, int], list[tuple[Kernel, int]]] = defaultdict(list)
        for i in steps:
            for kernel in self.kernels[i]:
                streams[kernel.device, kernel.stream].append((kernel, i))
        under = dict.fromkeys(steps, 0)
        for stream in streams.values():
            stream.sort(key=lambda entry: entry[0].start_ns)
            latest, of = stream[0]
            for kernel, i in stream[1:]:
                overlap = min(latest.end_ns, kernel.end_ns) - kernel.start_ns
                if overlap > JITTER_NS:
                    for step in {i, of}:
                        under[step] += overlap
                if kernel.end_ns > latest.end_ns:
                    latest, of = kernel, i
        total = {i: _by_name(self.kernels[i]).total() for i in steps}
        return {
            i: (OVERLAPPING, f"for {_ms(ns)} of {_ms(total[i])}") for i, ns in under.items() if ns > OVERLAP * total[i]
        }


def _by_name(kernels: Iterable[Kernel]) -> Counter[str]:
    """Nanoseconds."""
    times: Counter[str] = Counter()
    for kernel in kernels:
        times[kernel.name] += kernel.end_ns - kernel.start_ns
    return times


def _busy_ns(kernels: Sequence[Kernel]) -> int:
    """The least time in which the device can have done these: kernels of one stream do not run at the same time."""
    streams: Counter[tuple[int, int]] = Counter()
    for kernel in kernels:
        streams[kernel.device, kernel.stream] += kernel.end_ns - kernel.start_ns
    intervals = union((kernel.start_ns, kernel.end_ns) for kernel in kernels)
    return max(sum(end - start for start, end in intervals), *streams.values())


def _ms(ns: float) -> str:
    return f"{ns / 1e6:.4g} ms"
