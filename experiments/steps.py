"""Images per second of a training step that is eager, compiled, captured or a plain loop's; idle share and memory.

    python -m experiments steps --out FOLDER                     # batches 128, 512 and 2048 of what train.py trains
    python -m experiments steps --apart --preset article-256 --batch 512 --mode eager --mode plain
    python -m experiments steps --quick --batch 32 --mode eager --set widths=8,8,8,8     # a look, on a CPU

The modes take turns within one process, A B C, C B A, on the same images, so that a drift of the machine does not read
as a difference. A sample is some steps, the host's work for them included, until the device has done them. The idle
share is what of that the device's own time does not account for: the same step timed by the device, behind a kernel
that keeps it busy until everything is launched.

With --apart each turn, A B B A, is a process of its own: its peak memory is the mode's, and the plain loop runs with
the allocator as a user has it.
"""

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.study.folder import Request
from model.errors import RunError, UsageError
from model.presets import preset
from profiling import ROOT
from profiling.bench.timing import QUICK, Plan
from profiling.output.files import write_json

if TYPE_CHECKING:
    from model.interrupts import Interrupts
    from profiling.output.terminal import Terminal

Row = dict[str, Any]

BATCHES = (128, 512, 2048)
PLAIN = "plain"
MODES = ("eager", "compiled", "captured", PLAIN)
"""The launches of train.py, and the loop that a user would write."""
VARIED = {"batch_size": "--batch", "step": "--mode"}
"""Settings, and the options that list their values."""
PLAN = Plan(min_samples=10, max_samples=200, relative_error=0.005, seconds=10.0)


def check(request: Request, trained: str | None, batches: Sequence[int], modes: Sequence[str], **_: Any) -> None:
    """Raise UsageError for what cannot be measured, as far as that is known without torch."""
    config = request.configure(preset(trained or "laptop"))
    for batch in batches:
        dataclasses.replace(config, batch_size=batch)
    for mode in modes:
        if mode not in MODES:
            raise UsageError(f"--mode {mode} is unknown; expected {', '.join(MODES)}")
    for setting in request.settings:
        key = setting.partition("=")[0].strip().replace("-", "_")
        if key in VARIED:
            raise UsageError(f"--set {key} is what this measures several of; give {VARIED[key]} instead")


def run(
    request: Request,
    terminal: "Terminal",
    interrupts: "Interrupts",
    trained: str | None = None,
    batches: Sequence[int] = BATCHES,
    modes: Sequence[str] = MODES[:-1],
    steps: int = 20,
    quick: bool = False,
    apart: bool = False,
) -> dict[str, Any]:
    """Measure and print a table; after each batch size steps.json in --out has all until then. Returns what it holds.

    rows               one for each batch and mode (`step_speeds.measure`); of --apart one for each turn, with its peak
    peak_memory_bytes  of this process; all modes' together
    """
    if apart:
        words = [*(["--preset", trained] if trained else []), "--steps", str(steps), *(["--quick"] if quick else [])]
        return _apart(request, terminal, words, batches, modes)
    from experiments import step_speeds
    from model.data.cifar10 import load
    from model.memory import keep_freed_memory
    from model.trainer import choose_device, search_convolutions, with_available_ops
    from profiling.device.environment import environment

    if set(modes) != {PLAIN}:
        keep_freed_memory()
    config = request.configure(preset(trained or "laptop"))
    device = choose_device(config.device)
    search_convolutions(device)
    if trained is None and device.type == "cuda":
        config = request.configure(preset("fused"))
    config, reason = with_available_ops(config, device)
    if reason:
        terminal.warn(f"the kernels cannot run here ({reason}): reference ops")
    dataset = load(request.data_dir, synthetic=request.data_dir is None, say=terminal.say)
    if dataset.identity == "synthetic":
        dataset = step_speeds.as_many_as_cifar10(dataset)
    rows, machine = [], environment(device, ROOT)
    for batch in batches:
        changed = dataclasses.replace(config, batch_size=batch)
        rows += step_speeds.measure(changed, dataset, device, tuple(modes), steps, QUICK if quick else PLAN)
        document = _write(request.out, {"environment": machine, "rows": rows, "peak_memory_bytes": _peak_memory()})
    terminal.table(
        f"{config.preset}, ops={config.ops}, on {device}; images/s, median with its 95 % interval",
        ["batch", "step", "images/s", "against the first", "idle share of the device"],
        [cells(row) for row in rows],
    )
    return document


def _apart(
    request: Request, terminal: "Terminal", words: list[str], batches: Sequence[int], modes: Sequence[str]
) -> dict[str, Any]:
    """Each mode twice, A B B A, each time in a process of its own with these words of the command."""
    rows: list[Row] = []
    words += [word for setting in request.settings for word in ("--set", setting)]
    words += ["--data-dir", str(request.data_dir)] if request.data_dir else []
    for batch in batches:
        for mode in [*modes, *reversed(modes)]:
            found = measure_apart([*words, "--batch", str(batch), "--mode", mode])
            rows.append({**found["rows"][0], "peak_memory_bytes": found["peak_memory_bytes"]})
            document = _write(request.out, {"environment": found["environment"], "rows": rows})
    terminal.table(
        f"{' '.join(words)}: each turn in a process of its own",
        ["batch", "step", "images/s, each turn", "peak memory", f"speed against {modes[0]}, each turn"],
        [_turns(rows, batch, mode, modes[0]) for batch in batches for mode in modes],
    )
    return document


def measure_apart(words: Sequence[str]) -> dict[str, Any]:
    """The document of `steps` with these words, in a fresh process. Raises RunError where that fails."""
    command = [sys.executable, "-m", "experiments", "steps", *words, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise RunError(f"the process of {' '.join(words[-4:])} failed: {reason}")
    return json.loads(done.stdout)


def _turns(rows: Sequence[Row], batch: int, mode: str, first: str) -> list[str]:
    """A row of the table of --apart."""
    mine, base = ([row for row in rows if (row["batch"], row["step"]) == (batch, one)] for one in (mode, first))
    peak = f"{max(row['peak_memory_bytes'] for row in mine) / 1e6:,.0f} MB"
    reason = next((row["reason"] for row in mine if row["reason"]), None)
    if reason:
        return [str(batch), mode, f"unavailable: {reason}", "", ""]
    speeds = ", ".join(f"{row['images_per_s']:,.0f}" for row in mine)
    if any(row["reason"] for row in base):
        return [str(batch), mode, speeds, peak, "unavailable"]
    ratios = [one["images_per_s"] / other["images_per_s"] for one, other in zip(mine, base, strict=True)]
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return [str(batch), mode, speeds, peak, f"{statistics.fmean(ratios):.2f} times ({listed})"]


def _peak_memory() -> int:
    """Bytes that this process had resident at most (getrusage(2): kilobytes, on macOS bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _write(out: Path | None, document: dict[str, Any]) -> dict[str, Any]:
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "steps.json", document)
    return document


def cells(row: Row) -> list[str]:
    """A row of the table."""
    head = [str(row["batch"]), row["step"]]
    if row["reason"]:
        return [*head, f"unavailable: {row['reason']}", "", ""]
    word, ratio, low, high = row["ratio"]
    idle = "unavailable" if row["idle_share"] is None else f"{row['idle_share']:.1%}"
    speed = f"{row['images_per_s']:,.0f} ({row['low']:,.0f} to {row['high']:,.0f})"
    return [*head, speed, f"{ratio:.2f} ({low:.2f} to {high:.2f}) {word}", idle]
