"""Images per second of each way to run a training step, and the idle share of the GPU.

The modes take turns within one process, A B C, C B A, on the same images, so that a drift of the machine does not read
as a difference. A sample is some steps, the host's work for them included, until the device has done them. The idle
share is what of that the device's own time does not account for: the same step timed by the device, behind a kernel
that keeps it busy until everything is launched.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from experiments.steps import BATCHES, MODES
from experiments.study.folder import Request
from model.config import Config
from model.data.batches import Batches
from model.data.cifar10 import Dataset, load
from model.distributed import Ranks
from model.errors import RunError
from model.memory import out_of_memory
from model.network import ARTICLE_WIDTHS
from model.presets import preset
from model.trainer import Trainer, choose_device, choose_dtype, search_convolutions, with_available_ops
from profiling.bench.timing import QUICK, CpuTimer, CudaTimer, Plan, interleave, summarise, verdict
from profiling.device.environment import environment
from profiling.output.files import write_json
from profiling.output.terminal import Terminal

PLAN = Plan(min_samples=10, max_samples=200, relative_error=0.005, seconds=10.0)


def prepare(config: Config, dataset: Dataset, device: torch.device) -> tuple[Trainer, str | None]:
    """A trainer that is warmed up, and why it does not run its steps as `config.step` asks, if so."""
    dtype = choose_dtype(config.dtype, device, config.ops)
    batches = Batches(dataset.train_images, dataset.train_labels, config, device, dtype)
    trainer = Trainer(batches, dataset, Ranks())
    return trainer, trainer.warm_up()


def endless(trainer: Trainer) -> Iterator[int]:
    """Training that goes on after the last epoch, at its last learning rate."""
    trainer.network.train()
    return itertools.chain.from_iterable(trainer.train(epoch) for epoch in itertools.count())


def measure(
    config: Config, dataset: Dataset, device: torch.device, modes: Sequence[str], steps: int, plan: Plan
) -> list[dict[str, Any]]:
    """A row for each mode at `config.batch_size`; a mode that cannot run has a `reason` and no figures."""
    batch = config.batch_size
    usable = len(dataset.train_images) // batch * batch  # every step is a whole batch
    if not usable:
        raise RunError(f"batch {batch} is more than the {len(dataset.train_images)} images")
    dataset = dataclasses.replace(
        dataset, train_images=dataset.train_images[:usable], train_labels=dataset.train_labels[:usable]
    )
    rows, streams, runs = [], {}, {}
    for mode in modes:
        try:
            if mode == "plain":
                stream, reason = plain(config, device)
            else:
                trainer, reason = prepare(dataclasses.replace(config, step=mode), dataset, device)
                stream = endless(trainer)
        except Exception as error:  # memory that ran out, or a driver's: the other modes may yet run
            error = out_of_memory(error, device, batch) or error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        rows.append({"batch": batch, "step": mode, "ops": config.ops, "reason": reason})
        if reason is None:
            streams[mode] = stream
            runs[mode] = run_of(stream, steps, device)
    taken = interleave(runs, CpuTimer().for_mode("hot"), plan)
    baseline = next(iter(runs), None)
    for row in rows:
        mode = row["step"]
        if row["reason"] is None:
            wall = summarise(taken[mode].us)
            images = 1e6 * batch * steps
            row |= {"images_per_s": images / wall.median, "low": images / wall.high, "high": images / wall.low}
            row |= {"n": wall.n, "ratio": list(verdict(taken[mode].us, taken[baseline].us)), "against": baseline}
            row["idle_share"] = idle_share(streams[mode], wall.median / steps, device)
    return rows


class PlainBlock(nn.Module):
    """The article's block in library modules."""

    def __init__(self, c: int, k: int, stride: int):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(c), nn.BatchNorm2d(k)
        self.conv1 = nn.Conv2d(c, k, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(k, k, 3, 1, 1, bias=False)
        self.conv3 = nn.Conv2d(c, k, 1, stride, bias=False) if stride != 1 or c != k else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x))
        return self.conv2(F.relu(self.bn2(self.conv1(a)))) + self.conv3(a)


class PlainResNet(nn.Module):
    """The article's network as a user would write it: [N, 3, 32, 32] to [N, 10]."""

    def __init__(self, widths: Sequence[int] = ARTICLE_WIDTHS):
        super().__init__()
        self.prep = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        blocks, c = [], widths[0]
        for stage, k in enumerate(widths):
            blocks += [PlainBlock(c, k, 1 if stage == 0 else 2), PlainBlock(k, k, 1)]
            c = k
        self.blocks, self.linear = nn.Sequential(*blocks), nn.Linear(2 * c, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.prep(x))
        return self.linear(torch.cat([F.max_pool2d(x, 4), F.avg_pool2d(x, 4)], 1).flatten(1))


def plain(config: Config, device: torch.device) -> tuple[Iterator[int], str | None]:
    """The loop that a user would write, fp32, NCHW and eager, without an end; and why there is none, if so.

    Its images are on the device and augmented already, which favours it.
    """
    if config.network != "resnet":
        return iter(()), "the plain loop is of network=resnet"

    def steps() -> Iterator[int]:
        network = PlainResNet(config.widths).to(device)
        optimiser = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
        x = torch.randn(config.batch_size, 3, 32, 32, device=device)
        labels = torch.randint(0, 10, (config.batch_size,), device=device)
        while True:
            loss = F.cross_entropy(network(x), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            yield config.batch_size

    return steps(), None


def as_many_as_cifar10(dataset: Dataset) -> Dataset:
    """The training images again and again, so that an epoch begins as seldom as it does with 50,000."""
    again = torch.arange(50_000) % len(dataset.train_images)
    return dataclasses.replace(
        dataset, train_images=dataset.train_images[again], train_labels=dataset.train_labels[again]
    )


def run_of(stream: Iterator[int], steps: int, device: torch.device) -> Callable[[], None]:
    """So many steps, and the wait for the device to have done them."""

    def run() -> None:
        for _ in range(steps):
            next(stream)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


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


def report(
    request: Request,
    terminal: Terminal,
    preset_name: str | None = None,
    batches: Sequence[int] = BATCHES,
    modes: Sequence[str] = MODES[:3],
    steps: int = 20,
) -> list[dict[str, Any]]:
    """Measure, and print a table; returns its rows. After each batch size OUT/steps.json has all until then.

    Raises RunError where a batch is more than the images, and what the data raises.
    """
    config = request.configure(preset(preset_name or "laptop"))
    device = choose_device(config.device)
    search_convolutions(device)
    if preset_name is None and device.type == "cuda":
        config = request.configure(preset("fused"))
    config, reason = with_available_ops(config, device)
    if reason:
        terminal.warn(f"the kernels cannot run here ({reason}): reference ops")
    dataset = load(request.data_dir, synthetic=request.data_dir is None, say=terminal.say)
    if dataset.identity == "synthetic":
        dataset = as_many_as_cifar10(dataset)
    plan, rows, machine = QUICK if request.small else PLAN, [], environment(device, ROOT)
    for batch in batches:
        rows += measure(dataclasses.replace(config, batch_size=batch), dataset, device, modes, steps, plan)
        if request.out:
            request.out.mkdir(parents=True, exist_ok=True)
            write_json(request.out / "steps.json", {"environment": machine, "rows": rows})
    title = f"{config.preset}, ops={config.ops}, on {device}; images/s, median with its 95 % interval"
    columns = ["batch", "step", "images/s", "against the first", "idle share of the device"]
    terminal.table(title, columns, [cells(row) for row in rows])
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    head = [str(row["batch"]), row["step"]]
    if row["reason"]:
        return [*head, f"unavailable: {row['reason']}", "", ""]
    word, ratio, low, high = row["ratio"]
    idle = "unavailable" if row["idle_share"] is None else f"{row['idle_share']:.1%}"
    speed = f"{row['images_per_s']:,.0f} ({row['low']:,.0f} to {row['high']:,.0f})"
    return [*head, speed, f"{ratio:.2f} ({low:.2f} to {high:.2f}) {word}", idle]
