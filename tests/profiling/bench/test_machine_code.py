"""Machine code read: instructions, loops, and operands written before a warpgroup's product has read them."""

import pytest

from profiling.bench.machine_code import parse


def sass(text: str) -> list[str]:
    """Lines as nvdisasm prints them, of one instruction or label a line."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return [
        line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    ]


LOOP = """
    MOV R1, c[0x0][0x28]
    .L_x_1:
    {before}
    HGMMA.64x64x16.F32 R24, {first}, gdesc[UR8], R24, gsb0
    HGMMA.64x64x16.F32 R24, {second}, gdesc[UR8], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, {left}
    {after}
    @P0 BRA `(.L_x_1)
    EXIT
"""
PLAIN = {"before": "NOP", "first": "R88", "second": "R92", "left": "0x1", "after": "NOP"}


@pytest.mark.parametrize(
    ("changes", "overwritten"),
    [
        ({}, 0),
        ({"after": "MOV R88, R2"}, 0),
        ({"after": "MOV R92, R2"}, 1),
        ({"after": "MOV R92, R2", "left": "0x0"}, 0),
        ({"before": "MOV R95, R2"}, 1),
        ({"before": "MOV R96, R2"}, 0),
        ({"before": "MOV R88, R2"}, 0),
        ({"before": "LDSM.16.M88.4 R89, [R3]"}, 1),
        ({"before": "LDSM.16.M88.2 R89, [R3]"}, 0),
        ({"before": "@!P1 IMAD.WIDE R94, R2, 0x2, R4"}, 1),
        ({"before": "LDS.128 R89, [R3]"}, 1),
        ({"before": "STS.128 [R3], R92"}, 0),
        ({"before": "FADD R2, R92, R3"}, 0),
        ({"first": "gdesc[UR4]", "second": "gdesc[UR4]", "before": "MOV R92, R2"}, 0),
        ({"first": "R92", "left": "0x2", "after": "MOV R92, R2", "second": "gdesc[UR4]"}, 1),
    ],
    ids=lambda value: " ".join(value.values()) if isinstance(value, dict) else str(value),
)
def test_operands_overwritten_before_they_are_read(changes, overwritten):
    """In a loop; and what a round writes of its own product, also in code without one."""
    code = LOOP.format(**PLAIN | changes)
    assert parse(sass(code)).overwritten == overwritten
    if "after" in changes:
        assert parse(sass(code.replace("@P0 BRA `(.L_x_1)", "NOP"))).overwritten == overwritten


def test_instructions_are_counted_and_loops_found():
    found = parse(sass(LOOP.format(**PLAIN)))
    assert (found.counts["HGMMA.64x64x16.F32"], found.counts["EXIT"]) == (2, 1)
    assert found.loops == [{"NOP": 2, "HGMMA.64x64x16.F32": 2, "WARPGROUP.DEPBAR.LE": 1, "BRA": 1}]
