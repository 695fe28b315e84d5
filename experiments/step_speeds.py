"""The training steps that `experiments.steps` times: those of `train.py`, and of the loop that a user would write."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from model.config import Config
from model.data.batches import Batches
from model.data.cifar10 import Dataset
from model.distributed import Ranks
from model.errors import RunError
from model.memory import out_of_memory
from model.trainer import Trainer, choose_dtype
from profiling.bench.timing import CpuTimer, CudaTimer, Plan, interleave, summarise, verdict

PLAIN = "plain"


class PlainBlock(nn.Module):
    """The article's block in library modules."""

    def __init__(self, c: int, k: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(c), nn.BatchNorm2d(k)
        self.conv1 = nn.Conv2d(c, k, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(k, k, 3, 1, 1, bias=False)
        self.conv3 = nn.Conv2d(c, k, 1, stride, bias=False) if stride != 1 or c != k else nn.Identity()

    def forward(self, x):
        a = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(a)))) + self.conv3(a)


class PlainResNet(nn.Module):
    """The article's network as a user would write it: fp32, NCHW, eager."""

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 256)):
        super().__init__()
        self.prep = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        blocks, c = [], widths[0]
        for stage, k in enumerate(widths):
            blocks += [PlainBlock(c, k, 1 if stage == 0 else 2), PlainBlock(k, k, 1)]
            c = k
        self.blocks, self.linear = nn.Sequential(*blocks), nn.Linear(2 * c, 10)

    def forward(self, x):
        x = self.blocks(self.prep(x))
        return self.linear(torch.cat([F.max_pool2d(x, 4), F.avg_pool2d(x, 4)], 1).flatten(1))


def plain(config: Config, device: torch.device) -> Iterator[int]:
    """Steps of the plain loop without an end; images are already augmented, which favours it."""
    network = PlainResNet(config.widths).to(device)
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batch = config.batch_size
    x, labels = torch.randn(batch, 3, 32, 32, device=device), torch.randint(0, 10, (batch,), device=device)
    while True:
        loss = F.cross_entropy(network(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss.item()
        yield batch


def start(mode: str, config: Config, dataset: Dataset, device: torch.device) -> tuple[Iterator[int] | None, str | None]:
    """(the steps of `mode`, warmed up, or None; the reason why it cannot run here, if so).

    Training goes on after its last epoch, at its last learning rate.
    """
    if mode == PLAIN:
        if config.network != "resnet":
            return None, f"the plain loop has the article's network only, not network={config.network}"
        stream = plain(config, device)
        next(stream)
        return stream, None
    config = dataclasses.replace(config, step=mode)
    dtype = choose_dtype(config.dtype, device, config.ops)
    trainer = Trainer(Batches(dataset.train_images, dataset.train_labels, config, device, dtype), dataset, Ranks())
    reason = trainer.warm_up()
    trainer.network.train()
    return itertools.chain.from_iterable(trainer.train(epoch) for epoch in itertools.count()), reason


def measure(
    config: Config, dataset: Dataset, device: torch.device, modes: tuple[str, ...], steps: int, plan: Plan
) -> list[dict[str, Any]]:
    """A row for each mode at `config.batch_size`; a mode that cannot run has a `reason` and no figures."""
    batch = config.batch_size
    usable = len(dataset.train_images) // batch * batch  # every step is a whole batch
    if not usable:
        raise RunError(f"batch {batch} is more than the {len(dataset.train_images)} images")
    images, labels = dataset.train_images[:usable], dataset.train_labels[:usable]
    dataset = dataclasses.replace(dataset, train_images=images, train_labels=labels)
    rows, streams = [], {}
    for mode in modes:
        try:
            stream, reason = start(mode, config, dataset, device)
        except Exception as error:  # memory that ran out, or a driver's: the other modes may yet run
            error = out_of_memory(error, device, batch) or error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        rows.append({"batch": batch, "step": mode, "ops": config.ops, "reason": reason})
        if reason is None:
            streams[mode] = stream
    runs = {mode: functools.partial(_run, stream, steps, device) for mode, stream in streams.items()}
    taken = interleave(runs, CpuTimer().for_mode("hot"), plan)
    baseline = next(iter(streams), None)
    for row in rows:
        mode = row["step"]
        if mode in streams:
            wall = summarise(taken[mode].us)
            images = 1e6 * batch * steps
            row |= {"images_per_s": images / wall.median, "low": images / wall.high, "high": images / wall.low}
            row |= {"n": wall.n, "ratio": list(verdict(taken[mode].us, taken[baseline].us)), "against": baseline}
            row["idle_share"] = idle_share(streams[mode], wall.median / steps, device)
    return rows


def _run(stream: Iterator[int], steps: int, device: torch.device) -> None:
    """Run `steps` steps and synchronise."""
    for _ in range(steps):
        next(stream)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def as_many_as_cifar10(dataset: Dataset) -> Dataset:
    """The training images again and again, so that an epoch begins as seldom as it does with 50,000."""
    again = torch.arange(50_000) % len(dataset.train_images)
    images, labels = dataset.train_images[again], dataset.train_labels[again]
    return dataclasses.replace(dataset, train_images=images, train_labels=labels)


def idle_share(stream: Iterator[int], wall_us: float, device: torch.device) -> float | None:
    """1 - device time / wall time of a step, by the median of some steps; None where the device cannot time them.

    It cannot where there is no GPU, and where a step is more launches than the driver queues.
    """
    if device.type != "cuda":
        return None
    timer = CudaTimer(device).for_mode("hot")
    try:
        device_us = summarise([timer(lambda: next(stream)) for _ in range(11)]).median
    except RuntimeError:
        return None
    return max(0.0, 1 - device_us / wall_us)
