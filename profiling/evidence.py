"""What a run's folder holds, read and brought together; the first half of a report.

Whatever is missing or damaged is said in `lacks` and left out of the account; only a folder without summary.json is no
run.
"""

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from profiling import account, ncu, telemetry
from profiling.account import Busy, Evidence, Term
from profiling.attribution import Idle, doubt, idle, per_step
from profiling.ceilings import Ceilings
from profiling.collection import RECORDS
from profiling.cross_check import Judged, judge
from profiling.errors import ReportError
from profiling.records import read_json, read_jsonl
from profiling.roofline import Timed
from profiling.specifications import Specification, specification
from profiling.trace import Trace
from profiling.trace import read as read_trace
from profiling.work import Work
from profiling.work import from_json as work_from_json

WORK = ("batch", "dtype", "images", "flops_per_image", "ops", "article_batch", "article_flops_per_image")
"""What records/work.json must have; it may have the ops of other implementations too."""


DISTURBED = 0.15
"""Difference of profiled and timed steps above which an account of a CPU cannot join the two."""


class Run(NamedTuple):
    """Everything that was read. None is missing, and `lacks` says so."""

    summary: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[dict[str, Any]]
    phases: dict[str, Any] | None
    steps: list[list[int]] | None
    work: dict[str, Any] | None
    ceilings: Ceilings | None
    profile: dict[str, Any]
    trace: Trace | None
    telemetry: telemetry.Telemetry
    counters: dict[str, ncu.Measured]
    lacks: list[str]


def read(folder: Path) -> Run:
    """Read a run's folder. Raises ReportError where there is no readable summary.json."""
    lacks: list[str] = []
    records = folder / RECORDS

    def optional(what: str, read_it: Callable[[], Any], default: Any = None) -> Any:
        try:
            return read_it()
        except FileNotFoundError:
            lacks.append(f"There is no {what}.")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            lacks.append(f"The {what} cannot be read: {error}.")
        return default

    def checked(name: str, *keys: str) -> Any:
        record = read_json(records / f"{name}.json")
        if record["version"] != 1:
            raise ValueError(f"{name}.json is of version {record['version']!r}, expected 1")
        if missing := [key for key in keys if key not in record]:
            raise ValueError(f"{name}.json has no {', '.join(missing)}")
        return record

    try:
        summary = read_json(folder / "summary.json")
    except (OSError, ValueError) as error:
        raise ReportError(f"{folder} is not the folder of a run: {error}; expected one that train.py wrote") from None
    if not isinstance(summary, dict) or "train_s" not in summary:
        raise ReportError(f"{folder}/summary.json is not that of a single run; name one of its run-NNN folders")
    profile = optional(
        "record of the profiled pass",
        lambda: checked("profile", "eager_step", "step_images", "step_ns", "error"),
        {},
    )
    if profile.get("error"):
        lacks.append(f"The profiled pass failed: {profile['error']}.")
    trace = optional("trace of kernels", lambda: read_trace(records / "trace.json.gz"))
    environment = optional("description of the machine", lambda: read_json(folder / "environment.json"), {})
    if trace is not None and not trace.on_gpu and environment.get("gpu"):
        lacks.append("The trace of a run on a GPU holds none of its kernels.")
    counted = (records / "ncu.csv").exists()
    heard = telemetry.read(records / "telemetry.jsonl")
    return Run(
        summary,
        optional("configuration", lambda: read_json(folder / "config.json"), {}),
        environment,
        optional("log of epochs", lambda: read_jsonl(folder / "log.jsonl"), []),
        optional("record of the phases", lambda: checked("phases", "start_ns", "end_ns", "phases")),
        optional("record of the steps", lambda: checked("steps")["epochs"]),
        optional("count of the work in a step", lambda: checked("work", *WORK)),
        optional("measurement of this device's ceilings", lambda: Ceilings.from_json(checked("ceilings"))),
        profile,
        trace,
        heard,
        optional("output of ncu", lambda: _counters(records / "ncu.csv", lacks), {}) if counted else {},
        lacks + heard.lacks,
    )


def _counters(path: Path, lacks: list[str]) -> dict[str, ncu.Measured]:
    """Of each kernel's name, means over its launches."""
    text = path.read_text(errors="replace")
    if hint := ncu.hint(text):
        lacks.append(hint)
    launches = defaultdict(list)
    for launch in ncu.read(text):
        launches[launch.name].append(launch)

    def average(of: list[ncu.Measured], field: str) -> float | None:
        known = [getattr(launch, field) for launch in of if getattr(launch, field) is not None]
        return fmean(known) if known else None

    return {
        name: ncu.Measured(name, *(average(of, field) for field in ncu.Measured._fields[1:]))
        for name, of in launches.items()
    }


class Analysis(NamedTuple):
    """What follows from a `Run`, before it is put into words."""

    evidence: Evidence
    terms: list[Term]
    timed: list[Timed]
    active_steps: float
    perturbation: float | None
    unknown_share: float | None
    specification: Specification | None
    arithmetic: str | None
    judged: Judged | None
    rows: dict[str, list[Work]]
    lacks: list[str]


def analyse(run: Run) -> Analysis:
    """The account of the training phase and what it is made of."""
    lacks = list(run.lacks)
    on_gpu = run.environment.get("gpu") is not None
    spec = specification(run.summary.get("device") or "") if on_gpu else None
    dtype = run.summary.get("dtype")
    # fp32 convolutions may run as tf32, and are then held against that peak.
    arithmetic = run.ceilings.compute.arithmetic if run.ceilings else dtype
    peak = spec.flops_per_s.get(arithmetic) if spec else None
    if on_gpu and peak is None:
        lacks.append(f"No data sheet's peak is known for {run.summary.get('device')} in {arithmetic}.")
    batch = run.config.get("batch_size") or 1
    flops_per_image = run.work["flops_per_image"] if run.work else None
    images = run.work["images"] if run.work else 0
    rows = {
        k: work_from_json(run.work | {"ops": run.work[k]})
        for k in ("ops", "reference", "fused", "article")
        if run.work and run.work.get(k)
    }
    unprofiled = [end - start for epoch in run.steps or [] for start, end in pairwise(epoch)]
    timed_ns = median(unprofiled) if unprofiled else None
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
            gaps = Idle()  # those of a step run eagerly are not the run's
        elif doubted := doubt(judged.trace):
            lacks.append(doubted)
    busy, timed, active, unknown = None, [], 0.0, None
    if seen is not None and judged.images:
        active, scale, total = judged.images / batch, images / judged.images, seen.total
        timed = [Timed(k.name, k.op, k.category, k.dims, t.calls, t.ns) for k, t in total.by_kernel.items()]
        by_category = {name: ns * scale for name, ns in total.by_category.items()}
        busy = Busy(
            by_category=by_category,
            gaps=tuple(ns * scale for ns in gaps) if gaps is not None else None,
            on_gpu=run.trace.on_gpu,
            source=judged.source,
            note="of one step run eagerly" if judged.fell_back else None,
        )
        unknown = total.by_category["unknown"] / total.busy_ns if total.busy_ns else None
        if unknown is not None and unknown > account.UNKNOWN_LIMIT:
            lacks.append(f"{unknown:.1%} of the busy time is in kernels of no known category.")
    perturbation = _perturbation(run.profile, timed_ns)
    if perturbation is not None and not on_gpu and not 1 - DISTURBED < perturbation < 1 + DISTURBED:
        lacks.append(
            f"A profiled step took {perturbation:.3g} times as long as a timed one: something else used this machine "
            "in one of the two. Profile again when it is idle."
        )
    training_ns = _phase_ns(run, "training")
    steps_ns = sum(epoch[-1] - epoch[0] for epoch in run.steps if len(epoch) > 1) if run.steps else None
    evidence = Evidence(
        training_ns=training_ns,
        steps_ns=steps_ns,
        flops=images * (flops_per_image or 0),
        rows=rows.get("ops"),
        steps=images / batch,
        peak=peak,
        ceiling=run.ceilings.flops_per_s if run.ceilings else None,
        bandwidth=run.ceilings.bytes_per_s if run.ceilings else None,
        busy=busy,
        peak_source=spec.source if spec else "",
    )
    return Analysis(
        evidence, account.terms(evidence), timed, active, perturbation, unknown, spec, arithmetic, judged, rows, lacks
    )


def _phase_ns(run: Run, name: str) -> int:
    if run.phases is None:
        return round(1e9 * (run.summary.get("train_s") or 0))
    return sum(p["end_ns"] - p["start_ns"] for p in run.phases["phases"] if p["name"] == name)


def _perturbation(profile: dict[str, Any], timed_ns: float | None) -> float | None:
    """A profiled step over one that is not; medians, without the step that was run eagerly."""
    profiled = [ns for i, ns in enumerate(profile.get("step_ns", [])) if i != profile["eager_step"]]
    return median(profiled) / timed_ns if profiled and timed_ns else None
