"""What `experiments.step_modes` measures: images per second of each mode, and the idle share of the GPU.

The modes take turns within one process, A B C, C B A, on the same images, so that a drift of the machine does not read
as a difference. A sample is some steps, the host's work for them included, until the device has done them. The idle
share is what of that the device's own time does not account for: the same step timed by the device, behind a kernel
that keeps it busy until everything is launched.
"""

import dataclasses
import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch

import train
from model.config import Config
from model.data.batches import Batches
from model.data.cifar10 import Dataset, load
from model.distributed import Ranks
from model.errors import RunError
from model.memory import out_of_memory
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
    config: Config, dataset: Dataset, device: torch.device, modes: tuple[str, ...], steps: int, plan: Plan
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
            trainer, reason = prepare(dataclasses.replace(config, step=mode), dataset, device)
        except Exception as error:  # memory that ran out, or a driver's: the other modes may yet run
            error = out_of_memory(error, device, batch) or error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        rows.append({"batch": batch, "step": mode, "ops": config.ops, "reason": reason})
        if reason is None:
            streams[mode] = endless(trainer)
            runs[mode] = run_of(streams[mode], steps, device)
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


def report(arguments: Namespace, terminal: Terminal) -> list[dict[str, Any]]:
    """Measure, and print a table; returns its rows. After each batch size step_modes.json has all until then."""
    config = preset(arguments.preset or "laptop").with_settings(arguments.set)
    device = choose_device(config.device)
    search_convolutions(device)
    if arguments.preset is None and device.type == "cuda":
        config = preset("fused").with_settings(arguments.set)
    config, reason = with_available_ops(config, device)
    if reason:
        terminal.warn(f"the kernels cannot run here ({reason}): reference ops")
    dataset = load(arguments.data_dir, synthetic=arguments.data_dir is None, say=terminal.say)
    if dataset.identity == "synthetic":
        dataset = as_many_as_cifar10(dataset)
    plan, rows, machine = QUICK if arguments.quick else PLAN, [], environment(device, train.ROOT)
    for batch in arguments.batch:
        changed = dataclasses.replace(config, batch_size=batch)
        rows += measure(changed, dataset, device, tuple(arguments.modes), arguments.steps, plan)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_json(arguments.out / "step_modes.json", {"environment": machine, "rows": rows})
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
