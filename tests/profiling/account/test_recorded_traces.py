"""Recorded traces: of training steps on this CPU, and of GPUs in the folder that GPU_TRACES_DIR names, if it does."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from runs import tiny_config, tiny_dataset
from torch.profiler import ProfilerActivity, profile, schedule

from model.data.batches import Batches
from model.distributed import Ranks
from model.trainer import Trainer
from profiling.account.attribution import attribute_replays, idle, per_step, sweep
from profiling.account.categories import categorise
from profiling.account.trace import Kernel, Trace, read

SLOW = [pytest.param(row, marks=pytest.mark.slow) for row in (("resnet", "float32"), ("resnet9", "bfloat16"))]


VIEWS = {"detach", "t", "TBackward0", "transpose", "as_strided", "view"}


@pytest.fixture(scope="module", params=[("resnet", "bfloat16"), ("resnet9", "float32"), *SLOW], ids="-".join)
def trained(request, tmp_path_factory) -> Path:
    """Two training steps on the reference ops, as torch.profiler records them."""
    network, dtype = request.param
    path = tmp_path_factory.mktemp("trained") / "trace.json"
    config = tiny_config(network=network, dtype=dtype, ops="reference", widths=(8, 16, 16, 16), batch_size=8)
    dataset = tiny_dataset(24, 10)
    batches = Batches(dataset.train_images, dataset.train_labels, config, torch.device("cpu"), getattr(torch, dtype))
    trainer = Trainer(batches, dataset, Ranks())
    trainer.warm_up()
    plan = schedule(wait=0, warmup=1, active=2, repeat=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=plan, record_shapes=True) as session:
        for _ in trainer.train(0):
            session.step()
    session.export_chrome_trace(str(path))
    return path


def test_only_views_of_a_recorded_training_step_are_unknown(trained):
    trace = read(trained)
    steps, found = per_step(trace)
    assert steps == 2
    assert {c for c, ns in found.by_category.items() if not ns} == {"communication"}
    unknown = {k.name.rpartition(": ")[2] for k in trace.kernels if categorise(k) == "unknown"}
    assert unknown <= {f"{aten}{view}" for aten in ("aten::", "") for view in VIEWS}


def test_pieces_of_a_recorded_step_and_the_time_between_are_the_step(trained):
    trace = read(trained)
    assert trace.lacks == []
    assert [step.number for step in trace.steps] == [1, 2]
    events = json.loads(trained.read_bytes())["traceEvents"]
    calls = sorted((e for e in events if e.get("cat") in ("cpu_op", "user_annotation")), key=lambda e: e["ts"])
    for step in trace.steps:
        pieces = sorted((k.start_ns, k.end_ns) for k in trace.kernels if trace.step_of(k) == step.number - 1)
        assert all(end <= following for (_, end), (following, _) in pairwise(pieces))
        # Uncovered is what is in no operation at all, from the file itself, in doubles.
        edge, uncovered = step.start_ns / 1_000, 0.0
        for event in calls:
            inside = step.start_ns / 1_000 <= event["ts"] < step.end_ns / 1_000
            if inside and not event["name"].startswith("ProfilerStep"):
                uncovered += max(event["ts"] - edge, 0)
                edge = max(edge, event["ts"] + event["dur"])
        uncovered += step.end_ns / 1_000 - edge
        length, covered = step.end_ns - step.start_ns, sum(end - start for start, end in pieces)
        assert covered + 1_000 * uncovered == pytest.approx(length, abs=100)
        assert len(pieces) > 100


def recorded(name: str) -> Trace:
    folder = os.environ.get("GPU_TRACES_DIR")
    if not folder:
        pytest.skip("needs GPU_TRACES_DIR, a folder of recorded traces")
    return read(Path(folder) / f"{name}.json.gz")


def span_ns(trace: Trace) -> int:
    return max(kernel.end_ns for kernel in trace.kernels) - trace.kernels[0].start_ns


def union_ns(kernels: list[Kernel]) -> int:
    busy, until = 0, None
    for start, end in sorted((kernel.start_ns, kernel.end_ns) for kernel in kernels):
        until = start if until is None else until
        busy += max(end - max(start, until), 0)
        until = max(until, end)
    return busy


# Busy and span in microseconds, kernels and streams of recorded traces, computed independently of this program.
RECORDED = {
    "h100_vit_inference": (1_225, 7_560, 154, 1),
    "alexnet": (66_141, 12_920_244, 79, 2),
    "two_streams": (372, 19_506, 3, 3),
    "graph_replay": (10_718, 10_743, 425, 1),
    "compiled_triton": (12_549, 12_549, 12, 1),
}


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_traces_have_the_busy_time_and_span_of_their_table(name):
    trace = recorded(name)
    launched = [k for k in trace.kernels if k.kind == "kernel"]
    measured = round(union_ns(trace.kernels) / 1_000), round(span_ns(trace) / 1_000)
    assert (*measured, len(launched), len({k.stream for k in launched})) == RECORDED[name]
    assert all(k.launch_ns is not None for k in trace.kernels)
    assert not [lack for lack in trace.lacks if lack.startswith("trace incomplete")]


@pytest.mark.parametrize("name", [*RECORDED, "cpu_only"])
def test_little_of_a_recorded_trace_is_unknown(name):
    found = sweep(recorded(name).kernels)
    assert found.by_category["unknown"] < 0.05 * found.busy_ns


def test_recorded_trace_without_a_gpu_says_so():
    trace = recorded("cpu_only")
    assert not trace.on_gpu
    assert {kernel.kind for kernel in trace.kernels} == {"cpu"}


def test_idle_of_a_recorded_run_is_its_span_less_its_busy_time():
    trace = recorded("h100_vit_inference")
    gaps = idle(trace)
    assert sum(gaps) == span_ns(trace) - per_step(trace).total.busy_ns
    assert gaps.launch_ns + gaps.python_ns > 0.99 * sum(gaps)  # a host-bound run


def test_recorded_graph_replay_is_one_launch_of_known_kernels():
    kernels = recorded("graph_replay").kernels
    replayed = [kernel for kernel in kernels if kernel.graph is not None]
    assert (len(replayed), len({kernel.graph for kernel in replayed})) == (421, 1)
    eager = [kernel._replace(ops=("aten::mm",), graph=None) for kernel in replayed]
    assert sum(categorise(k) == "convolution" for k in attribute_replays(kernels, eager)) >= 421
