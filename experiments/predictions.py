"""What each kernel and each step should take on a GPU: written down before any has run there, to be held against.

    python -m experiments predictions                    # into results/predictions-h100/ and results/predictions-h200/
    python -m experiments predictions --gpu H100         # one of them; by the model of experiments.expected
    python -m experiments predictions --against FOLDER   # what was measured in FOLDER, beside the pages of its GPUs

What was measured on a GPU is held against that GPU's page, and of runs only those that took the steps that were
predicted: nothing that they fell back to.
"""

import importlib.util
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments import expected
from experiments.expected import Compile, Op, Prediction
from experiments.study.folder import Request
from model.config import Config
from model.errors import DataError, RunError, UsageError
from model.presets import preset
from profiling import ROOT
from profiling.device.specifications import MACHINES, Machine
from profiling.output.files import read_json, read_jsonl, write_json, write_text

if TYPE_CHECKING:
    from model.interrupts import Interrupts
    from profiling.bench.ahead_of_time import Facts
    from profiling.output.terminal import Terminal

OUT = ROOT / "results"
VERSION = 2
OF_A_STEP = ("network", "widths", "batch_size", "prep_bn_relu", "pool_first", "ops", "conv", "preprocess")
"""Of a configuration, what decides how long a step takes."""
STEPS = {"article-256": ("preprocess=on_device",), "fused": ()}
"""The presets whose steps are predicted, and with which settings: what a GPU does, not the host beside it."""
WIDE = "fused, with eight warps where the model prefers them"
"""What tuning may find; the default tiles have four warps."""
FORMER = (
    "The first page, of 2026-11-22 and the H200 alone, expected 3,224 us of `fused`, without a roof of the L2. The "
    "second, of 2026-11-26, had it, and expected 5,752 us on an H200 and 6,046 on an H100 of the convolutions' first "
    "generation. The present one walks down maps or takes both operands from shared memory, computes three taps of a "
    "load, and reduces without barriers. `article-256`, the library's step, is expected to take what it was."
)


def pages(machines: Sequence[Machine], compile_: Compile | None = None, chosen: Sequence[Any] | None = None) -> list:
    """A document for each machine: predictions of the benchmark's cases, `chosen` or all, and of whole steps."""
    import torch
    import triton

    from profiling.bench.ahead_of_time import compile_all
    from profiling.bench.cases import cases as all_cases
    from profiling.device.environment import environment

    known: dict[str, Facts] = {}  # machines of one architecture run the same code

    def compiled(builds: list) -> list:
        new = [build for build in builds if build.key() not in known]
        known.update(zip((build.key() for build in new), (compile_ or compile_all)(new) if new else [], strict=True))
        return [known[build.key()] for build in builds]

    documents = []
    for machine in machines:
        ops = expected.cases(all_cases() if chosen is None else chosen, machine)
        steps = {
            "article-256": expected.eager_step(_config("article-256")),
            "fused": expected.fused_step(_config("fused"), machine),
            WIDE: expected.fused_step(_config("fused"), machine, expected.wide_tile),
        }
        facts = expected.facts_of([*ops.values(), *(op for step in steps.values() for op in step)], compiled)
        steps[WIDE] = [_better(two, facts, machine) for two in zip(steps["fused"], steps[WIDE], strict=True)]
        documents.append(
            {
                "version": VERSION,
                "status": "modelled",
                "machine": machine._asdict(),
                "start_us": expected.START_US,
                "gap_us": expected.GAP_US,
                "library_block": expected.LIBRARY_BLOCK,
                "batch": expected.BATCH,
                "dtype": "float16",
                "triton": triton.__version__,
                "environment": environment(torch.device("cpu"), ROOT),
                "cases": {name: _json(expected.expect(op, facts, machine)) for name, op in ops.items()},
                "steps": {name: _step(step, facts, machine) for name, step in steps.items()},
            }
        )
    return documents


def _better(two: tuple[Op, Op], facts: dict[str, "Facts"], machine: Machine) -> Op:
    """The op that is expected to be faster, of those that do not spill."""

    def us(op: Op) -> float:
        return (
            math.inf
            if any(facts[b.key()].spill_bytes for b in op.builds)
            else expected.expect(op, facts, machine).expected_us
        )

    return min(two, key=us)


def _config(name: str) -> Config:
    return preset(name).with_settings(list(STEPS[name]))


def _step(ops: Sequence[Op], facts: dict[str, "Facts"], machine: Machine) -> dict[str, Any]:
    """A whole step, and what it would be at other rates of the L2 cache."""
    low, high = machine.l2_range

    def at(rate: float) -> list[Prediction]:
        return [expected.expect(op, facts, machine._replace(l2_bytes_per_s=rate)) for op in ops]

    rows = at(machine.l2_bytes_per_s)
    return expected.whole(rows) | {
        "l2_low_us": expected.whole(at(low))["expected_us"],
        "l2_high_us": expected.whole(at(high))["expected_us"],
        "no_l2_us": expected.whole(at(math.inf))["expected_us"],
        "reductions_us": sum(p.after_us + (p.expected_us if p.bound == "latency" else 0.0) for p in rows),
        "of_kernels": [_json(p) for p in rows],
    }


def _json(p: Prediction) -> dict[str, Any]:
    return p._asdict() | {"launches": [one._asdict() for one in p.launches]}


def markdown(document: dict[str, Any]) -> str:
    """The document as tables."""
    machine, about = document["machine"], document["environment"]
    low, high = machine["l2_range"]
    rows, columns = document["library_block"]
    lines = [
        f"# Predictions for one {machine['name']}",
        "",
        f"Modelled, not measured: fp16, batch {document['batch']}, {machine['flops_per_s'] / 1e12:,.0f} TFLOP/s and "
        f"{machine['bytes_per_s'] / 1e12:.1f} TB/s ({machine['source']}; quoted); from the L2 cache "
        f"{machine['l2_bytes_per_s'] / 1e12:.1f} TB/s, maybe {low / 1e12:.1f} to {high / 1e12:.1f}, after "
        f"{machine['l2_latency_us']} us ({machine['assumed']}). A kernel takes {document['start_us']} us and the "
        "largest of four times: its arithmetic's, times tail and issue; its bytes'; of a product its operands' tiles' "
        "through the L2 cache; of a reduction that loops, its passes in turn. In a replayed graph "
        f"{document['gap_us']:g} us lie between two kernels. The library's convolutions are taken to have tiles of "
        f"{rows} by {columns} (assumed), no tail and no issue. Made on {about['date'][:10]} by commit "
        f"{str(about['git_sha'])[:12]}, triton {document['triton']}.",
        "",
        FORMER,
        "",
        "| step | kernels | floor, us | expected, us | L2 at its lowest, highest | without that roof | reductions, us "
        "| images/s | 35 epochs, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, s in document["steps"].items():
        speed = 1e6 * document["batch"] / s["expected_us"]
        lines.append(
            f"| {_titled(name)} | {s['kernels']} | {s['floor_us']:,.0f} | {s['expected_us']:,.0f} "
            f"| {s['l2_low_us']:,.0f}, {s['l2_high_us']:,.0f} | {s['no_l2_us']:,.0f} | {s['reductions_us']:,.0f} "
            f"| {speed:,.0f} | {35 * 50_000 / speed:.1f} |"
        )
    for name, s in document["steps"].items():
        shares = ", ".join(f"{family} {us:,.0f}" for family, us in s["families_us"].items() if us >= 1)
        lines += ["", f"`{name}`, us: {shares}."]
    lines += ["", "| case | floor, us | expected, us | bound | programs | tail | issue | registers | blocks/SM |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name, p in document["cases"].items():
        one = p["launches"][p["main"]]
        lines.append(
            f"| {name} | {p['floor_us']:.1f} | {p['expected_us']:.1f} | {p['bound']} | {one['programs']:,} "
            f"| {one['tail']:.2f} | {one['issue']:.2f} | {one['registers']} | {one['blocks_per_sm']} |"
        )
    return "\n".join(lines) + "\n"


def _titled(name: str) -> str:
    return f"`{name}`" + "".join(f" `{setting}`" for setting in STEPS.get(name, ()))


class Held(NamedTuple):
    """A prediction beside its measurement, microseconds; `ratio` is measured over expected, `n` the measurements.

    Of several measurements it is the median.
    """

    gpu: str
    name: str
    expected_us: float
    measured_us: float
    ratio: float
    n: int


def hold(documents: Iterable[dict[str, Any]], folder: Path) -> list[Held]:
    """What was measured in `folder` beside the predictions for the GPU that measured it.

    Whole steps first, of every complete run below `folder`, then the cases of its bench.jsonl, the largest excess
    first. A case is our kernels with the L2 cache cold. Raises DataError where nothing was measured on a predicted GPU.
    """
    names, held = [], []
    runs = [(read_json(path), read_json(path.with_name("config.json"))) for path in _runs(folder)]
    path = folder / "bench.jsonl"
    timings = read_jsonl(path) if path.exists() else []
    for document in documents:
        gpu = document["machine"]["name"]
        names.append(gpu)
        for name in STEPS:
            measured = [
                1e6 * summary["train_s"] / summary["steps"]
                for summary, config in runs
                if summary["status"] == "complete" and _is_step(name, summary, config, document)
            ]
            if measured:
                held.append(_held(gpu, f"a step of {name}", document["steps"][name]["expected_us"], measured))
        measured = {row["case"]: row["us"]["value"] for row in timings if _is_case(row, document)}
        cases = [
            _held(gpu, name, document["cases"][name]["expected_us"], [us])
            for name, us in measured.items()
            if name in document["cases"]
        ]
        held += sorted(cases, key=lambda one: one.expected_us - one.measured_us)
    if not held:
        raise DataError(
            f"{folder} holds no measurement on {' or '.join(names)}: expected bench.jsonl, or runs of "
            f"{', '.join(STEPS)}, as `python -m experiments reproduce` writes them there"
        )
    return held


def _runs(folder: Path) -> list[Path]:
    """The summary.json of every run in `folder` or below it."""
    return [path for path in sorted(folder.rglob("summary.json")) if path.with_name("config.json").exists()]


def _is_step(name: str, summary: dict[str, Any], config: dict[str, Any], document: dict[str, Any]) -> bool:
    """Whether a run took the steps that are predicted: no other settings, and nothing that was fallen back to."""
    asked = _config(name).to_json()
    ran = (summary["preset"], summary["ops"], summary["dtype"], summary["step"], summary["device"])
    return ran == (name, asked["ops"], document["dtype"], "captured", document["machine"]["name"]) and all(
        config[key] == asked[key] for key in OF_A_STEP
    )


def _is_case(row: dict[str, Any], document: dict[str, Any]) -> bool:
    """Whether a row of a benchmark is a time of our kernels that is predicted, caches cold."""
    return (
        row["kind"] == "timing"
        and (row["provider"], row["mode"], row["dtype"]) == ("ours", "cold", document["dtype"])
        and row["us"]["value"] is not None
        and row["machine"].get("gpu") == document["machine"]["name"]
    )


def _held(gpu: str, name: str, expected_us: float, measured: Sequence[float]) -> Held:
    us = statistics.median(measured)
    return Held(gpu, name, expected_us, us, us / expected_us, len(measured))


def sentences(held: Sequence[Held]) -> list[str]:
    """What the comparison says."""
    said = [
        f"{one.name} on {one.gpu} was expected to take {one.expected_us:,.0f} us and took {one.measured_us:,.0f}, "
        f"{one.ratio:.2f} times as long (n = {one.n})."
        for one in held
        if one.name.startswith("a step of ")
    ]
    for gpu in dict.fromkeys(one.gpu for one in held):
        kernels = [one for one in held if one.gpu == gpu and not one.name.startswith("a step of ")]
        if not kernels:
            continue
        ratios = sorted(one.ratio for one in kernels)
        said.append(
            f"Of {len(kernels)} cases on {gpu} the median took {ratios[len(ratios) // 2]:.2f} times what was expected, "
            f"from {ratios[0]:.2f} to {ratios[-1]:.2f}; furthest above: "
            + ", ".join(f"{one.name} by {one.measured_us - one.expected_us:,.0f} us" for one in kernels[:3])
            + "."
        )
        too_fast = [one.name for one in kernels if one.ratio < 1]
        if too_fast:
            said.append(f"Faster than expected, so that the model is wrong there: {', '.join(too_fast)}.")
    return said


def check(request: Request, gpu: str | None = None, against: Path | None = None, out: Path | None = None) -> None:
    """Raise UsageError or DataError for a GPU that has no page, and for folders that cannot be read."""
    if gpu is not None and against is not None:
        raise UsageError("--gpu and --against contradict each other: the GPU is the one that measured")
    _machines(gpu)
    if against is None:
        return
    if not against.is_dir():
        raise UsageError(f"--against {against} is not a folder; name the --out of `python -m experiments reproduce`")
    if not _found(out or OUT):
        raise DataError(
            f"{out or OUT} holds no predictions-*/predictions.json; `python -m experiments predictions` makes it"
        )


def run(
    request: Request,
    terminal: "Terminal",
    interrupts: "Interrupts",
    gpu: str | None = None,
    against: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Write predictions-<gpu>/predictions.json and .md below `out`, or hold those against what `against` measured.

    The comparison is written to predictions-held.json in `against`. Returns what was written. Raises DataError where
    either is damaged, RunError for a full disk, and for a machine without Triton, whose compiler the predictions need.
    """
    out = out or OUT
    try:
        return _predict(terminal, _machines(gpu), out) if against is None else _hold(terminal, against, out)
    except OSError as error:
        raise RunError(f"{out if against is None else against}: {error}") from None


def _machines(gpu: str | None) -> tuple[Machine, ...]:
    """Those that `gpu` names, all for None. Raises UsageError for another."""
    chosen = tuple(one for one in MACHINES if gpu is None or gpu.lower() in (one.short.lower(), one.name.lower()))
    if not chosen:
        raise UsageError(
            f"--gpu {gpu}: predictions are made for {' and '.join(one.short for one in MACHINES)}, whose sustained "
            "rates are known; expected one of these"
        )
    return chosen


def _page(out: Path, machine: Machine) -> Path:
    return out / f"predictions-{machine.short.lower()}" / "predictions.json"


def _found(out: Path) -> list[Path]:
    """The pages below `out`, or the one that lies in it."""
    return sorted([*out.glob("predictions.json"), *out.glob("predictions-*/predictions.json")])


def _predict(terminal: "Terminal", machines: Sequence[Machine], out: Path) -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        raise RunError("predictions read the machine code, and triton is not installed (it has wheels for Linux only)")
    paths = [_page(out, machine) for machine in machines]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    terminal.say(f"compiling every kernel for {' and '.join(machine.name for machine in machines)} ...")
    documents = pages(machines)
    for path, document in zip(paths, documents, strict=True):
        write_json(path, document)
        write_text(path.with_suffix(".md"), markdown(document))
        rows = [
            [name, str(s["kernels"]), f"{s['floor_us']:,.0f}", f"{s['expected_us']:,.0f}"]
            for name, s in document["steps"].items()
        ]
        title = f"{document['machine']['name']}, modelled"
        terminal.table(title, ["step", "kernels", "floor, us", "expected, us"], rows)
        terminal.say(f"{len(document['cases'])} cases and {len(rows)} steps written to {path.with_suffix('.md')}")
    return {one.short: document for one, document in zip(machines, documents, strict=True)}


def _hold(terminal: "Terminal", folder: Path, out: Path) -> dict[str, Any]:
    try:
        held = hold([read_json(path) for path in _found(out)], folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder} or {out} is damaged: {error}; make the predictions or the measurement anew"
        ) from None
    document = {"version": VERSION, "held": [one._asdict() for one in held], "sentences": sentences(held)}
    write_json(folder / "predictions-held.json", document)
    rows = [
        [one.gpu, one.name, f"{one.expected_us:,.1f}", f"{one.measured_us:,.1f}", f"{one.ratio:.2f}"] for one in held
    ]
    terminal.table("expected (modelled) and measured, us", ["", "", "expected", "measured", "ratio"], rows)
    for sentence in document["sentences"]:
        terminal.say(sentence)
    return document
