"""Are a run's kernels right on this device? A step and an evaluation with them, compared with the reference ops.

`python -m model.probe` reads the question from stdin, the run's config as JSON with its device and dtype named, and
prints lines of JSON: {"running": place} before each op, and the verdict last. `model.verdict` asks; a kernel that
crashes or never ends takes this process with it, and not the run.

Each op is compared with its reference in float64 on the same operands, which names the kernel that is wrong; then loss,
every gradient and the loss of an evaluation with those of the reference ops from equal weights, which finds what is
wrong between ops.
"""

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kernels.accuracy import relative_error
from kernels.contract import dtype_name
from model.compilation import compile_kernels
from model.config import Config
from model.data.batches import Batches
from model.data.cifar10 import Dataset
from model.distributed import Ranks
from model.op_checks import OpChecks
from model.trainer import Trainer, choose_device, choose_dtype

INTERPRETED_IMAGES = 2
"""The batch where Triton's interpreter runs the kernels, whose time is by the program."""

OWN_DEVIATIONS = 3
GRADIENT_TOLERANCE = 0.1
LOSS_TOLERANCE = 0.02
"""Gradients may deviate (relatively, L2) from the reference ops' in fp32 by OWN_DEVIATIONS times the worst deviation of
the reference ops in the run's dtype, or by the tolerance. Each implementation rounds on its own, and so switches other
ReLUs and pools: in fp16 both deviate on the article's network by up to 0.15, single tensors by 15 times the other's.
This tests no kernel, as the ops' comparisons do; a wrong term or factor between the ops is of the order of 1."""

SHOWN = 3
"""Wrong ops that are named; the others are counted."""


def refusal(config: Config, begin: Callable[[str], Any] = lambda place: None) -> tuple[str | None, list[str]]:
    """(what is wrong with the kernels of `config` on its device, None if nothing is; what could not be compared).

    `begin(place)` hears of each op before it runs. Raises what a kernel or its compiler raises.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device, config.ops)
    images = config.batch_size
    if device.type == "cuda":
        torch.cuda.set_device(device)
        begin("the compiler")
        few = replace(config, batch_size=2)  # the kernels are the same for every batch
        compile_kernels(lambda: _results(few, device, dtype), device)
    else:
        images = min(images, INTERPRETED_IMAGES)
    while True:
        try:
            return _refusal(replace(config, batch_size=images), device, dtype, begin)
        except torch.OutOfMemoryError:  # float64 takes more than training does: fewer images say as much
            if images <= 2:
                raise
        images //= 2
        gc.collect()
        torch.cuda.empty_cache()


def _refusal(
    config: Config, device: torch.device, dtype: torch.dtype, begin: Callable[[str], Any]
) -> tuple[str | None, list[str]]:
    checks = OpChecks(begin)
    with checks, torch.autograd.set_multithreading_enabled(False):  # backward too in this thread, under the checks
        ours = _results(config, device, dtype)
    unchecked = list(checks.unchecked.values())
    if checks.wrong:
        more = len(checks.wrong) - SHOWN
        named = "; ".join(list(checks.wrong.values())[:SHOWN])
        return named + (f"; and {more} more" if more > 0 else ""), unchecked
    begin("the reference ops")
    reference = replace(config, ops="reference", conv="table")
    theirs = _results(reference, device, dtype)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        truth = _results(reference, device, torch.float32)
    own = {name: relative_error(theirs[name], exact) for name, exact in truth.items()}
    worst = max(own.values())
    for name, exact in truth.items():
        deviation = relative_error(ours[name], exact)
        tolerance = GRADIENT_TOLERANCE if name.startswith("gradient") else LOSS_TOLERANCE
        allowed = OWN_DEVIATIONS * (worst if name.startswith("gradient") else own[name])
        if not deviation <= max(allowed, tolerance):
            return (
                f"of a step of {config.batch_size} images the {name} is wrong, though no op is: it deviates by "
                f"{deviation:.2g} from the reference ops' in fp32, theirs in {dtype_name(dtype)} by {own[name]:.1g}"
            ), unchecked
    return None, unchecked


def _results(config: Config, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss and gradients of a training step on random images, and the loss of an evaluation after it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (config.batch_size, 32, 32, 3), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (config.batch_size,), generator=generator)
    data = Dataset(images, labels, images, labels, "synthetic", "random")
    trainer = Trainer(Batches(images, labels, config, device, dtype), data, Ranks())
    with torch.no_grad():
        for p in trainer.network.parameters():
            if p.dim() == 1:  # gammas of 1 and betas of 0 would hide a factor and a term
                p += 0.2 * torch.randn(p.shape, generator=generator).to(device)
        for name, v in trainer.step.tensors().items():
            if name.startswith("momentum."):
                v.copy_(torch.randn(v.shape, generator=generator))
    list(trainer.train(0))
    loss, _ = trainer.epoch_result()
    gradients = {f"gradient of {name}": p.grad.clone() for name, p in trainer.network.named_parameters()}
    evaluation = torch.tensor(trainer.evaluate().loss)
    return {"loss": torch.tensor(loss), **gradients, "loss of an evaluation": evaluation}


def main() -> None:
    """Answer the question on stdin; an exception is an answer too."""
    say, sys.stdout = sys.stdout, sys.stderr  # whatever else prints
    place = "a kernel"

    def begin(name: str) -> None:
        nonlocal place
        place = name
        print(json.dumps({"running": name}), file=say, flush=True)

    try:
        reason, unchecked = refusal(Config.from_json(json.load(sys.stdin)), begin)
        verdict = {"reason": reason, "compared": True, "unchecked": unchecked}
    except Exception as error:  # a compiler has one for each of its stages
        line = (str(error).strip() or "no reason given").splitlines()[0]
        verdict = {"reason": f"{place}, failed with {type(error).__name__}: {line}", "compared": False}
    print(json.dumps(verdict), file=say, flush=True)


if __name__ == "__main__":
    main()
