"""The account in sentences: where the seconds went, what to do next, and the one assumption behind it.

Every sentence is made of the figures of one report; what was not measured makes none.
"""

from typing import Any

NEXT = {
    "ceiling_gap": "nothing in this program: look at clocks, power cap and temperature in the timeline",
    "conv_bytes": "a fused preset, whose convolutions read and write each activation less often",
    "conv_inefficiency": "`python -m profiling bench --tune`, and the slowest layers in the table of layers",
    "convolution": "`python -m profiling device` for the ceiling that they are to be held against",
    "batch norm": "`--set ops=triton`, which leaves batch norm's passes to the convolutions' prologues and epilogues",
    "memory-bound": "a fused preset; a shortcut costs no pass of its own there",
    "layout and cast": "find the operation that changes layout or dtype in the table of kernels: none should",
    "optimiser and loss": "a larger batch, which updates less often",
    "augmentation and data": "`--set preprocess=on_device --set workers=0`",
    "communication": "a larger batch for each process",
    "unknown": "name those kernels in `profiling/categories.py`",
    "idle": "a larger batch, or a captured step: the device waits for the host",
    "unattributed": "profile again; the account says what it lacks",
    "residual": "work between epochs: drawing choices, reading results",
}
"""What to try against a term."""

NEXT_IDLE = {
    "waiting for data": "more workers, or `--set preprocess=on_device --set workers=0`",
    "waiting in a synchronisation": "fewer `.item()` and synchronisations: keep results on the device for an epoch",
    "in the optimiser's step": "a captured step (`--set step=captured`), whose optimiser is launched with the rest",
    "launching kernels": "a larger batch, or a captured step (`--set step=captured`), which is one launch",
    "in Python": "a captured step (`--set step=captured`), or less Python between the operations of a step",
    "between queued kernels": "nothing in this program: kernels were queued, and waited for another stream or the GPU",
}
"""By the largest part of the idle time."""

_NEXT_ON_CPU = {
    "batch norm": "fewer channels at the largest maps: its passes go through memory, and the fused kernels need a GPU",
    "memory-bound": "fewer channels at the largest maps: these operations only move them",
    "conv_bytes": "a narrower dtype, if this CPU multiplies it in hardware",
    "conv_inefficiency": "more cores for the process, or a batch that fits the cache",
    "idle": "a larger batch: the same Python for more images",
}


def _share(ns: float, total_ns: float) -> str:
    return f"{100 * ns / total_ns:.3g} %"


def _s(ns: float) -> str:
    return f"{ns / 1e9:.3g} s"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _losses(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Terms that could be won back, the largest first."""
    return sorted((t for t in report["terms"] if t["recoverable_ns"] > 0), key=lambda t: -t["recoverable_ns"])


def headline(report: dict[str, Any]) -> str:
    """The whole report in one sentence."""
    total = sum(t["ns"] for t in report["terms"])
    if not total:
        return "No training was recorded."
    text = f"{_s(total)} of training"
    ideal = next((t for t in report["terms"] if t["key"] == "ideal"), None)
    if ideal:
        text += f", of which the arithmetic needs {_s(ideal['ns'])} {_at(ideal)}"
    losses = _losses(report)
    if losses:
        text += f"; the largest loss is {losses[0]['name']}, {_s(losses[0]['ns'])}"
    return text + "."


def _at(ideal: dict[str, Any]) -> str:
    return "at this device's measured ceiling" if "measured" in ideal["name"] else "at the data sheet's peak"


def sentences(report: dict[str, Any]) -> list[str]:
    """Where the seconds went, and what to do next; the most recoverable first."""
    total = sum(t["ns"] for t in report["terms"])
    if not total:
        return ["No training was recorded, so there is nothing to account for."]
    said = []
    advice = NEXT if report["run"].get("on_gpu") else NEXT | _NEXT_ON_CPU
    for term in [t for t in _losses(report) if t["key"] != "residual"][:3]:
        said.append(
            f"{_capital(term['name'])} took {_s(term['ns'])}, {_share(term['ns'], total)} of training; "
            f"{term['what_if'] or 'nothing else did'}. Next: {_next(term, advice)}."
        )
    for term in report["terms"]:
        if term["ns"] < -0.02 * total:
            said.append(
                f"{_capital(term['name'])} is negative ({_s(term['ns'])}): the profiled pass and the timed run "
                "disagree by that much, and no other term is known better."
            )
    outside = [p for p in report["phases"] if p["name"] != "training"]
    wall = sum(p["ns"] for p in report["phases"])
    if outside and wall:
        longest = max(outside, key=lambda p: p["ns"])
        rest = sum(p["ns"] for p in outside)
        said.append(
            f"Outside training the process spent {_s(rest)} ({_share(rest, wall)} of its wall clock), most of it in "
            f"{longest['name']} ({_s(longest['ns'])})."
        )
    fused = [f for f in report["floors"] if f["name"] == "fused"]
    eager = [f for f in report["floors"] if f["name"] == "eager"]
    if eager and fused:
        said.append(
            f"At this device's ceilings training could not take less than {_s(eager[0]['ns'])} with eager kernels, "
            f"{_s(fused[0]['ns'])} with this project's fused ones."
        )
    profiled = report["profiled"]
    if profiled["said"] and report["kernels"] and not profiled["fell_back"]:
        said.append(f"{profiled['said']}; the kernel times are those of the others.")
    residual = next((t for t in report["terms"] if t["key"] == "residual"), None)
    if residual and residual["ns"] >= 0:
        said.append(f"{_s(residual['ns'])} ({_share(residual['ns'], total)}) of training remain unexplained.")
    return said


def _next(term: dict[str, Any], advice: dict[str, str]) -> str:
    largest = max(term.get("parts", []), key=lambda part: part["ns"], default=None)
    if term["key"] != "idle" or largest is None:
        return advice[term["key"]]
    action = NEXT_IDLE.get(largest["name"], advice["idle"])
    return f"for the largest part, {largest['name']} ({_s(largest['ns'])}), {action}"


def assumption(report: dict[str, Any]) -> str:
    """What the account takes for granted."""
    ratio = report["figures"]["perturbation"]["value"]
    seen = "" if ratio is None else f" A profiled step took {ratio:.3g} times as long as one that was not."
    eager = report["profiled"]["eager_step"]
    if eager is not None:
        seen += (
            f" ProfilerStep#{eager} of the trace was run eagerly, to learn which operation launches which kernel: the "
            "device waits for the host in it. Training's replayed steps have no such gaps, and they are not counted."
        )
    return f"Assumed: operations take as long in the run as in the profiled pass.{seen}"
