"""Two runs beside each other: what each term of the account gained or lost, which sums to what the stopwatch says.

Runs of different data, hardware or software are compared with that said first. Refused is what would mislead: seconds
of different amounts of work, a run that did not end, terms that mean different things on a CPU and on a GPU, an account
that lacks a part.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from profiling.output.errors import CommandError, RefusedError, ReportError
from profiling.output.files import read_json, write_text
from profiling.output.forms import COUNT, FACT, NUMBER, Number, clean
from profiling.output.terminal import Terminal
from profiling.output.units import show
from profiling.report.charts import difference
from profiling.report.html import assets, template

NAMED = {
    "data": ("data_identity", "data_source"),
    "device": ("device",),
    "dtype": ("dtype",),
    "ops": ("ops",),
    "preset": ("preset",),
    "batch size": ("batch_size",),
    "seed": ("seed",),
    "commit": ("git_sha", "dirty"),
}
"""Names of what two runs may differ in -> entries of `run` that say so."""

FIGURES = {"test_accuracy": 4, "images_per_s": 3, "step_s": 3, "peak_memory_bytes": 3}
"""Figures that stand below the terms, and their digits."""

_NS = Number(-(2.0**62), 2.0**62, whole=True)
REPORT = {
    "version": 1,
    "title": str,
    "status": ("complete", "incomplete"),
    "doubts?": [str],
    "lacks": [str],
    "run": {"status": str, "images": (COUNT, None), "on_gpu": bool, str: FACT},
    "environment": {str: FACT},
    "phases": [{"name": str, "ns": COUNT}],
    "terms": [{"key": str, "name": str, "ns": _NS}],
    "figures": {str: {"label": str, "value": (NUMBER, None), "unit": str}},
}
"""The part of a report.json that is read here; see `profiling.output.forms`."""

SOFTWARE = ("python", "torch", "triton", "numpy", "gpu driver", "cpu", "cores", "threads")
"""Ends of the names of a report's environment that are compared."""

BAR = 24
"""Letters of the longest bar of a comparison in text."""


def load(run: Path) -> dict[str, Any]:
    """The report of a run: its report.json, or built from its records. Raises ReportError."""
    path = run if run.suffix == ".json" else run / "report.json"
    if os.path.exists(path):
        try:
            return read_json(path, REPORT)
        except (OSError, ValueError) as error:
            raise ReportError(f"{path} is no report: {error}; make it anew with python -m profiling report") from None
    from profiling.report.build import build  # imports torch, which two report.json can be compared without

    return build(run)


def compare(a: dict[str, Any], b: dict[str, Any], names: tuple[str, str] = ("A", "B")) -> dict[str, Any]:
    """The difference of two reports as a record, B less A in nanoseconds; `names` are theirs. Raises RefusedError."""
    _require_comparable(a, b)
    of_a, of_b = (_terms(report, other) for report, other in ((a, b), (b, a)))
    rows = []
    for key in dict.fromkeys([*of_a, *of_b]):
        ns_a, ns_b = (terms[key]["ns"] if key in terms else 0 for terms in (of_a, of_b))
        name = (of_b.get(key) or of_a[key])["name"]
        rows.append({"key": key, "name": name, "a_ns": ns_a, "b_ns": ns_b, "difference_ns": ns_b - ns_a})
    total_a, total_b = (sum(t["ns"] for t in report["terms"]) for report in (a, b))
    phases = [{p["name"]: p["ns"] for p in report["phases"]} for report in (a, b)]
    said = [(name, [*(r["doubts"] or []), *r["lacks"]]) for name, r in zip(names, (a, b), strict=True)]
    result = {
        "version": 1,
        "names": list(names),
        "titles": [a["title"], b["title"]],
        "doubts": [f"{name}: {line}" for name, lines in said for line in lines],
        "differs": differences(a, b),
        "a_ns": total_a,
        "b_ns": total_b,
        "difference_ns": total_b - total_a,
        "terms": sorted(rows, key=lambda row: -abs(row["difference_ns"])),
        "phases": [
            {"name": name, "a_ns": phases[0].get(name, 0), "b_ns": phases[1].get(name, 0)}
            for name in dict.fromkeys([*phases[0], *phases[1]])
        ],
        "figures": _figures(a, b),
    }
    return result | {"sentence": _sentence(result), "uncertainty": _uncertainty(result)}


def _terms(report: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Terms by key. Where only one of the two has a data sheet, both are held against the measured ceiling."""
    terms = {t["key"]: t for t in report["terms"]}
    theirs = {t["key"]: t["name"] for t in other["terms"]}
    if "ideal" in terms and "ideal" in theirs and terms["ideal"]["name"] != theirs["ideal"]:
        gap = terms.pop("ceiling_gap", None)
        ideal = terms.pop("ideal")
        if gap is not None:  # the two together are at the ceiling
            ideal = {"key": "ideal", "name": "ideal at the measured ceiling", "ns": ideal["ns"] + gap["ns"]}
        terms = {ideal["name"]: ideal} | terms
    return terms


def _figures(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, str]]:
    """The FIGURES that both runs know, in words."""
    rows = []
    for key, digits in FIGURES.items():
        pair = [report["figures"].get(key) for report in (a, b)]
        if all(figure and figure["value"] is not None for figure in pair):
            of_a, of_b = (show(figure["value"], figure["unit"], digits) for figure in pair)
            rows.append({"name": pair[0]["label"], "a": of_a, "b": of_b})
    return rows


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The differences of two runs besides their times, one line each."""
    lines = []
    for name, keys in NAMED.items():
        one, other = (" ".join(str(report["run"].get(key)) for key in keys) for report in (a, b))
        if one != other:
            lines.append(f"{name}: {one} | {other}")
    here, there = a["environment"], b["environment"]
    for key in sorted({*here, *there}):
        if key.endswith(SOFTWARE) and here.get(key) != there.get(key):
            lines.append(f"{key}: {here.get(key)} | {there.get(key)}")
    return lines


def _require_comparable(a: dict[str, Any], b: dict[str, Any]) -> None:
    for report in (a, b):
        status = report["run"]["status"]
        if status != "complete":
            raise RefusedError(f"{report['title']} ended as {status!r}; compare runs that are complete")
        if not any(t["key"] == "residual" for t in report["terms"]):
            lacks = " ".join(report["lacks"]) or "its terms are not attributed."
            raise RefusedError(f"{report['title']} has no whole account: {lacks} Profile it again")
    images = [report["run"]["images"] for report in (a, b)]
    if images[0] != images[1]:
        raise RefusedError(
            f"the runs trained on {images[0]:,} and {images[1]:,} images: their seconds are of different work. Train "
            "both for the same epochs"
        )
    if a["run"]["on_gpu"] != b["run"]["on_gpu"]:
        raise RefusedError("one run is of a GPU and one of a CPU: their terms mean different things")
    identities = {report["run"].get("data_identity") for report in (a, b)}
    if "synthetic" in identities and len(identities) > 1:
        raise RefusedError(
            "one run is of synthetic images and one of CIFAR-10: their accuracies say nothing of each other"
        )


def _sentence(c: dict[str, Any]) -> str:
    difference_ns, (name_a, name_b), total_a, total_b = c["difference_ns"], c["names"], c["a_ns"], c["b_ns"]
    if not difference_ns or not total_a or not total_b:
        return "The two runs took the same time."
    word, times = ("faster", total_a / total_b) if difference_ns < 0 else ("slower", total_b / total_a)
    of_a, of_b = (show(ns, "ns", 4) for ns in (total_a, total_b))
    text = f"{name_b} is {show(abs(difference_ns), 'ns')} {word} than {name_a}: {of_a} to {of_b}"
    factor = f"{times:.3g}"
    text += "" if factor == "1" else f", {factor} times {word}"
    known = [(t["name"], t["difference_ns"]) for t in c["terms"] if t["key"] != "residual"]
    same = next(((name, ns) for name, ns in known if ns * difference_ns > 0), None)
    against = next(((name, ns) for name, ns in known if ns * difference_ns < 0), None)
    if same:
        text += f"; the largest part is {same[0]} ({signed(same[1])} s, {same[1] / difference_ns:.0%})"
    if against and abs(against[1]) > 0.1 * abs(difference_ns):
        text += f", against {against[0]} ({signed(against[1])} s)"
    return f"{text}."


def _uncertainty(c: dict[str, Any]) -> str:
    """Both residuals, which no term of the difference is surer than."""
    residual = next(t for t in c["terms"] if t["key"] == "residual")
    (name_a, name_b), a, b = c["names"], residual["a_ns"], residual["b_ns"]
    return (
        f"Unexplained are {signed(a)} s of {name_a} ({a / c['a_ns']:.1%}) and {signed(b)} s of {name_b} "
        f"({b / c['b_ns']:.1%}): a term may be wrong by {show(abs(a) + abs(b), 'ns')}."
    )


def signed(ns: float) -> str:
    """A difference in seconds with its sign; none where it rounds to nothing."""
    text = f"{ns / 1e9:+.3f}"
    return "0.000" if not text.strip("+-0.") else text


def lines(c: dict[str, Any]) -> list[str]:
    """The comparison as text: its doubts and differences, the waterfall from A to B, phases, figures, the sentence."""
    largest = max([abs(t["difference_ns"]) for t in c["terms"]] + [1])
    text = [f"{letter}  {name}: {title}" for letter, name, title in zip("AB", c["names"], c["titles"], strict=True)]
    text += ["", *(f"IN DOUBT: {line}" for line in c["doubts"])]
    text += [f"differs in {line}" for line in c["differs"]] or ["they differ in nothing but time"]
    text += ["", f"{'':<44}{'A, s':>10}{'B, s':>10}{'B - A':>10}"]

    def line(name: str, row: dict[str, Any]) -> str:
        return f"{name:<44}{row['a_ns'] / 1e9:>10.3f}{row['b_ns'] / 1e9:>10.3f}{signed(row['b_ns'] - row['a_ns']):>10}"

    text.append(line("training", c))
    for t in c["terms"]:
        bar = ("-" if t["difference_ns"] < 0 else "+") * round(BAR * abs(t["difference_ns"]) / largest)
        text.append(f"{line('  ' + t['name'][:41], t)}  {bar}".rstrip())
    text += ["", *(line(f"phase {p['name']}", p) for p in c["phases"])]
    text += [f"{f['name']:<44}{f['a']:>14}{f['b']:>14}" for f in c["figures"]]
    return [*text, "", c["sentence"], c["uncertainty"]]


def render_comparison(compared: dict[str, Any], addresses: Sequence[str | None] = (None, None)) -> str:
    """The page of what `compare` returned; `addresses` are those of the two runs' own pages."""
    chart = difference(compared)
    training = {"name": "training", "a_ns": compared["a_ns"], "b_ns": compared["b_ns"]}
    phases = [phase | {"name": f"phase {phase['name']}"} for phase in compared["phases"]]
    rows = [training, *compared["terms"], *phases]
    return template("compare.html.jinja").render(
        **assets([chart]), **compared, chart=chart, addresses=addresses, rows=rows, signed=signed
    )


def run(run_a: Path, run_b: Path, out: Path | None, as_json: bool, terminal: Terminal) -> int:
    """Say how two runs differ, and draw it to `out`; the exit code. Raises ReportError, RefusedError, CommandError."""
    names = [path.parent.name if path.suffix == ".json" else path.resolve().name for path in (run_a, run_b)]
    if names[0] == names[1]:
        names = [str(run_a), str(run_b)]
    compared = compare(load(run_a), load(run_b), clean(names))
    if out is not None:
        try:
            write_text(out, render_comparison(compared, [_address(run, out) for run in (run_a, run_b)]))
        except OSError as error:
            raise CommandError(f"the page cannot be written to {out}: {error.strerror}; name another --out") from None
    if as_json:
        terminal.put(json.dumps(compared, indent=2))
    for line in lines(compared):
        terminal.say(line)
    return 0


def _address(run: Path, out: Path) -> str | None:
    """A run's page as seen from the comparison's in `out`; None where there is none."""
    page = (run.parent if run.suffix == ".json" else run) / "report.html"
    return quote(os.fsencode(os.path.relpath(page.resolve(), out.resolve().parent))) if page.exists() else None
