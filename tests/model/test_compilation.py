"""Which kernels are compiled, when, and by whom: in a process of its own, since this one interprets them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ahead_of_time import network_builds

pytest.importorskip("triton")

from kernels import batchnorm, composed, fused, tiles
from kernels.tiles import Gpu
from profiling import ROOT


def in_a_process(what: str, cache: Path, *more: str) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(ROOT / "tests" / "support" / "runtime_builds.py"), what, *more]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("ops", [batchnorm, composed, fused], ids=["batchnorm", "composed", "fused"])
def test_the_builds_of_a_step_are_the_same_for_every_batch(monkeypatch, ops):
    monkeypatch.setattr(tiles, "gpu_of", lambda device: Gpu("sm_90", (9, 0)))
    builds = [{build.key() for build in network_builds(ops, batch)} for batch in (2, 336, 512)]
    assert builds[0] == builds[1] == builds[2]
    assert len(builds[0]) > 10


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    return in_a_process("fused", tmp_path_factory.mktemp("cache"))


def test_a_whole_run_needs_few_builds_and_all_are_there_before_its_first_step(whole_run):
    """Training at 512, the last batch of 336, evaluation at 500, augmentation and update; and batches of one image."""
    assert 40 < len(whole_run["ahead"]) == len(set(whole_run["ahead"])) <= 70
    assert whole_run["later"] == []
    assert whole_run["launched_later"] > 3 * len(whole_run["ahead"])


@pytest.mark.slow
def test_a_network_s_builds_are_in_the_cache_since_the_probe(whole_run, tmp_path):
    probed = in_a_process("probe", tmp_path, "fused")
    assert probed["launched_ahead"] == 0, "or a kernel that never ends would not be named"
    apart = ("augment_kernel", "sgd_")  # as the run asks for them, which this machine's would not
    assert {build for build in whole_run["ahead"] if not build.startswith(apart)} <= set(probed["ahead"])


def test_builds_are_made_by_other_threads_and_nothing_is_launched(whole_run):
    assert whole_run["by_the_main_thread"] == 0
    assert whole_run["launched_ahead"] == 0


def test_a_kernel_that_fails_is_left_for_the_step(whole_run):
    assert whole_run["failure"] == "out of resource"


def test_a_kernel_is_really_compiled_and_loaded_ahead_and_once(tmp_path):
    done = in_a_process("real", tmp_path)
    assert done["ahead"] == [["bn_apply_kernel"], []], "loaded, and not launched"
    assert done["later"] == [["bn_apply_kernel"], ["bn_apply_kernel"]]
