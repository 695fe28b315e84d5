"""Processes that check, by a script that does what its checks are named; test_command starts real ones."""

import json
import os
import signal
import subprocess
import sys
import types

import pytest
import torch

from profiling import ROOT
from profiling.bench import checks
from profiling.bench.cases import cases
from profiling.bench.checks import Check, Pool

CPU, GPU = torch.device("cpu"), torch.device("cuda")
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


@pytest.mark.parametrize(
    ("groups", "limit_s", "processes", "blamed"),
    [
        ("ab!c d", 60.0, "ab c d", [("dies", "failed", "the process ended with SIGSEGV: a library complains")]),
        ("a%b", 60.0, "a% b", []),
        (
            "a~b c",
            3.0,
            "a c",
            [
                ("hangs", "failed", "no result within 3 s"),
                ("b", "unknown", "not begun: a check of this op before it hung"),
            ],
        ),
    ],
    ids=["dies", "loses_its_device", "hangs"],
)
def test_a_process_that_ends_costs_no_check_but_its_own(groups, limit_s, processes, blamed):
    """A group is a word, and a check a letter; the checks that answered share processes as in `processes`."""
    names = {"!": "dies", "%": "loses", "~": "hangs"}
    found = []
    pool = Pool([sys.executable, "-c", WORKER], 2, limit_s, found.append, lambda one, *more: (one.case, *more))
    pool.run([[Check(names.get(letter, letter), 2) for letter in word] for word in groups.split()])
    by_process: dict[int, set[str]] = {}
    for row in (row for row in found if isinstance(row, list)):
        by_process.setdefault(row[2], set()).add(row[0])
    assert sorted(map(sorted, by_process.values())) == sorted(
        sorted(names.get(letter, letter) for letter in word) for word in processes.split()
    )
    assert [row for row in found if isinstance(row, tuple)] == blamed


def test_a_full_disk_is_its_own_error():
    def full(row):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        Pool([sys.executable, "-c", WORKER], 2, 60.0, full, None).run([[Check("a", 2)], [Check("hangs", 2)]])


INTERRUPTED = """
import signal, sys
from profiling.bench.checks import Check, Pool
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
worker, groups = sys.argv[1], [[Check("a", 2), Check("hangs", 2)], [Check("hangs", 2)]]
def report(row):
    print(row[2], flush=True)
Pool([sys.executable, "-c", worker], 2, 600.0, report, lambda *row: [row, row, "blamed"]).run(groups)
"""


@pytest.mark.parametrize(
    ("number", "code", "to"),
    [
        pytest.param(signal.SIGINT, -signal.SIGINT, os.kill, marks=pytest.mark.slow),
        (signal.SIGTERM, 143, os.killpg),
    ],
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
    sizes = [(group[0].case.split(" ")[0], len(group)) for group in planned]
    assert sizes == [("bn_stats_add", 8), ("bn_apply", 10), ("bn_apply[pool]", 6), ("bn_apply[residual]", 4)]
    for group in planned:
        assert [one.images for one in group] == sorted(one.images for one in group)


@pytest.mark.parametrize(("gigabytes", "processes"), [(80, 16), (24, 6), (3, 1)])
def test_processes_fit_the_memory_and_a_gpu_is_checked_at_the_training_batch_too(monkeypatch, gigabytes, processes):
    properties = types.SimpleNamespace(total_memory=gigabytes << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(checks.os, "cpu_count", lambda: 16)
    assert (checks.slots(GPU), checks.slots(CPU)) == (processes, 16)
    assert (checks.images_on(GPU), checks.images_on(CPU)) == ((2, 512), (2,))


def test_in_one_process_nothing_is_blamed_after_the_device_was_lost(monkeypatch):
    def verified(case, *arguments):
        if case.shape == "128x16x16":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(checks, "verified", verified)
    monkeypatch.setattr(checks, "lost", lambda device: True)
    known = {case.name: case for case in cases() if case.op == "bn_stats_add"}
    rows = checks.one_after_another(checks.planned(list(known.values()), (2,)), known, CPU, torch.float16)
    found = [(row["shape"], row["status"]) for row in rows]
    assert found == [("64x32x32", "right"), ("128x16x16", "failed"), ("256x8x8", "unknown"), ("256x4x4", "unknown")]


@pytest.mark.parametrize(("images", "judge"), [(2, CPU), (512, GPU)])
def test_many_images_are_judged_on_the_device(monkeypatch, images, judge):
    judges = []
    monkeypatch.setattr(checks, "verified", lambda case, device, dtype, images, judge: judges.append(judge))
    monkeypatch.setattr(checks.tiles, "gpu_of", lambda device: checks.tiles.Gpu("not in the table", (9, 0)))
    known = {case.name: case for case in cases()}
    row = checks.check(Check("conv_fprop 64x32x32-64x3x3-s1", images), known, GPU, torch.float16)
    assert judges == [judge]
    assert (row["status"], row["batch"], row["tile"]["form"]) == ("right", images, "lines")
    json.dumps(row)
