"""Machine code in numbers: the instructions of a kernel and of its loops, and a hazard of Hopper's matrix product.

A warpgroup's matrix instruction on a Hopper GPU runs beside its warps and reads operand A from their registers as it
needs it. Only WARPGROUP.DEPBAR delays later writes to these registers. The register allocation of ptxas before 13.3
(Triton 3.6 to 3.8 for 9.0) ignores that, so that a later operand may be multiplied in an earlier one's place
(triton-lang/triton#9433; #11781 has 61 for 64 on an H100).
"""

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple


class Sass(NamedTuple):
    """Instructions by full mnemonic ("LDG.E.128"): of the kernel, and of the body of every loop, smallest first.

    `overwritten` counts instructions that write an operand which a matrix instruction may not have read yet.
    """

    counts: dict[str, int]
    loops: list[dict[str, int]]
    overwritten: int = 0


class Instruction(NamedTuple):
    """One line of machine code: its address in the kernel, mnemonic and operands."""

    address: str
    mnemonic: str
    operands: str


def read(cubin: bytes) -> Sass:
    """The machine code of a kernel's binary, by Triton's nvdisasm; raises CalledProcessError where that fails."""
    import triton

    nvdisasm = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(nvdisasm), "--print-code", "--no-dataflow", file.name]
        return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())


def parse(lines: list[str]) -> Sass:
    """The facts in nvdisasm's lines for a kernel."""
    whole, loops = _instructions(lines), _loops(lines)
    overwritten = set().union(*map(_overwriting, [whole, *(body * 2 for body in loops)]))
    return Sass(_counts(whole), sorted(map(_counts, loops), key=lambda body: sum(body.values())), len(overwritten))


def _instructions(lines: list[str]) -> list[Instruction]:
    one = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)\s*([^;]*)")
    return [Instruction(*match.groups()) for line in lines if (match := one.search(line))]


def _counts(body: list[Instruction]) -> dict[str, int]:
    return dict(collections.Counter(one.mnemonic for one in body))


def _loops(lines: list[str]) -> list[list[Instruction]]:
    """The instructions from the target of every backward branch to the branch; not the final branch to itself."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\.L_x_\d+):", line))}
    bodies = []
    for i, line in enumerate(lines):
        match = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if match and labels.get(match[1], i) < i and len(body := _instructions(lines[labels[match[1]] : i + 1])) > 1:
            bodies.append(body)
    return bodies


OPERAND_REGISTERS = 4
"""Registers of operand A in each thread: a warpgroup's 64 rows of 32 bytes, by 128 threads of 4 bytes."""


def _overwriting(body: list[Instruction]) -> set[str]:
    """The addresses of instructions that write an operand of a warpgroup's product before it is known to be done.

    Products are counted in groups, each closed by a "gsb0"; WARPGROUP.DEPBAR.LE gsb0, N waits until N are left.
    """
    groups: list[set[int]] = []  # operands of the groups under way, the oldest first
    open_group: set[int] = set()
    found = set()
    for address, mnemonic, operands in body:
        if mnemonic.startswith("HGMMA"):
            operand = re.match(r"R\d+, R(\d+),", operands)
            open_group |= {int(operand[1]) + i for i in range(OPERAND_REGISTERS)} if operand else set()
            if "gsb0" in operands:
                groups, open_group = [*groups, open_group], set()
        elif mnemonic.startswith("WARPGROUP.DEPBAR"):
            left = int(re.search(r"gsb0, (0x[0-9a-f]+)", operands)[1], 16)
            groups = groups[len(groups) - left :] if left < len(groups) else groups
        elif written := _written(mnemonic, operands):
            found |= {address} if written & open_group.union(*groups) else set()
    return found


def _written(mnemonic: str, operands: str) -> set[int]:
    """The registers that an instruction writes: its first operand, of as many as its mnemonic says."""
    target = re.match(r"R(\d+)\b", operands)
    if not target or mnemonic.startswith(("ST", "RED", "ATOM")):
        return set()
    width = 1
    if matrices := re.match(r"LDSM.*88\.([24])", mnemonic):
        width = int(matrices[1])
    elif ".128" in mnemonic:
        width = 4
    elif ".64" in mnemonic or ".WIDE" in mnemonic or mnemonic == "CS2R":
        width = 2
    return {int(target[1]) + i for i in range(width)}
