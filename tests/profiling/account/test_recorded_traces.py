"""Traces that a GPU's profiler recorded, in the folder that GPU_TRACES_DIR names; skipped without it."""

import os
from pathlib import Path

import pytest

from profiling.account.attribution import EagerKernel, attribute_replays, idle, per_step, sweep
from profiling.account.categories import categorise
from profiling.account.trace import Kernel, Trace, read

# Busy and span in microseconds, kernels and streams of recorded traces, computed independently of this program.
RECORDED = {
    "h100_vit_inference": (1_225, 7_560, 154, 1),
    "alexnet": (66_141, 12_920_244, 79, 2),
    "two_streams": (372, 19_506, 3, 3),
    "graph_replay": (10_718, 10_743, 425, 1),
    "compiled_triton": (12_549, 12_549, 12, 1),
}


def span_ns(trace: Trace) -> int:
    return max(kernel.end_ns for kernel in trace.kernels) - trace.kernels[0].start_ns


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


def test_idle_of_a_recorded_run_is_its_span_less_its_busy_time():
    trace = recorded("h100_vit_inference")
    total = per_step(trace).total
    gaps = idle(trace)
    assert sum(gaps) == span_ns(trace) - total.busy_ns
    assert gaps.launch_ns + gaps.python_ns > 0.99 * sum(gaps)  # a host-bound run


@pytest.mark.parametrize(
    "name", ["h100_vit_inference", "alexnet", "two_streams", "compiled_triton", "graph_replay", "cpu_only"]
)
def test_little_of_a_recorded_gpu_trace_is_unknown(name):
    found = sweep(recorded(name).kernels)
    assert found.by_category["unknown"] < 0.05 * found.busy_ns


def test_recorded_replay_has_no_idle_of_the_hosts():
    trace = recorded("graph_replay")
    learned = [EagerKernel(k.name, ("aten::mm",), "") for k in trace.kernels if k.graph is not None]
    assert len(learned) == 421
    kernels = attribute_replays(trace.kernels, learned)
    assert sum(categorise(k) == "convolution" for k in kernels) >= 421
