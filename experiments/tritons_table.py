"""The table of what each Triton makes of the kernels, from the rows that experiments.tritons keeps."""

import contextlib
import re
from pathlib import Path
from typing import Any

from profiling.output.files import read_jsonl

ARCHITECTURES = (80, 90, 100)
PINS = {
    "3.6.0": "2.11.0",
    "3.7.0": "2.12.0",
    "3.7.1": "2.12.1, 2.13.0",
    "3.8.0": "2.14.0, 2.14.1",
}
PINS_SOURCE = "Requires-Dist of torch's wheels for Linux and CPython 3.12 on PyPI, read on 2026-11-26"
FAULTS = {
    "error": "does not compile",
    "spills": "spills",
    "local": "local memory",
    "remarks": "remarks of ptxas",
    "shared": "too much shared memory",
    "matrix": "no matrix instruction",
    "TMA": "no TMA",
    "overwritten": "operands overwritten",
}
"""Faults of machine code, and their words in the table."""


def known(path: Path, header: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that are there of the same Triton and the same kernels; none of a file that is damaged."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        rows = read_jsonl(path)
        if rows and header.items() <= rows[0].items() and all(row.get("kind") for row in rows):
            return rows
    return []


def found(out: Path, sources: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of every Triton in `out` that are of these kernels, by version."""
    versions = {}
    for path in sorted(out.glob("*.jsonl"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)]):
        rows = known(path, {"kind": "triton", "sources": sources})
        if rows:
            versions[rows[0]["version"]] = rows
    return versions


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """By architecture how many kernels there are and have which fault; what the interpreter says; is all well?"""
    by_arch = {}
    for arch in ARCHITECTURES:
        kernels = [one for one in rows if one["kind"] == "kernel" and one["arch"] == arch]
        counts = {name: sum(name in one["faults"] for one in kernels) for name in FAULTS}
        by_arch[str(arch)] = {"kernels": len(kernels)} | counts
    said = [one["reason"] for one in rows if one["kind"] == "interpreter"]
    sound = all(one["kernels"] and not any(one[name] for name in FAULTS) for one in by_arch.values())
    interpreter = said[-1] or "right" if said else "not run"
    return {"architectures": by_arch, "interpreter": interpreter, "passed": sound and interpreter == "right"}


def markdown(versions: dict[str, list[dict[str, Any]]]) -> str:
    """The table of every Triton, and the kernels that have a fault."""
    lines = [
        "# Tritons",
        "",
        "What each Triton's compiler makes of every kernel, in fp16 and without a GPU: how many of an architecture's "
        "kernels have which fault. A remark is a warning of ptxas or its word that it serialises matrix instructions. "
        "An operand is overwritten where the machine code may do so before a warpgroup's product has read it "
        "(triton-lang/triton#9433, which ptxas 13.3 cures). The interpreter runs a step and an evaluation of a tiny "
        f"network beside the reference. Which torch pins which: {PINS_SOURCE}.",
        "",
    ]
    head = ["triton", "torch", "sm", "ptxas", "kernels", *FAULTS.values(), "interpreter", "passed"]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for version, rows in versions.items():
        said = summary(rows)
        for arch, counts in said["architectures"].items():
            cells = [version, PINS.get(version, ""), arch, rows[0]["ptxas"].get(arch, ""), *counts.values()]
            well = not any(counts[name] for name in FAULTS) and counts["kernels"]
            lines.append(f"| {' | '.join(map(str, [*cells, said['interpreter'], 'yes' if well else 'no']))} |")
    for version, rows in versions.items():
        faulty = [one for one in rows if one.get("faults")]
        kinds = {}
        for one in faulty:
            kinds.setdefault((one["arch"], one["kernel"], tuple(one["faults"])), []).append(one)
        lines += ["", f"## {version}", ""]
        for (arch, kernel, names), several in kinds.items():
            words = ", ".join(FAULTS[name] for name in names)
            one = several[0]
            detail = one["error"] or "; ".join(one["notes"][:1])
            lines.append(
                f"- sm_{arch}, {kernel}: {words}; {len(several)} of them, as {one['op']} {one['layer']}, {one['tile']}"
                + f": {detail}" * bool(detail)
            )
        if not kinds:
            lines.append("No fault.")
    return "\n".join(lines) + "\n"
