"""The results of a reproduction as one text: the table of its runs, and what else was found.

Everything is read from the steps' own files, so that what a step finished before it was ended counts too. A section
that cannot be read says so, and the others stand.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from experiments.reproduce_runs import FUSED, Row, records, runs, summaries
from profiling.output.files import read_json

DONE, FAILED, LATE, LEFT, UNAVAILABLE = "done", "failed", "out of time", "left", "unavailable"
LONGEST = 10_900
"""Characters of what is printed; the page has all of it."""


def text(out: Path, document: Row) -> str:
    """The results in `out`; `document` is the record."""
    lines = []
    for section in SECTIONS:
        try:
            lines += section(out, document)
        except Exception as error:  # whatever a damaged file leads to costs its section, not the rest
            lines.append(f"== {section.__name__.strip('_')}: cannot be read ({type(error).__name__}: {error})"[:300])
    return "\n".join([*lines, *_steps(document["steps"], out)])


def clipped(whole: str) -> str:
    """The part to print: whole lines, and the last one, which says what is left."""
    if len(whole) <= LONGEST:
        return whole
    last = "\n... the rest is in reproduce.md\n" + whole.rpartition("\n")[2]
    return whole[: LONGEST - len(last) + 1].rpartition("\n")[0] + last


def markdown(whole: str) -> str:
    """The page."""
    head, _, rest = whole.partition("\n")
    return f"# {head}\n\n```\n{rest}\n```\n"


def last_line(log: Path) -> str:
    """The last words in it, shortened."""
    return next((line.strip()[:200] for line in reversed(_lines(log)) if line.strip()), "no word")


def _lines(log: Path) -> list[str]:
    try:
        return log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []


def _head(out: Path, document: Row) -> list[str]:
    e, settings = document["environment"], document["settings"]
    trained = summaries(out).values()
    versions = ", ".join(f"{name} {version}" for name, version in e["packages"].items() if version)
    driver = f", driver {e['gpu']['driver']}" if e.get("gpu") else ""
    commits = {str(run.get("git_sha"))[:12] for run in trained} or {str(e["git_sha"])[:12]}
    dirty = " with changes" if e.get("git_dirty") else ""
    identities = {str(run.get("data_identity")) for run in trained} or {"none so far"}
    lines = [
        f"reproduce on {settings['device_name']}{driver}; data: {', '.join(sorted(identities))}",
        f"{e['cores']} cores, Python {e['python']}, {versions}; commit {', '.join(sorted(commits))}{dirty}; measured "
        "here unless a line says otherwise",
    ]
    if settings["small"]:
        lines.append("SMALL: every training is a short one of the preset laptop: a look at whether it all works")
    if len(commits) > 1:
        lines.append("MIND: the runs are from different commits")
    found = [line for line in _lines(out / "doctor.log") if line.startswith(("missing ", "warning "))]
    return [*lines, *([f"doctor: {'; '.join(' '.join(line.split())[:110] for line in found[:6])}"] if found else [])]


def _check(out: Path, document: Row) -> list[str]:
    """The kernels that were held against float64."""
    rows = records(out / "check.jsonl")
    if not rows:
        return []
    bad = [row for row in rows if row["status"] != "right"]
    said = ", ".join(f"{n} {word}" for word, n in collections.Counter(row["status"] for row in rows).most_common())
    return [
        f"== kernels against float64: {len(rows)} checks of {len({row['op'] for row in rows})} ops, {said}",
        *(f"  {r['status']}: {r['case']}, {r['batch']} images: {str(r.get('error'))[:140]}" for r in bad[:12]),
        *([f"  and {len(bad) - 12} more in check.jsonl"] if bad[12:] else []),
    ]


def _report(out: Path, document: Row) -> list[str]:
    """The account of the profiled run."""
    path = out / f"{FUSED}-0" / "report.json"
    if not path.exists():
        return []
    report = read_json(path)
    lacks = [f"  lacks: {reason[:200]}" for reason in [*report.get("doubts", []), *report.get("lacks", [])][:4]]
    said = [f"  {sentence[:230]}" for sentence in report["sentences"][:5]]
    return [f"== account of {FUSED}-0: {report['headline']}", *said, *lacks]


def _ceilings(out: Path, document: Row) -> list[str]:
    path = out / "ceilings.json"
    if not path.exists():
        return []
    c = read_json(path)
    best = max(c["gemm"] + c["convolutions"], key=lambda one: one["value"])
    held = f"; held back by {', '.join(c['reasons'])}" if c["reasons"] else ""
    return [
        f"== ceilings: {best['value'] / 1e12:,.1f} TFLOP/s ({best['name']} {best['shape']}), copy "
        f"{c['copy']['value'] / 1e9:,.0f} GB/s, {c['launch']['value'] * 1e6:.2f} us a launch{held}"
    ]


def _logs(out: Path, document: Row) -> list[str]:
    """The last word of the steps that say it there, and the tests that failed."""
    said = []
    for log in (out / f"{name}.log" for name in ("tests", "tiles", "memcheck", "racecheck")):
        failed = [f"  {line[:150]}" for line in _lines(log) if line.startswith(("FAILED", "ERROR"))]
        said += [f"== {log.stem}: {last_line(log)}", *failed[:10]] if log.exists() else []
    return said


def _bench(out: Path, document: Row) -> list[str]:
    """Our kernels beside the best alternative, caches cold."""
    rows = [r for r in records(out / "bench.jsonl") if (r.get("provider"), r.get("mode")) == ("ours", "cold")]
    if not rows:
        return []
    words = collections.Counter(row["verdict"] for row in rows if row["verdict"])
    wrong = sum(row["wrong"] for row in rows)
    counted = ", ".join(f"{count} {word}" for word, count in words.most_common()) or "none timed beside another"
    lines = [f"== bench, our kernels, caches cold: {counted}" + (f"; {wrong} WRONG" if wrong else "")]
    for row in rows:
        us, speed = row["us"], row.get("speedup")
        took = f"{us['value']:.1f} us" if us["value"] is not None else f"unavailable: {us['source'][:100]}"
        beside = f", {speed['value']:.2f} x {row['best_alternative']}: {row['verdict']}" if speed else ""
        lines.append(f"  {row['case']}: {took}{beside}")
    return lines


def _step_speeds(out: Path, document: Row) -> list[str]:
    path = out / "steps.json"
    rows = read_json(path)["rows"] if path.exists() else []
    cells = [
        f"{row['batch']} {row['step']} "
        + (f"unavailable ({row['reason'][:60]})" if row["reason"] else f"{row['images_per_s']:,.0f} images/s")
        for row in rows
    ]
    return [f"== step modes by batch: {'; '.join(cells)}"] if cells else []


def _kernels(out: Path, document: Row) -> list[str]:
    lines = []
    for path in sorted(out.glob("*/kernels.json"), reverse=True):
        found = read_json(path)
        lacks = f"; NOT TO BE TRUSTED: {'; '.join(found['lacks'])[:200]}" if found["lacks"] else ""
        timed = found["timed_ms"]
        filled = "unknown" if timed is None else f"{timed:.3f} ms, filled to {found['sum_ms'] / timed:.0%}"
        lines.append(
            f"== longest kernels of {path.parent.name}: {found['sum_ms']:.3f} ms a step in "
            f"{found['kernels_a_step']:.0f} kernels; timed step {filled}; {found['source']}{lacks}"
        )
        for kernel in found["kernels"]:
            share = kernel["us"] / max(1e3 * found["sum_ms"], 1e-9)
            lines.append(f"  {kernel['us']:9.1f} us {share:6.1%} x{kernel['calls']:5.1f}  {kernel['name'][:76]}")
    return lines


Section = Callable[[Path, Row], list[str]]
SECTIONS: list[Section] = [_head, runs, _check, _report, _ceilings, _logs, _bench, _step_speeds, _kernels]
"""The most valuable first: what is printed may end before the last."""


def _steps(steps: Sequence[Row], out: Path) -> Iterator[str]:
    """Done, not done and why, and unavailable; the last line says what is left."""
    by_status = collections.defaultdict(list)
    for step in steps:
        by_status[step["status"]].append(step)
    took = ", ".join(f"{step['name']} {step['seconds']:.0f}" for step in by_status[DONE])
    if took:
        yield f"== done, s: {took}"
    left = [step for status in (FAILED, LATE, LEFT) for step in by_status[status]]
    for step in left:
        if step["why"]:
            seconds = "" if step["seconds"] is None else f" after {step['seconds']:.0f} s"
            yield f"== {step['status']}{seconds}: {step['name']}: {step['why'][:220]}"
    for reason in dict.fromkeys(step["why"] for step in by_status[UNAVAILABLE]):
        yield f"== unavailable, {reason}: {_named([s for s in by_status[UNAVAILABLE] if s['why'] == reason])}"
    yield f"left: {_named(left)}; the same command with --out {out} goes on" if left else "everything is done"


def _named(steps: Sequence[Row], most: int = 12) -> str:
    more = f" and {len(steps) - most} more" if steps[most:] else ""
    return ", ".join(step["name"] for step in steps[:most]) + more
