"""The jobs of the ranks of `tests/model/test_distributed.py`, each called in every rank with a folder as argument 1.

`torchrun tests/support/rank_jobs.py FOLDER ARGUMENTS` is the command line on small data, with FAULT in a rank.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from runs import tiny_config, tiny_dataset

import model.data.cifar10
import train
from model import checkpoint, verdict
from model.data.batches import Batches
from model.distributed import join, leave
from model.errors import CheckpointError
from model.interrupts import Interrupted, Interrupts
from model.step import TrainingStep
from model.trainer import Trainer, with_available_ops
from profiling.output.terminal import Terminal

CPU = torch.device("cpu")
FAULTY_STEP = 6


def command() -> None:
    """`train.py`; from step 6 on there is FAULT in the rank FAULTY_RANK."""
    folder, rank = Path(sys.argv.pop(1)), int(os.environ["RANK"])
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    fault, stepping = os.environ.get("FAULT", ""), TrainingStep.__call__

    def step(self, *batch):
        if self.number + 1 >= FAULTY_STEP and rank == int(os.environ.get("FAULTY_RANK", "1")):
            fail(fault, folder)
        stepping(self, *batch)

    TrainingStep.__call__ = step
    model.data.cifar10.load = lambda *_, **__: tiny_dataset(70, 30)
    train.app()


def fail(fault: str, folder: Path) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "asleep":
        time.sleep(3600)
    elif fault == "out of memory":
        raise torch.OutOfMemoryError("no more")
    elif fault == "a bug":
        raise ZeroDivisionError("a bug")
    elif fault == "slow":
        time.sleep(0.5)
        (folder / "training").touch()


def learn_twice() -> None:
    """Two epochs of 65 images, twice, to result-RANK.pt; and the names of the threads that live on."""
    folder, ranks = Path(sys.argv[1]), join(CPU)
    result = {"first": _learn(ranks), "again": _learn(ranks)}
    leave()
    tasks = Path("/proc/self/task")  # where there is one
    result["threads"] = [(task / "comm").read_text() for task in tasks.iterdir()] if tasks.exists() else []
    torch.save(result, folder / f"result-{ranks.rank}.pt")


def _learn(ranks) -> dict:
    data = tiny_dataset(65, 33)
    batches = Batches(data.train_images, data.train_labels, tiny_config(), CPU, torch.float32, ranks.rank, ranks.world)
    trainer = Trainer(batches, data, ranks)
    gradients, summing, network = [], trainer.step.sum_gradient, trainer.network

    def sum_gradient(gradient):
        summing(gradient)
        gradients.append([p.grad.clone() for p in network.parameters()])

    trainer.step.sum_gradient = sum_gradient
    for epoch in (0, 1):
        list(trainer.train(epoch))
    result = {"gradients": gradients, "parameters": [p.detach().clone() for p in network.parameters()]}
    result["own"] = [b.clone() for b in network.buffers()]
    result["epoch"] = trainer.epoch_result()
    result["evaluation"] = list(trainer.evaluate())
    result["averaged"] = [b.clone() for b in network.buffers()]
    result["sums"] = [trainer.tensors()[name].clone() for name in ("sums.loss", "sums.correct")]
    return result


def agree_on_kernels() -> None:
    """Three probes, whose answers are made here; to told-RANK what each rank takes them for."""
    folder, ranks, told = Path(sys.argv[1]), join(CPU), {}
    for name, answer, without in (("right", {}, None), ("wrong", {"reason": "bad"}, None), ("one", {}, 1)):
        verdict._known.clear()
        answer = json.dumps({"reason": None} | answer)
        verdict.COMMAND = ["sh", "-c", f"echo asked >> {folder / name}; echo '{answer}'"]
        verdict.unavailable = lambda device, without=without: "no GPU" if ranks.rank == without else None
        told[name] = with_available_ops(tiny_config(ops="batchnorm"), CPU, ranks=ranks)[1]
    (folder / f"told-{ranks.rank}").write_text(json.dumps(told))
    leave()


def resume() -> None:
    """A run, and others stopped after the steps of argument 2 and resumed. Each rank has folders, to show who writes.

    At last the first rank finds a checkpoint where the others find none.
    """
    folder, stops, ranks = Path(sys.argv[1]), json.loads(sys.argv[2]), join(CPU)
    interrupts, data = Interrupts(), tiny_dataset(61 if ranks.world == 2 else 62, 31)
    session = train.Session(data, CPU, ranks, Terminal(speaks=False), interrupts)

    def run(name: str, stop: int = 0, found=None) -> None:
        steps = []

        def on_step(number: int) -> None:
            steps.append(number)
            if number == stop and ranks.rank == 1:  # one rank gets the signal, all of them stop
                interrupts.requested = signal.SIGTERM

        try:
            train.run(session, tiny_config(), folder / f"{name}-{ranks.rank}", found, on_step=on_step)
        except Interrupted:
            ranks.wait()
            assert steps == list(range(1, stop + 1)), steps
            interrupts.requested = 0

    run("whole")
    for stop in stops:
        run(f"stopped{stop}", stop)
        found = checkpoint.load(folder / f"stopped{stop}-0")
        assert found.step == stop
        run(f"stopped{stop}", found=found)
    try:
        run("differ", found=checkpoint.load(folder / "whole-0") if ranks.is_first else None)
    except CheckpointError as error:
        (folder / f"differ-{ranks.rank}.txt").write_text(str(error))
    leave()


if __name__ == "__main__":
    command()
