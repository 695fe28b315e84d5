"""The cost of collecting a timed run's records: steps timed with and without, in turns.

    python -m experiments collection-overhead [--pairs N] [--steps N] [--json]

With: the clock of the steps, and the process that samples the GPU, which a signal holds still otherwise. Trainings of
the same steps take turns, with, without, without again and back, so that a drift of the machine does not read as a
cost. The ratio with / without stands beside the interval of without / without: what no difference looks like here.
"""

import itertools
import math
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from experiments.study.folder import Request
from model.config import Config
from model.data.batches import Batches
from model.data.cifar10 import Dataset
from model.distributed import Ranks
from model.trainer import Trainer
from profiling.bench.timing import Plan, Summary, interleave, summarise
from profiling.device.environment import gpu_uuid
from profiling.run import telemetry
from profiling.run.clock import StepClock

if TYPE_CHECKING:
    from model.interrupts import Interrupts
    from profiling.output.terminal import Terminal

BATCH = 64
WIDTHS = (8, 16, 16, 32)
SAMPLER = """
import sys, time
from pathlib import Path
from profiling.device.nvml import GpuSample
from profiling.run import sampler
header = sampler.header(None, None, sampler.PERIOD_MS, {})
sampler.record(lambda: GpuSample(t_ns=time.monotonic_ns()), header, Path(sys.argv[1]), sampler.stdin_closes())
"""
"""The sampler's loop on a source that knows nothing, until standard input closes."""
READY_S = 10.0
"""Time of the sampler to its first sample."""
WITH, WITHOUT, AGAIN = "with", "without", "without again"


class Overhead(NamedTuple):
    """Ratios of times, in pairs: medians with their 95 % intervals."""

    cost: Summary
    same: Summary

    @property
    def inside(self) -> bool:
        """True if the cost cannot be told from no difference."""
        return self.same.low <= self.cost.median <= self.same.high


def small_trainer(steps: int, device: torch.device) -> Trainer:
    """A small network, and epochs of `steps` steps on noise."""
    generator, count = torch.Generator().manual_seed(0), steps * BATCH
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 10
    dataset = Dataset(images, labels, images[:BATCH], labels[:BATCH], identity="synthetic", source="noise")
    # Noise cannot be learned, only survived.
    rate = {"lr_epochs": (0, 35), "lr_values": (1e-3, 1e-3)}
    config = Config(network="resnet9", widths=WIDTHS, batch_size=BATCH, dtype="float32", **rate)
    return Trainer(Batches(images, labels, config, device, torch.float32), dataset, Ranks())


def sampling(device: torch.device, path: Path) -> tuple[telemetry.Recorder, str]:
    """(the sampler at work, what it samples). Without NVML its process has nothing to ask, at the same period.

    Raises RuntimeError where no sample arrives.
    """
    if device.type == "cuda":
        recorder = telemetry.start(gpu_uuid(device), path)
        if _has_samples(recorder, path):
            return recorder, "NVML"
        recorder.stop()
    path.unlink(missing_ok=True)
    recorder = telemetry.Recorder(telemetry.launch([sys.executable, "-c", SAMPLER, str(path)]))
    if not _has_samples(recorder, path):
        recorder.stop()
        raise RuntimeError(f"the sampler left no sample within {READY_S:.0f} s")
    return recorder, "nothing (no NVML here): its process writes empty samples at the same period"


def _has_samples(recorder: telemetry.Recorder, path: Path) -> bool:
    """True if a sample arrives in time; from a process that ended none will."""
    deadline_s = time.monotonic() + READY_S
    while not telemetry.read(path).samples:
        if recorder.process is None or recorder.process.poll() is not None or time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def measure(pairs: int, steps: int, device: torch.device) -> tuple[Overhead, str]:
    """(the overhead, what was sampled) in `pairs` turns of `steps` steps each.

    Raises RuntimeError where the sampler did not last: then nothing was measured.
    """
    trainer, epochs = small_trainer(steps, device), itertools.count()

    def train(clock: StepClock | None = None) -> float:
        """Microseconds of an epoch; the device is idle before and after."""
        epoch = trainer.train(next(epochs))
        start_ns = time.monotonic_ns()
        for _ in clock.each(epoch) if clock else epoch:
            pass
        trainer.check_finite()
        return (time.monotonic_ns() - start_ns) / 1e3

    def collected() -> float:
        recorder.process.send_signal(signal.SIGCONT)
        try:
            return train(StepClock(device, steps))
        finally:
            recorder.process.send_signal(signal.SIGSTOP)

    plan = Plan(min_samples=pairs, max_samples=pairs, relative_error=0.0, seconds=math.inf)
    with tempfile.TemporaryDirectory() as folder:
        recorder, sampled = sampling(device, Path(folder) / "telemetry.jsonl")
        try:
            collected(), train()
            taken = interleave({WITH: collected, WITHOUT: train, AGAIN: train}, lambda run: run(), plan)
            if recorder.process.poll() is not None:
                raise RuntimeError(f"the sampler ended by itself, with exit code {recorder.process.returncode}")
        finally:
            recorder.process.send_signal(signal.SIGCONT)
            recorder.stop()
    return overhead(*(taken[name].us for name in (WITH, WITHOUT, AGAIN))), sampled


def overhead(with_us: list[float], without_us: list[float], again_us: list[float]) -> Overhead:
    """Both ratios, turn by turn: a drift of the machine cancels."""
    cost, same = ([a / b for a, b in zip(us, without_us, strict=True)] for us in (with_us, again_us))
    return Overhead(summarise(cost), summarise(same))


def run(
    request: Request, terminal: "Terminal", interrupts: "Interrupts", pairs: int = 30, steps: int = 50
) -> dict[str, Any]:
    """Measure and print the two ratios; returns them with their intervals."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, sampled = measure(pairs, steps, device)
    ratios = {"with / without": found.cost, "without / without": found.same}
    terminal.table(
        f"{pairs} turns of {steps} steps of a small network on {device.type}; sampled: {sampled}",
        ["ratio of times", "median", "95 % interval"],
        [[name, f"{s.median:.4f}", f"{s.low:.4f} to {s.high:.4f}"] for name, s in ratios.items()],
    )
    place = "inside" if found.inside else "outside"
    terminal.say(f"collection costs {found.cost.median - 1:+.2%}, {place} the interval of no difference")
    record = {"version": 1, "device": device.type, "sampled": sampled, "pairs": pairs, "steps": steps}
    return {**record, "cost": found.cost._asdict(), "same": found.same._asdict(), "inside": found.inside}
