import json
from itertools import pairwise
from pathlib import Path

import pytest
from traces import (
    BOOT_NS,
    GPU,
    MADE_BY_HAND,
    MAIN,
    STEP_NS,
    US,
    HandMadeTrace,
    record_training,
    training_step,
)

from profiling.account.trace import Kernel, Step, read


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


def test_made_traces_say_that_they_are(path):
    made = HandMadeTrace()
    training_step(made, 7, 0)
    record = json.loads(made.write(path).read_bytes())
    assert record["madeByHand"] == MADE_BY_HAND
    assert {"ph", "cat", "name", "pid", "tid", "ts", "dur", "args"} == set(record["traceEvents"][0])


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_step_is_read_to_the_nanosecond(tmp_path, suffix):
    made = HandMadeTrace()
    training_step(made, 7, 0)
    training_step(made, 8, STEP_NS)
    trace = read(made.write(tmp_path / f"trace{suffix}"))
    assert trace.steps == [Step(7, BOOT_NS, BOOT_NS + STEP_NS), Step(8, BOOT_NS + STEP_NS, BOOT_NS + 2 * STEP_NS)]
    assert (trace.device_name, trace.on_gpu, trace.lacks) == (GPU, True, [])
    assert len(trace.kernels) == 20
    assert [trace.step_of(kernel) for kernel in trace.kernels] == [0] * 10 + [1] * 10
    convolution = next(kernel for kernel in trace.kernels if "fprop" in kernel.name)
    assert convolution == Kernel(
        name="sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc",
        start_ns=BOOT_NS + 170 * US,
        end_ns=BOOT_NS + 230 * US,
        stream=7,
        device=0,
        kind="kernel",
        correlation=convolution.correlation,
        ops=("aten::conv2d", "aten::cudnn_convolution"),
        dims="[[64,32,16,16],[32,32,3,3],[],[],[],[],[],[],[]]",
        launch_ns=BOOT_NS + 80 * US,
        graph=None,
    )


def test_backward_finds_its_operations_on_autograds_thread(path):
    made = HandMadeTrace()
    training_step(made, 7, 0)
    made.op("aten::sleep", 340 * US, 200 * US, [[1]], MAIN)  # the program's thread, waiting
    wgrad = next(kernel for kernel in read(made.write(path)).kernels if "wgrad" in kernel.name)
    assert wgrad.ops == (
        "autograd::engine::evaluate_function: ConvolutionBackward0",
        "ConvolutionBackward0",
        "aten::convolution_backward",
    )
    assert wgrad.dims == "[[64,32,16,16],[64,32,16,16],[32,32,3,3]]"


def test_dims_are_of_the_innermost_operation_that_has_any(path):
    made = HandMadeTrace()
    made.op("aten::zeros", 0, 50, [[], [4]])
    made.op("aten::empty", 5, 40, [[], []])
    made.kernel("fill", 10, 100, 5)
    (kernel,) = read(made.write(path)).kernels
    assert kernel.ops == ("aten::zeros", "aten::empty")
    assert kernel.dims == "[[],[4]]"


@pytest.mark.parametrize("call", ["cudaGraphLaunch", "cudaGraphLaunch_v10000", "cuGraphLaunch", "hipGraphLaunch"])
def test_kernels_of_a_graph_share_its_launch(path, call):
    made = HandMadeTrace()
    made.step(0, 0, 1_000)
    correlation = made.call(call, 10)
    made.on_device("a", 100, 10, correlation)
    made.on_device("b", 120, 10, correlation)
    trace = read(made.write(path))
    assert [(k.graph, k.launch_ns) for k in trace.kernels] == [(correlation, BOOT_NS + 10)] * 2
    assert trace.lacks == []


@pytest.mark.parametrize(
    ("written", "node"),
    [(8589934603, 8589934603), (0, None), (-1, None), ("7", None), (None, None), (1 << 63, 1 << 63)],
)
def test_a_kernel_has_the_node_of_its_graph(path, written, node):
    made = HandMadeTrace()
    made.on_device("k", 100, 10, made.call("cudaGraphLaunch", 10))
    made.events[-1]["args"]["graph node id"] = written
    trace = read(made.write(path))
    assert [kernel.node for kernel in trace.kernels] == [node]
    assert not any("malformed" in lack for lack in trace.lacks)


LAUNCHES = ("cudaLaunchKernelExC", "cuLaunchKernelEx", "hipExtModuleLaunchKernel", "cudaLaunchCooperativeKernel")


@pytest.mark.parametrize("call", LAUNCHES)
def test_kernels_are_launched_by_calls_of_many_names(path, call):
    made = HandMadeTrace()
    library = {"cu": "cuda_driver", "hi": "hip_runtime"}.get(call[:2] if call[2:3].isupper() or call[0] == "h" else "")
    made.event(library or "cuda_runtime", call, 10, 5, correlation=900)
    made.on_device("k", 100, 10, 900)
    (kernel,) = read(made.write(path)).kernels
    assert (kernel.launch_ns, kernel.graph) == (BOOT_NS + 10, None)


WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "hipEventSynchronize", "cudaMemcpy")


@pytest.mark.parametrize("call", [*WAITS, "cudaMemcpyAsync", "cudaEventQuery", "cudaStreamWaitEvent"])
def test_syncs_are_calls_that_wait_for_the_device(path, call):
    made = HandMadeTrace()
    made.call(call, 10, 30)
    assert read(made.write(path)).syncs == ([(BOOT_NS + 10, BOOT_NS + 40, call)] if call in WAITS else [])


def test_copy_to_pageable_memory_waits(path):
    made = HandMadeTrace()
    correlation = made.call("cudaMemcpyAsync", 10, 500)
    made.on_device("Memcpy DtoH (Device -> Pageable)", 300, 20, correlation, category="gpu_memcpy")
    trace = read(made.write(path))
    assert trace.syncs == [(BOOT_NS + 10, BOOT_NS + 510, "Memcpy DtoH (Device -> Pageable)")]
    assert trace.kernels[0].kind == "memcpy"


def test_without_a_gpu_the_operations_are_what_ran(path):
    made = HandMadeTrace(gpu=None)
    made.step(3, 0, 1_000)
    made.op("aten::conv2d", 100, 400, [[1, 2]])
    made.op("aten::mkldnn_convolution", 150, 300, [[1, 2], [3]])
    made.op("profiler::_record_function_enter_new", 600, 50)
    made.annotation("augmentation", 700, 100)
    trace = read(made.write(path))
    assert not trace.on_gpu
    assert trace.lacks == []
    rows = [(k.name, k.start_ns - BOOT_NS, k.end_ns - BOOT_NS, k.ops[-1], k.device) for k in trace.kernels]
    assert rows == [
        ("aten::conv2d", 100, 150, "aten::conv2d", -1),
        ("aten::mkldnn_convolution", 150, 450, "aten::mkldnn_convolution", -1),
        ("aten::conv2d", 450, 500, "aten::conv2d", -1),
        ("augmentation", 700, 800, "augmentation", -1),
    ]
    assert trace.kernels[0].correlation == trace.kernels[2].correlation != trace.kernels[1].correlation
    assert all(trace.step_of(kernel) == 0 and kernel.launch_ns == kernel.start_ns for kernel in trace.kernels)


def test_pieces_of_a_recorded_step_and_the_time_between_are_the_step(path):
    record_training(path, "resnet9", "float32")
    trace = read(path)
    assert trace.lacks == []
    assert [step.number for step in trace.steps] == [1, 2]
    events = [e for e in json.loads(path.read_bytes())["traceEvents"] if e.get("cat") in ("cpu_op", "user_annotation")]
    for step in trace.steps:
        pieces = sorted((k.start_ns, k.end_ns) for k in trace.kernels if trace.step_of(k) == step.number - 1)
        assert all(end <= following for (_, end), (following, _) in pairwise(pieces))
        covered = sum(end - start for start, end in pieces)
        # Uncovered is what is in no operation at all, from the file itself, in doubles.
        edge, uncovered = step.start_ns / 1_000, 0.0
        for event in sorted(events, key=lambda e: e["ts"]):
            inside = step.start_ns / 1_000 <= event["ts"] < step.end_ns / 1_000
            if inside and not event["name"].startswith("ProfilerStep"):
                uncovered += max(event["ts"] - edge, 0)
                edge = max(edge, event["ts"] + event["dur"])
        uncovered += step.end_ns / 1_000 - edge
        assert covered + 1_000 * uncovered == pytest.approx(step.end_ns - step.start_ns, abs=100)
        assert covered > 0.5 * (step.end_ns - step.start_ns)
