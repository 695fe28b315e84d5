import json
from pathlib import Path

import pytest
from traces import BOOT_NS, MADE_BY_HAND, MAIN, STEP_NS, US, HandMadeTrace

from profiling.account.trace import Kernel, Step, read

STEP = ("step", 0, 0, 1_000)
KERNEL = ("kernel", "k", 10, 100, 10)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


@pytest.mark.parametrize("suffix", [".json", ".json.gz"])
def test_step_is_read_to_the_nanosecond(tmp_path, suffix):
    made = HandMadeTrace().training(0, 1)
    assert json.loads(made.text())["madeByHand"] == MADE_BY_HAND
    trace = read(made.write(tmp_path / f"trace{suffix}"))
    assert trace.steps == [Step(0, BOOT_NS, BOOT_NS + STEP_NS), Step(1, BOOT_NS + STEP_NS, BOOT_NS + 2 * STEP_NS)]
    assert (trace.on_gpu, trace.lacks) == (True, [])
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


def test_backward_finds_its_operations_on_autograds_thread():
    made = HandMadeTrace().training(7)
    made.op("aten::sleep", 7 * STEP_NS + 340 * US, 200 * US, [[1]], MAIN)  # the program's thread, waiting
    wgrad = next(kernel for kernel in made.read().kernels if "wgrad" in kernel.name)
    node = "autograd::engine::evaluate_function: ConvolutionBackward0"
    assert wgrad.ops == (node, "ConvolutionBackward0", "aten::convolution_backward")
    assert wgrad.dims == "[[64,32,16,16],[64,32,16,16],[32,32,3,3]]"


def test_dims_are_of_the_innermost_operation_that_has_any():
    made = HandMadeTrace().apply(("op", "aten::zeros", 0, 50, [[], [4]]), ("op", "aten::empty", 5, 40, [[], []]))
    (kernel,) = made.apply(("kernel", "fill", 10, 100, 5)).read().kernels
    assert (kernel.ops, kernel.dims) == (("aten::zeros", "aten::empty"), "[[],[4]]")
    too_long = HandMadeTrace().apply(("op", "aten::cat", 0, 50, [[[1, 2, 3]] * 20_000]), ("kernel", "k", 10, 60, 5))
    assert too_long.read().kernels[0].dims == ""


GRAPHS = ("cudaGraphLaunch", "cudaGraphLaunch_v10000", "cuGraphLaunch", "hipGraphLaunch")
LAUNCHES = {
    "cudaLaunchKernelExC": "cuda_runtime",
    "cuLaunchKernelEx": "cuda_driver",
    "hipExtModuleLaunchKernel": "hip_runtime",
    "cudaLaunchCooperativeKernel": "cuda_runtime",
} | dict.fromkeys(GRAPHS, "cuda_runtime")


@pytest.mark.parametrize(("call", "library"), LAUNCHES.items())
def test_launches_are_calls_of_many_names(call, library):
    """Kernels of a graph share its launch."""
    made = HandMadeTrace().apply(STEP)
    made.event(library, call, 10, 5, correlation=900)
    kernels = 2 if call in GRAPHS else 1
    trace = made.apply(*(("on_device", "k", 100 + 20 * i, 10, 900) for i in range(kernels))).read()
    graph = 900 if call in GRAPHS else None
    assert [(kernel.graph, kernel.launch_ns) for kernel in trace.kernels] == [(graph, BOOT_NS + 10)] * kernels
    assert trace.lacks == []


NODES = [(8589934603, 8589934603), (0, None), (-1, None), ("7", None), (None, None), (1 << 63, 1 << 63)]


@pytest.mark.parametrize(("written", "node"), NODES)
def test_kernel_has_the_node_of_its_graph(written, node):
    made = HandMadeTrace().apply(("graph", 10, [("k", 100, 10)]))
    made.events[-1]["args"]["graph node id"] = written
    trace = made.read()
    assert [kernel.node for kernel in trace.kernels] == [node]
    assert not any("malformed" in lack for lack in trace.lacks)


WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "hipEventSynchronize", "cudaMemcpy")


@pytest.mark.parametrize("call", [*WAITS, "cudaMemcpyAsync", "cudaEventQuery", "cudaStreamWaitEvent"])
def test_syncs_are_calls_that_wait_for_the_device(call):
    syncs = HandMadeTrace().apply(("call", call, 10, 30)).read().syncs
    assert syncs == ([(BOOT_NS + 10, BOOT_NS + 40)] if call in WAITS else [])


COPIES = {"DtoH (Device -> Pageable)": True, "DtoH (Device -> Pinned)": False, "HtoD (Pageable -> Device)": False}


@pytest.mark.parametrize(("copy", "waits"), COPIES.items())
def test_copy_to_pageable_memory_waits(copy, waits):
    made = HandMadeTrace()
    made.on_device(f"Memcpy {copy}", 300, 20, made.call("cudaMemcpyAsync", 10, 500), category="gpu_memcpy")
    trace = made.read()
    assert trace.syncs == [(BOOT_NS + 10, BOOT_NS + 510)] * waits
    assert trace.kernels[0].kind == "memcpy"


def test_without_a_gpu_operations_stand_for_kernels():
    made = HandMadeTrace(gpu=None).apply(("step", 3, 0, 1_000), ("op", "aten::conv2d", 100, 400, [[1, 2]]))
    made.apply(("op", "aten::mkldnn_convolution", 150, 300, [[1, 2], [3]]), ("annotation", "augmentation", 700, 100))
    trace = made.apply(("op", "profiler::_record_function_enter_new", 600, 50)).read()
    assert (trace.on_gpu, trace.lacks) == (False, [])
    assert [(k.name, k.start_ns - BOOT_NS, k.end_ns - BOOT_NS) for k in trace.kernels] == [
        ("aten::conv2d", 100, 150),
        ("aten::mkldnn_convolution", 150, 450),
        ("aten::conv2d", 450, 500),
        ("augmentation", 700, 800),
    ]
    assert trace.kernels[0].correlation == trace.kernels[2].correlation != trace.kernels[1].correlation
    for kernel in trace.kernels:
        assert (kernel.ops[-1], kernel.device, kernel.launch_ns) == (kernel.name, -1, kernel.start_ns)
        assert trace.step_of(kernel) == 0


TIMES = {
    "1414456661859.938": 1_414_456_661_859_938,
    "1414456661859.9": 1_414_456_661_859_900,
    "1414456661859.9384": 1_414_456_661_859_938,
    "1695835572943613": 1_695_835_572_943_613_000,
    "1.5e3": 1_500_000,
    "-2.25": -2_250,
    "0.001": 1,
}


@pytest.mark.parametrize(("written", "ns"), TIMES.items())
def test_times_are_exact(path, written, ns):
    event = '{"ph": "X", "cat": "kernel", "name": "k", "tid": 7, "pid": 0, "dur": 0.003, "args": {}, "ts": '
    path.write_text(f"[{event}{written}}}]")
    (kernel,) = read(path).kernels
    assert (kernel.start_ns, kernel.end_ns) == (ns, ns + 3)
