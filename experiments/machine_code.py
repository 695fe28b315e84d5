"""What the compiler made of the convolutions and of batch norm's reductions, two generations of them side by side.

    python -m experiments machine-code                     # results/machine-code/ and the table of docs/kernels.md
    python -m experiments machine-code --out before.json   # only what the compiler says now, to be compared with later

Every layer of both networks, with what the network fuses into it, compiled for compute capability 9.0; times are by the
model of `experiments.expected`, on an H200.
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import expected
from experiments.expected import Op
from experiments.study.folder import Request
from model.errors import DataError, RunError
from profiling import ROOT
from profiling.device.specifications import H200
from profiling.output.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from model.interrupts import Interrupts
    from profiling.bench.ahead_of_time import Build, Facts
    from profiling.output.terminal import Terminal

OUT = ROOT / "results" / "machine-code"
DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- The table is made by `python -m experiments machine-code`. -->", "<!-- End of the table. -->"
OPS = ("conv_fprop", "conv_dgrad", "conv_wgrad", "bn_finalize", "bn_coefficients")


def rows(compile_: Any = None) -> dict[str, dict[str, Any]]:
    """By the name of a benchmark's case, what its launches are compiled to and what the model says of them."""
    from profiling.bench import cases
    from profiling.bench.ahead_of_time import compile_all

    article = {str(shape) for layer in cases.RESNET_LAYERS for shape in (layer, layer.of_dgrad)}
    chosen = [one for one in cases.cases() if one.op in OPS and _is_fused(one.op, one.variant, one.shape in article)]
    ops = expected.cases(chosen, H200)
    facts = expected.facts_of(ops.values(), compile_ or compile_all)
    return {name: _row(op, facts) for name, op in ops.items()}


def _is_fused(op: str, variant: str, of_the_article: bool) -> bool:
    """Whether a network calls an op with just this fused into it: the article's everything, ResNet9 the statistics."""
    if not op.startswith("conv"):
        return variant != "pool"
    with_prologue = {"conv_fprop": "prologue,statistics", "conv_dgrad": "mask,sums", "conv_wgrad": "prologue"}
    without = "statistics" if op == "conv_fprop" else ""
    return variant == (with_prologue[op] if of_the_article else without) or (op == "conv_dgrad" and variant == "")


def _row(op: Op, facts: dict[str, "Facts"]) -> dict[str, Any]:
    found = expected.expect(op, facts, H200)
    build = op.builds[found.main]
    code = facts[build.key()]
    loop, matrices = code.main_loop()
    outside = {
        name: code.count(name) - sum(n for k, n in loop.items() if k.startswith(name)) for name in ("SHFL", "BAR")
    }
    return {
        "tile": _tile(build),
        "registers": code.registers,
        "shared_kb": round(code.shared_bytes / 1024),
        "ctas": code.blocks_per_sm(),
        "loop": sum(loop.values()),
        "matrices": dict(matrices),
        "operands": "" if not matrices else "registers" if any(k.startswith("LDSM") for k in loop) else "shared",
        "shuffles": outside["SHFL"],
        "barriers": outside["BAR"],
        "programs": build.programs,
        "flops_per_l2_byte": found.flops / found.l2_bytes if found.l2_bytes else None,
        "roofs_us": dict(zip(expected.ROOFS, found.roofs_us, strict=True)),
        "after_us": found.after_us,
        "expected_us": found.expected_us,
        "floor_us": found.floor_us,
    }


def _tile(build: "Build") -> str:
    """As in "128x64x64 4w 3s lines" for warps and stages; what the kernel has as constants."""
    values, options = {**build.constexprs, **build.integers}, build.options
    blocks = "x".join(
        str(values[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_T", "BLOCK_C") if name in values
    )
    form = "lines" if "lines" in build.kernel else "columns" if values.get("COLUMNS") else ""
    words = [blocks, f"{options['num_warps']}w", f"{options['num_stages']}s" if "num_stages" in options else "", form]
    words += ["fp16x2"] if values.get("HALVES") and values.get("scale_ptr", "") is not None else []
    words += [f"taps {values['TAPS']}"] if values.get("TAPS", 1) > 1 else []
    return " ".join(word for word in words if word)


def markdown(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The table: a line for each case, "before → after" where they differ."""
    heads = ["case", "tile", "registers", "shared, KB", "CTAs/SM", "loop / matrix instructions", "operands"]
    heads += [
        "SHFL, BAR outside",
        "FLOP per byte of L2",
        "compute, memory, L2, latency, us",
        "expected, us",
        "of the roofline",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, new in after.items():
        old = before.get(name, new)
        pairs = zip(_cells(old), _cells(new), strict=True)
        lines.append("| " + " | ".join([name, *(a if a == b else f"{a} → {b}" for a, b in pairs)]) + " |")
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> Iterable[str]:
    per_byte = row["flops_per_l2_byte"]
    return (
        row["tile"],
        str(row["registers"]),
        str(row["shared_kb"]),
        str(row["ctas"]),
        f"{row['loop']} / {sum(row['matrices'].values())}" if row["matrices"] else str(row["loop"]),
        row["operands"],
        f"{row['shuffles']}, {row['barriers']}",
        "" if per_byte is None else f"{per_byte:.0f}",
        ", ".join(f"{us:.0f}" for us in row["roofs_us"].values()),
        f"{row['expected_us']:.1f}",
        f"{row['floor_us'] / row['expected_us']:.0%}",
    )


def check(request: Request, out: Path | None = None) -> None:
    """Raise RunError without Triton, DataError if the document has lost the place of its table."""
    if importlib.util.find_spec("triton") is None:
        raise RunError("the machine code is Triton's, which is not installed (it has wheels for Linux only)")
    if out is None and not (text := DOCUMENT.read_text()).find(BEGIN) < text.find(END):
        raise DataError(f"{DOCUMENT} lacks the lines {BEGIN!r} and {END!r} around its table; restore it")


def run(request: Request, terminal: "Terminal", interrupts: "Interrupts", out: Path | None = None) -> dict[str, Any]:
    """Write what the compiler says; without `out` also the document's table, beside the first generation's."""
    terminal.say("compiling every layer's kernels ...")
    after = rows()
    try:
        write_json(out or OUT / "second.json", after)
        if out is None:
            text, table = DOCUMENT.read_text(), markdown(read_json(OUT / "first.json"), after)
            write_text(DOCUMENT, f"{text.partition(BEGIN)[0]}{BEGIN}\n\n{table}\n{END}{text.partition(END)[2]}")
    except OSError as error:
        raise RunError(f"{error}") from None
    terminal.say(f"{len(after)} cases written to {out or OUT / 'second.json'}" + ("" if out else f" and {DOCUMENT}"))
    return after
