"""Images per second of a training step run eagerly, compiled and captured, and how much of the time the GPU is idle.

`experiments.step_speeds` measures them; what was asked for is checked before it imports torch.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.study.folder import Request
from model.errors import UsageError
from model.interrupts import Interrupts
from model.presets import preset

if TYPE_CHECKING:
    from profiling.output.terminal import Terminal

MODES = ("eager", "compiled", "captured", "plain")
"""The last is the loop that a user would write: fp32, NCHW, eager, on images that are ready."""
BATCHES = (128, 512, 2048)
VARIED = {"batch_size": "--batch", "step": "--mode"}
"""Settings, and the options that list their values."""


def check(request: Request, preset_name: str | None, batches: Sequence[int], modes: Sequence[str], steps: int) -> None:
    """Raise UsageError for what cannot be measured, as far as that is known without torch."""
    config = request.configure(preset(preset_name or "laptop"))
    for mode in modes:
        if mode not in MODES:
            raise UsageError(f"--mode is {mode!r}, expected one of {', '.join(MODES)}")
    for batch in batches:
        dataclasses.replace(config, batch_size=batch)
    for setting in request.settings:
        key = setting.partition("=")[0].strip().replace("-", "_")
        if key in VARIED:
            raise UsageError(f"--set {key} is what this measures several of; give {VARIED[key]} instead")


def run(request: Request, terminal: "Terminal", interrupts: Interrupts, **options: Any) -> list[dict[str, Any]]:
    """Measure and print a table; returns its rows. `options` are those of `check`."""
    from experiments.step_speeds import report

    return report(request, terminal, **options)
