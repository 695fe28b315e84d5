"""The memory of a network: the loss of past batches by its last weights, against their age.

Five epochs of ramp, then a constant rate, on half the images without augmentation and on all of them with. Then the
weights are frozen, and the loss of each batch of the last epochs is computed again, in the order in which they were
seen: batches are functions of seed, epoch and index.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import train
from experiments.forgetting_rules import APART, LEAST, Climb, climb, curve, smoothed
from experiments.study import training
from experiments.study.drawing import BLUE, INK, ORANGE
from experiments.study.folder import Plot, Table
from model.config import Config
from model.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RATES = {"high": 1.0, "low": 1 / 8}
"""Multiples of the base rate, which is the schedule's own peak."""
SETTINGS = {"half": "half the images, not augmented", "all": "all images, augmented"}
RUNS = {f"{name}, {rate}": (name, rate) for rate in RATES for name in SETTINGS}
"""(setting, rate) of each run."""
RAMP = 5
"""Epochs (the article's)."""
RECENT = 0.1
"""The share of an epoch that is called its newest or its oldest batches."""
SAME = 0.1
"""Losses that differ by no more than this share are said to be the same."""
CAPTION = (
    "The weights are frozen; the batches are those of the last epochs. An image is seen once an epoch, so batches "
    "older than one have been seen again since. The fit, plateau - drop x exp(-age / memory), is to the last epoch: "
    "after as many steps as its memory 63 % of the drop is forgotten, 1 - 1/e."
)


def look_back(
    session: train.Session,
    config: Config,
    chosen: dict[str, int],
    name: str,
    rate: float,
    on_images: Callable[[int], Any],
) -> dict[str, Any]:
    """Train with a ramp up to a constant `rate`, then go through the last epochs' batches with frozen weights.

    losses       of each batch, the youngest first; empty if anything was not finite
    epoch_steps  batches of an epoch
    seen         the mean loss of the last epoch's images, as they were seen
    """
    images = chosen["images"]
    if name == "half":
        images //= 2
        config = dataclasses.replace(config, crop_pad=0, flip="none", cutout=0)
    changed = training.at_constant_rate(config, rate, RAMP + chosen["constant"], RAMP)
    trainer = training.prepare(session, changed, training.subset(session.dataset, images))
    found = training.fit(trainer, on_images)
    row = {"images": images, "rate": rate, "epoch_steps": trainer.epoch_steps, "seen": found["losses"][-1]}
    if found["diverged_step"]:
        return {**row, "losses": []}
    losses = past_losses(trainer, changed.epochs - chosen["last"])
    return {**row, "losses": losses if all(map(math.isfinite, losses)) else []}


@torch.no_grad()
def past_losses(trainer: Trainer, first: int) -> list[float]:
    """The mean loss of each batch from epoch `first` (from 0) on, by the weights of now; the youngest comes first.

    Batch norm takes the batch's own statistics, as in training. Running statistics change, weights do not.
    """
    config, losses = trainer.config, []
    trainer.network.train()
    for epoch in range(first, config.epochs):
        for batch in trainer.batches.epoch(epoch):
            x, labels = trainer.batches.load(*batch)
            logits = trainer.network(x).float()
            losses.append(F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing))
    return torch.stack(losses).flip(0).tolist()


def images_to_train(chosen: dict[str, int], name: str) -> int:
    """The images that the run of a setting sees, over all its epochs."""
    return chosen["images"] // (2 if name == "half" else 1) * (RAMP + chosen["constant"])


def sentences(memory: dict[str, Any], fits: dict[str, Climb]) -> list[str]:
    """The conclusions from the second experiment."""
    said = []
    for rate, multiple in RATES.items():
        both = [memory[f"{name}, {rate}"] for name in SETTINGS]
        if any(row["seen"] is None for row in both):
            said.append(f"At the {rate} rate a run blew up, so the two settings cannot be compared.")
            continue
        half, whole = (row["seen"] for row in both)
        same = abs(whole - half) <= SAME * min(whole, half)
        said.append(
            f"At the {rate} rate ({multiple:g} x the base) the last epoch's loss was {half:.3f} on {SETTINGS['half']} "
            f"and {whole:.3f} on {SETTINGS['all']}: {'the same' if same else 'not the same'} within {SAME:.0%}, where "
            "the article saw the same loss."
        )
    for name, words in SETTINGS.items():
        said.append(_of_climbs(words, {rate: fits.get(f"{name}, {rate}") for rate in RATES}))
    return said


def _of_climbs(words: str, fits: dict[str, Climb | None]) -> str:
    """The climbs of one setting at both rates."""
    parts = []
    for rate, fit in fits.items():
        if fit is None:
            parts.append(f"the run at the {rate} rate blew up or has too few batches to say")
        elif not fit.clear:
            parts.append(f"at the {rate} rate no climb is told from noise ({fit.drop:.3f} ± {fit.error:.3f})")
        else:
            parts.append(
                f"at the {rate} rate the last batch's loss is {fit.drop:.3f} ± {fit.error:.3f} below that of old ones, "
                f"{fit.plateau:.3f}, and 63 % of the difference is forgotten after {_memory(fit)} steps"
            )
    sentence = f"On {words}, {'; '.join(parts)}"
    high, low = fits["high"], fits["low"]
    if high and low and high.clear and low.clear:
        slower = low.memory / high.memory
        if slower > APART:
            least = "at least " if low.bounded else ""
            verdict = f"at the low rate the climb is more gradual, {least}{slower:.1f} times as long"
        elif low.bounded:
            verdict = "whether the climb is more gradual at the low rate cannot be told from one epoch"
        else:
            verdict = f"at the low rate the climb is not more gradual, {slower:.1f} times as long"
        sentence += f": {verdict} (the article: more gradual)"
    return sentence + "."


def plots(memory: dict[str, Any], fits: dict[str, Climb]) -> list[Plot]:
    """A picture for each of RATES."""
    return [
        Plot(
            f"memory-{rate}",
            f"Loss of past batches against their age, at the {rate} rate",
            partial(draw, rate=rate, memory=memory, fits=fits),
            CAPTION,
            reason="" if any(f"{name}, {rate}" in fits for name in SETTINGS) else "both runs blew up",
        )
        for rate in RATES
    ]


def draw(axes: "Axes", rate: str, memory: dict[str, Any], fits: dict[str, Climb]) -> None:
    """Loss of past batches at one of RATES against their age, smoothed, and the fit to the last epoch."""
    for (name, words), colour, style in zip(SETTINGS.items(), (ORANGE, BLUE), ("--", ":"), strict=True):
        row, fit = memory[f"{name}, {rate}"], fits.get(f"{name}, {rate}")
        if fit is None:
            continue
        losses, epoch_steps = row["losses"], row["epoch_steps"]
        ages = range(1, len(losses) + 1)
        forgotten = f"63 % forgotten after {_memory(fit)} steps" if fit.clear else "no forgetting told from noise"
        axes.plot(ages, losses, ".", color=colour, alpha=0.35, markersize=3)
        axes.plot(ages, smoothed(losses, max(5, epoch_steps // 10)), color=colour, linewidth=2, label=words)
        epoch = ages[:epoch_steps]
        axes.plot(epoch, curve(fit, epoch), style, color=INK, zorder=3, label=f"fit to the last epoch: {forgotten}")
    axes.set(xlabel="age of the batch, in steps before the weights were frozen", ylabel="loss by the frozen weights")


def fits(memory: dict[str, Any]) -> dict[str, Climb]:
    """The climb over the last epoch of each run that has one of enough batches."""
    last = {key: row["losses"][: row["epoch_steps"]] for key, row in memory.items()}
    return {key: climb(losses) for key, losses in last.items() if len(losses) >= LEAST}


def table(memory: dict[str, Any], fits: dict[str, Climb]) -> Table:
    """The numbers of the runs."""
    rows = []
    for key, row in memory.items():
        cells = [f"{row['rate']:.3g}", "blew up" if row["seen"] is None else f"{row['seen']:.3f}"]
        epoch = row["losses"][: row["epoch_steps"]]
        few = max(1, round(RECENT * len(epoch)))
        cells += [f"{fmean(part):.3f}" for part in (epoch[:few], epoch[-few:])] if epoch else ["blew up"] * 2
        fit = fits.get(key)
        cells += ["none", "none"] if fit is None else [f"{fit.drop:.3f} ± {fit.error:.3f}", _memory(fit)]
        rows.append([key, *cells])
    return Table(
        "Loss of batches seen before, by the last weights",
        [
            "run",
            "rate",
            "last epoch, as seen",
            "its newest tenth",
            "its oldest tenth",
            "drop",
            "63 % forgotten after, steps",
        ],
        rows,
        ["", "measured", "measured", "measured", "measured", "modelled", "modelled"],
    )


def _memory(fit: Climb) -> str:
    if not fit.clear:
        return "no climb"
    return f"{'at least ' if fit.bounded else ''}{fit.memory:.0f}"
