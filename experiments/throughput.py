"""Images per second and peak memory of training on this machine's CPU, beside the loop a user would write.

    python -m experiments.throughput

Each measurement is a process of its own (the allocator's setting is process-wide, and so is the peak), and the two that
are compared take turns, ours-plain-plain-ours, so that a drift of the machine does not read as a gain.
"""

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import train
from profiling.console import Terminal

ROOT = Path(__file__).resolve().parent.parent
BATCH = 512


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


def child(case: str, steps: int) -> None:
    """Measure `case` in this process and print {images_per_s, peak_memory_bytes}."""
    import resource

    ends = plain(steps) if case == "plain" else ours(case.split(), steps)
    batch = 256 if case.startswith("laptop") else BATCH
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    fastest = min(b - a for a, b in itertools.pairwise(ends))
    print(json.dumps({"images_per_s": batch / fastest, "peak_memory_bytes": peak}))


def measure(case: str, steps: int) -> dict[str, float]:
    """`child` in a fresh process."""
    command = [sys.executable, "-m", "experiments.throughput", "--case", case, "--steps", str(steps)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument(
        "--steps", type=int, default=4, help="steps per measurement; the fastest after the first counts"
    )
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps {arguments.steps} is too small; the first is not counted, so at least 2 are needed")
    if arguments.case:
        child(arguments.case, arguments.steps)
        return
    terminal, steps = Terminal(), arguments.steps
    article = "article-256"
    turns = [(case, measure(case, steps)) for case in (article, "plain", "plain", article)]
    speed = {case: [m["images_per_s"] for c, m in turns if c == case] for case in (article, "plain")}
    terminal.table(
        f"The article's network at batch {BATCH}, training on this CPU",
        ["", "images/s, each turn", "peak memory"],
        [
            [name, ", ".join(f"{v:.0f}" for v in speed[case]), f"{peak(turns, case) / 1e6:,.0f} MB"]
            for name, case in (("train.py", article), ("plain fp32 NCHW eager loop", "plain"))
        ],
    )
    ratios = [a / b for a, b in zip(speed[article], speed["plain"], strict=True)]
    terminal.say(
        f"train.py is {sum(ratios) / 2:.2f} times the plain loop's speed ({ratios[0]:.2f} and {ratios[1]:.2f})"
    )
    others = [("article-256 dtype=float32", "train.py, fp32"), ("laptop", "laptop")]
    rows = [(name, measure(case, steps)) for case, name in others]
    terminal.table(
        "Peak memory of the process",
        ["", "images/s", "peak memory"],
        [[name, f"{m['images_per_s']:,.0f}", f"{m['peak_memory_bytes'] / 1e6:,.0f} MB"] for name, m in rows],
    )


def peak(turns: list, case: str) -> float:
    """The larger of a case's peaks."""
    return max(m["peak_memory_bytes"] for c, m in turns if c == case)


if __name__ == "__main__":
    main()
