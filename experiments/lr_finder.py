"""The learning-rate finder: one epoch at a rate that rises exponentially, and what two rules read off the loss.

    python -m experiments lr-finder --data-dir DIR

The sweep is L. N. Smith's range test (arXiv:1506.01186), the two rules are fastai's; the smaller of their rates is the
one to start with. It runs on a copy of the network. The loss may blow up: that ends the sweep, and is part of its
result. At each step the loss is smoothed by a straight line through the steps around it, which has no lag, unlike a
running mean, so the minimum is not shifted to higher rates. The slope of such a line, through more steps, is the
descent.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments.study import training
from experiments.study.drawing import BLUE, GREY, INK, ORANGE, VIOLET
from experiments.study.folder import Plot, Request, Table, open_study
from model.config import Config
from model.data.batches import Batches
from model.data.cifar10 import Dataset
from model.distributed import Ranks
from model.presets import fused, laptop
from model.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from model.interrupts import Interrupts
    from profiling.output.terminal import Terminal

LOW, HIGH = 1e-4, 100.0
"""The sweep's first and last learning rate, of the mean loss."""
WINDOW, SLOPE_WINDOW = 0.5, 1.0
"""Decades over which the loss is smoothed, and its slope; in fewer, the noise of batches is steeper."""
SURE = 4.0
"""Standard errors by which the loss must fall; by chance the least of many smoothed losses is below the first."""
BLOWN_UP = 4.0
"""A sweep ends at a batch whose loss is this many times the first batch's, or is not finite."""


CAPTION = (
    "One epoch, in which each batch takes a higher rate than the one before. The line is the loss smoothed over half a "
    "decade of rates; a bar, where there is one, spans the rates at which that is as low as at its minimum, within "
    "noise."
)


class Sweep(NamedTuple):
    """`losses` are the mean loss of each step's batch, `rates` its learning rate; `stopped` says why it ended early."""

    rates: list[float]
    losses: list[float]
    stopped: str | None


class Suggestion(NamedTuple):
    """Two rates: `steepest`, where the smoothed loss falls fastest, and `tenth` of the rate at its minimum.

    Between `low` and `high` the smoothed loss is everywhere as low as there, within its noise: two standard errors of a
    difference. `at_end` says that the minimum is the last step's: the true one may lie at a higher rate.
    """

    steepest: float
    tenth: float
    minimum: float
    low: float
    high: float
    at_end: bool

    @property
    def first(self) -> float:
        """The rate to start with, the smaller: too low a rate costs time, too high a one the run."""
        return min(self.steepest, self.tenth)


def sweep(
    trainer: Trainer,
    dataset: Dataset,
    low: float = LOW,
    high: float = HIGH,
    on_images: Callable[[int], Any] = lambda images: None,
) -> Sweep:
    """One epoch of `dataset`'s training images on a copy of `trainer`, which does not change.

    The first step takes the rate `low`, the last `high`.
    """
    steps = trainer.epoch_steps
    rates = [low * (high / low) ** (n / max(steps - 1, 1)) for n in range(steps)]
    knots = tuple(n / steps for n in range(steps + 1))
    config = dataclasses.replace(trainer.config, epochs=1, lr_epochs=knots, lr_values=(low, *rates))
    batches = Batches(dataset.train_images, dataset.train_labels, config, trainer.device, trainer.dtype)
    twin = Trainer(batches, dataset, Ranks())
    twin.restore(trainer.tensors(), 0)
    if twin.step_requested != "eager":
        twin.warm_up()
    rates, losses = [], []
    for images in twin.train(0):
        loss = float(twin.step.loss_sum) / images
        twin.step.loss_sum.zero_()
        rate = twin.step.learning_rate(twin.step.number)
        on_images(images)
        bad = training.bad_step(twin) is not None
        if bad or not math.isfinite(loss):
            what = "gradient" if math.isfinite(loss) else "loss"
            return Sweep(rates, losses, f"the {what} was not finite at a rate of {rate:.3g}")
        rates.append(rate)
        losses.append(loss)
        if loss > BLOWN_UP * losses[0]:
            return Sweep(rates, losses, f"the loss was {loss / losses[0]:.0f} times the first at a rate of {rate:.3g}")
    return Sweep(rates, losses, None)


def smooth(rates: Sequence[float], losses: Sequence[float], window: float) -> tuple[list[float], list[float]]:
    """(smoothed loss, its slope per decade) at each step: a line by least squares through the steps around it.

    These are the steps within half of `window` decades, and at least the neighbours on both sides.
    """
    x, y = np.log10(rates), np.asarray(losses, np.float64)
    values, slopes = [], []
    for i in range(len(x)):
        near = np.abs(x - x[i]) <= window / 2
        near[max(i - 1, 0) : i + 2] = True
        dx = x[near] - x[near].mean()
        spread = float((dx**2).sum())
        slope = float((dx * y[near]).sum()) / spread if spread else 0.0
        values.append(float(y[near].mean() + slope * (x[i] - x[near].mean())))
        slopes.append(slope)
    return values, slopes


def suggest(rates: Sequence[float], losses: Sequence[float]) -> Suggestion | None:
    """The rates by both rules; None for fewer than three steps, or a loss that never falls by more than chance."""
    if len(rates) < 3:
        return None
    values, _ = smooth(rates, losses, WINDOW)
    _, slopes = smooth(rates, losses, SLOPE_WINDOW)
    lowest = int(np.argmin(values))
    if lowest == 0:
        return None
    steepest = int(np.argmin(slopes[: lowest + 1]))
    x = np.log10(rates)
    bends = np.abs(np.diff(losses, 2))  # a line has none; those of independent noise have six times its variance
    one = 1.4826 * float(np.median(bends)) / math.sqrt(6)  # the median, since batches at high rates are noisier
    error = one / math.sqrt(max(len(rates) * WINDOW / (x[-1] - x[0]) / 2, 1))  # at the ends the window is half
    if values[0] - values[lowest] < SURE * error:
        return None
    near = np.abs(x - x[lowest]) <= WINDOW / 2
    noise = float(np.std(np.subtract(losses, values)[near])) / math.sqrt(near.sum())
    higher = np.flatnonzero(np.asarray(values) > values[lowest] + 2 * math.sqrt(2) * noise)
    left, right = higher[higher < lowest], higher[higher > lowest]
    plateau = rates[left[-1] + 1 if len(left) else 0], rates[right[0] - 1 if len(right) else -1]
    return Suggestion(rates[steepest], rates[lowest] / 10, rates[lowest], *plateau, lowest == len(rates) - 1)


def sentences(found: Sweep, suggested: Suggestion | None, config: Config) -> list[str]:
    """The conclusions from the sweep, the headline first."""
    if suggested is None:
        few = len(found.rates) < 3
        why = f"its {len(found.rates)} steps are too few" if few else "its loss never fell by more than its noise"
        return [f"The sweep suggests no learning rate: {why}.", _end(found)]
    s = suggested
    if s.steepest <= s.tenth:
        why, other, more = "the loss falls fastest there", "a tenth of the rate at its minimum", s.tenth
    else:
        why, other, more = "it is a tenth of the rate at the loss's minimum", "where the loss falls fastest", s.steepest
    said = [
        f"Start with a learning rate of {s.first:.2g}: {why}, and the other rule, {other}, says more, {more:.2g}.",
        "Of the two the smaller is the safe one: too low a rate costs time, too high a one the run.",
    ]
    if s.high > 2 * s.low:
        said.append(
            f"The minimum is flat: within the noise of its batches the smoothed loss is as low anywhere from "
            f"{s.low:.2g} to {s.high:.2g}, and a tenth of it could be anything from {s.low / 10:.2g} to "
            f"{s.high / 10:.2g}."
        )
    if s.at_end:
        said.append("The loss was lowest at the sweep's last step, so a tenth of its rate is a lower bound.")
    return [*said, _of_peak(found, s, config), _end(found)]


def _of_peak(found: Sweep, suggested: Suggestion, config: Config) -> str:
    """Whether the curve supports the highest rate of the schedule."""
    peak = max(config.lr_values)
    if peak > found.rates[-1]:
        verdict = "which the sweep did not reach"
    elif peak > suggested.high:
        verdict = "where the loss has risen again: lower it"
    elif peak < suggested.low:
        verdict = "below the rates at which the loss is lowest: a higher peak may train faster"
    else:
        verdict = "where the loss is as low as anywhere: the sweep has nothing against it"
    return f"The schedule of {config.preset} peaks at {peak:.3g}, {verdict}."


def _end(found: Sweep) -> str:
    """The loss at the highest rates."""
    if found.stopped:
        return f"The sweep ended early: {found.stopped}."
    values, _ = smooth(found.rates, found.losses, WINDOW)
    lowest = int(np.argmin(values))
    rose = [rate for rate, value in zip(found.rates[lowest:], values[lowest:], strict=True) if value > values[0]]
    last = f"the sweep's end, a rate of {found.rates[-1]:.3g}"
    if rose:
        return f"From a rate of {rose[0]:.2g} on the smoothed loss is above its first value; it is finite up to {last}."
    return f"The smoothed loss does not rise above its first value up to {last}."


def picture(found: Sweep, suggested: Suggestion | None, config: Config) -> Plot:
    """Loss against rate."""
    return Plot(
        "sweep",
        "Loss against learning rate",
        partial(draw, found=found, suggested=suggested, config=config),
        CAPTION,
        reason="fewer than three steps were finite" if len(found.rates) < 3 else "",
    )


def draw(axes: "Axes", found: Sweep, suggested: Suggestion | None, config: Config) -> None:
    """Loss against rate, as measured and smoothed, with both suggestions and the schedule's peak."""
    rates, losses, _ = found
    values, _ = smooth(rates, losses, WINDOW)
    axes.plot(rates, losses, ".", color=GREY, markersize=4, label="a batch")
    axes.plot(rates, values, color=BLUE, linewidth=2.5, label="smoothed")
    peak = max(config.lr_values)
    axes.axvline(peak, color=INK, linestyle=":", label=f"peak of {config.preset}: {peak:.2g}")
    if suggested is not None:
        s = suggested
        for (name, rate), colour, style in zip(rules(s).items(), (ORANGE, VIOLET), ("-.", "--"), strict=True):
            use = ", start with it" if rate == s.first else ""
            axes.axvline(rate, color=colour, linestyle=style, label=f"{name}: {rate:.2g}{use}")
        if s.high > s.low:
            name = f"lowest loss, within noise: {s.low:.2g} to {s.high:.2g}"
            axes.hlines(min(values), s.low, s.high, color=VIOLET, linewidth=3, label=name)
    top = min(max(*values, losses[0]) * 1.1, 1.6 * losses[0])
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss of a batch", ylim=(min(*values, *losses) * 0.9, top))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(which="minor", labelbottom=False)  # between the decades they touch each other


def rules(suggested: Suggestion) -> dict[str, float]:
    """The two rates by the names of their rules."""
    return {"steepest descent": suggested.steepest, "a tenth of the minimum's rate": suggested.tenth}


def tables(suggested: Suggestion | None) -> list[Table]:
    """The two rates; nothing where there are none."""
    if suggested is None:
        return []
    rows = [
        [f"{name}: start with it" if rate == suggested.first else name, f"{rate:.3g}"]
        for name, rate in rules(suggested).items()
    ]
    return [Table("Learning rates", ["rule", "learning rate"], rows, ["", "modelled"])]


def run(request: Request, terminal: "Terminal", interrupts: "Interrupts") -> dict[str, Any]:
    """The experiment; returns its document."""
    session = training.open_session(request, terminal, interrupts)
    start = fused() if session.device.type == "cuda" and not request.small else laptop()
    config = training.runnable(request.configure(start), session)
    study = open_study("lr-finder", request, session, {**training.identity(config), "low": LOW, "high": HIGH})
    total = len(session.dataset.train_images)

    def measure() -> dict[str, Any]:
        trainer = training.prepare(session, config, session.dataset)
        with terminal.progress(total, 0, "images") as meter:
            return sweep(trainer, session.dataset, on_images=lambda n: meter.advance(n, "sweep"))._asdict()

    found = Sweep(**study.once("sweep", measure))
    suggested = suggest(found.rates, found.losses)
    caveats = []
    if request.small:
        caveats.append(
            f"--small: a sweep of a narrow network, that of the preset {config.preset}, at batch {config.batch_size}; "
            "another network or batch has other rates, and needs its own."
        )
    caveats.append(
        "One sweep with one seed. A sweep sees an untrained network for an epoch, not a schedule to its end."
    )
    return study.finish(
        {"sweep": found._asdict(), "suggestion": suggested and suggested._asdict(), "peak": max(config.lr_values)},
        [picture(found, suggested, config)],
        sentences(found, suggested, config),
        tables(suggested),
        caveats,
    )
