import dataclasses
import json

import pytest
import torch

from kernels.conv_shape import RESNET_LAYERS, ConvShape
from profiling.device import ceilings
from profiling.device.ceilings import Ceiling, Ceilings, measure
from profiling.device.sustained import CpuWatch, Sustained

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYERS = (ConvShape(16, 32, 8, 8, stride=2), ConvShape(16, 16, 8, 8, R=1))
PASSES = {"fprop": (2, 32, 4, 4), "dgrad": (2, 16, 8, 8), "wgrad": (32, 16, 3, 3)}


def ceiling(value, name="matrix product", unit="FLOP/s"):
    return Ceiling(name, "8192^3", value, value, unit, 8, 2.0, "float16")


FOUND = Ceilings(
    device="NVIDIA H200",
    dtype="float16",
    gemm=[ceiling(790e12), ceiling(700e12)],
    convolutions=[ceiling(610e12, "fprop")],
    copy=ceiling(4.3e12, "copy", "B/s"),
    launch=ceiling(2e-6, "launch", "s"),
    sm_clock_mhz=(345, 1755),
    reasons=("power cap",),
    lacks=(),
    fingerprint="0123456789abcdef",
)


@pytest.fixture
def small(monkeypatch):
    """Affordable candidates: one layer is a 3x3, one is not."""
    monkeypatch.setattr(ceilings, "GEMMS", {"cpu": ((64, False), (64, True))})
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(ceilings, "RESNET_LAYERS", LAYERS)


@pytest.fixture
def second_each(monkeypatch):
    """Every candidate's best call takes one second, its median one two."""

    def once(watch, run, seconds):
        run()
        return Sustained(1.0, 2.0, 8, seconds)

    monkeypatch.setattr(ceilings, "sustain", once)


def bench(device=CPU, dtype=torch.float32):
    return ceilings._Bench(device, dtype, 0.1, CpuWatch(), lambda text: None)


@pytest.mark.usefixtures("small")
def test_a_cpu_is_measured():
    said, search = [], torch.backends.cudnn.benchmark
    found = measure(CPU, torch.float32, seconds=0.01, batch=2, say=said.append)
    assert torch.backends.cudnn.benchmark == search
    assert [c.name for c in found.gemm + found.convolutions] == ["matrix product"] * 2 + list(PASSES)
    assert len(said) == 7
    for c in [*found.gemm, *found.convolutions, found.copy]:
        assert c.value >= c.median > 0
        assert c.samples >= 3
    assert 0 < found.launch.value <= found.launch.median
    assert (found.sm_clock_mhz, found.lacks, found.dtype) == (None, (), "float32")
    assert Ceilings.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.usefixtures("small", "second_each")
def test_rates_are_the_work_of_a_call_over_its_time(monkeypatch):
    found = measure(CPU, torch.bfloat16, batch=4)
    assert [c.value for c in found.gemm] == [2 * 64**3] * 2
    assert {c.name: c.value for c in found.convolutions} == dict.fromkeys(PASSES, 2 * 4 * 4 * 4 * 32 * 16 * 9)
    first = found.convolutions[0]
    assert (first.median, first.shape) == (first.value / 2, "16x8x8-32x3x3-s2, batch 4")
    assert (found.bytes_per_s, found.copy.unit) == (2 * (1 << 20), "B/s")
    assert (found.launch_s, found.launch.median, found.launch.unit) == (1.0, 2.0, "s")
    assert (found.flops_per_s, found.compute) == (first.value, first)
    assert {c.arithmetic for c in found.gemm + found.convolutions} == {"bfloat16"}
    assert dataclasses.replace(found, gemm=[ceiling(1e9)]).flops_per_s == 1e9, "the faster of products and convolutions"

    def refuse(*arguments):
        raise RuntimeError("GET was unable to find an engine to execute this computation\nsecond line")

    monkeypatch.setattr(ceilings, "conv_backward", refuse)
    found = measure(CPU, torch.float32, batch=1)
    assert [c.name for c in found.convolutions] == ["fprop"], "a pass that the library lacks does not cost the others"
    assert found.lacks[1].startswith("wgrad 16x8x8-32x3x3-s2: GET was unable")
    assert "second line" not in found.lacks[1]


@pytest.mark.usefixtures("second_each")
def test_the_candidates(monkeypatch):
    """The article's 3x3 layers; a larger product is left out where it would take minutes; a CPU's batch is bounded."""
    monkeypatch.setattr(ceilings._Bench, "_convolution", lambda bench, name, layer, batch: lambda: None)
    monkeypatch.setattr(ceilings, "GEMMS", {"cpu": ((64, False), (128, False))})
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1 << 20})
    found = bench().convolutions(512, [])
    layers = [layer for layer in RESNET_LAYERS if layer.R == 3]
    assert [(c.shape, c.value) for c in found[::3]] == [(f"{layer}, batch 512", layer.flops(512)) for layer in layers]
    assert [c.shape for c in bench().gemms()] == ["64^3"]
    for batch, used in ((2, 2), (512, ceilings.CPU_BATCH)):
        shape = measure(CPU, torch.float32, seconds=0.001, batch=batch).convolutions[0].shape
        assert shape.endswith(f", batch {used}")


@pytest.mark.parametrize(("name", "shape"), PASSES.items())
def test_each_pass_computes_its_own_gradient_channels_last(name, shape):
    result = bench()._convolution(name, LAYERS[0], 2)()
    assert result.shape == shape
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_a_size_that_does_not_fit_is_halved():
    def build(size):
        if size > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return lambda: size

    run, size = ceilings._fitting(build, 1024, 256)
    assert run() == size == 256
    with pytest.raises(torch.OutOfMemoryError, match="not even 512 fits"):
        ceilings._fitting(build, 1024, 512)


@pytest.mark.parametrize(
    ("dtype", "allowed", "capability", "expected"),
    [
        (torch.float32, True, (9, 0), "tf32"),
        (torch.float32, False, (9, 0), "float32"),
        (torch.float32, True, (7, 0), "float32"),
        (torch.float16, True, (9, 0), "float16"),
    ],
)
def test_the_arithmetic_is_the_device_s(monkeypatch, dtype, allowed, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert bench(CUDA, dtype)._arithmetic(allowed) == expected


@pytest.mark.parametrize(
    ("device", "dtype", "words"),
    [
        (CPU, torch.float16, "dtype is float16, expected bfloat16 or float32 on cpu"),
        (CUDA, torch.int8, "dtype is int8, expected float16 or bfloat16 or float32 on cuda"),
    ],
)
def test_a_dtype_that_the_device_does_not_compute_in(device, dtype, words):
    with pytest.raises(ValueError, match=words):
        measure(device, dtype)


@pytest.mark.parametrize("clocks", [None, (None, 1755)])
def test_a_record_is_read_back(clocks):
    found = dataclasses.replace(FOUND, sm_clock_mhz=clocks)
    assert Ceilings.from_json(json.loads(json.dumps(found.to_json()))) == found


DAMAGED = {
    "no_object": lambda r: [],
    "other_version": lambda r: r | {"version": 2},
    "field_missing": lambda r: {k: v for k, v in r.items() if k != "copy"},
    "no_candidates": lambda r: r | {"gemm": []},
    "candidate_of_another_kind": lambda r: r | {"gemm": [{"name": "x"}]},
    "text_for_a_number": lambda r: r | {"gemm": [r["gemm"][0] | {"value": "790"}]},
    "negative": lambda r: r | {"copy": r["copy"] | {"value": -1.0}},
    "nan": lambda r: r | {"launch": r["launch"] | {"value": float("nan")}},
    "null": lambda r: r | {"launch": None},
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_refused(damage):
    with pytest.raises(ValueError, match=r"^ceilings.*measure them again"):
        Ceilings.from_json(damage(FOUND.to_json()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_gpu_is_measured(monkeypatch, dtype):
    monkeypatch.setattr(ceilings, "GEMMS", {"cuda": ((2048, False), (2048, True))})
    found = measure(CUDA, dtype, seconds=0.05, batch=64)
    assert len(found.gemm) == 2
    assert len(found.convolutions) + len(found.lacks) == 21
    assert found.bytes_per_s > 1e11
    assert found.launch_s < 1e-3
    assert Ceilings.from_json(found.to_json()) == found
