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


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a table in place of the committed one, as `document`, or of entries; returns its path."""
    path = tmp_path / "tiles.json"
    monkeypatch.setattr(tiles, "_by_key", lambda: {entry[:4]: entry for entry in load(path)})

    def written(*entries: Entry, content=None):
        path.write_text(json.dumps(document(entries) if content is None else content))
        return path

    return written


def test_the_committed_table_is_by_its_schema():
    entries = load()
    assert list(entries) == sorted(entries, key=lambda entry: entry[:4])


def test_a_table_reads_back_as_written(write):
    other = ENTRY._replace(op="conv_dgrad", library_us=40)
    assert load(write(ENTRY, other)) == (other, ENTRY)


def test_a_measured_tile_is_used_where_it_was_measured_and_the_default_elsewhere(write):
    write(ENTRY)
    assert tile("conv_fprop", SHAPE, torch.float16, H200) == MEASURED
    for op, shape, dtype, gpu in (
        ("conv_dgrad", SHAPE, torch.float16, H200),
        ("conv_fprop", dataclasses.replace(SHAPE, stride=1), torch.float16, H200),
        ("conv_fprop", SHAPE, torch.bfloat16, H200),
        ("conv_fprop", SHAPE, torch.float16, Gpu("NVIDIA H100 80GB HBM3", (9, 0))),
    ):
        assert tile(op, shape, dtype, gpu) == default_tile(op, shape, dtype, gpu.capability)
        assert not prefers_library(op, shape, dtype, gpu), "nothing was measured"
    for library_us, preferred in ((44.0, False), (41.5, False), (41.0, True)):
        write(ENTRY._replace(library_us=library_us))
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


GOOD = Tile(64, 64, 64, 4, 3)
LINES, LINES_LAYER = Tile(64, 64, 64, 4, 2, True, form="lines", prologue="fp16x2"), ConvShape(64, 64, 32, 32)


@pytest.mark.parametrize(
    ("op", "good", "shape", "change", "message"),
    [
        *(
            (op, GOOD, SHAPE, change, message)
            for op, change, message in (
                ("conv_fprop", {"BLOCK_M": 96}, "BLOCK_M is 96, expected a power of two"),
                ("conv_fprop", {"BLOCK_N": 256}, "BLOCK_N is 256, .* divides 128"),
                ("conv_fprop", {"BLOCK_K": 128}, "BLOCK_K is 128, .* divides 64"),
                ("conv_dgrad", {"BLOCK_N": 128}, "BLOCK_N is 128, .* divides 64"),
                ("conv_wgrad", {"BLOCK_M": 128}, "BLOCK_M is 128, .* divides 64"),
                ("conv_wgrad", {"BLOCK_K": 8}, "BLOCK_K is 8, expected a power of two from 16"),
                ("conv_fprop", {"num_warps": 3}, "out of range"),
                ("conv_fprop", {"SPLIT": 0}, "out of range"),
                ("conv_wgrad", {"TAPS": 3}, "TAPS is 3, expected 1"),  # at stride 2
                ("conv_dgrad", {"TAPS": 3}, "TAPS is 3, expected 1"),
                ("conv_fprop", {"form": "line"}, "form is 'line', expected one of rows"),
                ("conv_wgrad", {"form": "columns"}, "form is 'columns'"),
                ("conv_dgrad", {"form": "lines", "descriptors": True}, "form is 'lines'"),  # at stride 2
                ("conv_fprop", {"prologue": "fp16"}, "prologue is 'fp16', expected one of fp32"),
                ("conv_dgrad", {"prologue": "stored"}, "prologue is 'stored'"),
            )
        ),
        ("conv_fprop", LINES, LINES_LAYER, {"descriptors": False}, "the map's width a power of two"),
        ("conv_fprop", LINES, LINES_LAYER, {"BLOCK_M": 16}, "the map's width a power of two"),
        ("conv_fprop", LINES, ConvShape(64, 64, 32, 24), {}, "the map's width a power of two"),
    ],
)
def test_a_tile_that_cannot_run_is_refused(op, good, shape, change, message):
    if change:
        good.check(op, shape)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(good, **change).check(op, shape)


def test_a_tile_says_what_is_not_by_default():
    assert str(GOOD) == "64x64x64 4 warps 3 stages pointers"
    words = "64x64x32 4 warps 2 stages descriptors split 8 taps 3 lines fp16x2"
    assert str(Tile(64, 64, 32, 4, 2, True, 8, 3, "lines", "fp16x2")) == words


def record(tile: dict | None = None, **changes) -> dict:
    return ENTRY._asdict() | {"tile": dataclasses.asdict(MEASURED) if tile is None else tile} | changes


def with_tile(**changes) -> dict:
    return record(dataclasses.asdict(MEASURED) | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "schema 1"),
        ({"schema": 2, "entries": []}, "schema 1"),
        *(
            ({"schema": 1, "entries": entries}, message)
            for entries, message in (
                ([record(), record()], "more than one entry"),
                ([record(), record(speed=1)], "entry 1: expected the fields"),
                ([record({})], "entry 0: expected a tile"),
                ([with_tile(SPLIT="2")], r"SPLIT \(int\)"),
                ([record(shape="64x32x32")], "shape is '64x32x32'"),
                ([record(op="matmul")], "expected an op"),
                ([record(us=0)], "positive times"),
                ([with_tile(BLOCK_N=100)], "BLOCK_N is 100"),
            )
        ),
    ],
)
def test_a_table_that_is_not_by_the_schema_is_named(write, content, message):
    path = write(content=content)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(path) in str(error.value)


def test_without_a_gpu_the_tiles_are_the_interpreters():
    assert tiles.gpu_of(torch.device("cpu")) == tiles.gpu_of(torch.device("meta")) == Gpu("interpreter", None)
