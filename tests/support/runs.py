"""Small data and small runs for tests of the training program."""

import importlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # for `python tests/support/runs.py`

import train
from model import checkpoint
from model.config import Config
from model.data.batches import Batches
from model.data.cifar10 import Dataset
from model.distributed import Ranks
from model.interrupts import BURST_S, Interrupts
from profiling.output.terminal import Terminal

TINY = {
    "preset": "tiny",
    "network": "resnet9",
    "widths": (8, 8, 16, 16),
    "epochs": 3,
    "batch_size": 20,
    "lr_epochs": (0, 1, 3),
    "lr_values": (0, 0.1, 0),
    "cutout": 8,
    "dtype": "float32",
    "device": "cpu",
    "checkpoint_s": 0,
}


def tiny_dataset(train_images: int = 70, test_images: int = 30) -> Dataset:
    """Images whose brightness tells the class, well enough to be learned in a few steps."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(n) % 10
        noise = torch.randint(0, 40, (n, 32, 32, 3), generator=generator)
        return (noise + 20 * labels[:, None, None, None]).to(torch.uint8), labels

    return Dataset(*split(train_images), *split(test_images), identity="synthetic", source="made in a test")


def tiny_config(**changes) -> Config:
    """Four steps an epoch, the last one short; three epochs."""
    return Config(**{**TINY, **changes})


def loaded(batches: Batches, epoch: int, first: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(x, labels) of the batches of an epoch."""
    return [batches.load(*batch) for batch in batches.epoch(epoch, first)]


def tiny_session(dataset: Dataset | None = None) -> train.Session:
    """A process with nobody to talk to."""
    return train.Session(dataset or tiny_dataset(), torch.device("cpu"), Ranks(), Terminal(speaks=False), Interrupts())


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the newest checkpoint in `folder`."""
    return checkpoint.load(folder).tensors


FAULTS = {
    "data": "model.data.cifar10:load",
    "preprocessing": "model.data.batches:Batches.__init__",
    "evaluation": "model.trainer:Trainer.evaluate",
    "save": "model.checkpoint:save",
    "profile": "train:profile",
}


def send(signals: list[str]) -> None:
    """Send these to ourselves, and take them from the list: "TERM", say; far enough apart to be requests of their own.

    "ORPHAN" kills the parent, and waits for this process to end.
    """
    while signals:
        name = signals.pop(0)
        if name == "ORPHAN":
            os.kill(os.getppid(), signal.SIGKILL)
            threading.Event().wait()
        os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
        if signals:
            time.sleep(1.5 * BURST_S)


def inject(signals: str, place: str) -> None:
    """From now on the first call at `place` begins with these signals ("TERM" or "INT,INT")."""
    module, _, path = FAULTS[place].partition(":")
    owner = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, pending = getattr(owner, name), signals.split(",")

    def faulty(*args, **kwargs):
        send(pending)
        return original(*args, **kwargs)

    setattr(owner, name, faulty)


def main() -> None:
    """`python tests/support/runs.py ARGUMENTS` is `python train.py ARGUMENTS` on a data set tiny for every preset.

    FAULT="TERM@save" sends that signal when a checkpoint is first saved; see `inject`. FAULT="INT@step" after step 5.
    """
    import model.data.cifar10
    import model.step

    model.data.cifar10.load = lambda *args, **kwargs: tiny_dataset()
    signals, _, place = os.environ.get("FAULT", "").partition("@")
    if place == "step":
        original, pending = model.step.TrainingStep.__call__, signals.split(",")

        def faulty(self, *batch):
            original(self, *batch)
            if self.number == 5:
                send(pending)

        model.step.TrainingStep.__call__ = faulty
    elif place:
        inject(signals, place)
    given = {argument.partition("=")[0] for argument in sys.argv}
    tiny = [
        f"--set={k}={','.join(map(str, v)) if isinstance(v, tuple) else v}"
        for k, v in TINY_SETTINGS.items()
        if k not in given
    ]
    sys.argv = ["train.py", *tiny, *sys.argv[1:]]
    train.app()


TINY_SETTINGS = {k: v for k, v in TINY.items() if k in ("widths", "batch_size", "checkpoint_s", "dtype", "device")}

if __name__ == "__main__":
    main()
