"""What was measured on a GPU beside what was predicted of it, for `python -m experiments predictions --against`."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.expected import STEPS, config_of
from model.errors import DataError
from profiling.output.files import read_json, read_jsonl, write_json

if TYPE_CHECKING:
    from profiling.output.terminal import Terminal

VERSION = 2
OF_A_STEP = ("network", "widths", "batch_size", "prep_bn_relu", "pool_first", "ops", "conv", "preprocess")
"""Of a configuration, what decides how long a step takes."""


class Held(NamedTuple):
    """A prediction beside its measurement, microseconds; `ratio` is measured over expected, `n` the measurements.

    Of several measurements it is the median.
    """

    gpu: str
    name: str
    expected_us: float
    measured_us: float
    ratio: float
    n: int


def hold(documents: Iterable[dict[str, Any]], folder: Path) -> list[Held]:
    """What was measured in `folder` beside the predictions for the GPU that measured it.

    Whole steps first, of every complete run below `folder`, then the cases of its bench.jsonl, the largest excess
    first. A case is our kernels with the L2 cache cold. Raises DataError where nothing was measured on a predicted GPU.
    """
    names, held = [], []
    runs = [(read_json(path), read_json(path.with_name("config.json"))) for path in _runs(folder)]
    path = folder / "bench.jsonl"
    timings = read_jsonl(path) if path.exists() else []
    for document in documents:
        gpu = document["machine"]["name"]
        names.append(gpu)
        for name in STEPS:
            measured = [
                1e6 * summary["train_s"] / summary["steps"]
                for summary, config in runs
                if summary["status"] == "complete" and _is_step(name, summary, config, document)
            ]
            if measured:
                held.append(_held(gpu, f"a step of {name}", document["steps"][name]["expected_us"], measured))
        measured = {row["case"]: row["us"]["value"] for row in timings if _is_case(row, document)}
        cases = [
            _held(gpu, name, document["cases"][name]["expected_us"], [us])
            for name, us in measured.items()
            if name in document["cases"]
        ]
        held += sorted(cases, key=lambda one: one.expected_us - one.measured_us)
    if not held:
        raise DataError(
            f"{folder} holds no measurement on {' or '.join(names)}: expected bench.jsonl, or runs of "
            f"{', '.join(STEPS)}, as `python -m experiments reproduce` writes them there"
        )
    return held


def _runs(folder: Path) -> list[Path]:
    """The summary.json of every run in `folder` or below it."""
    return [path for path in sorted(folder.rglob("summary.json")) if path.with_name("config.json").exists()]


def _is_step(name: str, summary: dict[str, Any], config: dict[str, Any], document: dict[str, Any]) -> bool:
    """Whether a run took the steps that are predicted: no other settings, and nothing that was fallen back to."""
    asked = config_of(name).to_json()
    ran = (summary["preset"], summary["ops"], summary["dtype"], summary["step"], summary["device"])
    return ran == (name, asked["ops"], document["dtype"], "captured", document["machine"]["name"]) and all(
        config[key] == asked[key] for key in OF_A_STEP
    )


def _is_case(row: dict[str, Any], document: dict[str, Any]) -> bool:
    """Whether a row of a benchmark is a time of our kernels that is predicted, caches cold."""
    return (
        row["kind"] == "timing"
        and (row["provider"], row["mode"], row["dtype"]) == ("ours", "cold", document["dtype"])
        and row["us"]["value"] is not None
        and row["machine"].get("gpu") == document["machine"]["name"]
    )


def _held(gpu: str, name: str, expected_us: float, measured: Sequence[float]) -> Held:
    us = statistics.median(measured)
    return Held(gpu, name, expected_us, us, us / expected_us, len(measured))


def sentences(held: Sequence[Held]) -> list[str]:
    """What the comparison says."""
    said = [
        f"{one.name} on {one.gpu} was expected to take {one.expected_us:,.0f} us and took {one.measured_us:,.0f}, "
        f"{one.ratio:.2f} times as long (n = {one.n})."
        for one in held
        if one.name.startswith("a step of ")
    ]
    for gpu in dict.fromkeys(one.gpu for one in held):
        kernels = [one for one in held if one.gpu == gpu and not one.name.startswith("a step of ")]
        if not kernels:
            continue
        ratios = sorted(one.ratio for one in kernels)
        said.append(
            f"Of {len(kernels)} cases on {gpu} the median took {ratios[len(ratios) // 2]:.2f} times what was expected, "
            f"from {ratios[0]:.2f} to {ratios[-1]:.2f}; furthest above: "
            + ", ".join(f"{one.name} by {one.measured_us - one.expected_us:,.0f} us" for one in kernels[:3])
            + "."
        )
        too_fast = [one.name for one in kernels if one.ratio < 1]
        if too_fast:
            said.append(f"Faster than expected, so that the model is wrong there: {', '.join(too_fast)}.")
    return said


def hold_all(terminal: "Terminal", pages: Sequence[Path], folder: Path) -> dict[str, Any]:
    """Hold `pages` against what `folder` measured: say it, and write predictions-held.json there. Returns that.

    Raises DataError where either is damaged, and as `hold` does; OSError.
    """
    try:
        held = hold([read_json(path) for path in pages], folder)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder} or {pages[0].parent} is damaged: {error}; make the predictions or the measurement anew"
        ) from None
    document = {"version": VERSION, "held": [one._asdict() for one in held], "sentences": sentences(held)}
    write_json(folder / "predictions-held.json", document)
    rows = [
        [one.gpu, one.name, f"{one.expected_us:,.1f}", f"{one.measured_us:,.1f}", f"{one.ratio:.2f}"] for one in held
    ]
    terminal.table("expected (modelled) and measured, us", ["", "", "expected", "measured", "ratio"], rows)
    for sentence in document["sentences"]:
        terminal.say(sentence)
    return document
