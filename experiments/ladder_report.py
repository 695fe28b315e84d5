"""Conclusions from the ladder's turns: figures of each rung, differences with their intervals, pictures, sentences.

Seconds "for 35 epochs" are extrapolated: what is prepared once, and 35 times the median epoch, scaled to the article's
50,000 images and its 10,000 of validation. The article's own seconds include its validation, and so do these.
"""

import itertools
import statistics
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from experiments.ladder_rungs import ARTICLE_EPOCHS, ARTICLE_IMAGES, ARTICLE_TEST_IMAGES, HOST, INPUT, WITHOUT_HOST
from experiments.study.drawing import BAR, INK, ORANGE, SOFT
from experiments.study.folder import Plot, Table
from profiling.bench.timing import FEWEST, summarise
from profiling.device.specifications import V100_FLOPS_PER_S, specification
from profiling.output.units import MISSING, significant

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]
FASTER, NOISE, SLOWER = "faster", "within noise", "slower"


def analyse(measured: Sequence[Row], device: str) -> Row:
    """{device, rungs, steps, host} from the rows of `ladder.Measurement`; JSON values, None for what is not known.

    Of an unfinished ladder those turns count that both of two rungs have, and a step with fewer than FEWEST is left
    out. `host` is the step to the rung that the host launches kernel by kernel, None where it was not measured.
    """
    sheet = specification(device)
    rungs = [_rung(row, sheet.flops_per_s if sheet else {}) for row in measured]
    able = [(rung, row) for rung, row in zip(rungs, measured, strict=True) if rung["reason"] is None]
    ladder, named = [pair for pair in able if pair[0]["name"] != HOST], {pair[0]["name"]: pair for pair in able}
    for rung, row in able:
        shares = [100 * ours / first for ours, first in zip(_totals(row), _totals(able[0][1]), strict=False)]
        rung["percent_of_first"] = _interval(shares)
    steps = [step for one, other in itertools.pairwise(ladder) if (step := _step(one, other))]
    host = _step(named[WITHOUT_HOST], named[HOST]) if {WITHOUT_HOST, HOST} <= named.keys() else None
    return {"device": device, "rungs": rungs, "steps": steps, "host": host}


def _totals(row: Row) -> list[float]:
    """For each turn the seconds of 35 epochs of the article's images, training and validation."""
    images, tests = ARTICLE_IMAGES / row["images"], ARTICLE_TEST_IMAGES / row["test_images"]
    once = row["preprocessing_s"] * images
    return [once + ARTICLE_EPOCHS * (t["train_s"] * images + t["eval_s"] * tests) for t in row["turns"]]


def _interval(values: Sequence[float]) -> Row:
    """The median and its interval, which fewer than FEWEST values do not have."""
    if len(values) < FEWEST:
        return {"median": statistics.median(values), "low": None, "high": None, "n": len(values)}
    s = summarise(values)
    return {"median": s.median, "low": s.low, "high": s.high, "n": s.n}


def _rung(row: Row, peaks: dict[str, float]) -> Row:
    rung = {name: row[name] for name in ("name", "what", "article_s", "credited_s", "reason")}
    if row["reason"] is None and not row["turns"]:
        rung["reason"] = "none of its turns has been timed yet"
    if rung["reason"] is not None:
        return rung
    train, count = _interval([t["train_s"] for t in row["turns"]]), row["images"]
    speed = count / train["median"]
    peak = peaks.get("tf32" if row["dtype"] == "float32" else row["dtype"])
    return rung | {
        **{name: row[name] for name in ("dtype", "step", "workers", "images", "preprocessing_s")},
        "workers_asked": row["config"]["workers"],
        "widths": row["config"]["widths"],
        "epoch_train_s": train,
        "epoch_eval_s": _interval([t["eval_s"] for t in row["turns"]]),
        "input_us_per_image": 1e6 * row["input_s"] / count,
        "train_us_per_image": 1e6 / speed,
        "seconds_35_epochs": _interval(_totals(row)),
        "images_per_s": speed,
        "v100_normalised": speed * row["flops_per_image"] / V100_FLOPS_PER_S,
        "mfu": speed * row["flops_per_image"] / peak if peak else None,
        "full": row.get("full"),
    }


def _step(one: tuple[Row, Row], other: tuple[Row, Row]) -> Row | None:
    """From one rung, as (figures, row), to another; None where they have too few turns in common."""
    (before, first), (after, second) = one, other
    both = list(zip(_totals(first), _totals(second), strict=False))
    if len(both) < FEWEST:
        return None
    seconds = _interval([b - a for a, b in both])
    verdict = FASTER if seconds["high"] < 0 else SLOWER if seconds["low"] > 0 else NOISE
    neighbours = before["article_s"] and after["credited_s"]
    return {
        "from": before["name"],
        "to": after["name"],
        "what": after["what"],
        "seconds": seconds,
        "percent": _interval([100 * (b - a) / a for a, b in both]),
        "verdict": verdict,
        "article_s": after["credited_s"] if neighbours else None,
        "article_percent": 100 * after["credited_s"] / before["article_s"] if neighbours else None,
    }


def sentences(ladder: Row) -> list[str]:
    """Conclusions from these numbers, the headline first."""
    able = [rung for rung in ladder["rungs"] if rung["reason"] is None]
    said = [_headline(ladder["device"], [rung for rung in able if rung["name"] != HOST] or able)] if able else []
    for verdict, words in (
        (FASTER, "Steps that save time (a negative change is faster)"),
        (NOISE, "Steps whose change is within noise"),
        (SLOWER, "Steps that cost time"),
    ):
        found = [_step_in_words(step) for step in ladder["steps"] if step["verdict"] == verdict]
        said.append(f"{words}: {'; '.join(found)}." if found else f"{words}: none.")
    said += [text for text in (_order(ladder), _input_share(able), _host_share(ladder), _accuracies(able)) if text]
    for reason in dict.fromkeys(rung["reason"] for rung in ladder["rungs"] if rung["reason"]):
        names = [rung["name"] for rung in ladder["rungs"] if rung["reason"] == reason]
        said.append(f"Not measured, {', '.join(names)}: {reason}.")
    return said


def _headline(device: str, able: Sequence[Row]) -> str:
    def shorter(percent: float) -> str:
        return f"{abs(percent):.0f} % {'shorter' if percent < 0 else 'longer'}"

    first = able[0]
    last = next((rung for rung in reversed(able) if rung["article_s"]), first)
    said = (
        f"On {device} the steps from {first['name']} to {last['name']} make training with validation "
        f"{shorter(last['percent_of_first']['median'] - 100)}"
    )
    if first["article_s"] and last["article_s"]:
        said += f"; on the article's V100 {shorter(100 * (last['article_s'] / first['article_s'] - 1))}"
    if able[-1] is not last:
        said += f"; with {able[-1]['name']} it is {shorter(able[-1]['percent_of_first']['median'] - 100)}"
    return said + "."


def _step_in_words(step: Row) -> str:
    percent = step["percent"]
    text = f"{step['to']} ({step['what']}) {percent['median']:+.1f} % [{percent['low']:+.1f}, {percent['high']:+.1f}]"
    if step["article_percent"] is not None:
        text += f", the article's {step['article_percent']:+.1f} %"
    return text


def _order(ladder: Row) -> str:
    """Whether the rungs that only make batches differently come in the article's order."""
    of_name = {rung["name"]: rung for rung in ladder["rungs"] if rung["reason"] is None}
    pipeline = [name for name in ("article-323", *INPUT) if name in of_name]
    names = [*pipeline, *(["on-device"] if "on-device" in of_name else [])]
    if len(names) < 3:
        return ""
    verdicts = {step["to"]: step["verdict"] for step in ladder["steps"]}
    close = [f"{a} and {b}" for a, b in itertools.pairwise(pipeline) if verdicts.get(b) == NOISE]
    timed = sorted(pipeline, key=lambda name: -of_name[name]["epoch_train_s"]["median"])
    agrees = "which is the article's order" if timed == pipeline else f"not the article's ({', '.join(pipeline)})"
    alone = {name: of_name[name]["input_us_per_image"] for name in names}
    costs = ", ".join(f"{name} {significant(cost)}" for name, cost in sorted(alone.items(), key=lambda one: -one[1]))
    return (
        f"The rungs of the input pipeline, slowest epoch first: {', '.join(timed)}, {agrees}"
        f"{'; not to be told apart: ' if close else ''}{', '.join(close)}. Making the batches alone takes, in "
        f"microseconds an image: {costs}."
    )


def _input_share(able: Sequence[Row]) -> str:
    here = [rung for rung in able if rung["workers"] == 0]
    if not here:
        return ""
    shares = {r["name"]: 100 * r["input_us_per_image"] / r["train_us_per_image"] for r in here}
    listed = ", ".join(f"{share:.0f} % of {name}" for name, share in shares.items())
    widths = "-".join(map(str, here[0]["widths"]))
    return (
        "Without workers, making the batches alone, by one Python thread on the article's rungs, takes this share of "
        f"the training time of a {widths} network: {listed}. Compare kernels on the rungs from on-device on, where the "
        "device makes the batches."
    )


def _host_share(ladder: Row) -> str:
    """The host time that a CUDA graph saves."""
    step = ladder["host"]
    if not step:
        return ""
    low, median, high = (step["percent"][key] for key in ("low", "median", "high"))
    return (
        f"Without its CUDA graph {step['from']} takes {median:+.1f} % [{low:+.1f}, {high:+.1f}]: what launching its "
        "kernels costs the host beyond the device's time."
    )


def _accuracies(able: Sequence[Row]) -> str:
    known = [(r["name"], r["full"]) for r in able if r["full"]]
    if not known:
        return ""
    one = [
        f"{name} {f['test_accuracy']:.2%} in {f['train_plus_eval_s']:.1f} s"
        if f["test_accuracy"] is not None
        else f"{name} ended as {f['status']}"
        for name, f in known
    ]
    return f"Trained to the end, n = 1 each: {'; '.join(one)}."


def caveats(ladder: Row, small: bool) -> list[str]:
    """The limits of the sentences."""
    able = [rung for rung in ladder["rungs"] if rung["reason"] is None]
    if not able:
        return ["No rung can run here."]
    turns, few = able[0]["epoch_train_s"]["n"], []
    if small:
        widths = "-".join(map(str, able[0]["widths"]))
        few.append(
            f"--small: a network of widths {widths} on {able[0]['images']:,} images. Its arithmetic is so little that "
            "the input and the host weigh far more than with the article's network: compare rungs with each other, not "
            "seconds or shares with the article's. The network runs on one thread"
        )
    few.append(
        f"Seconds for {ARTICLE_EPOCHS} epochs are extrapolated from the median of {turns} epochs of each rung, scaled "
        f"to {ARTICLE_IMAGES:,} images"
    )
    capped = [r for r in able if r["workers"] < r["workers_asked"]]
    if capped:
        listed = ", ".join(f"{r['name']} {r['workers']} of {r['workers_asked']}" for r in capped)
        few.append(f"This process may use fewer cores than some rungs want workers: {listed}")
    return few


def plots(ladder: Row) -> list[Plot]:
    """The time of each rung, and the change by each step, beside the article's."""
    able, device = [rung for rung in ladder["rungs"] if rung["reason"] is None], ladder["device"]
    first = able[0]["article_s"] if able else None
    times = [
        (
            rung["name"],
            rung["percent_of_first"],
            100 * rung["article_s"] / first if first and rung["article_s"] else None,
            f"{rung['seconds_35_epochs']['median']:,.0f} s",
        )
        for rung in able
    ]
    changes = [(step["to"], step["percent"], step["article_percent"], step["verdict"]) for step in ladder["steps"]]
    of_time = f"training and validation, % of {able[0]['name']}" if able else ""
    of_change = "change in the time of training and validation, % (negative is faster)"
    return [
        Plot(
            "ladder",
            "The ladder",
            partial(_draw, bars=times, title=of_time, device=device),
            f"Bars: {device}, with the 95 % interval of the median over the turns; beside them the seconds for "
            f"{ARTICLE_EPOCHS} epochs, extrapolated. Diamonds: the article's V100 (quoted).",
            1.5 + 0.34 * len(times),
            "" if times else "no rung can run here",
        ),
        Plot(
            "steps",
            "Change by each step",
            partial(_draw, bars=changes, title=of_change, device=device),
            "Against the rung before, turn by turn, with the 95 % interval of the median. Left of zero is faster. "
            "Diamonds: what the article credits it with (quoted).",
            1.5 + 0.34 * len(changes),
            "" if changes else "there are no two rungs to compare",
        ),
    ]


def _draw(axes: "Axes", bars: list[tuple[str, Row, float | None, str]], title: str, device: str) -> None:
    """Horizontal bars, each of (name, interval, the article's figure, word behind it): bars of `device`, diamonds."""
    names, spread, quoted, _ = zip(*bars, strict=True)
    middles, places = [s["median"] for s in spread], range(len(bars))
    errors = [[s["median"] - s["low"] for s in spread], [s["high"] - s["median"] for s in spread]]
    axes.barh(places, middles, 0.62, xerr=errors, color=BAR, ecolor=INK, label=f"{device} (measured)")
    known = [(value, place) for value, place in zip(quoted, places, strict=True) if value is not None]
    if known:
        axes.plot(*zip(*known, strict=True), "D", color=ORANGE, label="the article's V100 (quoted)")
    for place, (_, s, value, word) in enumerate(bars):
        end = max(0, s["high"], value or 0)
        axes.annotate(word, (end, place), (7, 0), textcoords="offset points", va="center", color=SOFT)
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(title)


def tables(ladder: Row) -> list[Table]:
    """The rungs, and the steps between them."""
    full = any(rung.get("full") for rung in ladder["rungs"])
    statuses = {
        **{"rung": "", "step": "", "s an epoch": "measured", "images/s": "measured"},
        **{"input alone, µs/image": "measured", "35 epochs, s": "modelled", "V100-normalised": "modelled"},
        **{"MFU": "modelled", "article, s": "quoted"},
        **({"whole run, s": "measured", "accuracy": "measured"} if full else {}),
    }
    rows = [[*_cells(rung), *(_full_cells(rung) if full else [])] for rung in ladder["rungs"]]
    steps = [
        [
            s["to"],
            _with_interval(s["percent"], "{:+.1f} %"),
            _with_interval(s["seconds"], "{:+,.1f}"),
            s["verdict"],
            MISSING if s["article_s"] is None else f"{s['article_s']:+.0f}",
            MISSING if s["article_percent"] is None else f"{s['article_percent']:+.1f} %",
        ]
        for s in [*ladder["steps"], *([ladder["host"]] if ladder["host"] else [])]
    ]
    heads = ["step", "change of time", "of 35 epochs, s", "verdict", "the article's, s", "the article's"]
    return [
        Table("The rungs", list(statuses), rows, list(statuses.values())),
        Table("The steps", heads, steps, ["", "measured", "modelled", "", "quoted", "quoted"]),
    ]


def _cells(rung: Row) -> list[str]:
    quoted = MISSING if rung["article_s"] is None else f"{rung['article_s']:.0f}"
    if rung["reason"] is not None:
        return [rung["name"], MISSING, "unavailable", *[MISSING] * 5, quoted]
    return [
        rung["name"],
        rung["step"],
        _with_interval(rung["epoch_train_s"], "{:.3g}"),
        f"{rung['images_per_s']:,.0f}",
        f"{rung['input_us_per_image']:.3g}",
        f"{rung['seconds_35_epochs']['median']:,.0f}",
        f"{100 * rung['v100_normalised']:.3g} %",
        MISSING if rung["mfu"] is None else f"{100 * rung['mfu']:.3g} %",
        quoted,
    ]


def _full_cells(rung: Row) -> list[str]:
    f = rung.get("full")
    if not f:
        return [MISSING, MISSING]
    if f["status"] != "complete":
        return [f["status"], MISSING]
    return [f"{f['train_plus_eval_s']:,.1f}", f"{f['test_accuracy']:.2%}"]


def _with_interval(s: Row, form: str) -> str:
    if s["low"] is None:
        return form.format(s["median"])
    return f"{form.format(s['median'])} ({form.format(s['low'])} to {form.format(s['high'])})"
