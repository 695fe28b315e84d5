import gzip
import json
import os
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
from traces import (
    AUTOGRAD,
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

from profiling.account import trace as trace_module
from profiling.account.trace import Kernel, Step, Trace, read

# Busy and span in microseconds, kernels and streams of recorded traces, computed independently of this program.
RECORDED = {
    "h100_vit_inference": (1_225, 7_560, 154, 1),
    "alexnet": (66_141, 12_920_244, 79, 2),
    "two_streams": (372, 19_506, 3, 3),
    "graph_replay": (10_718, 10_743, 425, 1),
    "compiled_triton": (12_549, 12_549, 12, 1),
}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


def recorded(name: str) -> Trace:
    folder = os.environ.get("GPU_TRACES_DIR")
    if not folder:
        pytest.skip("needs GPU_TRACES_DIR, a folder of recorded traces")
    return read(Path(folder) / f"{name}.json.gz")


def union_ns(kernels: list[Kernel]) -> int:
    busy, until = 0, None
    for start, end in sorted((kernel.start_ns, kernel.end_ns) for kernel in kernels):
        until = start if until is None else until
        busy += max(end - max(start, until), 0)
        until = max(until, end)
    return busy


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_traces_have_the_busy_time_and_span_of_their_table(name):
    trace = recorded(name)
    busy_us, span_us, kernels, streams = RECORDED[name]
    assert round(union_ns(trace.kernels) / 1_000) == busy_us
    assert round((max(k.end_ns for k in trace.kernels) - trace.kernels[0].start_ns) / 1_000) == span_us
    assert sum(k.kind == "kernel" for k in trace.kernels) == kernels
    assert len({k.stream for k in trace.kernels if k.kind == "kernel"}) == streams
    assert all(k.launch_ns is not None for k in trace.kernels)
    assert not [lack for lack in trace.lacks if lack.startswith("trace incomplete")]


def test_recorded_graph_replay_is_one_launch():
    graphs = [kernel.graph for kernel in recorded("graph_replay").kernels]
    assert len(graphs) - graphs.count(None) == 421
    assert len(set(graphs)) == 2


def test_recorded_trace_without_a_gpu_says_so():
    trace = recorded("cpu_only")
    assert not trace.on_gpu
    assert trace.device_name is None
    assert {kernel.kind for kernel in trace.kernels} == {"cpu"}


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


@pytest.mark.parametrize(
    "call", ["cudaGraphLaunch", "cudaGraphLaunch_v10000", "cuGraphLaunch", "hipGraphLaunch"], ids=lambda name: name
)
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


@pytest.mark.parametrize(
    ("call", "category"),
    [
        ("cudaLaunchKernelExC", "cuda_runtime"),
        ("cuLaunchKernelEx", "cuda_driver"),
        ("hipExtModuleLaunchKernel", "hip_runtime"),
        ("cudaLaunchCooperativeKernel", "cuda_runtime"),
    ],
)
def test_kernels_are_launched_by_calls_of_many_names(path, call, category):
    made = HandMadeTrace()
    made.event(category, call, 10, 5, correlation=900)
    made.on_device("k", 100, 10, 900)
    (kernel,) = read(made.write(path)).kernels
    assert kernel.launch_ns == BOOT_NS + 10
    assert kernel.graph is None


@pytest.mark.parametrize(
    ("call", "waits"),
    [
        ("cudaDeviceSynchronize", True),
        ("cudaStreamSynchronize", True),
        ("hipEventSynchronize", True),
        ("cudaMemcpy", True),
        ("cudaMemcpyAsync", False),
        ("cudaEventQuery", False),
        ("cudaStreamWaitEvent", False),
    ],
)
def test_syncs_are_calls_that_wait_for_the_device(path, call, waits):
    made = HandMadeTrace()
    made.call(call, 10, 30)
    assert read(made.write(path)).syncs == ([(BOOT_NS + 10, BOOT_NS + 40, call)] if waits else [])


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


def one_kernel(made: HandMadeTrace) -> None:
    made.step(0, 0, 1_000)
    made.kernel("k", 10, 100, 10)


def launch_without_kernel(made):
    one_kernel(made)
    made.call("cudaLaunchKernel", 50)


def graph_without_kernels(made):
    one_kernel(made)
    made.graph(50, [])


def launches_without_any_kernel(made):
    made.step(0, 0, 1_000)
    made.call("cudaLaunchKernel", 10)


def kernel_without_launch_among_others(made):
    one_kernel(made)
    made.on_device("orphan", 130, 10, 900)


def first_launch_missing_whose_operation_is_there(made):
    external = made.op("aten::relu", 5, 4)
    made.on_device("orphan", 20, 10, 900, external=external)
    one_kernel(made)


def all_launches_missing(made):
    made.step(0, 0, 1_000)
    made.op("aten::relu", 5, 4)
    made.on_device("orphan", 20, 10, 900)


@pytest.mark.parametrize(
    ("build", "lack"),
    [
        (launch_without_kernel, "trace incomplete: the kernels of 1 launches are missing"),
        (graph_without_kernels, "trace incomplete: the kernels of 1 launches are missing"),
        (launches_without_any_kernel, "trace incomplete: 1 launches, but no kernels"),
        (kernel_without_launch_among_others, "trace incomplete: the launches of 1 kernels are missing"),
        (first_launch_missing_whose_operation_is_there, "trace incomplete: the launches of 1 kernels are missing"),
        (all_launches_missing, "trace incomplete: the launches of 1 kernels are missing"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_missing_is_said(path, build, lack):
    made = HandMadeTrace()
    build(made)
    trace = read(made.write(path))
    assert trace.lacks == [lack]
    assert trace.on_gpu


def leftover_of_before(made):
    """Launched before the profiler began: neither its launch nor its operation is there."""
    made.event("cpu_op", "aten::relu", 5, 4)  # neither has an External id, which makes them no pair
    made.event("kernel", "leftover", 5, 60, 7, stream=7, device=0, correlation=900)


def launch_outside_of_the_steps(made):
    made.call("cudaLaunchKernel", 2_000)


def launches_captured_into_a_graph(made):
    made.call("cudaStreamBeginCapture", 200, 2)
    made.call("cudaLaunchKernel", 210, thread=AUTOGRAD)
    made.call("cudaStreamEndCapture", 220, 2)


def copy_that_left_no_record(made):
    made.call("cudaMemsetAsync", 200)


def stub_of_a_step(made):
    """What the profiler leaves when it ends behind a step."""
    made.step(1, 1_000, 3)


@pytest.mark.parametrize(
    "build",
    [
        leftover_of_before,
        launch_outside_of_the_steps,
        launches_captured_into_a_graph,
        copy_that_left_no_record,
        stub_of_a_step,
    ],
    ids=lambda build: build.__name__,
)
def test_what_is_as_it_should_be_lacks_nothing(path, build):
    made = HandMadeTrace()
    one_kernel(made)
    build(made)
    trace = read(made.write(path))
    assert trace.lacks == []
    assert [step.number for step in trace.steps] == [0]


@pytest.mark.parametrize(
    ("content", "lack"),
    [
        (b"", "trace incomplete: the file is empty"),
        (b'{"traceEvents": []}', "the trace holds no work"),
        (b"garbage", "trace incomplete: not JSON"),
        (
            b'{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": 5',
            "trace incomplete: the file is cut off",
        ),
    ],
    ids=["empty_file", "no_events", "garbage", "cut_in_the_first_event"],
)
def test_unreadable_trace_is_an_empty_one(path, content, lack):
    path.write_bytes(content)
    trace = read(path)
    assert (trace.kernels, trace.steps, trace.syncs, trace.on_gpu, trace.device_name) == ([], [], [], False, None)
    assert any(found.startswith(lack) for found in trace.lacks)


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gzip"])
def test_trace_cut_off_in_an_event_keeps_what_came_before(path, compress):
    made = HandMadeTrace()
    for number in range(200):
        training_step(made, number, number * STEP_NS)
    data = made.text().encode()
    data = gzip.compress(data) if compress else data
    path.write_bytes(data[: len(data) // 2])
    trace = read(path)
    assert 80 <= len(trace.steps) <= 110
    assert any(lack.startswith("trace incomplete") for lack in trace.lacks)


def test_missing_file_raises(path):
    with pytest.raises(FileNotFoundError):
        read(path)


HOSTILE = {
    "no_name": {"name": None},
    "name_is_a_number": {"name": 5},
    "no_args": {"args": None},
    "args_are_text": {"args": "stream 7"},
    "no_start": {"ts": None},
    "start_is_text": {"ts": "noon"},
    "start_is_a_list": {"ts": [1]},
    "start_is_true": {"ts": True},
    "device_is_true": {"args": {"stream": 7, "device": True, "correlation": 1}},
    "endless": {"dur": "1e999999999"},
    "not_a_number": {"dur": "NaN"},
    "ends_before_it_begins": {"dur": -5},
    "beyond_64_bits": {"ts": 10**30},
    "beyond_64_bits_with_an_exponent": {"ts": "1e18"},
    "stream_is_a_list": {"args": {"stream": [7], "correlation": 1}},
    "correlation_is_text": {"args": {"stream": 7, "correlation": "one"}},
    "correlation_beyond_64_bits": {"args": {"stream": 7, "correlation": 10**40}},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_malformed_kernels_are_left_out_and_counted(path, change):
    made = HandMadeTrace()
    one_kernel(made)
    record = json.loads(made.text())
    kernel = {**record["traceEvents"][-1], **change}
    record["traceEvents"].append(kernel)
    path.write_text(json.dumps(record))
    trace = read(path)
    assert [k.name for k in trace.kernels] == ["k"]
    assert trace.lacks == ["trace incomplete: 1 events were malformed and left out"]


@pytest.mark.parametrize(
    "event",
    [
        {"ph": "X", "cat": ["kernel"], "name": "k"},
        {"ph": "X", "cat": "cpu_op", "name": "op", "ts": 1, "dur": 1, "args": []},
        {"ph": "X", "cat": "cpu_op", "name": "op", "ts": 1, "dur": 1, "pid": [], "args": {}},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 1, "dur": 1, "args": {"correlation": {}}},
        {"ph": "X", "cat": "user_annotation", "name": "ProfilerStep#3", "ts": 1},
    ],
    ids=["category_is_a_list", "args_are_a_list", "pid_is_a_list", "correlation_is_an_object", "step_without_end"],
)
def test_malformed_events_of_the_host_are_counted(path, event):
    path.write_text(json.dumps([event]))
    trace = read(path)
    assert trace.kernels == trace.steps == []
    assert "trace incomplete: 1 events were malformed and left out" in trace.lacks


@pytest.mark.parametrize(
    ("written", "ns"),
    [
        ("1414456661859.938", 1_414_456_661_859_938),
        ("1414456661859.9", 1_414_456_661_859_900),
        ("1414456661859.9384", 1_414_456_661_859_938),
        ("1695835572943613", 1_695_835_572_943_613_000),
        ("1.5e3", 1_500_000),
        ("-2.25", -2_250),
        ("0.001", 1),
    ],
)
def test_times_are_exact(path, written, ns):
    event = '{"ph": "X", "cat": "kernel", "name": "k", "tid": 7, "pid": 0, "dur": 0.003, "args": {}, "ts": '
    path.write_text(f"[{event}{written}}}]")
    (kernel,) = read(path).kernels
    assert (kernel.start_ns, kernel.end_ns) == (ns, ns + 3)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ("nul \0 and \x1b[31m", "nul \0 and \x1b[31m"),
        ("x" * 100_000, "x" * trace_module.LONGEST_NAME),
        ("half a pair \ud800", "half a pair ?"),
        ("", ""),
    ],
    ids=["markup", "control_characters", "very_long", "lone_surrogate", "empty"],
)
def test_hostile_names_are_kept_as_they_can_be_written(path, name, kept):
    made = HandMadeTrace()
    made.step(0, 0, 100)
    made.op(name, 0, 50)
    made.kernel(name, 10, 60, 5)
    trace = read(made.write(path))
    assert trace.kernels[0].name == kept
    assert trace.kernels[0].ops == (kept,)
    kept.encode()
    assert trace.lacks == []


def test_dims_too_long_are_left_out(path):
    made = HandMadeTrace()
    made.op("aten::cat", 0, 50, [[[1, 2, 3]] * 20_000])
    made.kernel("k", 10, 60, 5)
    assert read(made.write(path)).kernels[0].dims == ""


@pytest.mark.parametrize(
    ("properties", "name"),
    [
        ([{"id": 0, "name": "A"}, {"id": 1, "name": "B"}], "A"),
        ([{"id": 5, "name": "B"}], "B"),
        ([{"id": 4, "name": "A"}, {"id": 5, "name": "B"}], None),
        ([{"id": 0, "name": ""}], None),
        ([{"id": 0, "name": 7}], None),
        ("A", None),
        ([["A"]], None),
    ],
    ids=["by_id", "the_only_one", "not_among_several", "no_name", "number", "text", "lists"],
)
def test_device_is_named_only_if_it_is_known(path, properties, name):
    made = HandMadeTrace()
    one_kernel(made)
    path.write_text(json.dumps(json.loads(made.text()) | {"deviceProperties": properties}))
    assert read(path).device_name == name


def test_memory_goes_with_what_is_kept_and_not_with_the_file(path):
    """20 MB of Python frames, memory events and arrows around the same step."""
    peaks = []
    for noise in (0, 31_000):
        made = HandMadeTrace()
        training_step(made, 0, 0)
        made.noise(noise)
        training_step(made, 1, STEP_NS)
        made.write(path)
        del made
        tracemalloc.start()
        trace = read(path)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert len(trace.kernels) == 20
    assert path.stat().st_size > 20e6
    assert peaks[1] - peaks[0] < 2e6
