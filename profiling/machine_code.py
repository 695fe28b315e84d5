"""Machine code in words: how often which instruction stands in a kernel, and in which of its loops."""

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple


class Sass(NamedTuple):
    """Instructions by full mnemonic ("LDG.E.128"): of the kernel, and of the body of every loop, innermost and smallest
    first."""

    counts: dict[str, int]
    loops: list[dict[str, int]]


def read(cubin: bytes) -> Sass:
    """The machine code of a kernel's binary; raises CalledProcessError where the disassembler does not know it."""
    lines = _disassemble(cubin)
    return Sass(dict(collections.Counter(_mnemonics(lines))), _loops(lines))


def tool(name: str) -> str:
    """The path of one of the programs that come with Triton: ptxas, nvdisasm."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _disassemble(cubin: bytes) -> list[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("nvdisasm"), "--print-code", "--no-dataflow", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def _mnemonics(lines: list[str]) -> list[str]:
    instruction = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)")
    return [match[1] for line in lines if (match := instruction.search(line))]


def _loops(lines: list[str]) -> list[dict[str, int]]:
    """The instructions from the target of every backward branch to it, the branch to itself at the end excepted."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    bodies = []
    for i, line in enumerate(lines):
        match = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if match and labels.get(match[1], i) < i and len(body := _mnemonics(lines[labels[match[1]] : i + 1])) > 1:
            bodies.append(dict(collections.Counter(body)))
    return sorted(bodies, key=lambda body: sum(body.values()))
