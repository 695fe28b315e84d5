"""The article's two experiments on catastrophic forgetting (Part 2): limits of the learning rate, memory of batches.

    python -m experiments forgetting --data-dir DIR

Limits: a fixed number of epochs at constant rates from 1/8 to 16 times the base, on an eighth of the training images, a
quarter, half and all of them. The final loss is the mean over the last epoch's images, as they were seen.

Memory: `experiments.retention`. The rules by which the limits are read off the curves: `experiments.forgetting_rules`.
"""

from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import train
from experiments import forgetting_rules, retention
from experiments.study import training
from experiments.study.drawing import BLUE, GREY, INK, ORANGE, VIOLET, WARN
from experiments.study.folder import Plot, Request, Study, Table, open_study
from model.config import Config

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from model.interrupts import Interrupts
    from profiling.output.terminal import Terminal

MULTIPLES = tuple(2.0**i for i in range(-3, 5))
"""The rates, in multiples of the base rate."""
SHARES = (8, 4, 2, 1)
"""The sizes of the sets are the largest one's divided by these."""
EPOCHS, CONSTANT, LAST = 10, 25, 4
"""Epochs at each rate; at a constant rate after the ramp (the article's), and how many of these are looked back on."""
SMALL_EPOCHS, SMALL_CONSTANT, SMALL_LAST = (4, 10), 5, 3
"""The same for `small`, the first from the least to the most."""
DIVISORS = (1, 2, 4, 8, 16)
"""Divisors of the number of training images that `small` may choose."""


def plan(request: Request, session: train.Session, config: Config) -> dict[str, int]:
    """{images, epochs, constant, last}: the article's, or for `small` as much as this machine's speed leaves time for.

    images  of the largest set
    epochs  of each run at a constant rate
    """
    count = len(session.dataset.train_images)
    chosen = {"images": count, "epochs": EPOCHS, "constant": CONSTANT, "last": LAST}
    speed = training.images_per_s(session, config)
    if request.small:
        least, most = SMALL_EPOCHS
        for divisor in DIVISORS:
            chosen = {"images": count // divisor, "epochs": least, "constant": SMALL_CONSTANT, "last": SMALL_LAST}
            if work(chosen) / speed <= training.SMALL_S:
                break
        while chosen["epochs"] < most and work({**chosen, "epochs": chosen["epochs"] + 1}) / speed <= training.SMALL_S:
            chosen["epochs"] += 1
    session.terminal.say(
        f"{speed:,.0f} images/s in a batch of {config.batch_size}: {work(chosen):,} images will take about "
        f"{work(chosen) / speed / 60:.0f} min, up to {chosen['images']:,} at a time for {chosen['epochs']} epochs"
    )
    return chosen


def sizes(chosen: dict[str, int]) -> list[int]:
    """The number of images of each curve."""
    return [chosen["images"] // share for share in SHARES]


def work(chosen: dict[str, int]) -> int:
    """Images to train on in all; a look back is a forward pass, a third of a training step."""
    first = sum(sizes(chosen)) * chosen["epochs"] * len(MULTIPLES)
    second = (chosen["images"] + chosen["images"] // 2) * len(retention.RATES)
    return first + second * (retention.RAMP + chosen["constant"]) + second * chosen["last"] // 3


def run(request: Request, terminal: "Terminal", interrupts: "Interrupts") -> dict[str, Any]:
    """The experiment; returns its document."""
    session = training.open_session(request, terminal, interrupts)
    config = training.recipe(request, session)
    study = open_study("forgetting", request, session, training.identity(config))
    chosen = study.once("plan", lambda: plan(request, session, config))
    result = {"recipe": config.learned(), "base_rate": max(config.lr_values), "plan": chosen}
    result |= measure(study, session, config, chosen)
    fits = retention.fits(result["memory"])
    result["climbs"] = {name: fit._asdict() for name, fit in fits.items()}
    curves = [forgetting_rules.Limits(**row) for row in result["limits"]]
    return study.finish(
        result,
        [limits_plot(result), *retention.plots(result["memory"], fits)],
        [
            *forgetting_rules.sentences(curves),
            *blown_up(result["curves"]),
            *retention.sentences(result["memory"], fits),
        ],
        [*limits_tables(result), retention.table(result["memory"], fits)],
        caveats(request, session, config, chosen),
    )


def measure(study: Study, session: train.Session, config: Config, chosen: dict[str, int]) -> dict[str, Any]:
    """Both experiments, each run kept as soon as it is done.

    curves  the final losses on each number of images, one for each of MULTIPLES; None where a run blew up
    limits  what `experiments.forgetting_rules` reads off each of them
    memory  `retention.look_back` of each of its RUNS
    """
    base = max(config.lr_values)
    cells = {f"{images} images, rate x {m:g}": (images, m) for images in sizes(chosen) for m in MULTIPLES}
    work_of = {key: images * chosen["epochs"] for key, (images, _) in cells.items()}
    work_of |= {key: retention.images_to_train(chosen, name) for key, (name, _) in retention.RUNS.items()}
    done = sum(images for key, images in work_of.items() if key in study.results)
    curves: dict[int, list[float | None]] = {images: [] for images in sizes(chosen)}
    remembered = {}

    def at_a_rate(key: str, images: int, multiple: float) -> dict[str, Any]:
        changed = training.at_constant_rate(config, base * multiple, chosen["epochs"])
        trainer = training.prepare(session, changed, training.subset(session.dataset, images))
        return training.fit(trainer, lambda n: meter.advance(n, key))

    def looked_back(key: str, name: str, rate: str) -> dict[str, Any]:
        multiple = retention.RATES[rate]
        return retention.look_back(session, config, chosen, name, base * multiple, lambda n: meter.advance(n, key))

    with session.terminal.progress(sum(work_of.values()), done, "images") as meter:
        for key, (images, multiple) in cells.items():
            found = study.once(key, partial(at_a_rate, key, images, multiple))
            curves[images].append(None if found["diverged_step"] else found["losses"][-1])
        for key, (name, rate) in retention.RUNS.items():
            remembered[key] = study.once(key, partial(looked_back, key, name, rate))
    found = [
        forgetting_rules.limits(images, MULTIPLES, curve)._asdict() for images, curve in curves.items() if any(curve)
    ]
    return {"curves": {str(images): curve for images, curve in curves.items()}, "limits": found, "memory": remembered}


def blown_up(curves: dict[str, list[float | None]]) -> list[str]:
    """A sentence for each number of images on which there is no curve."""
    none = [int(images) for images, curve in curves.items() if not any(curve)]
    return [f"On {images:,} images every rate blew up: it has no limits to compare." for images in none]


def limits_plot(result: dict[str, Any]) -> Plot:
    """Final loss against the rate, a curve for each number of images."""
    caption = (
        f"Each point is a run of {result['plan']['epochs']} epochs at a constant rate. A curve starts to rise where it "
        f"has given back {forgetting_rules.RISEN:.0%} of what its best rate learned, guessing being a loss of ln 10, "
        f"and has blown up where it has given back {forgetting_rules.BLOWN_UP:.0%}. Losses beyond the axis are drawn "
        "at its edge."
    )
    return Plot("limits", "Final loss against learning rate", lambda axes: draw_limits(axes, result), caption)


def draw_limits(axes: "Axes", result: dict[str, Any]) -> None:
    """A curve for each number of images, where each starts to rise, and where all blow up."""
    guessing = forgetting_rules.GUESSING
    top, lowest = 1.15 * guessing, guessing
    for (images, curve), colour in zip(result["curves"].items(), (GREY, VIOLET, ORANGE, BLUE), strict=True):
        shown = [top if loss is None else min(loss, top) for loss in curve]
        lowest = min(lowest, *shown)
        axes.plot(MULTIPLES, shown, "o-", color=colour, linewidth=2, markersize=4.5, label=f"{int(images):,} images")
    limits = [forgetting_rules.Limits(**row) for row in result["limits"]]
    rising = [
        (c.rises, c.best_loss + forgetting_rules.RISEN * (guessing - c.best_loss))
        for c in limits
        if c.rises is not None
    ]
    if rising:
        axes.plot(*zip(*rising, strict=True), "D", color=INK, markersize=7, label="starts to rise")
    common = forgetting_rules.curvature_limit(limits)
    if common is not None:
        axes.axvline(common, color=WARN, linestyle="--", label=f"all blow up: {forgetting_rules.times(common)}")
    axes.set(xscale="log", xlabel="learning rate, in multiples of the base rate", ylabel="loss of the last epoch")
    axes.set_xticks(MULTIPLES, [str(Fraction(m)) for m in MULTIPLES])
    axes.minorticks_off()
    axes.set_ylim(0.9 * lowest, 1.02 * top)


def limits_tables(result: dict[str, Any]) -> list[Table]:
    """The numbers of the first plot."""
    losses = [[f"{int(images):,}", *map(_cell, curve)] for images, curve in result["curves"].items()]
    found = [
        [
            f"{row['images']:,}",
            f"{row['best_rate']:g}",
            f"{row['best_loss']:.3f}",
            *("not reached" if row[key] is None else f"{row[key]:.2f}" for key in ("rises", "blows_up")),
        ]
        for row in result["limits"]
    ]
    statuses = ["", "measured", "measured", "modelled", "modelled"]
    return [
        Table("Loss of the last epoch", ["images", *(f"rate x {m:g}" for m in MULTIPLES)], losses),
        Table(
            "Limits, in multiples of the base rate",
            ["images", "best rate", "its loss", "starts to rise", "blows up"],
            found,
            statuses,
        ),
    ]


def _cell(loss: float | None) -> str:
    return "blew up" if loss is None else f"{loss:.3f}" if loss < 100 else f"{loss:,.0f}"


def caveats(request: Request, session: train.Session, config: Config, chosen: dict[str, int]) -> list[str]:
    """The limits of the conclusions."""
    said = []
    if request.small:
        count = len(session.dataset.train_images)
        said.append(
            f"--small: the network of {config.preset} ({'-'.join(map(str, config.widths))}), at most "
            f"{chosen['images']:,} of {count:,} images, {chosen['epochs']} epochs at each rate and {retention.RAMP} + "
            f"{chosen['constant']} with a ramp (the article: 30). There is less to forget in so few steps."
        )
    said.append("One run for each point, with one seed: a difference as small as two seeds' cannot be told from noise.")
    said.append("Epochs are fixed, so a larger set also has more steps; that alone lowers the rate it does best at.")
    return said
