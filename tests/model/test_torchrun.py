"""The command line in several processes, as forks and under torchrun, with a fault in one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forks
import pytest
import torch
from train_runs import needs_gloo

import train
from model import folder
from model.errors import CheckpointError
from profiling import ROOT
from profiling.output.files import read_json

PATIENCE_S = 180  # for a busy machine: a job takes about 7 s
TINY = ["--preset", "laptop", "--epochs", "3"]
for setting in ("widths=8,8,8,8", "batch_size=20", "device=cpu", "dtype=float32"):
    TINY += ["--set", setting]


class Torchrun:
    """`torchrun --nproc-per-node world` of the command line on small data, to `folder`/run."""

    def __init__(self, folder: Path, world: int, *arguments: str, settings: list[str] = TINY, **environment: str):
        self.folder, self.out = folder, folder / "run"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        script = [ROOT / "tests" / "support" / "rank_jobs.py", folder, *settings, "--out", self.out, *arguments]
        path = f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}"
        self.process = subprocess.Popen(
            [*launcher, *map(str, script)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.folder.glob("pid-*") if path.read_text()]

    def wait_until_it_trains(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not (self.folder / "training").exists() and self.process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, once torchrun has ended; no rank may have outlived it."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        assert not [pid for pid in self.pids() if alive(pid)], err
        return self.process.returncode, out, err

    def kill(self) -> None:
        for pid in [self.process.pid, *self.pids()]:  # each leads a process group
            if not (pid == self.process.pid and self.process.poll() is not None) and alive(pid):
                os.killpg(pid, signal.SIGKILL)
        self.process.wait()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator:
    """`torchrun(world, *arguments, **environment)` starts a job, whose processes end with the test."""
    jobs = []

    def start(*arguments, **environment) -> Torchrun:
        folder = tmp_path / f"job-{len(jobs)}"
        folder.mkdir()
        jobs.append(Torchrun(folder, *arguments, **environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def assert_lost(out: Path, err: str) -> None:
    """The first rank says and writes that it lost another."""
    assert len(re.findall("^error: lost another process", err, re.MULTILINE)) == 1, err
    summary = read_json(out / "summary.json")
    assert (summary["status"], summary["exit_code"]) == ("failed", 1)
    assert summary["steps"] < 12


@needs_gloo
@pytest.mark.parametrize(
    ("fault", "rank", "code"),
    [
        pytest.param("killed", 1, -signal.SIGKILL, id="sigkill"),
        pytest.param("killed", 0, -signal.SIGKILL, id="sigkill_of_the_first"),
        pytest.param("out of memory", 1, 6, id="exception_with_an_exit_code"),
        pytest.param("a bug", 1, 1, id="exception_without_one"),
        pytest.param("stopped", 1, -signal.SIGKILL, id="hanging"),
    ],
)
def test_a_lost_rank_ends_the_others(tmp_path, fault, rank, code):
    env = {"FAULT": fault, "FAULTY_RANK": str(rank), "CIFAR10_RANK_TIMEOUT_S": "3"}
    arguments = (str(tmp_path), *TINY, "--out", str(tmp_path / "run"))
    ranks = forks.run("rank_jobs:command", *arguments, world=2, env=env)
    assert ranks[rank].returncode == code
    assert ranks[1 - rank].returncode == 1, ranks[1 - rank].stderr
    if rank == 1:
        assert_lost(tmp_path / "run", ranks[0].stderr.decode())


@needs_gloo
@pytest.mark.parametrize(
    ("fault", "rank"),
    [
        pytest.param("out of memory", 1, id="exception_with_an_exit_code", marks=pytest.mark.slow),
        pytest.param("a bug", 1, id="exception_without_one", marks=pytest.mark.slow),
        pytest.param("killed", 1, id="sigkill", marks=pytest.mark.slow),
        pytest.param("killed", 0, id="sigkill_of_the_first", marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_ends_the_job(torchrun, fault, rank):
    job = torchrun(2, FAULT=fault, FAULTY_RANK=str(rank))
    code, _, err = job.end()
    assert code != 0
    if rank == 1:
        assert_lost(job.out, err)
    if fault == "out of memory":  # in torchrun's own report, since only the first rank speaks
        # -15 where the first rank was out of the door sooner, and torchrun ended this one on its way there.
        assert re.search(r"rank +: 1 .*\n +exitcode +: (6|-15)\b", err), err
        assert "cpu ran out of memory at batch_size=20" in err


@needs_gloo
@pytest.mark.slow
def test_a_hanging_rank_ends_the_job(torchrun):
    """Stopped, or in a call that never returns. torchrun waits 30 s for it, whatever else is asked of it."""
    for job in [torchrun(2, FAULT=fault, CIFAR10_RANK_TIMEOUT_S="3") for fault in ("stopped", "asleep")]:
        code, _, err = job.end()
        assert code != 0
        assert_lost(job.out, err)


@needs_gloo
def test_sigterm_saves_and_the_run_goes_on_with_as_many_processes(torchrun):
    workers = ["--set", "preprocess=once", "--set", "workers=1"]  # which torchrun's signal must not end first
    job = torchrun(2, *workers, FAULT="slow")
    job.wait_until_it_trains()
    job.process.send_signal(signal.SIGTERM)
    code, said, err = job.end()
    assert code != 0
    assert "stopped; go on with" in said, err
    summary = read_json(job.out / "summary.json")
    assert (summary["status"], summary["exit_code"]) == ("interrupted", 143)
    assert 6 <= summary["steps"] < 12
    assert (job.out / f"checkpoint-{summary['steps']:08d}.json").exists()

    again = ["rank_jobs:command", str(job.folder), *TINY, "--out", str(job.out), "--resume", "auto"]
    (alone,) = forks.run(*again, world=1)
    assert alone.returncode == 8
    assert len(re.findall(rb"^error: .*processes: 2 in the checkpoint, 1 asked for", alone.stderr, re.MULTILINE)) == 1
    assert read_json(job.out / "summary.json") == {**summary, "status": "failed", "exit_code": 8}

    first, second = forks.run(*again, "--json", world=2)
    assert (first.returncode, second.returncode, second.stdout) == (0, 0, b""), first.stderr
    summary = read_json(job.out / "summary.json")
    assert json.loads(first.stdout) == summary
    assert (summary["status"], summary["steps"], summary["world_size"]) == ("complete", 12, 2)


@needs_gloo
@pytest.mark.slow
def test_ranks_end_when_torchrun_is_killed(torchrun):
    """The kernel does this where memory is short. They save, and the folder is free again."""
    job = torchrun(2, "--epochs", "999", FAULT="slow")
    job.wait_until_it_trains()
    job.process.kill()
    job.process.communicate(timeout=PATIENCE_S)  # to the end of what the ranks say
    summary = read_json(job.out / "summary.json")
    assert (summary["status"], summary["exit_code"]) == ("interrupted", 143)
    assert (job.out / f"checkpoint-{summary['steps']:08d}.json").exists()
    with folder.hold(job.out, pytest.fail):
        pass


def test_a_refusal_does_not_undo_a_complete_run(tmp_path):
    for status, code in {"complete": 0, "interrupted": 8}.items():
        (tmp_path / "summary.json").write_text(json.dumps({"status": status, "exit_code": 0, "steps": 12}))
        train._record_refusal(tmp_path, CheckpointError("of another run"))
        summary = read_json(tmp_path / "summary.json")
        assert (summary["exit_code"], summary["steps"]) == (code, 12)


@pytest.mark.gpu
def test_a_process_for_each_gpu(torchrun):
    gpus = torch.cuda.device_count()
    settings = [text.replace("device=cpu", "device=auto").replace("float32", "auto") for text in TINY]
    job = torchrun(gpus, settings=settings)
    code, _, err = job.end()
    assert code == 0, err
    assert read_json(job.out / "summary.json")["world_size"] == gpus
