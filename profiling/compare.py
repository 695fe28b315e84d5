"""Two runs beside each other: what each term of the account gained or lost, which sums to what the stopwatch says.

Runs of different data, hardware or software are compared with that said first. Refused is what would mislead: seconds
of different amounts of work, a run that did not end, terms that mean different things on a CPU and on a GPU, an account
that lacks a part.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiling.errors import CommandError, RefusedError, ReportError
from profiling.records import read_json, write_text

if TYPE_CHECKING:
    from profiling.console import Terminal

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
"""What two runs may differ in, and the entries of `run` that say so."""

SOFTWARE = ("python", "torch", "triton", "numpy", "gpu driver", "cpu", "cores", "threads")
"""Entries of a report's environment that are named where they differ, by how they end."""


def load(run: Path) -> dict[str, Any]:
    """The report of a run: its report.json, or built from its records. Raises ReportError."""
    path = run if run.suffix == ".json" else run / "report.json"
    if path.exists():
        try:
            report = read_json(path)
            if report["version"] == 1 and report["terms"] is not None and report["run"] is not None:
                return report
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ReportError(f"{path} is no report: {error}; make it anew with python -m profiling report") from None
        raise ReportError(f"{path} is a report of version {report['version']!r}, expected 1")
    from profiling.report import build

    return build(run)


def compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """The difference of two reports as a record, B less A in nanoseconds. Raises RefusedError."""
    _require_comparable(a, b)
    of_a, of_b = ({t["key"]: t for t in report["terms"]} for report in (a, b))
    keys = list(dict.fromkeys([*of_a, *of_b]))
    rows = []
    for key in keys:
        ns_a, ns_b = (terms[key]["ns"] if key in terms else 0 for terms in (of_a, of_b))
        name = (of_b.get(key) or of_a[key])["name"]
        rows.append({"key": key, "name": name, "a_ns": ns_a, "b_ns": ns_b, "difference_ns": ns_b - ns_a})
    total_a, total_b = (sum(t["ns"] for t in report["terms"]) for report in (a, b))
    result = {
        "version": 1,
        "a": a["title"],
        "b": b["title"],
        "differs": differences(a, b),
        "a_ns": total_a,
        "b_ns": total_b,
        "difference_ns": total_b - total_a,
        "terms": sorted(rows, key=lambda row: -abs(row["difference_ns"])),
        "phases": _phases(a, b),
        "accuracy": [r["figures"]["test_accuracy"]["value"] for r in (a, b)],
    }
    return result | {"sentence": _sentence(result)}


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """In what the two runs differ besides their times, one line each."""
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
        if report["run"].get("status") != "complete":
            raise RefusedError(
                f"{report['title']} ended as {report['run'].get('status')!r}; compare runs that are complete"
            )
        if not any(t["key"] == "residual" for t in report["terms"]):
            lacks = " ".join(report["lacks"]) or "its terms are not attributed."
            raise RefusedError(f"{report['title']} has no whole account: {lacks} Profile it again")
    images = [report["run"].get("images") for report in (a, b)]
    if images[0] != images[1]:
        raise RefusedError(
            f"the runs trained on {images[0]:,} and {images[1]:,} images: their seconds are of different work. Train "
            "both for the same epochs"
        )
    if a["run"].get("on_gpu") != b["run"].get("on_gpu"):
        raise RefusedError("one run is of a GPU and one of a CPU: their terms mean different things")
    identities = {report["run"].get("data_identity") for report in (a, b)}
    if "synthetic" in identities and len(identities) > 1:
        raise RefusedError(
            "one run is of synthetic images and one of CIFAR-10: their accuracies say nothing of each other"
        )


def _phases(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, Any]]:
    of_a, of_b = ({p["name"]: p["ns"] for p in report["phases"]} for report in (a, b))
    return [
        {"name": name, "a_ns": of_a.get(name, 0), "b_ns": of_b.get(name, 0)} for name in dict.fromkeys([*of_a, *of_b])
    ]


def _sentence(c: dict[str, Any]) -> str:
    difference = c["difference_ns"]
    if not difference or not c["terms"] or not c["a_ns"]:
        return "The two runs took the same time."
    word = "faster" if difference < 0 else "slower"
    text = (
        f"B is {abs(difference) / 1e9:.4g} s {word} than A ({c['a_ns'] / 1e9:.4g} to {c['b_ns'] / 1e9:.4g} s, "
        f"{c['a_ns'] / c['b_ns']:.3g} times as fast)"
    )
    same = [t for t in c["terms"] if t["difference_ns"] * difference > 0]
    against = [t for t in c["terms"] if t["difference_ns"] * difference < 0]
    text += f"; most of it in {same[0]['name']} ({same[0]['difference_ns'] / 1e9:+.4g} s)"
    if against and abs(against[0]["difference_ns"]) > 0.1 * abs(difference):
        text += f", against {against[0]['name']} ({against[0]['difference_ns'] / 1e9:+.4g} s)"
    return text + "."


BAR = 24


def lines(c: dict[str, Any]) -> list[str]:
    """The comparison as text: what differs, the waterfall from A to B, the phases, the sentence."""
    largest = max([abs(t["difference_ns"]) for t in c["terms"]] + [1])
    text = [f"A  {c['a']}", f"B  {c['b']}", ""]
    text += [f"differs in {line}" for line in c["differs"]] or ["they differ in nothing but time"]
    text += ["", f"{'':<44}{'A, s':>10}{'B, s':>10}{'B - A':>10}"]
    text.append(f"{'training':<44}{c['a_ns'] / 1e9:>10.3f}{c['b_ns'] / 1e9:>10.3f}{c['difference_ns'] / 1e9:>+10.3f}")
    for t in c["terms"]:
        bar = ("-" if t["difference_ns"] < 0 else "+") * round(BAR * abs(t["difference_ns"]) / largest)
        figures = f"{t['a_ns'] / 1e9:>10.3f}{t['b_ns'] / 1e9:>10.3f}{t['difference_ns'] / 1e9:>+10.3f}"
        text.append(f"  {t['name'][:41]:<42}{figures}  {bar}".rstrip())
    text.append("")
    for p in c["phases"]:
        figures = f"{p['a_ns'] / 1e9:>10.3f}{p['b_ns'] / 1e9:>10.3f}{(p['b_ns'] - p['a_ns']) / 1e9:>+10.3f}"
        text.append(f"{'phase ' + p['name']:<44}{figures}")
    if None not in c["accuracy"]:
        text.append(f"{'test accuracy':<44}{c['accuracy'][0]:>10.2%}{c['accuracy'][1]:>10.2%}")
    return [*text, "", c["sentence"]]


def run(run_a: Path, run_b: Path, out: Path | None, as_json: bool, terminal: "Terminal") -> int:
    """Say how two runs differ, and draw it to `out`; the exit code. Raises ReportError, RefusedError, CommandError."""
    compared = compare(load(run_a), load(run_b))
    if out is not None:
        from profiling.page import render_comparison

        try:
            write_text(out, render_comparison(compared))
        except OSError as error:
            raise CommandError(f"--out {out}: {error}") from None
    if as_json:
        terminal.put(json.dumps(compared, indent=2))
    for line in lines(compared):
        terminal.say(line)
    return 0
