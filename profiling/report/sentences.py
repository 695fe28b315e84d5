"""The account in sentences: where the seconds went, what to do next, and the one assumption behind it.

Every sentence is made of the figures of one report; what was not measured makes none.
"""

from typing import Any

from profiling.output.units import show, significant

NEXT = {
    "conv_inefficiency": "python -m profiling bench --tune, and the slowest layers in the table of layers",
    "convolution": "python -m profiling device, for the ceiling that they are to be held against",
    "batch norm": "--set ops=fused, which leaves batch norm's passes to the convolutions' prologues and epilogues",
    "memory-bound": "the preset fused, in which a shortcut costs no pass of its own",
    "layout and cast": "find the operation that changes layout or dtype in the table of kernels: none should",
    "optimiser and loss": "a larger batch, which updates less often",
    "augmentation and data": "--set preprocess=on_device --set workers=0",
    "communication": "a larger batch for each process",
    "unknown": "name those kernels in profiling/account/categories.py",
    "idle": "a larger batch, or --set step=captured: the device waits for the host",
}
"""A remedy for each term."""

FUSED_NEXT = {
    "batch norm": "the batch-norm kernels in the table of kernels; python -m profiling bench bn_backward_apply",
    "memory-bound": "those operations in the table of kernels: they are outside of the fused blocks",
}
"""Where the kernels are fused already."""

NEXT_IDLE = {
    "waiting for data": "more workers, or --set preprocess=on_device --set workers=0",
    "waiting in a synchronisation": "fewer .item() and synchronisations: keep results on the device for an epoch",
    "in the optimiser's step": "a captured step (--set step=captured), whose optimiser is launched with the rest",
    "launching kernels": "a larger batch, or a captured step (--set step=captured), which is one launch",
    "in Python": "a captured step (--set step=captured), or less Python between the operations of a step",
    "between queued kernels": "nothing in this program: kernels were queued, and waited for another stream or the GPU",
}
"""By the largest part of the idle time."""

WORTH = 0.005
"""Share of training below which a term is not worth a sentence."""


def headline(report: dict[str, Any]) -> str:
    """The whole report in one sentence."""
    total = _total(report)
    if not total:
        return "No training was recorded."
    text = f"{_s(total)} of training"
    ideal = next((t for t in report["terms"] if t["key"] == "ideal"), None)
    if ideal:
        measured = "measured" in ideal["name"]
        roof = "this device's measured ceiling" if measured else "the data sheet's peak"
        text += f", of which the arithmetic needs {_s(ideal['ns'])} at {roof}"
    if costs := _costs(report):
        text += f"; the largest cost is {costs[0]['name']}, {_s(costs[0]['ns'])}{_above(costs[0])}"
    return f"{text}."


def sentences(report: dict[str, Any]) -> list[str]:
    """Where the seconds went, and what to do next; the most recoverable first."""
    total = _total(report)
    if not total:
        return ["No training was recorded, so there is nothing to account for."]
    said: list[str] = []
    for term in [t for t in _costs(report) if t["recoverable_ns"] > WORTH * total][:3]:
        what_if = f"; without that {term['what_if']}" if term["what_if"] else ""
        advice = f" Next: {_next(term, report)}."
        share = f"{show(term['ns'] / total, 'share')} of training{_above(term)}{what_if}."
        told = any(line.endswith(advice) for line in said)
        said.append(f"{_capital(term['name'])}: {_s(term['ns'])}, {share}{'' if told else advice}")
    for term in report["terms"]:
        doubted = any(line.startswith(_capital(term["name"])) for line in report["doubts"])
        if term["ns"] < -WORTH * total and not doubted:
            said.append(
                f"{_capital(term['name'])} is {_s(term['ns'])}: the profiled pass and the timed run, or a model and "
                "what was measured, differ by so much. Other terms may be wrong by as much."
            )
    step = report["figures"]["step_s"]
    if step["value"] is not None:
        said.append(f"A step took {show(step['value'], 's', 4)} in the median; {step['spread']}.")
    outside = [p for p in report["phases"] if p["name"] != "training"]
    if outside:
        wall, rest = (sum(p["ns"] for p in phases) for phases in (report["phases"], outside))
        longest = max(outside, key=lambda p: p["ns"])
        said.append(
            f"Outside training the process spent {_s(rest)} ({show(rest / wall, 'share')} of its wall clock), most of "
            f"it in {longest['name']} ({_s(longest['ns'])})."
        )
    floors = {floor["name"]: floor["ns"] for floor in report["floors"]}
    if floors.keys() >= {"eager", "fused"}:
        said.append(
            f"At this device's ceilings training could not take less than {_s(floors['eager'])} with eager kernels, "
            f"{_s(floors['fused'])} with this project's fused ones."
        )
    profiled = report["profiled"]
    if profiled["said"] and report["kernels"] and not profiled["fell_back"]:
        said.append(f"{profiled['said']}; the kernel times are those of the others.")
    residual = next((t["ns"] for t in report["terms"] if t["key"] == "residual"), -1)
    if residual >= 0:
        said.append(f"{_s(residual)} ({show(residual / total, 'share')}) of training remain unexplained.")
    return said


def assumption(report: dict[str, Any]) -> str:
    """The assumption of the account, as a sentence."""
    ratio, eager = report["figures"]["perturbation"]["value"], report["profiled"]["eager_step"]
    text = "Assumed: operations take as long in the run as in the profiled pass."
    if ratio is not None:
        text += f" A profiled step took {significant(ratio)} times as long as one that was not."
    if eager is not None:
        text += (
            f" ProfilerStep#{eager} of the trace was run eagerly, to learn which operation launches which kernel: the "
            "device waits for the host in it. Training's replayed steps have no such gaps, and they are not counted."
        )
    return text


def _next(term: dict[str, Any], report: dict[str, Any]) -> str:
    """The remedy for a term of this run; on a CPU the one that its threads, caches and dtype leave."""
    key, run, place = term["key"], report["run"], report["environment"]
    largest = max(term["parts"], key=lambda part: part["ns"], default=None)
    if key == "idle" and largest:
        return f"for the largest part, {largest['name']} ({_s(largest['ns'])}), {NEXT_IDLE[largest['name']]}"
    if run["on_gpu"] and run["ops"] == "fused" and key in FUSED_NEXT:
        return FUSED_NEXT[key]
    if run["on_gpu"] or key not in ("batch norm", "memory-bound", "conv_inefficiency", "idle"):
        return NEXT[key]
    batch, cores, threads = run["batch_size"] or 0, place.get("cores"), place.get("threads")
    if key == "idle":
        return f"--set batch_size={2 * batch}: the same Python for twice the images"
    if isinstance(cores, int) and isinstance(threads, int) and threads < cores:
        return f"OMP_NUM_THREADS={cores}: the run had {threads} of {cores} cores"
    if run["dtype"] == "float32":
        return "--set dtype=bfloat16, which halves the bytes, where this CPU multiplies it in hardware"
    return f"--set batch_size={max(batch // 2, 1)}, so that more of a layer stays in the cache"


def _total(report: dict[str, Any]) -> int:
    return sum(t["ns"] for t in report["terms"])


def _costs(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Terms of which something could be won back, the largest first."""
    return sorted((t for t in report["terms"] if t["recoverable_ns"] > 0), key=lambda t: -t["recoverable_ns"])


def _above(term: dict[str, Any]) -> str:
    """The part of a term above its floor, if it has one."""
    rest = term["recoverable_ns"]
    return f", {_s(rest)} of it more than its bytes need" if rest < term["ns"] else ""


def _s(ns: float) -> str:
    return show(ns, "ns")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
