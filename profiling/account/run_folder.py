"""The records in a run's folder, read and checked; the first half of a report.

Records that are missing or damaged are named in `lacks`; only a folder without summary.json is no run.
"""

import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from profiling.account import consistency
from profiling.account.trace import Trace
from profiling.account.trace import read as read_trace
from profiling.device import ncu
from profiling.device.ceilings import Ceilings
from profiling.output.errors import ReportError
from profiling.output.files import read_bytes, read_json, read_jsonl, require_regular
from profiling.output.forms import COUNT, FACT, NUMBER, POSITIVE, SECONDS, SHARE, clean
from profiling.run import telemetry
from profiling.run.collect import RECORDS

SUMMARY = {
    "status": str,
    "preset": str,
    "data_identity": ("official", "copy", "synthetic"),
    "data_source": (str, None),
    "device": str,
    "dtype": str,
    "ops": str,
    "step": (str, None),
    "epochs": COUNT,
    "steps": COUNT,
    "seed": (NUMBER, None),
    "git_sha": (str, None),
    "test_accuracy": (SHARE, None),
    "train_s": SECONDS,
    "train_plus_eval_s": (SECONDS, None),
    "wall_s": (SECONDS, None),
    "images_per_s": (NUMBER, None),
    "peak_memory_bytes": (COUNT, None),
}
CONFIG = {"batch_size": POSITIVE}
ENVIRONMENT = {"gpu": (None, {str: FACT}), "date?": str, "git_dirty?": bool, str: FACT}
EPOCH = {"epoch": POSITIVE} | dict.fromkeys(
    ["learning_rate", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "images_per_s", "train_s"],
    (NUMBER, None),
)
PHASE = {"name": str, "start_ns": COUNT, "end_ns": COUNT}
OP = {"op": str, "family": str, "layer": str, "dims": [[COUNT]], "backward": bool, "flops": COUNT, "bytes": COUNT}
FORMS = {
    "phases": {"version": 1, "start_ns": COUNT, "end_ns": COUNT, "phases": [PHASE]},
    "steps": {"version": 1, "epochs": [[COUNT]], "missed_steps": COUNT},
    "work": {
        "version": 1,
        "batch": POSITIVE,
        "dtype": str,
        "images": POSITIVE,
        "flops_per_image": POSITIVE,
        "article_batch": POSITIVE,
        "article_flops_per_image": POSITIVE,
        "ops": [OP],
        "reference?": [OP],
        "fused?": [OP],
        "article?": [OP],
    },
    "profile": {
        "version": 1,
        "eager_step": (COUNT, None),
        "step_images": [POSITIVE],
        "step_ns": [POSITIVE],
        "error": (str, None),
    },
}
"""The forms of the records folder's files, as `profiling.run.log` and `profiling.run.collect` write them."""


class Run(NamedTuple):
    """All records, each of its form; a missing one is None, and `lacks` says so."""

    summary: dict[str, Any]
    config: dict[str, Any]
    environment: dict[str, Any]
    epochs: list[dict[str, Any]]
    phases: dict[str, Any] | None
    steps: dict[str, Any] | None
    work: dict[str, Any] | None
    ceilings: Ceilings | None
    profile: dict[str, Any]
    trace: Trace | None
    telemetry: telemetry.Telemetry
    counters: dict[str, ncu.Measured]
    lacks: list[str]

    @property
    def training(self) -> list[tuple[int, int]]:
        """(start_ns, end_ns) of each stretch of the training phase; none where the phases are not known."""
        phases = self.phases["phases"] if self.phases else []
        return [(phase["start_ns"], phase["end_ns"]) for phase in phases if phase["name"] == "training"]


def read(folder: Path) -> Run:
    """Read a run's folder. Raises ReportError where there is no readable summary.json, or no record of a profiling."""
    lacks: list[str] = []
    records = folder / RECORDS

    def optional(what: str, read_it: Callable[[], Any], default: Any = None) -> Any:
        try:
            return read_it()
        except FileNotFoundError:
            lacks.append(f"There is no {what}.")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            lacks.append(f"The {what} cannot be read: {error}.")
        return default

    def record(of: str) -> Any:
        return read_json(records / f"{of}.json", FORMS[of])

    name = clean(str(folder))
    if not os.path.exists(folder / "summary.json"):  # unlike a Path's own, it raises nothing for too long a name
        raise ReportError(
            f"{name} is not the folder of a run: it has no summary.json; expected one that train.py wrote"
        )
    try:
        summary = read_json(folder / "summary.json", SUMMARY)
    except (OSError, ValueError) as error:
        raise ReportError(f"{name} is not that of a single run: {error}; of several, name one run-NNN folder") from None
    if not records.is_dir():
        raise ReportError(f"{name} was not profiled, so there is no account of it: python -m profiling collect {name}")
    profile = optional("record of the profiled pass", lambda: record("profile"), {})
    if profile.get("error"):
        lacks.append(f"The profiled pass failed: {profile['error']}.")
    trace = optional("trace of kernels", lambda: _trace(records / "trace.json.gz"))
    environment = optional(
        "description of the machine", lambda: read_json(folder / "environment.json", ENVIRONMENT), {"gpu": None}
    )
    if trace is not None and not trace.on_gpu and environment["gpu"]:
        lacks.append("The trace of a run on a GPU holds none of its kernels.")
    if trace is not None and trace.on_gpu and not environment["gpu"]:
        lacks.append("The trace is of a GPU, and environment.json knows of none.")
    counted = (records / "ncu.csv").exists()
    heard = telemetry.read(records / "telemetry.jsonl")
    return consistency.believed(
        Run(
            summary,
            optional("configuration", lambda: read_json(folder / "config.json", CONFIG), {}),
            environment,
            optional("log of epochs", lambda: read_jsonl(folder / "log.jsonl", EPOCH), []),
            optional("record of the phases", lambda: record("phases")),
            optional("record of the steps", lambda: record("steps")),
            optional("count of the work in a step", lambda: record("work")),
            optional("measurement of this device's ceilings", lambda: _ceilings(records / "ceilings.json")),
            profile,
            trace,
            heard,
            optional("output of ncu", lambda: _counters(records / "ncu.csv", lacks), {}) if counted else {},
            lacks + heard.lacks,
        )
    )


def _trace(path: Path) -> Trace:
    require_regular(path)
    return read_trace(path)


def _ceilings(path: Path) -> Ceilings:
    return Ceilings.from_json(read_json(path))


def _counters(path: Path, lacks: list[str]) -> dict[str, ncu.Measured]:
    """Kernel name -> means over its launches."""
    text = read_bytes(path).decode(errors="replace")
    if hint := ncu.hint(text):
        lacks.append(hint)
    launches = defaultdict(list)
    for launch in ncu.read(text):
        launches[launch.name].append(launch)

    def average(of: list[ncu.Measured], field: str) -> float | None:
        known = [getattr(launch, field) for launch in of if getattr(launch, field) is not None]
        return fmean(known) if known else None

    return {
        name: ncu.Measured(name, *(average(of, field) for field in ncu.Measured._fields[1:]))
        for name, of in launches.items()
    }
