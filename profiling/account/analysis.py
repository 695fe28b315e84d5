"""What a run's folder holds, read and brought together; the first half of a report.

Whatever is missing or damaged is said in `lacks` and left out of the account; only a folder without summary.json is no
run.
"""

import os
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from profiling.account import consistency
from profiling.account import terms as account
from profiling.account.attribution import Idle, doubt, idle, per_step
from profiling.account.cross_check import Judged, judge
from profiling.account.roofline import Roofs, Row, Timed, kernel_rows
from profiling.account.terms import Busy, Evidence, Term
from profiling.account.trace import Trace
from profiling.account.trace import read as read_trace
from profiling.account.work import Work
from profiling.account.work import from_json as work_from_json
from profiling.device import ncu
from profiling.device.ceilings import Ceilings
from profiling.device.specifications import Specification, specification
from profiling.output.errors import ReportError
from profiling.output.files import read_bytes, read_json, read_jsonl, require_regular
from profiling.output.forms import COUNT, FACT, NUMBER, POSITIVE, SECONDS, SHARE, clean
from profiling.run import telemetry
from profiling.run.collect import RECORDS

SUMMARY = {
    "status": str,
    "preset": str,
    "data_identity": ("official", "copy", "synthetic"),
    "data_source": (str, None),
    "device": str,
    "dtype": str,
    "ops": str,
    "step": (str, None),
    "epochs": COUNT,
    "steps": COUNT,
    "seed": (NUMBER, None),
    "git_sha": (str, None),
    "test_accuracy": (SHARE, None),
    "train_s": SECONDS,
    "train_plus_eval_s": (SECONDS, None),
    "wall_s": (SECONDS, None),
    "images_per_s": (NUMBER, None),
    "peak_memory_bytes": (COUNT, None),
}
CONFIG = {"batch_size": POSITIVE}
ENVIRONMENT = {"gpu": (None, {str: FACT}), "date?": str, "git_dirty?": bool, str: FACT}
EPOCH = {"epoch": POSITIVE} | dict.fromkeys(
    ["learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "images_per_s", "train_s"],
    (NUMBER, None),
)
PHASE = {"name": str, "start_ns": COUNT, "end_ns": COUNT}
OP = {"op": str, "family": str, "layer": str, "dims": [[COUNT]], "backward": bool, "flops": COUNT, "bytes": COUNT}
FORMS = {
    "phases": {"version": 1, "start_ns": COUNT, "end_ns": COUNT, "phases": [PHASE]},
    "steps": {"version": 1, "epochs": [[COUNT]], "missed_steps": COUNT},
    "work": {
        "version": 1,
        "batch": POSITIVE,
        "dtype": str,
        "images": POSITIVE,
        "flops_per_image": POSITIVE,
        "article_batch": POSITIVE,
        "article_flops_per_image": POSITIVE,
        "ops": [OP],
        "reference?": [OP],
        "fused?": [OP],
        "article?": [OP],
    },
    "profile": {
        "version": 1,
        "eager_step": (COUNT, None),
        "step_images": [POSITIVE],
        "step_ns": [POSITIVE],
        "error": (str, None),
    },
}
"""The records of a run, as `profiling.run.log` and `profiling.run.collect` write them; those in its records folder."""


class Run(NamedTuple):
    """Everything that was read, each record of its form. None is missing, and `lacks` says so."""

    summary: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[dict[str, Any]]
    phases: dict[str, Any] | None
    steps: dict[str, Any] | None
    work: dict[str, Any] | None
    ceilings: Ceilings | None
    profile: dict[str, Any]
    trace: Trace | None
    telemetry: telemetry.Telemetry
    counters: dict[str, ncu.Measured]
    lacks: list[str]


def read(folder: Path) -> Run:
    """Read a run's folder. Raises ReportError where there is no readable summary.json, or no record of a profiling."""
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

    def record(of: str) -> Any:
        return read_json(records / f"{of}.json", FORMS[of])

    name = clean(str(folder))
    if not os.path.exists(folder / "summary.json"):  # unlike a Path's own, it raises nothing for too long a name
        raise ReportError(
            f"{name} is not the folder of a run: it has no summary.json; expected one that train.py wrote"
        )
    try:
        summary = read_json(folder / "summary.json", SUMMARY)
    except (OSError, ValueError) as error:
        raise ReportError(f"{name} is not that of a single run: {error}; of several, name one run-NNN folder") from None
    if not records.is_dir():
        raise ReportError(f"{name} was not profiled, so there is no account of it: python -m profiling collect {name}")
    profile = optional("record of the profiled pass", lambda: record("profile"), {})
    if profile.get("error"):
        lacks.append(f"The profiled pass failed: {profile['error']}.")
    trace = optional("trace of kernels", lambda: _trace(records / "trace.json.gz"))
    environment = optional(
        "description of the machine", lambda: read_json(folder / "environment.json", ENVIRONMENT), {"gpu": None}
    )
    if trace is not None and not trace.on_gpu and environment["gpu"]:
        lacks.append("The trace of a run on a GPU holds none of its kernels.")
    if trace is not None and trace.on_gpu and not environment["gpu"]:
        lacks.append("The trace is of a GPU, and environment.json knows of none.")
    counted = (records / "ncu.csv").exists()
    heard = telemetry.read(records / "telemetry.jsonl")
    return consistency.believed(
        Run(
            summary,
            optional("configuration", lambda: read_json(folder / "config.json", CONFIG), {}),
            environment,
            optional("log of epochs", lambda: read_jsonl(folder / "log.jsonl", EPOCH), []),
            optional("record of the phases", lambda: record("phases")),
            optional("record of the steps", lambda: record("steps")),
            optional("count of the work in a step", lambda: record("work")),
            optional("measurement of this device's ceilings", lambda: _ceilings(records / "ceilings.json")),
            profile,
            trace,
            heard,
            optional("output of ncu", lambda: _counters(records / "ncu.csv", lacks), {}) if counted else {},
            lacks + heard.lacks,
        )
    )


def _trace(path: Path) -> Trace:
    require_regular(path)
    return read_trace(path)


def _ceilings(path: Path) -> Ceilings:
    return Ceilings.from_json(read_json(path))


def _counters(path: Path, lacks: list[str]) -> dict[str, ncu.Measured]:
    """Of each kernel's name, means over its launches."""
    text = read_bytes(path).decode(errors="replace")
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
            gaps = Idle()  # those of a step run eagerly are not the run's
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
