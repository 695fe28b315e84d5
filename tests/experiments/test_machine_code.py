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


def test_every_layer_is_there_with_what_its_network_fuses(rows):
    for layer in RESNET_LAYERS:
        fused = [f"conv_fprop[prologue,statistics] {layer}", f"conv_wgrad[prologue] {layer}"]
        fused.append(f"conv_dgrad[mask,sums] {layer}" if layer.R == 3 else f"conv_dgrad {layer.of_dgrad}")
        assert rows.keys() >= set(fused)
    for layer in RESNET9_LAYERS:
        if layer not in RESNET_LAYERS:
            assert rows.keys() >= {f"conv_fprop[statistics] {layer}", f"conv_dgrad {layer}", f"conv_wgrad {layer}"}
    assert any(name.startswith("bn_finalize") for name in rows)


def test_a_row_says_what_the_loop_holds_and_what_is_behind_it(rows):
    row = rows["conv_fprop[prologue,statistics] 64x32x32-64x3x3-s1"]
    assert (row["registers"], row["shared_kb"], row["ctas"]) == (100, 56, 4)
    assert (row["loop"], row["operands"]) == (100, "registers")
    assert (row["shuffles"], row["barriers"]) == (16, 3)
    assert row["expected_us"] > max(row["roofs_us"].values()) > 0
    assert row["tile"].startswith("256x64x64 4w 3s fp16x2")
    assert 0 < row["floor_us"] < row["expected_us"]


def test_two_generations_stand_beside_each_other_where_they_differ(rows):
    name = "conv_dgrad[mask,sums] 64x32x32-64x3x3-s1"
    text = machine_code.markdown({name: rows[name] | {"registers": 200}}, {name: rows[name]})
    head, _, line = text.splitlines()
    assert line.count("|") == head.count("|")
    assert "| 200 → 100 |" in line
    assert line.count("→") == 1


def test_the_command_writes_the_documents_table_and_nothing_else_of_it(rows, monkeypatch, tmp_path):
    document = tmp_path / "kernels.md"
    document.write_text(f"before\n\n{machine_code.BEGIN}\n\nold\n\n{machine_code.END}\nafter\n")
    (tmp_path / "first.json").write_text(json.dumps(rows))
    monkeypatch.setattr(machine_code, "DOCUMENT", document)
    monkeypatch.setattr(machine_code, "OUT", tmp_path)
    monkeypatch.setattr(machine_code, "rows", lambda: rows)
    assert CliRunner().invoke(app, ["machine-code"]).exit_code == 0
    text = document.read_text()
    assert text.startswith("before\n\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert text.count("\n| conv_") == sum(name.startswith("conv_") for name in rows)
    assert json.loads((tmp_path / "second.json").read_text()) == json.loads(json.dumps(rows))
    elsewhere = tmp_path / "elsewhere.json"
    assert CliRunner().invoke(app, ["machine-code", "--out", str(elsewhere)]).exit_code == 0
    assert elsewhere.exists()
    assert document.read_text() == text


def test_a_document_without_the_tables_place_is_one_clear_line(monkeypatch, tmp_path):
    document = tmp_path / "kernels.md"
    document.write_text("no table\n")
    monkeypatch.setattr(machine_code, "DOCUMENT", document)
    result = CliRunner().invoke(app, ["machine-code"])
    assert result.exit_code == 3
    assert "lacks the lines" in result.output
    assert len(result.output.strip().splitlines()) == 1
