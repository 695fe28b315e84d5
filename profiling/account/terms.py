"""The account of a run, from what the arithmetic needs to what the stopwatch shows.

Two levels. The phases of the process are exclusive and contiguous, so they sum to its wall clock by construction. The
training phase is then cut into terms that sum to it, in integer nanoseconds:

    ideal         model FLOPs over the data sheet's peak
    ceiling gap   the same FLOPs over the best rate that this device was seen to sustain, less the ideal
    bound by bytes  what convolutions need beyond that because their bytes take longer than their arithmetic
    inefficiency  what the convolution kernels took beyond these three
    ...           the other categories of `profiling.account.categories`, as a profiled pass saw them
    idle          unprofiled step time less busy time. On a CPU, where there is no second machine to be idle, the time
                  between operations as the profiled pass saw it: the host's own work
    residual      what is left; never hidden

Without a data sheet's peak, ideal and ceiling gap are one. The profiled pass times kernels only; how long steps take is
taken from the run that was not profiled. A term may be negative and is then shown so: sums that close by construction
prove nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from profiling.account import floors
from profiling.account.attribution import CAUSES, apportioned
from profiling.account.categories import categorise
from profiling.account.trace import Kernel
from profiling.account.work import Work

RESIDUAL_LIMIT = 0.02
"""Share of the training phase above which the account is inconsistent (`--strict`)."""
UNKNOWN_LIMIT = 0.05
"""Share of the busy time in kernels of no category above which the account is incomplete."""

ARTICLE_S = 256.0
"""The article's run at batch 512 on a V100, its validation included (quoted)."""
ARTICLE_VALIDATION_S = 15.3
"""Part of the 256 s: 35 passes of 0.437 s over the test images (quoted, from the author's own log)."""
ARTICLE_IMAGES = 35 * 50_000

NAMES = {
    "ideal": "ideal at the data sheet's peak",
    "ceiling_gap": "peak that this device does not sustain",
    "conv_bytes": "convolutions bound by bytes",
    "conv_inefficiency": "convolutions below their roof",
    "convolution": "convolutions",
    "batch norm": "batch norm",
    "memory-bound": "pool, add, ReLU",
    "layout and cast": "layout and casts",
    "optimiser and loss": "optimiser and loss",
    "augmentation and data": "augmentation and data, exposed",
    "communication": "communication, exposed",
    "unknown": "kernels of no known category",
    "idle": "idle",
    "unattributed": "not attributed",
    "validation": "validation",
    "residual": "residual",
}
NECESSARY = ("ideal", "ceiling_gap", "conv_bytes", "validation")
"""Terms that are floors themselves: nothing of them can be won back on this device."""
UNEXPLAINED = ("unattributed", "residual")


@dataclass(frozen=True)
class Term:
    """A share of the training phase; `source` says how it is known. The parts, if any, sum to `ns`.

    `floor_ns` is what the work of the term needs at the least on this device, by bytes and FLOPs; 0 where it needs not
    be done at all, or where nothing is known of it.
    """

    key: str
    ns: int
    status: str
    source: str
    note: str | None = None
    parts: tuple[tuple[str, int], ...] = ()
    name: str = ""
    floor_ns: int = 0

    @property
    def recoverable_ns(self) -> int:
        """The time above its floor."""
        return 0 if self.key in (*NECESSARY, *UNEXPLAINED) else max(self.ns - max(self.floor_ns, 0), 0)

    def to_json(self, total_ns: int) -> dict[str, Any]:
        """The record, with the time that training would take if the term were at its floor."""
        left, what_if = total_ns - self.recoverable_ns, ""
        if self.recoverable_ns > 0.005 * total_ns and left > 0:
            what_if = f"training takes {left / 1e9:.3g} s, {total_ns / left:.3g} times as fast"
        return {
            "key": self.key,
            "name": self.name or NAMES[self.key],
            "ns": self.ns,
            "status": self.status,
            "source": self.source,
            "floor_ns": self.floor_ns,
            "recoverable_ns": self.recoverable_ns,
            "what_if": what_if,
            "note": self.note,
            "parts": [{"name": name, "ns": ns} for name, ns in self.parts],
        }


@dataclass(frozen=True)
class Busy:
    """Nanoseconds by category and of the device's gaps in a profiled pass, scaled to all images of the run.

    `gaps` are in the order of `attribution.CAUSES`, None where the trace cannot tell, so that busy times are not
    certain either, and zeros where only the gaps are not the run's.
    `on_gpu` is whether the categories are of a device beside the host. `note` stands under each term that is made of
    kernel times.
    """

    by_category: dict[str, float]
    gaps: tuple[float, ...] | None
    on_gpu: bool
    source: str = "torch.profiler, a pass of its own"
    note: str | None = None


@dataclass(frozen=True)
class Evidence:
    """The evidence of the training phase; None is not known.

    training_ns   the phase
    steps_ns      of it, from the start of each epoch's first step to the end of its last, unprofiled
    flops         of the training, by the reference network; 0 is not known
    rows, steps   the ops of one step, and how many steps of that size the run's images make
    peak, ceiling FLOP/s of the data sheet, and sustained; bandwidth in bytes/s, sustained
    """

    training_ns: int
    steps_ns: int | None
    flops: int
    rows: Sequence[Work] | None
    steps: float
    peak: float | None
    ceiling: float | None
    bandwidth: float | None
    busy: Busy | None
    peak_source: str = "data sheet"
    fused: bool = False
    """Whether other work is fused into the kernels of batch norm."""
    on_gpu: bool = True


def terms(e: Evidence) -> list[Term]:
    """The training phase in terms, in the order of the module's docstring; they sum to it."""
    found = _needed(e)
    if e.busy is not None:
        found += _of_categories(e, sum(t.ns for t in found))
    source = "the training phase less all terms above"
    if complete := e.busy is not None and e.busy.gaps is not None and e.steps_ns is not None:
        found.append(_idle(e))
    else:
        source += "; see what it lacks"
    rest = e.training_ns - sum(t.ns for t in found)
    return [*found, Term("residual" if complete else "unattributed", rest, "measured", source)]


def _needed(e: Evidence) -> list[Term]:
    """The least that the arithmetic and the convolutions' bytes need."""
    found = []
    if e.flops and e.peak is not None:
        ideal = round(1e9 * e.flops / e.peak)
        found.append(Term("ideal", ideal, "modelled", f"model FLOPs over {e.peak / 1e12:.4g} TFLOP/s, {e.peak_source}"))
        if e.ceiling is not None:
            gap = round(1e9 * e.flops / e.ceiling) - ideal
            text = f"the same FLOPs over {e.ceiling / 1e12:.4g} TFLOP/s, the best this device sustained, less the ideal"
            found.append(Term("ceiling_gap", gap, "modelled", text))
    elif e.flops and e.ceiling is not None:
        text = f"model FLOPs over {e.ceiling / 1e12:.4g} TFLOP/s, the best this device sustained; no data sheet's peak"
        name = "ideal at the measured ceiling"
        found.append(Term("ideal", round(1e9 * e.flops / e.ceiling), "modelled", text, name=name))
    roof = e.ceiling or e.peak
    if roof and e.bandwidth and e.rows is not None:
        each = sum(max(0.0, r.bytes / e.bandwidth - r.flops / roof) for r in e.rows if r.family in floors.CONVOLUTIONS)
        text = f"bytes of each convolution over {e.bandwidth / 1e9:.4g} GB/s where that is longer than its arithmetic"
        found.append(Term("conv_bytes", round(1e9 * each * e.steps), "modelled", text))
    return found


def _of_categories(e: Evidence, needed_ns: int) -> list[Term]:
    by_category, least = dict(e.busy.by_category), _floors(e)
    convolutions = round(by_category.pop("convolution", 0))
    key, less = ("conv_inefficiency", ", less the terms above") if needed_ns else ("convolution", "")
    text = f"convolution and matrix kernels ({convolutions / 1e9:.4g} s; {e.busy.source}){less}"
    found = [Term(key, convolutions - needed_ns, "measured", text, e.busy.note)]
    for key, ns in by_category.items():
        if round(ns):
            name = "batch norm and fused epilogues" if key == "batch norm" and e.fused else ""
            floor_ns = least.get(key, 0)
            found.append(Term(key, round(ns), "measured", e.busy.source, e.busy.note, name=name, floor_ns=floor_ns))
    return found


def _floors(e: Evidence) -> dict[str, int]:
    """Nanoseconds that the run's own operations need at the least, by category: bytes or FLOPs, each at its roof.

    A change of layout or dtype is not needed at all.
    """
    roof, found = e.ceiling or e.peak, {}
    for row in e.rows or () if roof and e.bandwidth else ():
        op = "augmentation" if row.family == "augment" else row.op
        category = categorise(Kernel("", 0, 0, 0, -1, "cpu", 0, (op,)))
        if category != "layout and cast":
            found[category] = found.get(category, 0.0) + max(row.bytes / e.bandwidth, row.flops / roof)
    return {category: round(1e9 * seconds * e.steps) for category, seconds in found.items()}


def _idle(e: Evidence) -> Term:
    gaps = e.busy.gaps
    if not e.busy.on_gpu:
        name = "between operations: Python and dispatch"
        return Term("idle", round(sum(gaps)), "measured", f"{e.busy.source}: time inside no operation", name=name)
    idle, total = e.steps_ns - round(sum(e.busy.by_category.values())), sum(gaps)
    text, parts = f"unprofiled steps less the kernels' busy time ({e.busy.source})", ()
    if total > 0:
        names, seen = zip(*((name, gap) for name, gap in zip(CAUSES, gaps, strict=False) if gap), strict=True)
        parts = tuple(zip(names, apportioned(seen, idle, total), strict=True))
        text += "; its parts in proportion to the profiled pass's gaps"
    return Term("idle", idle, "measured", text, e.busy.note and f"less kernel times {e.busy.note}", parts)


def article_terms(rows: Sequence[Work], batch: int, peak: float, bandwidth: float, flops_per_image: int) -> list[Term]:
    """The article's 256 s on its V100 by the same terms: quoted where the author says so, else modelled.

    `rows` are the ops of a step of `batch` images of the article's network. The floors are those of eager PyTorch's 19
    passes a layer; what they do not explain remains one term.
    """
    steps, total_ns = ARTICLE_IMAGES / batch, round(1e9 * ARTICLE_S)
    flops = ARTICLE_IMAGES * flops_per_image
    kernels = floors.kernels(rows, floors.CUTS[0])
    found = _needed(Evidence(total_ns, None, flops, kernels, steps, peak, None, bandwidth, None, "NVIDIA's data sheet"))
    text = f"bytes over {bandwidth / 1e9:.4g} GB/s by eager PyTorch's passes"
    for key, name, families in (
        ("batch norm", "batch norm and ReLU", ("batch norm", "relu", "relu backward", "batch norm backward")),
        ("memory-bound", "shortcuts", ("add",)),
        ("optimiser and loss", "optimiser", ("optimiser",)),
    ):
        ns = floors.floor_ns([k for k in kernels if k.family in families], math.inf, bandwidth)
        found.append(Term(key, round(ns * steps), "modelled", text, name=name))
    source = "the author's log: 35 passes of 0.437 s"
    found.append(Term("validation", round(1e9 * ARTICLE_VALIDATION_S), "quoted", source))
    text = "256 s less all of these: kernels below their roofs, the host, synchronisation; nobody has measured which"
    found.append(Term("unattributed", total_ns - sum(t.ns for t in found), "modelled", text))
    return found


def levers(flops: int, seconds: float, peak: float, article_flops: int, article_peak: float) -> list[tuple[str, float]]:
    """256 s over this run's `seconds` as a product: fewer FLOPs, better use of the peak, more peak."""
    mfu = flops / seconds / peak
    article_mfu = article_flops / ARTICLE_S / article_peak
    return [
        ("fewer FLOPs", article_flops / flops),
        ("better use of the peak", mfu / article_mfu),
        ("more peak", peak / article_peak),
    ]
