"""What each kernel and each step should take on an H200: written down before any has run there, to be held against.

    python -m experiments predictions                    # into results/predictions-h200/, by experiments.expected
    python -m experiments predictions --against FOLDER   # what `reproduce` measured into FOLDER, beside them

The second is of an H200 alone, and of the steps that were predicted: nothing that a run fell back to.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments import expected
from experiments.expected import H200, Compile, Machine, Prediction
from experiments.study import Request
from model.config import preset
from model.errors import DataError, RunError, UsageError
from profiling.records import read_json, read_jsonl, write_json, write_text

if TYPE_CHECKING:
    from model.interrupts import Interrupts
    from profiling.console import Terminal

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "predictions-h200"
VERSION = 1
OF_A_STEP = ("network", "widths", "batch_size", "prep_bn_relu", "pool_first", "ops", "conv", "preprocess")
"""Of a configuration, what decides how long a step takes."""


def make(machine: Machine = H200, compile_: Compile | None = None, chosen: Sequence[Any] | None = None) -> dict:
    """The document: predictions of the benchmark's cases, `chosen` or all, and of whole steps."""
    import torch
    import triton

    from profiling.ahead_of_time import compile_all
    from profiling.cases import cases as all_cases
    from profiling.environment import environment

    compile_ = compile_ or compile_all
    predicted = expected.cases(all_cases() if chosen is None else chosen, machine, compile_)
    steps = {
        "article-256": expected.eager_step(preset("article-256"), machine),
        "fused": expected.fused_step(preset("fused"), machine, compile_),
    }
    return {
        "version": VERSION,
        "status": "modelled",
        "machine": machine._asdict(),
        "start_us": expected.START_US,
        "gap_us": expected.GAP_US,
        "batch": expected.BATCH,
        "dtype": "float16",
        "triton": triton.__version__,
        "environment": environment(torch.device("cpu"), ROOT),
        "cases": {name: _json(p) for name, p in predicted.items()},
        "steps": {
            name: expected.whole(rows) | {"of_kernels": [_json(p) for p in rows]} for name, rows in steps.items()
        },
    }


def _json(p: Prediction) -> dict[str, Any]:
    return p._asdict() | {"launches": [one._asdict() for one in p.launches]}


def markdown(document: dict[str, Any]) -> str:
    """The document as tables."""
    machine, about = document["machine"], document["environment"]
    lines = [
        f"# Predictions for one {machine['name']}",
        "",
        f"Modelled, not measured: fp16, batch {document['batch']}, {machine['flops_per_s'] / 1e12:,.0f} TFLOP/s and "
        f"{machine['bytes_per_s'] / 1e12:.1f} TB/s ({machine['source']}; quoted). A kernel takes "
        f"{document['start_us']} us and the larger of its arithmetic's time, times tail and issue, and its bytes'; "
        f"in a replayed graph {document['gap_us']:g} us lie between two kernels. What is measured will mostly be "
        f"longer. Made on {about['date'][:10]} by commit {str(about['git_sha'])[:12]}, triton {document['triton']}.",
        "",
        "| step | kernels | floor, us | expected, us | images/s | 35 epochs, s |",
        "|---|---|---|---|---|---|",
    ]
    for name, s in document["steps"].items():
        speed = 1e6 * document["batch"] / s["expected_us"]
        lines.append(
            f"| `{name}` | {s['kernels']} | {s['floor_us']:,.0f} | {s['expected_us']:,.0f} | {speed:,.0f} "
            f"| {35 * 50_000 / speed:.1f} |"
        )
    for name, s in document["steps"].items():
        shares = ", ".join(f"{family} {us:,.0f}" for family, us in s["families_us"].items() if us >= 1)
        lines += ["", f"`{name}`, us: {shares}."]
    lines += ["", "| case | floor, us | expected, us | bound | programs | tail | issue | registers | blocks/SM |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for name, p in document["cases"].items():
        one = max(p["launches"], key=lambda launch: launch["programs"])
        lines.append(
            f"| {name} | {p['floor_us']:.1f} | {p['expected_us']:.1f} | {p['bound']} | {one['programs']:,} "
            f"| {one['tail']:.2f} | {one['issue']:.2f} | {one['registers']} | {one['blocks_per_sm']} |"
        )
    return "\n".join(lines) + "\n"


class Held(NamedTuple):
    """A prediction beside its measurement, microseconds; `ratio` is measured over expected."""

    name: str
    expected_us: float
    measured_us: float
    ratio: float


def hold(document: dict[str, Any], folder: Path) -> list[Held]:
    """What `reproduce` measured in `folder` beside the predictions: whole steps, then cases, the largest excess first.

    A case is our kernels with the L2 cache cold. Raises DataError where nothing was measured on the predicted machine.
    """
    steps = []
    for name, run in (("fused", "profiled"), ("article-256", "profiled-article")):
        path = folder / run / "summary.json"
        if path.exists():
            summary, config = read_json(path), read_json(path.with_name("config.json"))
            if summary["status"] == "complete" and _is_step(name, summary, config, document):
                measured = 1e6 * summary["train_s"] / summary["steps"]
                steps.append(_held(f"a step of {name}", document["steps"][name]["expected_us"], measured))
    path = folder / "bench.jsonl"
    rows = read_jsonl(path) if path.exists() else []
    measured = {
        row["case"]: row["us"]["value"]
        for row in rows
        if row["kind"] == "timing"
        and (row["provider"], row["mode"], row["dtype"]) == ("ours", "cold", document["dtype"])
        and row["us"]["value"] is not None
        and _is(row["machine"].get("gpu", ""), document)
    }
    held = [
        _held(name, document["cases"][name]["expected_us"], us)
        for name, us in measured.items()
        if name in document["cases"]
    ]
    if not steps and not held:
        raise DataError(
            f"{folder} holds no measurement on {document['machine']['name']}: expected bench.jsonl or profiled/, as "
            "`python -m experiments reproduce` writes them there"
        )
    return steps + sorted(held, key=lambda one: one.expected_us - one.measured_us)


def _is_step(name: str, summary: dict[str, Any], config: dict[str, Any], document: dict[str, Any]) -> bool:
    """Whether a run took the steps that are predicted: no other settings, and nothing that was fallen back to."""
    expected = preset(name).to_json()
    ran = (summary["preset"], summary["ops"], summary["dtype"], summary["step"])
    return (
        ran == (name, expected["ops"], document["dtype"], "captured")
        and all(config[key] == expected[key] for key in OF_A_STEP)
        and _is(summary["device"], document)
    )


def _is(device: str, document: dict[str, Any]) -> bool:
    return device == document["machine"]["name"]


def _held(name: str, expected_us: float, measured_us: float) -> Held:
    return Held(name, expected_us, measured_us, measured_us / expected_us)


def sentences(held: Sequence[Held]) -> list[str]:
    """What the comparison says."""
    kernels = [one for one in held if not one.name.startswith("a step of ")]
    said = [
        f"{one.name} was expected to take {one.expected_us:,.0f} us and took {one.measured_us:,.0f}, "
        f"{one.ratio:.2f} times as long."
        for one in held[: len(held) - len(kernels)]
    ]
    if kernels:
        ratios = sorted(one.ratio for one in kernels)
        said.append(
            f"Of {len(kernels)} cases the median took {ratios[len(ratios) // 2]:.2f} times what was expected, from "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}; furthest above: "
            + ", ".join(f"{one.name} by {one.measured_us - one.expected_us:,.0f} us" for one in kernels[:3])
            + "."
        )
        too_fast = [one.name for one in kernels if one.ratio < 1]
        if too_fast:
            said.append(f"Faster than expected, so that the model is wrong there: {', '.join(too_fast)}.")
    return said


def check(request: Request, against: Path | None = None, out: Path | None = None) -> None:
    """Raise UsageError or DataError for folders that cannot be read."""
    if against is None:
        return
    if not against.is_dir():
        raise UsageError(f"--against {against} is not a folder; name the --out of `python -m experiments reproduce`")
    out = out or OUT
    if not (out / "predictions.json").exists():
        raise DataError(f"{out} holds no predictions.json; `python -m experiments predictions` makes it")


def run(
    request: Request,
    terminal: "Terminal",
    interrupts: "Interrupts",
    against: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Write predictions.json and predictions.md into `out`, or hold those against the measurements in `against`.

    The comparison is written to predictions-held.json in `against`. Returns what was written. Raises DataError where
    either is damaged, RunError for a full disk, and for a machine without Triton, whose compiler the predictions need.
    """
    out = out or OUT
    try:
        return _predict(terminal, out) if against is None else _hold(terminal, against, out)
    except OSError as error:
        raise RunError(f"{out if against is None else against}: {error}") from None


def _predict(terminal: "Terminal", out: Path) -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        raise RunError("predictions read the machine code, and triton is not installed (it has wheels for Linux only)")
    out.mkdir(parents=True, exist_ok=True)
    terminal.say(f"compiling every kernel for {H200.name} ...")
    document = make()
    write_json(out / "predictions.json", document)
    write_text(out / "predictions.md", markdown(document))
    rows = [
        [name, str(s["kernels"]), f"{s['floor_us']:,.0f}", f"{s['expected_us']:,.0f}"]
        for name, s in document["steps"].items()
    ]
    terminal.table(f"{H200.name}, modelled", ["step", "kernels", "floor, us", "expected, us"], rows)
    terminal.say(f"{len(document['cases'])} cases and {len(rows)} steps written to {out / 'predictions.md'}")
    return document


def _hold(terminal: "Terminal", folder: Path, out: Path) -> dict[str, Any]:
    try:
        held = hold(read_json(out / "predictions.json"), folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder} or {out} is damaged: {error}; make the predictions or the measurement anew"
        ) from None
    document = {"version": VERSION, "held": [one._asdict() for one in held], "sentences": sentences(held)}
    write_json(folder / "predictions-held.json", document)
    rows = [[one.name, f"{one.expected_us:,.1f}", f"{one.measured_us:,.1f}", f"{one.ratio:.2f}"] for one in held]
    terminal.table("expected (modelled) and measured, us", ["", "expected", "measured", "ratio"], rows)
    for sentence in document["sentences"]:
        terminal.say(sentence)
    return document
