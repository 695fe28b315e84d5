"""Instructions and loops of machine code, and operands that are written before a warpgroup's product has read them."""

import pytest

from profiling.bench.machine_code import parse


def sass(text: str) -> list[str]:
    """Lines as nvdisasm prints them, of instructions one a line; what ends with a colon is a label."""
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
    ids=[
        *("nothing_is_written", "after_it_was_waited_for", "too_early", "after_all_were_waited_for"),
        *("by_the_next_round", "beside_it", "by_the_next_round_in_time", "by_four_matrices", "by_two_matrices"),
        *("by_a_wide_product", "by_a_wide_load", "a_store_only_reads", "a_sum_only_reads"),
        *("operands_in_shared_memory", "of_the_older_product"),
    ],
)
def test_operands_that_are_overwritten(changes, overwritten):
    assert parse(sass(LOOP.format(**PLAIN | changes))).overwritten == overwritten


def test_code_without_a_loop_is_looked_at_too():
    straight = LOOP.format(**PLAIN | {"after": "MOV R92, R2"}).replace("@P0 BRA `(.L_x_1)", "NOP")
    assert parse(sass(straight)).overwritten == 1


def test_instructions_are_counted_and_loops_found():
    found = parse(sass(LOOP.format(**PLAIN)))
    assert found.counts["HGMMA.64x64x16.F32"] == 2
    assert found.counts["EXIT"] == 1
    (loop,) = found.loops
    assert loop == {"NOP": 2, "HGMMA.64x64x16.F32": 2, "WARPGROUP.DEPBAR.LE": 1, "BRA": 1}
