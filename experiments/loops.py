"""The two training loops whose speeds `experiments.throughput` compares, each as the times at which its steps ended."""

import contextlib
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import train
from experiments.throughput import BATCH
from profiling.output.terminal import Terminal


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

    def __init__(self, widths=(64, 128, 256, 256)):
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


def plain(steps: int) -> list[float]:
    """When each step of the plain loop ended, in seconds; images are already augmented, which favours it."""
    network = PlainResNet()
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
    x, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(0, 10, (BATCH,))
    ends = []
    for _ in range(steps):
        loss = F.cross_entropy(network(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        loss.item()
        ends.append(time.monotonic())
    return ends


def ours(settings: list[str], steps: int) -> list[float]:
    """The same of `python train.py`, augmentation included."""
    interrupts, ends = train.Interrupts(), []
    session = train.open_session(Terminal(speaks=False), interrupts, device="cpu", synthetic=True)

    def on_step(number: int) -> None:
        ends.append(time.monotonic())
        if len(ends) == steps:
            interrupts.requested = 2

    preset, *rest = settings
    config = train.preset(preset).with_settings(rest)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(train.Interrupted):
        train.run(session, config, Path(folder), on_step=on_step)
    return ends
