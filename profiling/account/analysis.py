"""The account of a run, from its records: terms, kernels, floors, levers, and what the records lack or contradict."""

import math
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from profiling.account import consistency
from profiling.account import terms as account
from profiling.account.attribution import Idle, doubt, idle, per_step
from profiling.account.cross_check import Judged, judge
from profiling.account.floors import CUTS, FUSED_PASSES, FUSED_SAYS, floor_ns, fused_kernels
from profiling.account.floors import kernels as kernels_of_cut
from profiling.account.roofline import Roofs, Row, Timed, kernel_rows, layer_rows
from profiling.account.run_folder import Run
from profiling.account.terms import Busy, Evidence, Term
from profiling.account.work import Work
from profiling.account.work import from_json as work_from_json
from profiling.device.specifications import V100_FLOPS_PER_S, Specification, specification
from profiling.output.numbers import TARGET_ACCURACY, measured, quoted

V100 = specification("Tesla V100-SXM2-16GB")
"""The article's GPU."""


class Analysis(NamedTuple):
    """The account of a run in numbers.

    perturbation   a profiled step over a timed one, medians
    step_ns        of the timed run's steps, sorted
    unknown_share  of the profiled pass's busy time, in kernels of no known category
    arithmetic     of the convolutions, as a data sheet names it
    rows           the ops of one step by the names in work.json: "ops", "reference", "fused", "article"
    """

    evidence: Evidence
    terms: list[Term]
    kernels: list[Row]
    layers: list[Row]
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
    unprofiled = sorted(end - start for epoch in epochs for start, end in pairwise(epoch))
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
    training_ns = round(1e9 * run.summary["train_s"])
    if run.phases:
        training_ns = sum(end - start for start, end in run.training)
    evidence = Evidence(
        training_ns=training_ns,
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
    kernels, layers = (
        of(timed, rows.get("ops", []), active, roofs) if timed else [] for of in (kernel_rows, layer_rows)
    )
    profiled = [ns for i, ns in enumerate(run.profile.get("step_ns", [])) if i != run.profile["eager_step"]]
    perturbation = median(profiled) / timed_ns if profiled and timed_ns else None
    if training_ns == 0:
        lacks.append("No training was recorded.")
    terms = account.terms(evidence)
    doubts = consistency.doubts(evidence, terms, perturbation, witness, kernels)
    facts = (unprofiled, unknown, spec, arithmetic, judged, rows)
    return Analysis(evidence, terms, kernels, layers, perturbation, *facts, lacks, doubts)


def article(run: Run, a: Analysis) -> dict[str, Any]:
    """The V100's column, by the same code, of the ops at the article's batch; no terms where those are not known."""
    total_ns, terms = round(1e9 * account.ARTICLE_S), []
    if a.rows.get("article"):
        batch, flops = run.work["article_batch"], run.work["article_flops_per_image"]
        terms = account.article_terms(a.rows["article"], batch, V100.flops_per_s["float16"], V100.bytes_per_s, flops)
    return {"title": "the article, one V100", "total_ns": total_ns, "terms": [t.to_json(total_ns) for t in terms]}


def kernels(run: Run, a: Analysis) -> list[dict[str, Any]]:
    """With Nsight Compute's counters per launch, None without: bytes of DRAM, and the tensor cores' activity."""
    counted = [run.counters.get(row.name) for row in a.kernels]
    fields = ("dram_bytes", "tensor_active")
    return [
        _sourced(row, a) | {field: getattr(counts, field, None) for field in fields}
        for row, counts in zip(a.kernels, counted, strict=True)
    ]


def layers(a: Analysis) -> list[dict[str, Any]]:
    """Each convolution layer's passes."""
    return [_sourced(row, a) for row in a.layers]


def _sourced(row: Row, a: Analysis) -> dict[str, Any]:
    """With the steps that its times are of."""
    return row.to_json() | {"source": row.source.replace("torch.profiler", a.evidence.busy.source)}


def profiled(a: Analysis) -> dict[str, Any]:
    """Which steps of the profiled pass the account is made of."""
    judged = a.judged
    if judged is None:
        return {"steps": None, "refused": [], "said": "", "eager_step": None, "fell_back": False}
    return {
        "steps": judged.steps,
        "refused": [one._asdict() for one in judged.refused],
        "said": judged.said,
        "eager_step": judged.eager_step,
        "fell_back": judged.fell_back,
    }


def levers(run: Run, a: Analysis) -> tuple[list[dict[str, Any]], str]:
    """The factors between the article's 256 s and this run; or none, and why the two say nothing of each other."""
    peak, seconds = a.evidence.peak or a.evidence.ceiling, run.summary["train_plus_eval_s"]
    accuracy = run.summary["test_accuracy"]
    if run.summary["data_identity"] == "synthetic":
        return [], "the images are synthetic, and the article's are not"
    if accuracy is None or accuracy < TARGET_ACCURACY:
        reached = "no accuracy is known" if accuracy is None else f"it reached {accuracy:.2%}"
        return [], f"{reached}, and the article's 256 s are the time to {TARGET_ACCURACY:.0%}"
    if not peak or not seconds or not a.evidence.flops:
        return [], "its work, its time or this device's peak is not known"
    article_flops = account.ARTICLE_IMAGES * run.work["article_flops_per_image"]
    factors = account.levers(a.evidence.flops, seconds, peak, article_flops, V100_FLOPS_PER_S)
    whose = "data sheet's peak" if a.evidence.peak else "measured ceiling"
    source = f"256 s (quoted) over this run's training with evaluation, at the {whose}"
    return [
        {"name": name, "factor": factor, "log": math.log(factor), "status": "modelled", "source": source}
        for name, factor in factors
    ], ""


def floors(a: Analysis) -> list[dict[str, Any]]:
    """The least time that this run's training could take on this device, by how its layers are cut into kernels."""
    flops_per_s, bytes_per_s = a.evidence.ceiling, a.evidence.bandwidth
    if not flops_per_s or not bytes_per_s or not a.rows.get("reference"):
        return []
    of_cuts = [(cut.name, cut.passes, kernels_of_cut(a.rows["reference"], cut), cut.says) for cut in CUTS]
    if a.rows.get("fused"):
        of_cuts.insert(-1, ("fused", FUSED_PASSES, fused_kernels(a.rows["fused"]), FUSED_SAYS))
    least = [round(floor_ns(rows, flops_per_s, bytes_per_s) * a.evidence.steps) for _, _, rows, _ in of_cuts]
    return [
        {"name": name, "passes": passes, "ns": ns, "note": note}
        for (name, passes, _, note), ns in zip(of_cuts, least, strict=True)
    ]


def roofs(run: Run, a: Analysis) -> dict[str, list[dict[str, Any]]]:
    """The rates that bound this device's kernels: as measured, and by the data sheet."""
    compute, bandwidth = [], []
    if run.ceilings:
        source = f"ceilings.json, {run.ceilings.dtype}"
        compute.append(measured(run.ceilings.flops_per_s, "FLOP/s", source).to_json("measured ceiling"))
        bandwidth.append(measured(run.ceilings.bytes_per_s, "B/s", source).to_json("measured copy"))
    if a.specification:
        if a.evidence.peak:
            compute.append(quoted(a.evidence.peak, "FLOP/s", a.specification.source).to_json("data sheet"))
        bandwidth.append(quoted(a.specification.bytes_per_s, "B/s", a.specification.source).to_json("data sheet"))
    return {"compute": compute, "bandwidth": bandwidth}
