"""The runs of a reproduction as a table, with a verdict on each: is it right, and did it run as was asked?"""

import math
import re
import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments.longest_kernels import step_ms
from model.presets import TARGET
from profiling.output.files import read_json, read_jsonl

Row = dict[str, Any]
REFERENCE, FUSED = "reference", "fused"
"""The runs to the end are named after these, with a number; the first also stands for the reference's two epochs."""
LOSS_WITHIN, ACCURACY_WITHIN = 0.10, 0.05
"""Distance from the reference's loss and accuracy after the same few epochs from the same seed: a mode that is further
off computes something else. On an H200 the reference itself, captured, eager and compiled, was 6 % and 2 points apart:
cuDNN adds in another order each time, and training multiplies the difference."""
WARM = "warm-"
"""Begins the names of runs that only fill the compilers' caches, many at once: their times mean nothing."""
TEST_IMAGES = 10_000


def data_identity(out: Path) -> str | None:
    """The identity of the images that the runs in `out` were trained on, None where there is no run."""
    return next((identity for s in summaries(out).values() if (identity := s.get("data_identity"))), None)


def summaries(out: Path) -> dict[str, Row]:
    """The summary of each run, by the name of its folder, the oldest first."""
    found = {}
    for path in sorted(out.glob("*/summary.json"), key=lambda path: path.stat().st_mtime):
        with suppress(OSError, ValueError):
            summary = read_json(path)
            if isinstance(summary, dict):
                found[path.parent.name] = summary
    return found


def epochs(run: Path) -> list[Row]:
    """The rows of its log."""
    return records(run / "log.jsonl")


def records(path: Path) -> list[Row]:
    """The rows of a file, none where it is missing."""
    return read_jsonl(path) if path.exists() else []


def against(run: Sequence[Row], reference: Sequence[Row]) -> str:
    """The verdict on a mode by its first two epochs beside the reference's."""
    if not reference:
        return "no reference to hold it against"
    if len(run) < min(2, len(reference)):
        return "not held against the reference: too few epochs"
    wrong = []
    for mine, its in zip(run[:2], reference[:2], strict=False):
        off = mine["train_loss"] / its["train_loss"] - 1
        if not abs(off) <= LOSS_WITHIN:
            wrong.append(f"loss of epoch {mine['epoch']} {off:+.1%}")
    mine, its = run[: len(reference)][-1], reference[-1]
    points = mine["test_accuracy"] - its["test_accuracy"]
    if not abs(points) <= ACCURACY_WITHIN:
        wrong.append(f"accuracy {100 * points:+.1f} points")
    return f"WRONG: {', '.join(wrong)} from the reference's" if wrong else "right"


def not_as_asked(summary: Row) -> str:
    """The differences of a run from what was asked for; "" for none."""
    asked = [(name, summary.get(name), summary.get(f"{name}_requested")) for name in ("ops", "step")]
    return "; ".join(f"RAN {name}={ran}, asked {want}" for name, ran, want in asked if ran != want)


def target(identity: str | None, small: bool, reference: Sequence[float], runs: int) -> tuple[float | None, str]:
    """(The mean accuracy that `runs` runs must reach, the reason); None where there is nothing to hold it against.

    On the official files it is the article's. Accuracies on other images are their own, and there it is the reference's
    mean in the same folder, less twice the standard error that the test images leave in the difference of the two
    means. That is known before the first run, where the spread of two or three is not, and shrinks with each seed.
    """
    if identity == "official" and not small:
        return TARGET, f"{TARGET:.0%}, the article's, on the official files"
    if not reference:
        return None, "no run of the reference to hold it against"
    mean = statistics.fmean(reference)
    margin = 2 * math.sqrt(mean * (1 - mean) / TEST_IMAGES * (1 / len(reference) + 1 / runs))
    which = f"on data that are {identity}" if identity != "official" else "after so few epochs"
    return mean - margin, (
        f"{mean - margin:.2%}, the reference's mean in this folder less {100 * margin:.2f} points: twice the standard "
        f"error that {TEST_IMAGES:,} test images leave in the difference of {runs} and {len(reference)} runs; {which} "
        "no other accuracy counts"
    )


COLUMNS = {
    **{"run": 22, "ms/step": 8, "images/s": 9, "peak MB": 13, "loss 1": 8, "2": 8, "last": 8, "accuracy": 9},
    **{"step/ops": 20, "process s": 9, "verdict": 0},
}
"""Heads and widths of the table."""


def runs(out: Path, document: Row) -> list[str]:
    """The table: a line for each run that was begun, whatever became of it."""
    ended, by_name = summaries(out), {step["name"]: step for step in document["steps"]}
    reference = epochs(out / REFERENCE)
    lines = [_line(list(COLUMNS))]
    for name, step in by_name.items():
        if name.startswith(WARM) or not (out / name / "config.json").exists():
            continue
        summary, rows = ended.get(name, {}), epochs(out / name)
        said = [] if summary.get("status") == "complete" else [summary.get("status") or step["status"]]
        said += [not_as_asked(summary)] if summary else []
        if rows and name == REFERENCE:
            said.append("the reference")
        elif rows and not re.search(r"-\d+$", name):
            said.append(against(rows, reference))
        elif summary.get("status") == "complete":
            said.append(f"{len(rows)} epoch{'s' if rows[1:] else ''} in {summary['train_s']:.1f} s")
        lines.append(_line([name, *_figures(out / name, summary, rows), "; ".join(filter(None, said))]))
    return [*lines, *_accuracy(out, document, ended)] if lines[1:] else ["no run has begun"]


def _figures(folder: Path, summary: Row, rows: Sequence[Row]) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    speed = statistics.median([row["images_per_s"] for row in rows[1:] or rows]) if rows else None
    losses = [rows[i]["train_loss"] if len(rows) > i else None for i in (0, 1)]
    losses.append(rows[-1]["train_loss"] if len(rows) > 2 else None)
    peaks = [summary.get(f"peak_{what}_bytes") for what in ("memory", "reserved")]
    return [
        shown(step_ms(folder) if rows else None, ".3f"),
        shown(speed, ",.0f"),
        "/".join(f"{peak / 1e6:,.0f}" for peak in peaks if peak is not None) or "-",
        *(shown(loss, ".4f") for loss in losses),
        shown(rows[-1]["test_accuracy"] if rows else None, ".2%"),
        f"{summary.get('step') or '-'}/{summary.get('ops') or '-'}",
        shown(summary.get("wall_s"), ".1f"),
    ]


def _line(cells: Sequence[str]) -> str:
    name, *others = (f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))
    return " ".join([name.strip().ljust(COLUMNS["run"]), *others]).rstrip()


def _accuracy(out: Path, document: Row, ended: dict[str, Row]) -> list[str]:
    """The accuracies of the runs to the end, and the verdict on ours."""
    complete, lines = {name: s["test_accuracy"] for name, s in ended.items() if s.get("status") == "complete"}, []
    ours, reference = (
        [accuracy for name, accuracy in complete.items() if re.fullmatch(rf"{kind}-\d+", name)]
        for kind in (FUSED, REFERENCE)
    )
    for kind, values in ((FUSED, ours), (REFERENCE, reference)):
        if values:
            sd = f", standard deviation {100 * statistics.stdev(values):.2f} points" if values[1:] else ""
            at = f"{sum(value >= TARGET for value in values)} at or above {TARGET:.0%}"
            lines.append(f"{kind}: n = {len(values)}, mean accuracy {statistics.fmean(values):.2%}{sd}, {at}")
    if ours:
        least, why = target(data_identity(out), document["settings"]["small"], reference, len(ours))
        word = "not judged" if least is None else "REACHED" if statistics.fmean(ours) >= least else "BELOW"
        lines.append(f"accuracy of {FUSED}: {word}; what counts is {why}")
    return lines
