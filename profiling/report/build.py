"""From the records in a run's folder to its report: a pure function of files, which works anywhere.

`build` reads, `write` puts report.json, report.md and report.html beside the records.
"""

import math
from pathlib import Path
from statistics import median
from typing import Any

from profiling.account import terms as account
from profiling.account.analysis import Analysis, analyse
from profiling.account.floors import CUTS, FUSED_PASSES, FUSED_SAYS, floor_ns, fused_kernels, kernels
from profiling.account.roofline import Roofs, Row, layer_rows
from profiling.account.run_folder import Run, read
from profiling.device.specifications import V100_FLOPS_PER_S, boost_mhz, specification
from profiling.output.errors import ReportError
from profiling.output.files import write_json, write_text
from profiling.output.forms import clean
from profiling.output.numbers import Number, measured, modelled, quoted, unavailable
from profiling.report.html import render_html
from profiling.report.markdown import render_markdown
from profiling.report.sentences import assumption, headline, sentences
from profiling.report.timeline import timeline_record

VERSION = 1
OF_GPUS = ("mfu", "mfu_at_clock", "sm_clock_hz", "throttled_share", "energy_j")
"""Figures that a CPU cannot have: no driver says so much of it, and no data sheet's peak is known."""
TARGET_ACCURACY = 0.94
"""That the article's 256 s are the time to (quoted)."""
V100 = specification("Tesla V100-SXM2-16GB")
"""The article's GPU."""


def build(folder: Path) -> dict[str, Any]:
    """The report of the run in `folder` as a record. Raises ReportError where there is no run."""
    run = read(folder)
    a = analyse(run)
    s, total_ns = run.summary, a.evidence.training_ns
    roofs = Roofs(a.evidence.ceiling or a.evidence.peak, a.evidence.bandwidth)
    work = a.rows.get("ops", [])
    terms = [t.to_json(total_ns) for t in a.terms]
    report = {
        "version": VERSION,
        "title": f"{s['preset']} on {s['device']}",
        "status": "incomplete" if a.lacks or a.doubts else "complete",
        "doubts": a.doubts,
        "lacks": a.lacks,
        "run": _run_facts(run),
        "environment": _flat(run.environment),
        "figures": _figures(run, a),
        "phases": _phases(run),
        "terms": terms,
        "article": _article(a, run),
        **_levers(a, run),
        "profiled": _profiled(a),
        "floors": _floors(a),
        "kernels": _kernels(a, run),
        "layers": [_sourced(r, a) for r in layer_rows(a.timed, work, a.active_steps, roofs)] if a.timed else [],
        "roofs": _roofs(a, run),
        "timeline": timeline_record(run.phases, run.telemetry),
        "epochs": run.epochs,
    }
    report["headline"] = headline(report)
    report["sentences"] = sentences(report)
    report["assumption"] = assumption(report)
    return clean(report)


def write(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Build the report and put it into `folder`, each file whole or not at all. Raises ReportError and OSError.

    Returns the report, and why there is no page of it where that could not be drawn.
    """
    report = build(folder)
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", render_markdown(report))
    try:
        page = render_html(report)
    except ReportError as error:
        return report, str(error)
    write_text(folder / "report.html", page)
    return report, None


def residual_share(report: dict[str, Any]) -> float | None:
    """|residual| over the training phase, None where the account has no residual of its own."""
    total = sum(t["ns"] for t in report["terms"])
    found = [t["ns"] for t in report["terms"] if t["key"] == "residual"]
    return abs(found[0]) / total if found and total else None


def _run_facts(run: Run) -> dict[str, Any]:
    s, keys = (
        run.summary,
        ("preset", "data_identity", "data_source", "device", "dtype", "ops", "step", "epochs", "steps", "seed"),
    )
    return {
        **{key: s[key] for key in keys},
        "batch_size": run.config.get("batch_size"),
        "images": run.work["images"] if run.work else None,
        "git_sha": s["git_sha"],
        "dirty": run.environment.get("git_dirty"),
        "date": run.environment.get("date"),
        "status": s["status"],
        "on_gpu": run.environment["gpu"] is not None,
    }


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, dict):
            flat |= _flat(item, f"{name} ")
        else:
            flat[name] = item if isinstance(item, str | int | float | bool | None) else str(item)
    return flat


def _step(a: Analysis) -> dict[str, Any]:
    """The median of the timed run's steps, and in `spread` where nine in ten of them lie."""
    label, steps = "a step, median", a.step_ns
    if not steps:
        return unavailable("s", "the timed run's steps are not known").to_json(label) | {"spread": ""}
    low, high = (steps[round(share * (len(steps) - 1))] / 1e6 for share in (0.05, 0.95))
    spread = f"nine in ten took {low:.4g} to {high:.4g} ms"
    step_s = median(steps) / 1e9
    return measured(step_s, "s", f"of {len(steps):,} steps of the timed run; {spread}").to_json(label) | {
        "spread": spread
    }


def _figures(run: Run, a: Analysis) -> dict[str, dict[str, Any]]:
    """The key figures; those that only a GPU has are left out on a CPU."""
    s, e = run.summary, a.evidence
    seconds = e.training_ns / 1e9
    rate = e.flops / seconds if seconds and e.flops else None
    no_rate = "the work of a step was not counted, or no step was made"

    def share_of(peak: float | None, source: str, reason: str) -> Number:
        if rate is None or peak is None:
            return unavailable("share", reason if rate is not None else no_rate)
        return measured(rate / peak, "share", source)

    def of_summary(key: str, unit: str, source: str) -> Number:
        return unavailable(unit, "the run did not get that far") if s[key] is None else measured(s[key], unit, source)

    clock = "monotonic clock of the run"
    no_peak = "this GPU's data sheet is not in the table"
    figures = {
        "training_s": ("training", measured(seconds, "s", clock)),
        "train_plus_eval_s": ("training, evaluation", of_summary("train_plus_eval_s", "s", clock)),
        "wall_s": ("process", of_summary("wall_s", "s", clock)),
        "test_accuracy": (
            "test accuracy",
            of_summary("test_accuracy", "share", f"test images, {s['data_identity']} data, n = 1"),
        ),
        "images_per_s": (
            "throughput",
            of_summary("images_per_s", "1/s", "training images over preprocessing and training"),
        ),
        "flops": (
            "model FLOPs",
            modelled(e.flops, "FLOP", "FlopCounterMode on the meta device, times images")
            if e.flops
            else unavailable("FLOP", no_rate),
        ),
        "achieved_flops_per_s": (
            "achieved",
            measured(rate, "FLOP/s", "model FLOPs over the training phase") if rate else unavailable("FLOP/s", no_rate),
        ),
        "v100_normalised": (
            "V100-normalised",
            share_of(V100_FLOPS_PER_S, "achieved over the V100's 125 TFLOP/s; not MFU", no_rate),
        ),
        "mfu": ("MFU", share_of(e.peak, f"achieved over {e.peak_source}", no_peak)),
        "mfu_at_clock": (
            "MFU at the sampled clock",
            _mfu_at_clock(run, a, rate, no_peak if e.peak is None else no_rate),
        ),
        "sm_clock_hz": ("SM clock in training", run.telemetry.sm_clock(_windows(run))),
        "of_ceiling": (
            "of the measured ceiling",
            share_of(e.ceiling, "achieved over the best sustained rate", "the ceilings were not measured"),
        ),
        "perturbation": (
            "profiled / timed step",
            measured(a.perturbation, "ratio", "medians of the two runs' steps")
            if a.perturbation
            else unavailable("ratio", "needs both passes"),
        ),
        "unknown_share": (
            "unknown kernels",
            measured(a.unknown_share, "share", "of the busy time of the profiled pass")
            if a.unknown_share is not None
            else unavailable("share", "no trace"),
        ),
        "peak_memory_bytes": (
            "peak memory",
            of_summary("peak_memory_bytes", "B", "of the device, or of the process on a CPU"),
        ),
        "throttled_share": ("throttled", run.telemetry.throttled_share()),
        "energy_j": ("energy", run.telemetry.energy()),
    }
    left_out = () if e.on_gpu else OF_GPUS
    records = {key: figure.to_json(label) for key, (label, figure) in figures.items() if key not in left_out}
    return {"training_s": records.pop("training_s"), "step_s": _step(a), **records}


def _windows(run: Run) -> list[tuple[int, int]]:
    phases = run.phases["phases"] if run.phases else []
    return [(phase["start_ns"], phase["end_ns"]) for phase in phases if phase["name"] == "training"]


def _mfu_at_clock(run: Run, a: Analysis, rate: float | None, reason: str) -> Number:
    """The share of the peak that the GPU had at the clocks it really ran at; `reason` is for want of the other two."""
    if rate is None or a.evidence.peak is None or a.specification is None:
        return unavailable("share", reason)
    clock, quoted_mhz = run.telemetry.sm_clock(_windows(run)), boost_mhz(a.specification, a.arithmetic)
    if clock.value is None:
        return unavailable("share", clock.source)
    if quoted_mhz is None:
        return unavailable("share", f"no document says at which clock the peak of {a.specification.name} is quoted")
    share = rate / (a.evidence.peak * clock.value / (1e6 * quoted_mhz))
    clocks = f"{clock.value / 1e6:,.0f} MHz sampled / {quoted_mhz:,} MHz of the peak"
    return modelled(share, "share", f"achieved over the peak times {clocks}; {a.evidence.peak_source}")


def _phases(run: Run) -> list[dict[str, Any]]:
    totals: dict[str, int] = {}
    for phase in (run.phases or {"phases": []})["phases"]:
        totals[phase["name"]] = totals.get(phase["name"], 0) + phase["end_ns"] - phase["start_ns"]
    source = "monotonic clock of the run; phases are exclusive and contiguous"
    return [{"name": name, "ns": ns, "status": "measured", "source": source} for name, ns in totals.items()]


def _article(a: Analysis, run: Run) -> dict[str, Any]:
    """The V100's column, by the same code; the network's ops at the article's batch are part of the record."""
    title = "the article, one V100"
    total_ns = round(1e9 * account.ARTICLE_S)
    if not run.work or not a.rows.get("article"):
        return {"title": title, "total_ns": total_ns, "terms": []}
    terms = account.article_terms(
        a.rows["article"],
        run.work["article_batch"],
        V100.flops_per_s["float16"],
        V100.bytes_per_s,
        run.work["article_flops_per_image"],
    )
    return {"title": title, "total_ns": total_ns, "terms": [t.to_json(total_ns) for t in terms]}


def _kernels(a: Analysis, run: Run) -> list[dict[str, Any]]:
    """With what Nsight Compute counted, where it did: bytes of DRAM, and the tensor cores' activity, per launch."""
    counted = [run.counters.get(row.name) for row in a.kernels]
    return [
        _sourced(row, a) | {"dram_bytes": c.dram_bytes if c else None, "tensor_active": c.tensor_active if c else None}
        for row, c in zip(a.kernels, counted, strict=True)
    ]


def _sourced(row: Row, a: Analysis) -> dict[str, Any]:
    """With the steps that its times are of."""
    return row.to_json() | {"source": row.source.replace("torch.profiler", a.evidence.busy.source)}


def _profiled(a: Analysis) -> dict[str, Any]:
    """Which steps of the profiled pass the account is made of."""
    if a.judged is None:
        return {"steps": None, "refused": [], "said": "", "eager_step": None, "fell_back": False}
    judged = a.judged
    return {
        "steps": judged.steps,
        "refused": [one._asdict() for one in judged.refused],
        "said": judged.said,
        "eager_step": judged.eager_step,
        "fell_back": judged.fell_back,
    }


def _levers(a: Analysis, run: Run) -> dict[str, Any]:
    """The factors between the article's 256 s and this run, or the `reason` why the two say nothing of each other."""
    peak, seconds = a.evidence.peak or a.evidence.ceiling, run.summary["train_plus_eval_s"]
    accuracy = run.summary["test_accuracy"]
    reason = ""
    if run.summary["data_identity"] == "synthetic":
        reason = "the images are synthetic, and the article's are not"
    elif accuracy is None or accuracy < TARGET_ACCURACY:
        reached = "no accuracy is known" if accuracy is None else f"it reached {accuracy:.2%}"
        reason = f"{reached}, and the article's 256 s are the time to {TARGET_ACCURACY:.0%}"
    elif not peak or not seconds or not a.evidence.flops:
        reason = "its work, its time or this device's peak is not known"
    if reason:
        return {"levers": [], "no_levers": reason}
    article_flops = account.ARTICLE_IMAGES * run.work["article_flops_per_image"]
    factors = account.levers(a.evidence.flops, seconds, peak, article_flops, V100_FLOPS_PER_S)
    whose = "data sheet's peak" if a.evidence.peak else "measured ceiling"
    source = f"256 s (quoted) over this run's training with evaluation, at the {whose}"
    rows = [
        {"name": name, "factor": factor, "log": math.log(factor), "status": "modelled", "source": source}
        for name, factor in factors
    ]
    return {"levers": rows, "no_levers": ""}


def _floors(a: Analysis) -> list[dict[str, Any]]:
    """The least time that this run's training could take on this device, by how its layers are cut into kernels."""
    flops_per_s, bytes_per_s = a.evidence.ceiling, a.evidence.bandwidth
    if not flops_per_s or not bytes_per_s or not a.rows.get("reference"):
        return []
    of_cuts = [(cut.name, cut.passes, kernels(a.rows["reference"], cut), cut.says) for cut in CUTS]
    if a.rows.get("fused"):
        of_cuts.insert(-1, ("fused", FUSED_PASSES, fused_kernels(a.rows["fused"]), FUSED_SAYS))
    return [
        {
            "name": name,
            "passes": passes,
            "ns": round(floor_ns(rows, flops_per_s, bytes_per_s) * a.evidence.steps),
            "note": note,
        }
        for name, passes, rows, note in of_cuts
    ]


def _roofs(a: Analysis, run: Run) -> dict[str, list[dict[str, Any]]]:
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
