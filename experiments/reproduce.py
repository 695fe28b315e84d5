"""Everything worth doing on a device within a budget of seconds, the most valuable first: one command for its owner.

    python -m experiments reproduce --budget 540      # results/<date>-<device>/; once more: goes on with what is left

A step is a process of its own. It may take its share of what is left of the budget, by the weights below; what it does
not need goes to those after it. One that runs out of time is interrupted, as by Ctrl-C, and keeps what it has. Without
a GPU, or with --small, the same list is done in small.
"""

import datetime
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfile, rmtree
from typing import TYPE_CHECKING, Any

from experiments.study import Request, Study
from model.errors import RunError, UsageError
from model.interrupts import Interrupted, Interrupts
from profiling.records import read_json, write_json

if TYPE_CHECKING:
    from profiling.console import Terminal

ROOT = Path(__file__).resolve().parent.parent
VERSION = 1
GRACE_S = 20.0
"""How long an interrupted step may take to save what it has."""
LEAST_S = 5.0
"""No step is begun with less."""
DONE, FAILED, LATE, LEFT, UNAVAILABLE = "done", "failed", "out of time", "left", "unavailable"


@dataclass(frozen=True)
class Step:
    """`command`'s exit codes in `accepts` mean that it is done; `weight` is its share of the budget.

    `found(OUT)` says in a line what it found, and raises an OSError, ValueError, KeyError or IndexError where it did
    not. `fresh` names a folder in OUT that an unfinished attempt leaves behind and a new one cannot use. `after(OUT)`
    is called once it is done. With a `reason` it cannot run here.
    """

    name: str
    command: tuple[str, ...]
    weight: float
    found: Callable[[Path], str] | None = None
    accepts: tuple[int, ...] = (0,)
    fresh: str | None = None
    after: Callable[[Path], None] | None = None
    reason: str | None = None


def check(request: Request, budget: float) -> None:
    """Raise UsageError for a budget that is none."""
    if not LEAST_S <= budget < float("inf"):
        raise UsageError(f"--budget {budget:g}: expected seconds, at least {LEAST_S:g}")


def run(
    request: Request,
    terminal: "Terminal",
    interrupts: Interrupts,
    budget: float,
    steps: Sequence[Step] | None = None,
) -> dict[str, Any]:
    """Do what the budget allows; returns what OUT/status.json holds."""
    start_s = time.monotonic()
    name, on_gpu = _device()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = request.out or ROOT / "results" / f"{datetime.date.today()}-{slug}"
    small = request.small or not on_gpu
    data = "synthetic" if request.synthetic else "folder" if request.data_dir else "default"
    settings = {"small": small, "set": list(request.settings), "seed": request.seed, "device_name": name, "data": data}
    study = Study("reproduce", out, settings, terminal)
    steps = plan(out.absolute(), request, small, on_gpu) if steps is None else steps
    return Reproduction(study, steps, budget, start_s, interrupts).run()


def _device() -> tuple[str, bool]:
    import torch

    from model.trainer import choose_device
    from profiling.environment import device_name

    device = choose_device("auto")
    return device_name(torch.device(device)), device.type == "cuda"


def plan(out: Path, request: Request, small: bool, on_gpu: bool) -> list[Step]:
    """The steps in order of value, in small or whole, for the absolute folder `out`."""
    python, data = sys.executable, ["--synthetic"] if request.synthetic else []
    if request.data_dir:
        data = ["--data-dir", str(request.data_dir.absolute())]
    settings = [f"--set={setting}" for setting in request.settings]
    settings += [] if request.seed is None else ["--seed", str(request.seed)]
    train = [python, "train.py", *data, *settings]
    network = ["--preset", "laptop", "--epochs", "1"] if small else ["--preset", "fused"]
    tests = ["tests/test_config.py", "tests/test_schedule.py", "tests/test_timing.py"] if small else _gpu_tests()
    suite = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out / 'suite.xml'}"]
    ladder = [python, "-m", "experiments", "ladder", *data, *settings, "--out", str(out / "ladder")]
    ceilings = [python, "-m", "profiling", "device", "--out", str(out / "ceilings.json")]
    bench = [python, "-m", "profiling", "bench", "--out", str(out / "bench.jsonl")]
    runs = ["--runs", "2" if small else "5", "--resume", "auto", "--out", str(out / "accuracy")]
    target = [] if small else ["--target-accuracy", "0.94"]
    quick = ["bn_finalize", "--quick"] if small else []
    return [
        Step("suite", (*suite, *tests), 150, _last_line("suite"), accepts=(0, 1)),
        Step("ceilings", (*ceilings, "--seconds", "0.1" if small else "1"), 50),
        Step(
            "tiles",
            (python, "-m", "profiling", "bench", "--tune", *(["--quick"] if small else [])),
            90,
            after=_keep_tiles,
            reason=None if on_gpu else "tiles are timed on a CUDA GPU",
        ),
        Step("bench", (*bench, *quick), 90, accepts=(0, 1)),
        Step("ladder", (*ladder, "--epochs-per-rung", "4", *(["--small"] if small else [])), 120, _ladder_says),
        Step(
            "profiled",
            (*train, *network, "--profile", "--out", str(out / "profiled")),
            80,
            lambda folder: str(read_json(folder / "profiled" / "report.json")["headline"]),
            fresh="profiled",
            after=_drop_checkpoints("profiled"),
        ),
        Step(
            "accuracy",
            (*train, *network, *target, *runs),
            80,
            _accuracy_says,
            accepts=(0, 7),
            after=_drop_checkpoints("accuracy"),
        ),
    ]


class Reproduction:
    """Steps under a budget of seconds that began at `start_s` on the monotonic clock."""

    def __init__(self, study: Study, steps: Sequence[Step], budget: float, start_s: float, interrupts: Interrupts):
        self.study, self.steps, self.budget, self.start_s = study, steps, budget, start_s
        self.interrupts, self.terminal = interrupts, study.terminal
        self.rows = {step.name: self._row(step) for step in steps}

    def _row(self, step: Step) -> dict[str, Any]:
        row = {"name": step.name, "status": LEFT, "seconds": None, "limit_s": None, "exit_code": None, "found": ""}
        if step.reason:
            return row | {"status": UNAVAILABLE, "found": step.reason}
        return row | self.study.results.get(step.name, {})

    def left_s(self) -> float:
        """What is left of the budget."""
        return self.budget - (time.monotonic() - self.start_s)

    def run(self) -> dict[str, Any]:
        """Do the steps that are left, in order, while there is time; returns the status."""
        status = self._write()
        for step in self.steps:
            if self.rows[step.name]["status"] in (DONE, UNAVAILABLE):
                continue
            limit_s = self._limit(step)
            if limit_s < LEAST_S:
                self.terminal.say(f"{step.name}: left, {self.left_s():.0f} s are too few")
                continue
            self.terminal.say(f"{step.name}: at most {limit_s:.0f} s of {self.left_s():.0f}", "bold")
            row = self._do(step, limit_s)
            self.terminal.say(f"{step.name}: {row['status']} after {row['seconds']:.0f} s. {row['found']}")
            status = self._write()
        self._say(status)
        return status

    def _limit(self, step: Step) -> float:
        """Its share, by weight, of what is left for it and the unfinished ones after it."""
        waiting = [s for s in self.steps if self.rows[s.name]["status"] in (LEFT, FAILED, LATE)]
        after = waiting[waiting.index(step) :]
        return self.left_s() * step.weight / sum(s.weight for s in after)

    def _do(self, step: Step, limit_s: float) -> dict[str, Any]:
        out, row = self.study.out, self.rows[step.name]
        if step.fresh:
            rmtree(out / step.fresh, ignore_errors=True)
        begun_s = time.monotonic()
        row |= {"limit_s": limit_s}
        try:
            code, late = self._execute(step, limit_s)
        except Interrupted:
            row |= {"status": LEFT, "seconds": time.monotonic() - begun_s, "found": "interrupted"}
            self._write()
            raise
        row |= {"exit_code": code, "seconds": time.monotonic() - begun_s}
        row |= {"status": DONE if code in step.accepts else LATE if late else FAILED, "found": ""}
        if row["status"] != DONE:
            row["found"] = f"exit code {code}: {_last_line(step.name)(out) or 'no output'}"
        else:
            with suppress(OSError, ValueError, KeyError, IndexError, TypeError):
                row["found"] = step.found(out) if step.found else ""
            if step.after:
                step.after(out)
            self.study.once(step.name, lambda: row)
        return row

    def _execute(self, step: Step, limit_s: float) -> tuple[int, bool]:
        """(exit code, whether time ran out). Its output goes to OUT/<name>.log, anew."""
        with open(self.study.out / f"{step.name}.log", "wb") as log:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"},
                start_new_session=True,  # so that all its processes can be ended, and Ctrl-C comes to us first
            )
            try:
                return process.wait(max(limit_s - min(GRACE_S, limit_s / 4), 0)), False
            except subprocess.TimeoutExpired:
                return _end(process, min(GRACE_S, limit_s / 4)), True
            except BaseException:
                _end(process, GRACE_S)
                raise

    def _write(self) -> dict[str, Any]:
        status = {
            "version": VERSION,
            "settings": self.study.settings,
            "budget_s": self.budget,
            "spent_s": time.monotonic() - self.start_s,
            "steps": list(self.rows.values()),
        }
        try:
            write_json(self.study.out / "status.json", status)
        except OSError as error:
            raise RunError(f"{self.study.out}: {error}; free some space and run the command again") from None
        return status

    def _say(self, status: dict[str, Any]) -> None:
        rows = [
            [r["name"], r["status"], "" if r["seconds"] is None else f"{r['seconds']:.0f}", r["found"]]
            for r in status["steps"]
        ]
        self.terminal.table(f"{self.study.out}", ["step", "status", "s", "found"], rows)
        left = [r["name"] for r in status["steps"] if r["status"] not in (DONE, UNAVAILABLE)]
        how = f"the same command with --out {self.study.out} goes on"
        self.terminal.say(f"left: {', '.join(left)}; {how}" if left else "everything is done", "bold")


def _end(process: subprocess.Popen, grace_s: float) -> int:
    """Ask the step to end as Ctrl-C would, then make it; its exit code."""
    for signum, patience_s in ((signal.SIGINT, grace_s), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            return process.wait(patience_s)
    return process.wait()


def _gpu_tests() -> list[str]:
    """The test files of which a GPU computes something: those marked for one, and those that ask for the device."""
    asks = re.compile(r"mark\.gpu|def test\w*\([^)]*\bdevice\b")
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if asks.search(path.read_text(encoding="utf-8"))]


def _last_line(name: str) -> Callable[[Path], str]:
    """The last line of a step's log."""

    def read(out: Path) -> str:
        lines = (out / f"{name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")

    return read


def _keep_tiles(out: Path) -> None:
    copyfile(ROOT / "kernels" / "tiles.json", out / "tiles.json")


def _drop_checkpoints(folder: str) -> Callable[[Path], None]:
    """Weights of finished runs are not results: a folder without them is small enough to be committed."""

    def drop(out: Path) -> None:
        for path in (out / folder).rglob("checkpoint-*"):
            path.unlink()

    return drop


def _ladder_says(out: Path) -> str:
    return str(read_json(out / "ladder" / "ladder.json")["sentences"][0])


def _accuracy_says(out: Path) -> str:
    from profiling.statistics import claim_in_words

    return claim_in_words(read_json(out / "accuracy" / "summary.json"))
