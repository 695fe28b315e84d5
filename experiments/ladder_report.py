"""What the ladder's turns say: figures of each rung, differences with their intervals, charts, sentences.

Seconds "for 35 epochs" are extrapolated: what is prepared once, and 35 times the median epoch, scaled to the article's
50,000 images and its 10,000 of validation. The article's own seconds include its validation, and so do these.
"""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.ladder_rungs import ARTICLE_EPOCHS, ARTICLE_IMAGES, ARTICLE_TEST_IMAGES, HOST, INPUT, WITHOUT_HOST
from experiments.study.folder import Table
from profiling.bench.timing import FEWEST, summarise
from profiling.device.specifications import V100_FLOPS_PER_S, specification
from profiling.output.units import MISSING, significant

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
    names = ("name", "what", "article_s", "credited_s", "reason")
    rung = {name: row[name] for name in names}
    if row["reason"] is None and not row["turns"]:
        rung["reason"] = "none of its turns has been timed yet"
    if rung["reason"] is not None:
        return rung
    train, count = _interval([t["train_s"] for t in row["turns"]]), row["images"]
    speed = count / train["median"]
    peak = peaks.get("tf32" if row["dtype"] == "float32" else row["dtype"])
    return rung | {
        "dtype": row["dtype"],
        "step": row["step"],
        "workers": row["workers"],
        "workers_asked": row["config"]["workers"],
        "widths": row["config"]["widths"],
        "images": count,
        "preprocessing_s": row["preprocessing_s"],
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
    first = able[0]
    last = next((rung for rung in reversed(able) if rung["article_s"]), first)
    share = last["percent_of_first"]["median"] - 100
    ours = (
        f"On {device} the steps from {first['name']} to {last['name']} make training with validation "
        f"{abs(share):.0f} % {'shorter' if share < 0 else 'longer'}"
    )
    if first["article_s"] and last["article_s"]:
        theirs = 100 * (last["article_s"] / first["article_s"] - 1)
        ours += f"; on the article's V100 {abs(theirs):.0f} % {'shorter' if theirs < 0 else 'longer'}"
    if able[-1] is not last:
        more = able[-1]["percent_of_first"]["median"] - share - 100
        ours += (
            f"; with {able[-1]['name']} it is {abs(more + share):.0f} % {'shorter' if more + share < 0 else 'longer'}"
        )
    return ours + "."


def _step_in_words(step: Row) -> str:
    percent = step["percent"]
    text = f"{step['to']} ({step['what']}) {percent['median']:+.1f} % [{percent['low']:+.1f}, {percent['high']:+.1f}]"
    if step["article_percent"] is not None:
        text += f", the article's {step['article_percent']:+.1f} %"
    return text


def _order(ladder: Row) -> str:
    """Whether the rungs that only make batches differently come in the article's order."""
    of_name = {rung["name"]: rung for rung in ladder["rungs"] if rung["reason"] is None}
    names = [name for name in ("article-323", *INPUT, "on-device") if name in of_name]
    steps = {step["to"]: step for step in ladder["steps"]}
    if len(names) < 3:
        return ""
    unsure = [f"{a} and {b}" for a, b in itertools.pairwise(names) if steps.get(b, {}).get("verdict") == NOISE]
    alone = sorted(names, key=lambda name: -of_name[name]["input_us_per_image"])
    costs = ", ".join(f"{name} {significant(of_name[name]['input_us_per_image'])}" for name in alone)
    pipeline = [name for name in names if name != "on-device"]
    timed = sorted(pipeline, key=lambda name: -of_name[name]["epoch_train_s"]["median"])
    agrees = "which is the article's order" if timed == pipeline else f"not the article's ({', '.join(pipeline)})"
    text = f"The rungs of the input pipeline, slowest epoch first: {', '.join(timed)}, {agrees}"
    close = [pair for pair in unsure if "on-device" not in pair]
    text += f"; not to be told apart: {', '.join(close)}" if close else ""
    return f"{text}. Making the batches alone takes, in microseconds an image: {costs}."


def _input_share(able: Sequence[Row]) -> str:
    here = [rung for rung in able if rung["workers"] == 0]
    if not here:
        return ""
    shares = {r["name"]: 100 * r["input_us_per_image"] / r["train_us_per_image"] for r in here}
    listed = ", ".join(f"{share:.0f} % of {name}" for name, share in shares.items())
    widths = "-".join(map(str, here[0]["widths"]))
    return (
        "Where no worker helps, making batches alone, of which the article's rungs have one Python thread do it, takes "
        f"this much of the training time of a {widths} network: {listed}. Compare kernels on the rungs from on-device "
        "on, where the device makes them."
    )


def _host_share(ladder: Row) -> str:
    """What a CUDA graph takes off the host."""
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
        if f["status"] == "complete" and f["test_accuracy"] is not None
        else f"{name} ended as {f['status']}"
        for name, f in known
    ]
    return f"Trained to the end, n = 1 each: {'; '.join(one)}."


def caveats(ladder: Row, small: bool, images: int | None) -> list[str]:
    """What limits the sentences."""
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


def tables(ladder: Row) -> list[Table]:
    """The rungs, and the steps between them."""
    full = any(rung.get("full") for rung in ladder["rungs"])
    columns = ["rung", "step", "s an epoch", "images/s", "input alone, µs/image"]
    columns += ["35 epochs, s", "V100-normalised", "MFU", "article, s"]
    statuses = ["", "", "measured", "measured", "measured", "modelled", "modelled", "modelled", "quoted"]
    if full:
        columns, statuses = [*columns, "whole run, s", "accuracy"], [*statuses, "measured", "measured"]
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
        Table("The rungs", columns, rows, statuses),
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
