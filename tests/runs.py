"""Small data and small runs for tests of the training program."""

from pathlib import Path

import torch

import train
from model.config import Config
from model.data import Dataset
from model.distributed import Ranks
from model.interrupts import Interrupts
from profiling.console import Terminal

TINY = {
    "preset": "tiny",
    "network": "resnet9",
    "widths": (4, 4, 8, 8),
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


def tiny_session(dataset: Dataset | None = None) -> train.Session:
    """A process with nobody to talk to."""
    return train.Session(dataset or tiny_dataset(), torch.device("cpu"), Ranks(), Terminal(speaks=False), Interrupts())


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What the newest checkpoint in `folder` holds."""
    from model import checkpoint

    return checkpoint.load(folder).tensors
