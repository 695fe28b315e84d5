"""The table of the kernels' document: what is in a row, how two generations stand in it, and the command."""

import json

import pytest
from typer.testing import CliRunner

from experiments import machine_code
from experiments.__main__ import app
from profiling.bench.ahead_of_time import Build, Facts
from profiling.bench.cases import RESNET9_LAYERS, RESNET_LAYERS

LOOP = {"HGMMA.64x64x16.F32": 4, "LDSM.16.M88.4": 2, "BAR.SYNC": 1, "IADD3": 93}


def facts_of(builds: list[Build]) -> list[Facts]:
    """A loop with a product in registers for convolutions, and shuffles and barriers behind it."""
    sass = {**LOOP, "SHFL.BFLY": 16, "BAR.SYNC": 4}
    product = {"shared_bytes": 56 * 1024, "sass": sass, "loops": [LOOP]}
    return [Facts("", 90, registers=100, warps=4, **(product if "BLOCK_K" in b.constexprs else {})) for b in builds]


@pytest.fixture(scope="module")
def rows() -> dict:
    return machine_code.rows(facts_of)


def test_rows_are_what_each_network_fuses_into_its_layers(rows):
    for layer in RESNET_LAYERS:
        fused = [f"conv_fprop[prologue,statistics] {layer}", f"conv_wgrad[prologue] {layer}"]
        fused.append(f"conv_dgrad[mask,sums] {layer}" if layer.R == 3 else f"conv_dgrad {layer.of_dgrad}")
        assert rows.keys() >= set(fused)
    for layer in RESNET9_LAYERS:
        if layer not in RESNET_LAYERS:
            assert rows.keys() >= {f"conv_fprop[statistics] {layer}", f"conv_dgrad {layer}", f"conv_wgrad {layer}"}
    assert any(name.startswith("bn_finalize") for name in rows)
    row = rows["conv_fprop[prologue,statistics] 64x32x32-64x3x3-s1"]
    assert row == {
        **{"tile": "256x64x64 4w 3s fp16x2", "programs": 2048, "registers": 100, "shared_kb": 56, "ctas": 4},
        **{"loop": 100, "matrices": {"HGMMA.64x64x16.F32": 4}, "operands": "registers"},
        **{"shuffles": 16, "barriers": 3, "flops_per_l2_byte": pytest.approx(51.2)},
    }


LINES = {"H": 32, "W": 32, "C": 64, "K": 64}
TILE = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64}


@pytest.mark.parametrize(
    ("kernel", "constexprs", "flops", "loaded"),
    [
        ("conv_dgrad_kernel", TILE, 2 * 64 * 32 * 64, (64 + 32) * 64 * 2),
        # A block of 64 channels by 32 filters in three taps: of the channels' tile a third, of the filters' all three.
        ("conv_wgrad_kernel", {**TILE, "TAPS": 3}, 3 * 2 * 64 * 32 * 64, (64 + 3 * 32) * 64 * 2),
        # 512 maps of 32x32: 256 programs load nine taps, and 33 lines of 64 pixels three times each.
        (
            "conv_fprop_lines_kernel",
            {**LINES, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64},
            2 * 512 * 32 * 32 * 64 * 64 * 9,
            256 * 2 * (9 * 64 * 64 + 3 * 33 * 64 * 64),
        ),
        ("bn_finalize_kernel", {"BLOCK_T": 256, "BLOCK_C": 8}, None, None),
    ],
    ids=["rows", "taps", "lines", "no_product"],
)
def test_flops_per_l2_byte(kernel, constexprs, flops, loaded):
    found = machine_code.flops_per_l2_byte(Build("kernels.x", kernel, {}, constexprs))
    assert found == (flops and pytest.approx(flops / loaded, rel=1e-9))


def test_generations_stand_beside_each_other_where_they_differ(rows):
    name = "conv_dgrad[mask,sums] 64x32x32-64x3x3-s1"
    text = machine_code.markdown({name: rows[name] | {"registers": 200}}, {name: rows[name]})
    head, _, line = text.splitlines()
    assert line.count("|") == head.count("|")
    assert ("| 200 → 100 |" in line, line.count("→")) == (True, 1)


@pytest.fixture
def document(monkeypatch, tmp_path):
    path = tmp_path / "kernels.md"
    monkeypatch.setattr(machine_code, "DOCUMENT", path)
    monkeypatch.setattr(machine_code, "OUT", tmp_path)
    return path


def test_command_writes_the_table_and_nothing_else_of_the_document(rows, monkeypatch, document):
    document.write_text(f"before\n\n{machine_code.BEGIN}\n\nold\n\n{machine_code.END}\nafter\n")
    (document.parent / "first.json").write_text(json.dumps(rows))
    monkeypatch.setattr(machine_code, "rows", lambda: rows)
    assert CliRunner().invoke(app, ["machine-code"]).exit_code == 0
    text = document.read_text()
    assert text == f"before\n\n{machine_code.BEGIN}\n\n{machine_code.markdown(rows, rows)}\n{machine_code.END}\nafter\n"
    assert json.loads((document.parent / "second.json").read_text()) == json.loads(json.dumps(rows))
    elsewhere = document.parent / "elsewhere.json"
    assert CliRunner().invoke(app, ["machine-code", "--out", str(elsewhere)]).exit_code == 0
    assert elsewhere.exists()
    assert document.read_text() == text


def test_document_without_the_table_s_place_is_one_line(document):
    document.write_text("no table\n")
    result = CliRunner().invoke(app, ["machine-code"])
    assert (result.exit_code, result.output.count("\n")) == (3, 1)
    assert "lacks the lines" in result.output
