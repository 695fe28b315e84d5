"""Processes that check, by a script that does what its checks are called; real ones are in test_bench_command."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from profiling import ROOT
from profiling.bench import checks
from profiling.bench.cases import cases
from profiling.bench.checks import Check, Pool

WORKER = """
import json, os, sys, time
for case, images in json.load(sys.stdin):
    if case == "dies":
        print("a library complains", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 11)
    if case == "hangs":
        time.sleep(1000)
    lost = case == "loses"
    print(json.dumps({"row": [case, images, os.getpid()], "lost": lost}), flush=True)
    if lost:
        break
"""


def results(*groups: list[str], limit_s: float = 60.0, slots: int = 2) -> list:
    """What is reported of the checks so called, at two images: [name, 2, process] or (name, status, error)."""
    found = []

    def failure(check, status, error):
        return check.case, status, error

    pool = Pool([sys.executable, "-c", WORKER], slots, limit_s, found.append, failure)
    pool.run([[Check(name, 2) for name in group] for group in groups])
    return found


def test_a_group_has_one_process_and_each_group_its_own():
    found = results(["a", "b"], ["c"])
    assert sorted(name for name, *_ in found) == ["a", "b", "c"]
    process = {name: pid for name, _, pid in found}
    assert process["a"] == process["b"] != process["c"]


def test_a_process_that_dies_costs_the_check_it_died_in():
    """Those behind it have another; the other group knows nothing of it."""
    found = results(["a", "dies", "b"], ["c"])
    assert ("dies", "failed", "the process ended with SIGSEGV: a library complains") in found
    process = {row[0]: row[2] for row in found if isinstance(row, list)}
    assert set(process) == {"a", "b", "c"}
    assert process["a"] != process["b"]


def test_a_device_that_is_lost_costs_the_check_that_lost_it():
    process = {name: pid for name, _, pid in results(["a", "loses", "b"])}
    assert set(process) == {"a", "loses", "b"}
    assert process["a"] == process["loses"] != process["b"]


def test_a_check_that_hangs_is_ended_and_ends_its_group_alone():
    found = results(["a", "hangs", "b"], ["c"], limit_s=3.0)
    assert [row for row in found if isinstance(row, tuple)] == [
        ("hangs", "failed", "no result within 3 s"),
        ("b", "unknown", "not begun: a check of this op before it hung"),
    ]
    assert {row[0] for row in found if isinstance(row, list)} == {"a", "c"}


def test_a_disk_that_is_full_is_its_own_error():
    def full(row):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        Pool([sys.executable, "-c", WORKER], 2, 60.0, full, None).run([[Check("a", 2)], [Check("hangs", 2)]])


INTERRUPTED = """
import signal, sys
from pathlib import Path
from profiling.bench.checks import Check, Pool
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
worker, groups = sys.argv[1], [[Check("a", 2), Check("hangs", 2)], [Check("hangs", 2)]]
def report(row):
    print(row[2], flush=True)
Pool([sys.executable, "-c", worker], 2, 600.0, report, lambda *row: [row, row, "blamed"]).run(groups)
"""


@pytest.mark.parametrize(
    ("number", "code", "to"),
    [(signal.SIGINT, -signal.SIGINT, os.kill), (signal.SIGTERM, 143, os.killpg)],
    ids=["INT_to_the_parent", "TERM_to_the_group"],
)
def test_a_signal_ends_all_processes_and_blames_none(number, code, to):
    command = [sys.executable, "-c", INTERRUPTED, WORKER]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    parent = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **out)
    child = int(parent.stdout.readline())
    to(parent.pid, number)
    rest, _ = parent.communicate(timeout=60)
    assert (parent.returncode, rest) == (code, "")
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_checks_are_grouped_by_op_and_variant_with_few_images_first():
    chosen = [case for case in cases() if case.op in ("bn_apply", "bn_stats_add")]
    planned = checks.planned(chosen, (2, 512))
    assert [(group[0].case.split(" ")[0], len(group)) for group in planned] == [
        ("bn_stats_add", 8),
        ("bn_apply", 10),
        ("bn_apply[pool]", 6),
        ("bn_apply[residual]", 4),
    ]
    for group in planned:
        assert [one.images for one in group] == sorted(one.images for one in group)


def test_a_gpu_is_checked_at_the_training_batch_too():
    assert checks.images_on(torch.device("cpu")) == (2,)
    assert checks.images_on(torch.device("cuda")) == (2, 512)


@pytest.mark.parametrize(("gigabytes", "processes"), [(80, 16), (24, 6), (3, 1)])
def test_a_small_gpu_bears_fewer_processes(monkeypatch, gigabytes, processes):
    properties = type("Properties", (), {"total_memory": gigabytes << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 16)
    assert checks.slots(torch.device("cuda")) == processes
    assert checks.slots(torch.device("cpu")) == 16


def test_in_one_process_nothing_is_blamed_after_the_device_was_lost(monkeypatch):
    def verified(case, *arguments):
        if case.shape == "128x16x16":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(checks.gate, "verified", verified)
    monkeypatch.setattr(checks, "lost", lambda device: True)
    chosen = [case for case in cases() if case.op == "bn_stats_add"]
    known = {case.name: case for case in chosen}
    groups = checks.planned(chosen, (2,))
    rows = list(checks.one_after_another(groups, known, torch.device("cpu"), torch.float16))
    assert [(row["shape"], row["status"]) for row in rows] == [
        ("64x32x32", "right"),
        ("128x16x16", "failed"),
        ("256x8x8", "unknown"),
        ("256x4x4", "unknown"),
    ]


@pytest.mark.parametrize("images", [2, 512])
def test_many_images_are_judged_on_the_device(monkeypatch, images):
    judges = []
    monkeypatch.setattr(checks.gate, "verified", lambda case, device, dtype, images, judge: judges.append(judge))
    known, gpu = {case.name: case for case in cases()}, torch.device("cuda")
    monkeypatch.setattr(checks.tiles, "gpu_of", lambda device: checks.tiles.Gpu("NVIDIA H200", (9, 0)))
    row = checks.check(Check("conv_fprop 64x32x32-64x3x3-s1", images), known, gpu, torch.float16)
    assert judges == [torch.device("cpu") if images == 2 else gpu]
    assert (row["status"], row["batch"], row["tile"]["form"]) == ("right", images, "lines")
    json.dumps(row)
