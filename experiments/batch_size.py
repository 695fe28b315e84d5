"""Batch 128 to 1024 with the learning rate scaled linearly, and 10 % more at 512 as the article has it (Part 2).

    python -m experiments batch-size --data-dir DIR --evidence FOLDER      # the --out of a finished forgetting

Each case is a run of train.py with a folder of its own, `batch-512` and so on. Time, accuracy and loss are measured;
the limit of each batch follows from the two limits that `forgetting` found, if it is given: forgetting's goes with the
move of the weights by an image, rate / batch, which linear scaling leaves alone; curvature's with the rate of a step.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.forgetting_rules import Evidence, read_evidence, times
from experiments.study.drawing import BLUE, ORANGE
from experiments.study.folder import Plot, Request, Table, open_study
from model.config import Config
from model.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    import train
    from experiments.study.folder import Study
    from model.interrupts import Interrupts
    from profiling.output.terminal import Terminal

Rows = dict[str, dict[str, Any]]
CASES = {
    "128": (128, 1.0),
    "256": (256, 1.0),
    "512": (512, 1.0),
    "512 at rate + 10 %": (512, 1.1),
    "768": (768, 1.0),
    "1024": (1024, 1.0),
}
"""(batch, factor on the linearly scaled rate)."""
KEPT = ("train_s", "eval_s", "images_per_s", "train_loss", "test_loss", "test_accuracy", "steps", "status")
RUN_SD = 0.0015
"""Standard deviation of final accuracy from run to run, "roughly 0.15 %" (the article, Part 8)."""
SAME_NETWORK = ("network", "widths", "momentum", "weight_decay", "prep_bn_relu", "uniform_gamma", "pool_first")
"""Settings that evidence and runs must share."""


def check(request: Request, evidence: Path | None = None) -> None:
    """Raise UsageError for a folder that holds no evidence."""
    if evidence is not None:
        read_evidence(evidence)
    if any(setting.partition("=")[0].strip() in ("batch_size", "batch-size") for setting in request.settings):
        raise UsageError("--set batch_size is what this experiment varies; leave it out")


def run(
    request: Request, terminal: "Terminal", interrupts: "Interrupts", evidence: Path | None = None
) -> dict[str, Any]:
    """The experiment; returns its document."""
    from experiments.study import training

    found = read_evidence(evidence) if evidence else None
    session = training.open_session(request, terminal, interrupts)
    config = training.recipe(request, session)
    study = open_study("batch-size", request, session, training.identity(config))
    epochs = study.once("plan", lambda: plan(request, session, config))["epochs"]
    config = config.with_epochs(epochs)
    rows = {}
    for name, (batch, factor) in CASES.items():
        changed = training.at_batch(config, batch, factor)
        rows[name] = study.once(name, lambda name=name, changed=changed: measure(study, session, changed, name))
    limited, judged = limits(found, config, rows)
    result = {"epochs": epochs, "cases": rows, "limits": limited, "evidence": found and found._asdict()}
    said = [*sentences(rows), *judged]
    return study.finish(result, plots(rows, limited), said, tables(rows, limited), caveats(request, config, found))


def plan(request: Request, session: "train.Session", config: Config) -> dict[str, int]:
    """{epochs} of each run: the recipe's, or for `small` as many as this machine's speed leaves time for."""
    from experiments.study import training

    count, tests = len(session.dataset.train_images), len(session.dataset.test_images)
    speed = training.images_per_s(session, config)
    epoch_s = len(CASES) * (count + tests / 3) / speed  # a forward pass is a third of a step
    epochs = config.epochs
    if request.small:
        epochs = max(1, min(epochs, int(training.SMALL_S / epoch_s)))
    session.terminal.say(
        f"{speed:,.0f} images/s at batch {config.batch_size}: {len(CASES)} runs of {epochs} epoch{'s' * (epochs > 1)} "
        f"will take about {epochs * epoch_s / 60:.0f} min"
    )
    return {"epochs": epochs}


def measure(study: "Study", session: "train.Session", config: Config, name: str) -> dict[str, Any]:
    """Train `config` in a folder of its own; the parts of its summary that are KEPT."""
    from experiments.study import training

    session.terminal.say(f"batch {name}, peak rate {max(config.lr_values):.3g}", "bold")
    folder = study.out / f"batch-{name.replace(' at rate + 10 %', '-plus-10')}"
    summary = training.train_whole(session, config, folder)
    return {"batch": config.batch_size, "rate": max(config.lr_values), **{key: summary[key] for key in KEPT}}


def limits(found: Evidence | None, config: Config, rows: Rows) -> tuple[Rows, list[str]]:
    """The limits of each case by the evidence, none where it does not fit these runs; and the sentences on them.

    forgetting, curvature  the limit in multiples of the rate that is taken, None where it is not known
    by                     the nearer, if both are known
    """
    unknown = "What limits each batch is not known: "
    if found is None:
        return {}, [f"{unknown}give --evidence the folder of a finished forgetting."]
    here = config.learned()
    if differing := [key for key in SAME_NETWORK if found.recipe.get(key) != here[key]]:
        return {}, [f"{unknown}the evidence does not fit, it is of another {', '.join(differing)}."]
    limited = {}
    for name, row in rows.items():
        room = dict(zip(("forgetting", "curvature"), found.headroom(row["batch"], row["rate"]), strict=True))
        limited[name] = {**room, "by": None if None in room.values() else min(room, key=room.__getitem__)}
    missing = [kind for kind in ("forgetting", "curvature") if getattr(found, kind) is None]
    if missing:
        return limited, [f"{unknown}the evidence has no {' and no '.join(missing)} limit."]
    said = []
    for kind in ("forgetting", "curvature"):
        if names := [name for name, row in limited.items() if row["by"] == kind]:
            said.append(f"{kind}-limited: batch {', '.join(names)}")
    crossing = found.batch * found.curvature / found.forgetting
    beyond = [name for name, row in limited.items() if row[row["by"]] < 1]
    return limited, [
        f"By the evidence of {found.images:,} images, {'; '.join(said)}; the two limits meet at batch {crossing:.0f}. "
        + (f"Past the nearer: batch {', '.join(beyond)}." if beyond else "None is past it."),
        "The article has batch 128 limited by forgetting and 512 by curvature (quoted).",
    ]


def sentences(rows: Rows) -> list[str]:
    """The conclusions from the runs."""
    finished = {name: row for name, row in rows.items() if row["test_accuracy"] is not None}
    blown = [name for name in rows if name not in finished]
    said = []
    if len(finished) > 1:
        first, *_, last = finished
        a, b = finished[first], finished[last]
        change = b["test_accuracy"] - a["test_accuracy"]
        noise = "within" if abs(change) <= 2 * 2**0.5 * RUN_SD else "beyond"
        faster = a["train_s"] / b["train_s"]
        said.append(
            f"From batch {first} to {last} training became {faster:.2f} times as fast and test accuracy went from "
            f"{a['test_accuracy']:.2%} to {b['test_accuracy']:.2%}, {noise} what two runs of one recipe differ by "
            "(standard deviation 0.15 %, quoted)."
        )
        best = max(finished, key=lambda name: finished[name]["test_accuracy"])
        quick = min(finished, key=lambda name: finished[name]["train_s"])
        said.append(f"The most accurate was batch {best}, the fastest batch {quick}.")
    if {"512", "512 at rate + 10 %"} <= finished.keys():
        gain = finished["512 at rate + 10 %"]["test_accuracy"] - finished["512"]["test_accuracy"]
        said.append(f"At batch 512 a rate 10 % higher changed test accuracy by {100 * gain:+.2f} points.")
    if blown:
        said.append(f"At batch {' and '.join(blown)} a gradient was not finite: the run ended there.")
    return said


def plots(rows: Rows, limited: Rows) -> list[Plot]:
    """Accuracy, loss and time of each case."""
    caption = "One run for each point. A diamond has the rate of its batch, scaled linearly, and 10 % more."
    if limited:
        caption += " Under each batch stands the limit that its rate is nearer to, by the evidence of forgetting."
    noise = f" Runs of one recipe differ by a standard deviation of {100 * RUN_SD:.2f} points (quoted)."
    shown = {
        "accuracy": ("Test accuracy", "test accuracy (axis not from 0)", {"test_accuracy": BLUE}, caption + noise),
        "loss": ("Loss", "loss (axis not from 0)", {"test_loss": BLUE, "train_loss": ORANGE}, caption),
        "time": ("Seconds of training", "seconds of training", {"train_s": BLUE}, caption),
    }
    made = []
    for key, (title, name, paints, words) in shown.items():
        known = any(row[field] is not None for row in rows.values() for field in paints)
        filled = partial(draw, rows=rows, limited=limited, paints=paints, name=name)
        reason = "" if known else "no run came to its end"
        made.append(Plot(key, f"{title} against batch size, one run each", filled, words, 3.4, reason))
    return made


def draw(axes: "Axes", rows: Rows, limited: Rows, paints: dict[str, str], name: str) -> None:
    """Figures of each batch: a line where the rate is scaled linearly, a diamond where it is 10 % higher."""
    batches = list(dict.fromkeys(row["batch"] for row in rows.values()))
    for field, colour in paints.items():
        which = f"{field.replace('_', ' ')}, " if len(paints) > 1 else ""
        for factor, style, label in ((1.0, "o-", "rate scaled linearly"), (1.1, "D", "rate 10 % higher")):
            points = [
                (batches.index(row["batch"]), row[field])
                for case, row in rows.items()
                if row[field] is not None and CASES[case][1] == factor
            ]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=colour, linewidth=2, label=which + label)
    nearer = [(batch, limited.get(str(batch), {}).get("by")) for batch in batches]
    axes.set_xticks(range(len(batches)), [f"{batch}\n{by}" if by else str(batch) for batch, by in nearer])
    axes.set(xlabel=f"batch size{', and what limits its rate' if limited else ''}", ylabel=name)
    if "test_accuracy" in paints:
        axes.yaxis.set_major_formatter("{x:.1%}")
    if "train_s" in paints:
        axes.set_ylim(0, 1.1 * max(row["train_s"] for row in rows.values()))


def tables(rows: Rows, limited: Rows) -> list[Table]:
    """The numbers; headroom is the limit over the rate that the case takes."""
    seconds, losses, rooms = [], [], []
    for name, row in rows.items():
        speed = "" if row["images_per_s"] is None else f"{row['images_per_s']:,.0f}"
        seconds.append([name, f"{row['train_s']:.1f}", f"{row['train_s'] + row['eval_s']:.1f}", speed])
        figures = [
            "blew up" if row[key] is None else form.format(row[key])
            for key, form in (("test_accuracy", "{:.2%}"), ("test_loss", "{:.3f}"), ("train_loss", "{:.3f}"))
        ]
        losses.append([name, f"{row['rate']:.3g}", *figures])
        if name in limited:
            by = limited[name]
            room = [times(by[kind]) if by[kind] else "not known" for kind in ("forgetting", "curvature")]
            rooms.append([name, *room, by["by"] or "not known"])
    made = [
        Table("Time", ["batch", "training, s", "with evaluation, s", "images/s"], seconds),
        Table(
            "Accuracy and loss",
            ["batch", "peak rate", "test accuracy", "test loss", "training loss"],
            losses,
            ["", "", "measured", "measured", "measured"],
        ),
    ]
    if rooms:
        columns = ["batch", "to forgetting", "to curvature", "limited by"]
        made.append(Table("Headroom of the rate, by the evidence", columns, rooms, ["", "modelled", "modelled", ""]))
    return made


def caveats(request: Request, config: Config, found: Evidence | None) -> list[str]:
    """The limits of the conclusions."""
    said = []
    if request.small:
        said.append(
            f"--small: the narrow network of {config.preset}, epochs: {config.epochs}. Accuracies of a short training."
        )
    if found and found.small:
        said.append("The evidence is of forgetting --small: fewer images and epochs than these runs have.")
    said.append("One run for each batch, one after the other: a drift of the machine reads as a difference in time.")
    return said
