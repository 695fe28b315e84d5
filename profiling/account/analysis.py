"""The account of a run, from its records: terms, kernels, and what they lack or contradict."""

from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from profiling.account import consistency
from profiling.account import terms as account
from profiling.account.attribution import Idle, doubt, idle, per_step
from profiling.account.cross_check import Judged, judge
from profiling.account.roofline import Roofs, Row, Timed, kernel_rows
from profiling.account.run_folder import Run
from profiling.account.terms import Busy, Evidence, Term
from profiling.account.work import Work
from profiling.account.work import from_json as work_from_json
from profiling.device.specifications import Specification, specification


class Analysis(NamedTuple):
    """The results of `analyse`, before they are put into words."""

    evidence: Evidence
    terms: list[Term]
    timed: list[Timed]
    kernels: list[Row]
    active_steps: float
    perturbation: float | None
    step_ns: list[int]
    unknown_share: float | None
    specification: Specification | None
    arithmetic: str | None
    judged: Judged | None
    rows: dict[str, list[Work]]
    lacks: list[str]
    doubts: list[str]


def analyse(run: Run) -> Analysis:
    """The account of the training phase and what it is made of."""
    lacks, work = list(run.lacks), run.work
    on_gpu = run.environment["gpu"] is not None
    spec = specification(run.summary["device"]) if on_gpu else None
    # fp32 convolutions may run as tf32, and are then held against that peak.
    arithmetic = run.ceilings.compute.arithmetic if run.ceilings else run.summary["dtype"]
    peak = spec.flops_per_s.get(arithmetic) if spec else None
    if on_gpu and peak is None:
        lacks.append(f"No data sheet's peak is known for {run.summary['device']} in {arithmetic}.")
    batch, images = (work["batch"], work["images"]) if work else (run.config.get("batch_size") or 1, 0)
    names = ("ops", "reference", "fused", "article")
    rows = {k: work_from_json(work | {"ops": work[k]}) for k in names if work and work[k]}
    epochs = run.steps["epochs"] if run.steps else []
    unprofiled = [end - start for epoch in epochs for start, end in pairwise(epoch)]
    timed_ns = median(unprofiled) if unprofiled else None
    steps_ns = sum(epoch[-1] - epoch[0] for epoch in epochs if epoch) if unprofiled else None
    judged, seen, gaps = None, None, None
    if run.trace is not None and run.profile.get("step_images"):
        judged = judge(run.trace, run.profile, timed_ns)
        lacks += judged.lacks
    elif run.trace is not None:
        lacks += run.trace.lacks
    if judged is not None and judged.trace is not None:
        seen, gaps = per_step(judged.trace), idle(judged.trace)
        if seen is None:
            lacks.append("The trace has no training steps.")
        elif judged.fell_back and gaps is not None:
            gaps = Idle()  # the gaps of a step run eagerly are not the run's
        elif doubted := doubt(judged.trace):
            lacks.append(doubted)
    busy, timed, active, unknown, witness = None, [], 0.0, None, None
    if seen is not None and judged.images and images:
        active, scale, total = judged.images / batch, images / judged.images, seen.total
        timed = [Timed(k.name, k.op, k.category, k.dims, t.calls, t.ns) for k, t in total.by_kernel.items()]
        busy = Busy(
            by_category={name: ns * scale for name, ns in total.by_category.items()},
            gaps=tuple(ns * scale for ns in gaps) if gaps is not None else None,
            on_gpu=run.trace.on_gpu,
            source=judged.source,
            note="of one step run eagerly" if judged.fell_back else None,
        )
        if busy.on_gpu and busy.gaps is not None and steps_ns is not None and not judged.fell_back:
            witness = consistency.witness(run, judged, sum(busy.gaps), steps_ns, scale)
        unknown = total.by_category["unknown"] / total.busy_ns if total.busy_ns else None
        if unknown is not None and unknown > account.UNKNOWN_LIMIT:
            lacks.append(f"{unknown:.1%} of the busy time is in kernels of no known category.")
    evidence = Evidence(
        training_ns=_phase_ns(run, "training"),
        steps_ns=steps_ns,
        flops=images * work["flops_per_image"] if work else 0,
        rows=rows.get("ops"),
        steps=images / batch,
        peak=peak,
        ceiling=run.ceilings.flops_per_s if run.ceilings else None,
        bandwidth=run.ceilings.bytes_per_s if run.ceilings else None,
        busy=busy,
        peak_source=spec.source if spec else "",
        fused=run.summary["ops"] != "reference",
        on_gpu=on_gpu,
    )
    roofs = Roofs(evidence.ceiling or evidence.peak, evidence.bandwidth)
    kernels = kernel_rows(timed, rows.get("ops", []), active, roofs) if timed else []
    terms, perturbation = account.terms(evidence), _perturbation(run.profile, timed_ns)
    if evidence.training_ns == 0:
        lacks.append("No training was recorded.")
    doubts = consistency.doubts(evidence, terms, perturbation, witness, kernels)
    facts = (sorted(unprofiled), unknown, spec, arithmetic, judged, rows)
    return Analysis(evidence, terms, timed, kernels, active, perturbation, *facts, lacks, doubts)


def _phase_ns(run: Run, name: str) -> int:
    if run.phases is None:
        return round(1e9 * run.summary["train_s"])
    return sum(p["end_ns"] - p["start_ns"] for p in run.phases["phases"] if p["name"] == name)


def _perturbation(profile: dict[str, Any], timed_ns: float | None) -> float | None:
    """A profiled step over one that is not; medians, without the step that was run eagerly."""
    profiled = [ns for i, ns in enumerate(profile.get("step_ns", [])) if i != profile["eager_step"]]
    return median(profiled) / timed_ns if profiled and timed_ns else None
