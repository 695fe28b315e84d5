"""Machine code of the convolutions and of batch norm's reductions: two generations side by side.

    python -m experiments machine-code                     # results/machine-code/ and the table of docs/kernels.md
    python -m experiments machine-code --out before.json   # only the present machine code, to be compared with later

Every layer of both networks, with what the network fuses into it, is compiled for compute capability 9.0, with the
tiles that an H200 takes.
"""

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.study.folder import Request
from model.errors import DataError, RunError
from profiling import ROOT
from profiling.device.specifications import CAPABILITY
from profiling.output.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from model.interrupts import Interrupts
    from profiling.bench.ahead_of_time import Build, Facts
    from profiling.output.terminal import Terminal

OUT = ROOT / "results" / "machine-code"
DOCUMENT = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- The table is made by `python -m experiments machine-code`. -->", "<!-- End of the table. -->"
GPU, BATCH = "NVIDIA H200", 512
OPS = ("conv_fprop", "conv_dgrad", "conv_wgrad", "bn_finalize", "bn_coefficients")
COLUMNS = (
    *("case", "tile", "registers", "shared, KB", "CTAs/SM", "loop / matrix instructions", "operands"),
    *("SHFL, BAR outside", "FLOP per byte of L2"),
)


def rows(compile_: "Callable[[list[Build]], list[Facts]] | None" = None) -> dict[str, dict[str, Any]]:
    """The machine code of the kernel that does the work, by the benchmark's case, in fp16 at batch 512."""
    import torch

    from profiling.bench import cases
    from profiling.bench.ahead_of_time import compile_all, launches, unique
    from profiling.bench.case import OperandFactory
    from profiling.bench.kernel_facts import Gpu

    article = {str(shape) for layer in cases.RESNET_LAYERS for shape in (layer, layer.of_dgrad)}
    draw, main = OperandFactory(BATCH, torch.device("cpu"), torch.float16, untouched=True), {}
    for case in cases.cases():
        if case.op in OPS and _is_fused(case.op, case.variant, case.shape in article):
            operands = case.operands(draw)
            with torch.no_grad(), launches(Gpu(GPU, CAPABILITY[GPU])) as builds:
                case.ours(*operands)
            # Behind a product comes at most the sum of its parts.
            main[case.name] = next((build for build in builds if "BLOCK_K" in build.constexprs), builds[-1])
    builds = unique(list(main.values()))
    facts = dict(zip((build.key() for build in builds), (compile_ or compile_all)(builds), strict=True))
    return {name: row(build, facts[build.key()]) for name, build in main.items()}


def _is_fused(op: str, variant: str, of_the_article: bool) -> bool:
    """True if a network calls an op with just this fused into it: the article's everything, ResNet9 the statistics."""
    if not op.startswith("conv"):
        return variant != "pool"
    with_prologue = {"conv_fprop": "prologue,statistics", "conv_dgrad": "mask,sums", "conv_wgrad": "prologue"}
    without = "statistics" if op == "conv_fprop" else ""
    return variant == (with_prologue[op] if of_the_article else without) or (op == "conv_dgrad" and variant == "")


def row(build: "Build", code: "Facts") -> dict[str, Any]:
    """The record of one kernel; shuffles and barriers are those outside of its loop."""
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
        "flops_per_l2_byte": flops_per_l2_byte(build),
    }


def flops_per_l2_byte(build: "Build") -> float | None:
    """FLOP of a product for each byte of its operands' fp16 tiles, which programs read through the L2 cache.

    A pass multiplies BLOCK_M x BLOCK_K by BLOCK_N x BLOCK_K elements: 2 BLOCK_M BLOCK_N BLOCK_K FLOP for
    2 (BLOCK_M + BLOCK_N) BLOCK_K bytes, in which BLOCK_K cancels. None for a kernel that is no product.
    """
    values = build.constexprs
    if "BLOCK_K" not in values:
        return None
    # Several taps of one load of the first operand: as if their columns lay side by side.
    rows, columns = values["BLOCK_M"], values["BLOCK_N"] * values.get("TAPS", 1)
    if "lines" in build.kernel:  # the filter serves every line, a line's load three products; one line is extra
        lines = values["H"]
        rows, columns = rows * lines, 3 * values["BLOCK_N"] * lines / (lines + 1)
    return 1 / (1 / rows + 1 / columns)


def _tile(build: "Build") -> str:
    """The kernel's constants, such as "128x64x64 4w 3s lines" (4 warps, 3 stages)."""
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
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for name, new in after.items():
        pairs = zip(_cells(before.get(name, new)), _cells(new), strict=True)
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
    )


def check(request: Request, out: Path | None = None) -> None:
    """Raise RunError without Triton, DataError if the document has lost the place of its table."""
    if importlib.util.find_spec("triton") is None:
        raise RunError("the machine code is Triton's, which is not installed (it has wheels for Linux only)")
    if out is None and not (text := DOCUMENT.read_text()).find(BEGIN) < text.find(END):
        raise DataError(f"{DOCUMENT} lacks the lines {BEGIN!r} and {END!r} around its table; restore it")


def run(request: Request, terminal: "Terminal", interrupts: "Interrupts", out: Path | None = None) -> dict[str, Any]:
    """Write the present machine code; without `out` also the document's table, beside the first generation's."""
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
