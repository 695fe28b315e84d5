"""Batch 128 to 1024 with the learning rate scaled linearly, and 10 % more at 512 as the article has it (Part 2).

    python -m experiments batch-size --data-dir DIR --evidence FOLDER      # the --out of a finished forgetting

Each case is a run of train.py with a folder of its own, `batch-512` and so on. Time, accuracy and loss are measured;
what limits each batch follows from the two limits that `forgetting` found, if it is given: forgetting's goes with what
an image moves the weights by, rate / batch, which linear scaling leaves alone; curvature's with the rate of a step.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.forgetting_rules import Evidence, read_evidence, times
from experiments.study.folder import Plot, Request, Table, open_study
from model.config import Config
from model.errors import NonFiniteError, UsageError
from model.presets import laptop
from profiling.report.plot import Chart, axis, colour, layout, line, margin, trace

if TYPE_CHECKING:
    import train
    from experiments.study.folder import Study
    from model.interrupts import Interrupts
    from profiling.output.terminal import Terminal

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
"""What evidence and runs must agree in."""


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
    import train
    from experiments.study import training

    found = read_evidence(evidence) if evidence else None
    device = request.configure(laptop()).device
    session = train.open_session(terminal, interrupts, device, request.data_dir, synthetic=request.synthetic)
    config = training.recipe(request, session)
    study = open_study("batch-size", request, session, training.identity(config))
    epochs = study.once("plan", lambda: plan(request, session, config))["epochs"]
    config = config.with_epochs(epochs)
    rows = {}
    for name, (batch, factor) in CASES.items():
        changed = training.at_batch(config, batch, factor)
        rows[name] = study.once(name, lambda name=name, changed=changed: measure(study, session, changed, name))
    reason = unfit(found, config)
    limited = {} if found is None or reason else {name: limit(found, row) for name, row in rows.items()}
    result = {"epochs": epochs, "cases": rows, "limits": limited, "evidence": found and found._asdict()}
    said = [*sentences(rows), *limit_sentences(found, reason, limited)]
    return study.finish(result, plots(rows, limited), said, tables(rows, limited), caveats(request, config, found))


def plan(request: Request, session: "train.Session", config: Config) -> dict[str, int]:
    """{epochs} of each run: the recipe's, or of `small` as many of them as this machine's speed leaves time for."""
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
    """Train `config` in a folder of its own, going on with what is there; of its summary what is KEPT.

    A run that blows up is a result too, without accuracy.
    """
    import train
    from model import checkpoint

    folder = study.out / f"batch-{name.replace(' at rate + 10 %', '-plus-10')}"
    session.terminal.say(f"batch {name}, peak rate {max(config.lr_values):.3g}", "bold")
    try:
        summary = train.run(session, config, folder, checkpoint.newest(folder, session.terminal.warn))
    except NonFiniteError as error:
        session.interrupts.deferred = False
        summary = {**error.summary, "test_accuracy": None, "test_loss": None, "train_loss": None}
    row = {key: summary[key] for key in KEPT}
    return {"batch": config.batch_size, "rate": max(config.lr_values), **row}


def unfit(found: Evidence | None, config: Config) -> str | None:
    """Why the evidence says nothing about these runs, or None."""
    if found is None:
        return None
    here = config.learned()
    differing = [key for key in SAME_NETWORK if found.recipe.get(key) != here[key]]
    return f"it is of another {', '.join(differing)}" if differing else None


def limit(found: Evidence, row: dict[str, Any]) -> dict[str, Any]:
    """{forgetting, curvature: the limit in multiples of the rate that is taken; by: the nearer, if both are known}."""
    forgetting, curvature = found.headroom(row["batch"], row["rate"])
    by = None
    if forgetting is not None and curvature is not None:
        by = "forgetting" if forgetting <= curvature else "curvature"
    return {"forgetting": forgetting, "curvature": curvature, "by": by}


def sentences(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What the runs say."""
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


def limit_sentences(found: Evidence | None, reason: str | None, limited: dict[str, dict[str, Any]]) -> list[str]:
    """Where each case is limited, or why that is not known."""
    if found is None:
        return ["What limits each batch is not known: give --evidence the folder of a finished forgetting."]
    if reason:
        return [f"What limits each batch is not known: the evidence does not fit, {reason}."]
    missing = [
        name for name, value in (("forgetting", found.forgetting), ("curvature", found.curvature)) if value is None
    ]
    if missing:
        return [f"What limits each batch is not known: the evidence has no {' and no '.join(missing)} limit."]
    said = []
    for kind in ("forgetting", "curvature"):
        names = [name for name, row in limited.items() if row["by"] == kind]
        if names:
            said.append(f"{kind}-limited: batch {', '.join(names)}")
    crossing = found.batch * found.curvature / found.forgetting
    beyond = [name for name, row in limited.items() if row[row["by"]] < 1]
    sentence = f"By the evidence of {found.images:,} images, {'; '.join(said)}; the two limits meet at batch "
    sentence += f"{crossing:.0f}. " + (f"Past the nearer: batch {', '.join(beyond)}." if beyond else "None is past it.")
    return [sentence, "The article has batch 128 limited by forgetting and 512 by curvature (quoted)."]


def plots(rows: dict[str, dict[str, Any]], limited: dict[str, dict[str, Any]]) -> list[Plot]:
    """Accuracy, loss and time of each case."""
    caption = "One run for each point. A diamond has the rate of its batch, scaled linearly, and 10 % more."
    if limited:
        caption += " Under each batch stands the limit that its rate is nearer to, by the evidence of forgetting."
    of_accuracy = f"{caption} Runs of one recipe differ by a standard deviation of {100 * RUN_SD:.2f} points (quoted)."
    return [
        Plot(
            "accuracy",
            "Test accuracy against batch size, one run each",
            chart(rows, limited, "test_accuracy", "test accuracy"),
            of_accuracy,
        ),
        Plot(
            "loss",
            "Loss against batch size, one run each",
            chart(rows, limited, "test_loss", "loss", "train_loss"),
            caption,
        ),
        Plot(
            "time",
            "Seconds of training against batch size, one run each",
            chart(rows, limited, "train_s", "seconds of training"),
            caption,
        ),
    ]


def chart(
    rows: dict[str, dict[str, Any]],
    limited: dict[str, dict[str, Any]],
    key: str,
    name: str,
    second: str | None = None,
) -> Chart:
    """A figure of each batch, the second one beside it: a line where the rate is scaled linearly, and a diamond."""
    batches, data = list(dict.fromkeys(row["batch"] for row in rows.values())), []
    for field, paint in ((key, "series-1"), (second, "series-2")):
        words = (field or "").replace("_", " ").replace("train s", "seconds")
        for factor in (1.0, 1.1):
            known = [
                (batches.index(row["batch"]), row[field], case)
                for case, row in rows.items()
                if field and row[field] is not None and CASES[case][1] == factor
            ]
            if not known:
                continue
            x, y, cases = (list(values) for values in zip(*known, strict=True))
            plain = factor == 1
            label = "rate scaled linearly" if plain else "rate 10 % higher"
            data.append(
                trace(
                    "scatter",
                    x=x,
                    y=y,
                    name=f"{words}, {label}" if second else label,
                    showlegend=True,
                    mode="lines+markers" if plain else "markers",
                    line=line(paint, 2),
                    marker={
                        "size": 7 if plain else 10,
                        "symbol": "circle" if plain else "diamond",
                        "color": colour(paint),
                    },
                    hovertext=[f"batch {case}, {words} {v:.4g}" for v, case in zip(y, cases, strict=True)],
                    hoverinfo="text",
                )
            )
    if not data:
        return Chart(key, name, reason="no run came to its end")
    if key == "train_s":
        scale: dict[str, Any] = {"range": [0, 1.1 * max(max(one["y"]) for one in data)]}
    else:
        name, scale = f"{name} (axis not from 0)", {"tickformat": ".1%"} if key == "test_accuracy" else {}
    nearer = {batch: limited.get(str(batch), {}).get("by") for batch in batches}
    whole = layout(
        xaxis=axis(
            f"batch size{', and what limits its rate' if limited else ''}",
            tickvals=list(range(len(batches))),
            ticktext=[f"{batch}<br>{by}" if by else str(batch) for batch, by in nearer.items()],
        ),
        yaxis=axis(name, **scale),
        hovermode="closest",
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin=margin(left=64, top=36, bottom=60),
    )
    return Chart(key, name, 320, data, whole)


def tables(rows: dict[str, dict[str, Any]], limited: dict[str, dict[str, Any]]) -> list[Table]:
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
    """What limits the conclusions."""
    said = []
    if request.small:
        said.append(
            f"--small: the narrow network of {config.preset}, epochs: {config.epochs}. Accuracies of a short training."
        )
    if found and found.small:
        said.append("The evidence is of forgetting --small: fewer images and epochs than these runs have.")
    said.append("One run for each batch, one after the other: a drift of the machine reads as a difference in time.")
    return said
