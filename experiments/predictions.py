"""What each kernel and each step should take on a GPU: written down before any has run there, to be held against.

    python -m experiments predictions                    # into results/predictions-h100/ and results/predictions-h200/
    python -m experiments predictions --gpu H100         # one of them; by the model of experiments.expected
    python -m experiments predictions --against FOLDER   # what was measured in FOLDER, beside the pages of its GPUs

What was measured on a GPU is held against that GPU's page, and of runs only those that took the steps that were
predicted: nothing that they fell back to.
"""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import expected, predictions_held
from experiments.expected import Compile, Op, Prediction
from experiments.study.folder import Request
from model.errors import DataError, RunError, UsageError
from profiling import ROOT
from profiling.device.specifications import MACHINES, Machine
from profiling.output.files import write_json, write_text

if TYPE_CHECKING:
    from model.interrupts import Interrupts
    from profiling.bench.ahead_of_time import Facts
    from profiling.output.terminal import Terminal

OUT = ROOT / "results"
VERSION = 2
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
            "article-256": expected.eager_step(expected.config_of("article-256")),
            "fused": expected.fused_step(expected.config_of("fused"), machine),
        }
        facts = expected.facts_of([*ops.values(), *(op for step in steps.values() for op in step)], compiled)
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
    return f"`{name}`" + "".join(f" `{setting}`" for setting in expected.STEPS.get(name, ()))


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
        if against is None:
            return _predict(terminal, _machines(gpu), out)
        return predictions_held.hold_all(terminal, _found(out), against)
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
