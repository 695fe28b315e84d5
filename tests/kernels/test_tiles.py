"""The tile table: what may be in it, how it is looked up, and defaults that fit every layer."""

import dataclasses
import json

import pytest
import torch

from kernels import tiles
from kernels.conv_shape import RESNET9_LAYERS, RESNET_LAYERS, ConvShape
from kernels.tiles import OPS, Entry, Gpu, Tile, default_tile, document, load, prefers_library, tile

SHAPE = ConvShape(64, 128, 32, 32, stride=2)
H200 = Gpu("NVIDIA H200", (9, 0))
MEASURED = Tile(256, 64, 64, 8, 4, descriptors=True)
ENTRY = Entry("NVIDIA H200", "conv_fprop", str(SHAPE), "float16", "3.6.0", 41.5, 44.0, MEASURED)


def dump(entries, path):
    path.write_text(json.dumps(document(entries)))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of one measurement, in place of the committed one."""
    path = tmp_path / "tiles.json"
    dump((ENTRY,), path)
    monkeypatch.setattr(tiles, "_by_key", lambda: {entry[:4]: entry for entry in load(path)})
    return path


def test_the_committed_table_is_by_its_schema():
    entries = load()
    assert list(entries) == sorted(entries, key=lambda entry: entry[:4])


def test_a_table_reads_back_as_written(table):
    other = ENTRY._replace(op="conv_dgrad", library_us=40)
    dump((ENTRY, other), table)
    assert load(table) == (other, ENTRY)


def test_a_measured_tile_is_used_where_it_was_measured_and_the_default_elsewhere(table):
    assert tile("conv_fprop", SHAPE, torch.float16, H200) == MEASURED
    for op, shape, dtype, gpu in (
        ("conv_dgrad", SHAPE, torch.float16, H200),
        ("conv_fprop", dataclasses.replace(SHAPE, stride=1), torch.float16, H200),
        ("conv_fprop", SHAPE, torch.bfloat16, H200),
        ("conv_fprop", SHAPE, torch.float16, Gpu("NVIDIA H100 80GB HBM3", (9, 0))),
    ):
        assert tile(op, shape, dtype, gpu) == default_tile(op, shape, dtype, gpu.capability)
        assert not prefers_library(op, shape, dtype, gpu), "nothing was measured"


@pytest.mark.parametrize(("library_us", "preferred"), [(44.0, False), (41.5, False), (41.0, True)])
def test_the_library_is_preferred_where_it_was_measured_faster(table, library_us, preferred):
    dump((ENTRY._replace(library_us=library_us),), table)
    assert prefers_library("conv_fprop", SHAPE, torch.float16, H200) == preferred


@pytest.mark.parametrize("capability", [None, (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_defaults_fit_every_layer(op, dtype, capability):
    for shape in (*RESNET_LAYERS, *RESNET9_LAYERS, ConvShape(16, 48, 5, 7), ConvShape(80, 16, 1, 1, 1, 2)):
        chosen = default_tile(op, shape, dtype, capability)
        chosen.check(op, shape)
        assert chosen.num_warps == 4
        assert chosen.descriptors == (capability in ((9, 0), (10, 0)) and dtype != torch.float32)
        assert chosen.SPLIT == 1 or op == "conv_wgrad"


def test_an_unknown_op_is_named():
    with pytest.raises(ValueError, match="'conv_fwd', expected one of conv_fprop"):
        default_tile("conv_fwd", SHAPE, torch.float16, None)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        pytest.param("conv_fprop", {"BLOCK_M": 96}, "BLOCK_M is 96, expected a power of two", id="no_power_of_two"),
        pytest.param("conv_fprop", {"BLOCK_N": 256}, "BLOCK_N is 256, .* divides 128", id="wider_than_k"),
        pytest.param("conv_fprop", {"BLOCK_K": 128}, "BLOCK_K is 128, .* divides 64", id="deeper_than_c"),
        pytest.param("conv_dgrad", {"BLOCK_N": 128}, "BLOCK_N is 128, .* divides 64", id="dgrad_wider_than_c"),
        pytest.param("conv_wgrad", {"BLOCK_M": 128}, "BLOCK_M is 128, .* divides 64", id="wgrad_longer_than_c"),
        pytest.param("conv_wgrad", {"BLOCK_K": 8}, "BLOCK_K is 8, expected a power of two from 16", id="small"),
        pytest.param("conv_fprop", {"num_warps": 3}, "out of range", id="three_warps"),
        pytest.param("conv_fprop", {"SPLIT": 0}, "out of range", id="no_parts"),
        pytest.param("conv_wgrad", {"TAPS": 3}, "TAPS is 3, expected 1", id="taps_at_stride_2"),
        pytest.param("conv_dgrad", {"TAPS": 3}, "TAPS is 3, expected 1", id="taps_of_dgrad"),
        pytest.param("conv_fprop", {"form": "line"}, "form is 'line', expected one of rows", id="form"),
        pytest.param("conv_wgrad", {"form": "columns"}, "form is 'columns'", id="form_of_wgrad"),
        pytest.param("conv_dgrad", {"form": "lines", "descriptors": True}, "form is 'lines'", id="lines_at_stride_2"),
        pytest.param("conv_fprop", {"prologue": "fp16"}, "prologue is 'fp16', expected one of fp32", id="prologue"),
        pytest.param("conv_dgrad", {"prologue": "stored"}, "prologue is 'stored'", id="prologue_of_dgrad"),
    ],
)
def test_a_tile_that_cannot_run_is_refused(op, change, message):
    good = Tile(64, 64, 64, 4, 3)
    good.check(op, SHAPE)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **change).check(op, SHAPE)


@pytest.mark.parametrize("change", [{"descriptors": False}, {"BLOCK_M": 16}], ids=str)
def test_lines_need_descriptors_and_whole_lines(change):
    layer, good = ConvShape(64, 64, 32, 32), Tile(64, 64, 64, 4, 2, True, form="lines", prologue="fp16x2")
    good.check("conv_fprop", layer)
    for bad, shape in ((dataclasses.replace(good, **change), layer), (good, ConvShape(64, 64, 32, 24))):
        with pytest.raises(ValueError, match="the map's width a power of two"):
            bad.check("conv_fprop", shape)


def test_a_tile_says_what_is_not_by_default():
    assert str(Tile(64, 64, 64, 4, 3)) == "64x64x64 4 warps 3 stages pointers"
    words = "64x64x32 4 warps 2 stages descriptors split 8 taps 3 lines fp16x2"
    assert str(Tile(64, 64, 32, 4, 2, True, 8, 3, "lines", "fp16x2")) == words


def record(**changes) -> dict:
    return ENTRY._asdict() | {"tile": dataclasses.asdict(MEASURED)} | changes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param([], "schema 1", id="no_object"),
        pytest.param({"schema": 2, "entries": []}, "schema 1", id="another_schema"),
        pytest.param({"schema": 1, "entries": [record(), record()]}, "more than one entry", id="twice"),
        pytest.param({"schema": 1, "entries": [record(), record(speed=1)]}, "entry 1: expected the fields", id="field"),
        pytest.param({"schema": 1, "entries": [record(tile={})]}, "entry 0: expected a tile", id="tile"),
        pytest.param(
            {"schema": 1, "entries": [record(tile=record()["tile"] | {"SPLIT": "2"})]}, r"SPLIT \(int\)", id="type"
        ),
        pytest.param({"schema": 1, "entries": [record(shape="64x32x32")]}, "shape is '64x32x32'", id="shape"),
        pytest.param({"schema": 1, "entries": [record(op="matmul")]}, "expected an op", id="op"),
        pytest.param({"schema": 1, "entries": [record(us=0)]}, "positive times", id="zero_time"),
        pytest.param(
            {"schema": 1, "entries": [record(tile=record()["tile"] | {"BLOCK_N": 100})]}, "BLOCK_N is 100", id="block"
        ),
    ],
)
def test_a_table_that_is_not_by_the_schema_is_named(tmp_path, content, message):
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_without_a_gpu_the_tiles_are_the_interpreters():
    assert tiles.gpu_of(torch.device("cpu")) == tiles.gpu_of(torch.device("meta")) == Gpu("interpreter", None)
