"""Jobs of two and three processes under torchrun, with gloo on the CPU, on data made here."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from runs import final_tensors, loaded, tiny_config, tiny_dataset

import train
from model import folder
from model.data.batches import Batches
from model.data.choices import draw_order
from model.distributed import LEAVE_S, STEP_S, Ranks, join
from model.errors import CheckpointError, DeviceError, UsageError
from model.step import TrainingStep
from model.trainer import Trainer, build_network
from profiling import ROOT

CPU = torch.device("cpu")
PATIENCE_S = 180  # for a busy machine: a job takes about 7 s

needs_gloo = pytest.mark.skipif(
    os.name == "nt" or not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo and POSIX signals"
)

PREAMBLE = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests" / "support")!r}]
from pathlib import Path
import torch
from runs import tiny_config, tiny_dataset
FOLDER, RANK = Path(sys.argv.pop(1)), int(os.environ["RANK"])
(FOLDER / f"pid-{{RANK}}").write_text(str(os.getpid()))
"""


# The command line on small data, with a fault in one rank
COMMAND = """
import signal, time
import model.data.cifar10
import train
from model.step import TrainingStep

FAULT, WHERE, STEP = os.environ.get("FAULT", ""), int(os.environ.get("FAULTY_RANK", "1")), 6

def fail():
    if FAULT == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif FAULT == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif FAULT == "asleep":
        time.sleep(3600)
    elif FAULT == "out of memory":
        raise torch.OutOfMemoryError("no more")
    elif FAULT == "a bug":
        raise ZeroDivisionError("a bug")
    elif FAULT == "slow":
        time.sleep(0.5)
        (FOLDER / "training").touch()

stepping = TrainingStep.__call__
def step(self, *batch):
    if self.number + 1 >= STEP and FAULT and RANK == WHERE:
        fail()
    stepping(self, *batch)
TrainingStep.__call__ = step

model.data.cifar10.load = lambda *_, **__: tiny_dataset(70, 30)
train.app()
"""

TINY = ["--preset", "laptop", "--epochs", "3"]
for setting in ("widths=8,8,8,8", "batch_size=20", "device=cpu", "dtype=float32"):
    TINY += ["--set", setting]


class Job:
    """`torchrun --nproc-per-node world` of a script that starts with PREAMBLE."""

    def __init__(self, folder: Path, world: int, script: str, *arguments: str, **environment: str):
        self.folder = folder
        (folder / "rank.py").write_text(PREAMBLE + script)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        self.process = subprocess.Popen(
            [*command, str(folder / "rank.py"), str(folder), *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def pids(self) -> list[int]:
        return [int(path.read_text()) for path in self.folder.glob("pid-*") if path.read_text()]

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr, once torchrun has ended; no rank may have outlived it."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        assert not [pid for pid in self.pids() if alive(pid)], err
        return self.process.returncode, out, err

    def kill(self) -> None:
        for pid in [self.process.pid, *self.pids()]:  # each leads a process group
            if pid == self.process.pid and self.process.poll() is not None:
                continue
            if alive(pid):
                os.killpg(pid, signal.SIGKILL)
        self.process.wait()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def start(tmp_path: Path) -> Iterator:
    """`start(world, script, *arguments, **environment)` starts a job, whose processes end with the test."""
    jobs = []

    def start(world: int, script: str, *arguments: str, **environment: str) -> Job:
        for old in tmp_path.glob("pid-*"):
            old.unlink()
        jobs.append(Job(tmp_path, world, script, *arguments, **environment))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


HANGING = {"stopped": "SIGSTOP", "asleep": "a call that never returns"}


@pytest.fixture(scope="module")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Job]]:
    """Jobs whose second rank hangs in a step; torchrun waits 30 s for it, whatever else is asked of it."""
    jobs = {}
    for fault in HANGING:
        folder = tmp_path_factory.mktemp(fault)
        arguments = (*TINY, "--out", str(folder / "run"))
        jobs[fault] = Job(folder, 2, COMMAND, *arguments, FAULT=fault, CIFAR10_RANK_TIMEOUT_S="3")
    yield jobs
    for job in jobs.values():
        job.kill()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the ranks compute, so that sums have their order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Shards, without processes


@pytest.mark.parametrize(
    ("images", "batch_size", "world"),
    [
        pytest.param(64, 16, 2, id="all_divide"),
        pytest.param(65, 20, 3, id="nothing_divides"),
        pytest.param(41, 20, 2, id="last_batch_leaves_a_rank_empty"),
        pytest.param(10, 3, 5, id="every_batch_leaves_ranks_empty"),
        pytest.param(2, 20, 3, id="fewer_images_than_ranks"),
    ],
)
@pytest.mark.parametrize("preprocess", ["on_device", "once"])
def test_the_ranks_batches_are_one_process_s_batches_cut_up(images, batch_size, world, preprocess):
    data = tiny_dataset(images)
    config = tiny_config(batch_size=batch_size, preprocess=preprocess)

    def batches(rank: int, world: int) -> Batches:
        return Batches(data.train_images, torch.arange(images), config, CPU, torch.float32, rank, world)

    for epoch in (0, 1):
        whole = loaded(batches(0, 1), epoch)
        parts = [loaded(batches(rank, world), epoch) for rank in range(world)]
        assert [len(part) for part in parts] == [len(whole)] * world  # the same number of steps, or somebody waits
        seen = []
        for number, (x, labels) in enumerate(whole):
            assert torch.equal(torch.cat([part[number][0] for part in parts]), x)
            assert torch.equal(torch.cat([part[number][1] for part in parts]), labels)
            sizes = [len(part[number][1]) for part in parts]
            assert max(sizes) - min(sizes) <= 1
            seen += labels.tolist()
        assert sorted(seen) == list(range(images))
        assert seen == draw_order(config.seed, epoch, images).tolist()


# One process


def test_without_torchrun_there_is_one_rank_and_nothing_to_agree_on(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ranks = join(CPU)
    assert ranks == Ranks()
    assert ranks.is_first
    x = torch.randn(3)
    assert ranks.sum(x) is x
    assert ranks.any(15) == 15
    assert ranks.all_equal("a")
    ranks.wait()
    assert not dist.is_initialized()


def test_two_processes_do_not_share_a_gpu(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DeviceError, match=r"cuda:0 is one GPU.*device=auto"):
        join(torch.device("cuda:0"))


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_an_impossible_timeout_is_refused(monkeypatch, text):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "CIFAR10_RANK_TIMEOUT_S": text}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="CIFAR10_RANK_TIMEOUT_S"):
        join(CPU)


def test_half_of_torchrun_s_environment_is_refused(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match=r"MASTER_ADDR.*torchrun"):
        join(CPU)


def test_a_hanging_rank_ends_the_job_within_a_minute():
    torchrun_s = 30  # between its SIGTERM and its SIGKILL, by default
    assert STEP_S + LEAVE_S + torchrun_s < 57


# What two ranks learn

TWICE = """
from model.data.batches import Batches
from model.distributed import join, leave
from model.trainer import Trainer

def learn():
    trainer = Trainer(
        Batches(data.train_images, data.train_labels, tiny_config(), CPU, torch.float32, ranks.rank, ranks.world),
        data, ranks,
    )
    gradients, summing = [], trainer.step.sum_gradient
    def sum_gradient(gradient):
        summing(gradient)
        gradients.append([p.grad.clone() for p in trainer.network.parameters()])
    trainer.step.sum_gradient = sum_gradient
    for epoch in (0, 1):
        list(trainer.train(epoch))
    result = {"gradients": gradients, "parameters": [p.detach().clone() for p in trainer.network.parameters()]}
    result["own"] = [b.clone() for b in trainer.network.buffers()]
    result["epoch"] = trainer.epoch_result()
    loss, accuracy, classes = trainer.evaluate()
    result["evaluation"] = [loss, accuracy, classes]
    result["averaged"] = [b.clone() for b in trainer.network.buffers()]
    result["sums"] = [trainer.tensors()[name].clone() for name in ("sums.loss", "sums.correct")]
    return result

CPU = torch.device("cpu")
data = tiny_dataset(65, 33)
ranks = join(CPU)
result = {"first": learn(), "again": learn()}
leave()
tasks = Path("/proc/self/task")  # where there is one
result["threads"] = [(task / "comm").read_text() for task in tasks.iterdir()] if tasks.exists() else []
torch.save(result, FOLDER / f"result-{RANK}.pt")
"""


@needs_gloo
@pytest.mark.usefixtures("hanging")  # which are waited for meanwhile
def test_two_ranks_learn_what_one_process_learns_from_ghost_batches(start, tmp_path, one_thread):
    job = start(2, TWICE)
    ghost = Ghosts(world=2)
    ghost.train(epochs=2)
    code, out, err = job.end()
    assert code == 0, err
    assert out == ""
    both = [torch.load(tmp_path / f"result-{rank}.pt", weights_only=True) for rank in range(2)]
    for result in both:
        assert equal(result["first"], result["again"])  # the same seed, the same bits
        assert not [name for name in result["threads"] if "gloo" in name]  # or one may abort the process as it ends
    ranks = [result["first"] for result in both]

    assert len(ghost.gradients) == 8
    for rank, ours in enumerate(ranks):
        assert equal(ours["gradients"], ghost.gradients)
        assert equal(ours["parameters"], list(ghost.step.network.parameters()))
        assert equal(ours["own"], list(ghost.networks[rank].buffers()))
    assert not equal(ranks[0]["own"], ranks[1]["own"])
    mean = [(a + b) / 2 for a, b in zip(ranks[0]["own"], ranks[1]["own"], strict=True)]
    assert equal(ranks[0]["averaged"], mean)
    assert equal(ranks[1]["averaged"], mean)

    trainer = ghost.trainer()
    for target, source in zip(trainer.network.buffers(), mean, strict=True):
        target.copy_(source)
    alone = trainer.evaluate()
    for ours in ranks:
        loss, accuracy, classes = ours["evaluation"]
        assert (accuracy, classes) == (alone.accuracy, alone.class_accuracy)
        assert loss == pytest.approx(alone.loss, rel=1e-6)
        assert ours["epoch"] == pytest.approx((ghost.loss / 65, ghost.correct / 65), rel=1e-5)
        assert [float(t) for t in ours["sums"]] == pytest.approx([ghost.loss, ghost.correct], rel=1e-5)


# Kernels


ASKING = """
import json
from model import verdict
from model.distributed import join, leave
from model.trainer import with_available_ops

ranks, told = join(torch.device("cpu")), {}
for name, answer, without in (("right", {"reason": None}, None), ("wrong", {"reason": "bad"}, None), ("one", {}, 1)):
    verdict._known.clear()
    verdict.COMMAND = ["sh", "-c", f"echo asked >> {FOLDER / name}; echo '{json.dumps({'reason': None} | answer)}'"]
    verdict.unavailable = lambda device: "no GPU" if RANK == without else None
    told[name] = with_available_ops(tiny_config(ops="batchnorm"), torch.device("cpu"), ranks=ranks)[1]
(FOLDER / f"told-{RANK}").write_text(json.dumps(told))
leave()
"""


@needs_gloo
def test_ranks_agree_on_their_kernels_and_ask_once(start, tmp_path):
    pytest.importorskip("triton")
    code, _, err = start(2, ASKING, TRITON_CACHE_DIR=str(tmp_path / "cache")).end()
    assert code == 0, err
    for rank in range(2):
        assert json.loads((tmp_path / f"told-{rank}").read_text()) == {"right": None, "wrong": "bad", "one": "no GPU"}
    assert [(tmp_path / name).read_text() for name in ("right", "wrong", "one")] == ["asked\n"] * 3


class Ghosts:
    """The reference: one process passes each shard through the network, with statistics of its own for each."""

    def __init__(self, world: int):
        self.data, config = tiny_dataset(65, 33), tiny_config()
        network = build_network(config).to(memory_format=torch.channels_last)
        self.networks = [network, *(copy.deepcopy(network) for _ in range(world - 1))]
        self.batches = [
            Batches(self.data.train_images, self.data.train_labels, config, CPU, torch.float32, rank, world)
            for rank in range(world)
        ]
        self.step = TrainingStep(network, config, self.batches[0].steps_per_epoch, self.add_the_other_shards)
        self.gradients: list[list[torch.Tensor]] = []
        self.others: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.loss = self.correct = 0.0

    def add_the_other_shards(self, _: torch.Tensor) -> None:
        parameters = list(self.step.network.parameters())
        for network, (x, labels) in zip(self.networks[1:], self.others, strict=True):
            for p, q in zip(network.parameters(), parameters, strict=True):
                p.data.copy_(q)
            logits = network(x)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            for q, g in zip(parameters, torch.autograd.grad(loss, list(network.parameters())), strict=True):
                q.grad += g
            self.loss += float(loss.detach())
            self.correct += int((logits.argmax(1) == labels).sum())
        self.gradients.append([p.grad.clone() for p in parameters])

    def train(self, epochs: int) -> None:
        for epoch in range(epochs):
            self.step.start_epoch()
            self.loss = self.correct = 0.0
            for mine, *others in zip(*(loaded(b, epoch) for b in self.batches), strict=True):
                self.others = others
                self.step(*mine)
        self.loss += float(self.step.loss_sum)
        self.correct += int(self.step.correct)

    def trainer(self) -> Trainer:
        """What was learned, to be evaluated; with the first shard's statistics."""
        config = self.batches[0].config
        whole = Batches(self.data.train_images, self.data.train_labels, config, CPU, torch.float32)
        trainer = Trainer(whole, self.data, Ranks())
        trainer.network.load_state_dict(self.step.network.state_dict())
        return trainer


def equal(a: object, b: object) -> bool:
    """Bit for bit, through lists and dictionaries."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# A run of three ranks, the last of which gets nothing of an epoch's last batch; stopped and resumed

RESUMED = """
import json
import train
from model import checkpoint
from model.distributed import join, leave
from model.errors import CheckpointError
from model.interrupts import Interrupted, Interrupts
from profiling.output.terminal import Terminal

ranks = join(torch.device("cpu"))
data = tiny_dataset(62, 31)

def run(name, stop=None):
    interrupts, found, steps = Interrupts(), None, []
    session = train.Session(data, torch.device("cpu"), ranks, Terminal(speaks=False), interrupts)
    def on_step(number):
        steps.append(number)
        if number == stop and RANK == 1:  # one rank gets the signal, all of them stop
            interrupts.requested = 15
    # Each rank has a folder of its own, so that it shows who writes.
    out = FOLDER / f"{name}-{RANK}"
    try:
        return train.run(session, tiny_config(), out, None, on_step=on_step)
    except Interrupted:
        ranks.wait()
    assert steps == list(range(1, stop + 1)), steps
    found = checkpoint.load(FOLDER / f"{name}-0")
    assert found.step == stop
    interrupts.requested = stop = 0
    return train.run(session, tiny_config(), out, found, on_step=on_step)

run("whole")
for stop in (1, 4, 6, 11, 12):
    run(f"stopped{stop}", stop)
try:  # the first rank found a checkpoint, the others did not
    found = checkpoint.load(FOLDER / "whole-0") if RANK == 0 else None
    session = train.Session(data, torch.device("cpu"), ranks, Terminal(speaks=False), Interrupts())
    train.run(session, tiny_config(), FOLDER / f"differ-{RANK}", found)
except CheckpointError as error:
    (FOLDER / f"differ-{RANK}.txt").write_text(str(error))
leave()
"""


@needs_gloo
def test_three_ranks_with_an_empty_shard_resume_bit_for_bit(start, tmp_path):
    code, _, err = start(3, RESUMED).end()
    assert code == 0, err
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    stops = [1, 4, 6, 11, 12]
    assert folders == {"whole-0", *(f"stopped{stop}-0" for stop in stops), "differ-0"}
    whole = final_tensors(tmp_path / "whole-0")
    log = [json.loads(line) for line in (tmp_path / "whole-0" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [4, 8, 12]
    for stop in stops:
        resumed = final_tensors(tmp_path / f"stopped{stop}-0")
        assert resumed.keys() == whole.keys()
        for name, tensor in whole.items():
            if name == "sums.loss":  # added up when the first part was saved
                assert float(resumed[name]) == pytest.approx(float(tensor), rel=1e-5)
            elif "running_" in name:  # averaged then, and at the end of an epoch: after its empty step
                close = 1e-5 if stop % 4 == 0 else 0.05
                assert float((resumed[name] - tensor).norm()) <= close * float(tensor.norm())
            else:
                assert torch.equal(resumed[name], tensor), (stop, name)
        again = [json.loads(line) for line in (tmp_path / f"stopped{stop}-0" / "log.jsonl").read_text().splitlines()]
        for ours, expected in zip(again, log, strict=True):
            assert ours["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
            assert ours["train_accuracy"] == expected["train_accuracy"]
            assert ours["test_accuracy"] == pytest.approx(expected["test_accuracy"], abs=1.5 / 31)
    for rank in range(3):
        assert "different checkpoints" in (tmp_path / f"differ-{rank}.txt").read_text()
    assert json.loads((tmp_path / "differ-0" / "summary.json").read_text())["exit_code"] == 8


# The command line


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@needs_gloo
@pytest.mark.parametrize(
    ("fault", "rank"),
    [
        pytest.param("killed", 1, id="sigkill"),
        pytest.param("killed", 0, id="sigkill_of_the_first"),
        pytest.param("out of memory", 1, id="exception_with_an_exit_code"),
        pytest.param("a bug", 1, id="exception_without_one"),
    ],
)
def test_a_lost_rank_ends_the_job(start, tmp_path, fault, rank):
    out = tmp_path / "run"
    job = start(2, COMMAND, *TINY, "--out", str(out), FAULT=fault, FAULTY_RANK=str(rank))
    code, _, err = job.end()
    assert code != 0
    if rank == 1:
        assert len(re.findall("^error: lost another process", err, re.MULTILINE)) == 1
        assert (summary_of(out)["status"], summary_of(out)["exit_code"]) == ("failed", 1)
        assert summary_of(out)["steps"] < 12
    if fault == "out of memory":  # in torchrun's own report, since only the first rank speaks
        # -15 where the first rank was out of the door sooner, and torchrun ended this one on its way there.
        assert re.search(r"rank +: 1 .*\n +exitcode +: (6|-15)\b", err), err
        assert "cpu ran out of memory at batch_size=20" in err


@needs_gloo
@pytest.mark.parametrize("fault", HANGING)
def test_a_hanging_rank_ends_the_job(hanging, tmp_path, fault):
    job = hanging[fault]
    code, _, err = job.end()
    assert code != 0
    assert len(re.findall("^error: lost another process", err, re.MULTILINE)) == 1
    summary = summary_of(job.folder / "run")
    assert (summary["status"], summary["exit_code"]) == ("failed", 1)
    assert summary["steps"] < 12


@needs_gloo
def test_sigterm_saves_and_the_run_goes_on_with_as_many_processes(start, tmp_path):
    out = tmp_path / "run"
    workers = ["--set", "preprocess=once", "--set", "workers=1"]  # which torchrun's signal must not end first
    job = start(2, COMMAND, *TINY, *workers, "--out", str(out), FAULT="slow")
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "training").exists() and job.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.process.send_signal(signal.SIGTERM)
    code, said, err = job.end()
    assert code != 0
    assert "stopped; go on with" in said, err
    summary = summary_of(out)
    assert (summary["status"], summary["exit_code"]) == ("interrupted", 143)
    assert 6 <= summary["steps"] < 12
    assert (out / f"checkpoint-{summary['steps']:08d}.json").exists()

    code, _, err = start(1, COMMAND, *TINY, "--out", str(out), "--resume", "auto").end()
    assert code != 0
    assert len(re.findall(r"^error: .*processes: 2 in the checkpoint, 1 asked for", err, re.MULTILINE)) == 1
    assert summary_of(out) == {**summary, "status": "failed", "exit_code": 8}

    code, said, err = start(2, COMMAND, *TINY, "--out", str(out), "--resume", "auto", "--json").end()
    assert code == 0, err
    assert json.loads(said) == summary_of(out)
    assert (summary_of(out)["status"], summary_of(out)["steps"], summary_of(out)["world_size"]) == ("complete", 12, 2)


@needs_gloo
def test_ranks_end_when_torchrun_is_killed(start, tmp_path):
    """As the kernel does where memory is short. They save, and the folder is free again."""
    out = tmp_path / "run"
    job = start(2, COMMAND, *TINY, "--epochs", "999", "--out", str(out), FAULT="slow")
    deadline = time.monotonic() + PATIENCE_S
    while not (tmp_path / "training").exists() and job.process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.process.kill()
    job.process.communicate(timeout=PATIENCE_S)  # to the end of what the ranks say
    summary = summary_of(out)
    assert (summary["status"], summary["exit_code"]) == ("interrupted", 143)
    assert (out / f"checkpoint-{summary['steps']:08d}.json").exists()
    with folder.hold(out, pytest.fail):
        pass


def test_a_refusal_does_not_undo_a_complete_run(tmp_path):
    for status, code in {"complete": 0, "interrupted": 8}.items():
        (tmp_path / "summary.json").write_text(json.dumps({"status": status, "exit_code": 0, "steps": 12}))
        train._record_refusal(tmp_path, CheckpointError("of another run"))
        assert (summary_of(tmp_path)["exit_code"], summary_of(tmp_path)["steps"]) == (code, 12)


@pytest.mark.gpu
def test_a_process_for_each_gpu(start, tmp_path):
    gpus = torch.cuda.device_count()
    settings = [text.replace("device=cpu", "device=auto").replace("float32", "auto") for text in TINY]
    code, _, err = start(gpus, COMMAND, *settings, "--out", str(tmp_path / "run")).end()
    assert code == 0, err
    assert summary_of(tmp_path / "run")["world_size"] == gpus
