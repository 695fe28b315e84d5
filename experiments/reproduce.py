"""Everything worth doing on a device within a budget of seconds, the most valuable first: one command for its owner.

    python -m experiments reproduce --budget 540      # results/<date>-<device>/; once more: goes on with what is left

A step is a process of its own. It may take its share of what is left of the budget, by the weights below; what it does
not need goes to those after it. One that runs out of time is interrupted, as by Ctrl-C, and keeps what it has. What
is worth less comes after all else, and shares what that has left. Without a GPU, or with --small, the same list is
done in small.
"""

import datetime
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from experiments import reproduce_page
from experiments.reproduce_page import DONE, FAILED, LATE, LEFT, UNAVAILABLE
from experiments.reproduce_plan import ROOT, Step, last_line, plan, take_tiles
from experiments.study import Request, Study
from model.errors import RunError, UsageError
from model.interrupts import Interrupted, Interrupts
from profiling.records import write_json

if TYPE_CHECKING:
    from profiling.console import Terminal

VERSION = 1
GRACE_S = 20.0
"""How long an interrupted step may take to save what it has."""
LEAST_S = 5.0
"""No step is begun with less."""


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
    settings = {"small": small, "set": list(request.settings), "seed": request.seed, "data": data}
    settings |= {"device": "cuda" if on_gpu else "cpu", "device_name": name}
    study = Study("reproduce", out, settings, terminal)
    if on_gpu and take_tiles(out):
        terminal.warn(f"kernels/tiles.json is the one of {out} now, with which its results were measured")
    steps = plan(out.absolute(), request, small, name if on_gpu else None) if steps is None else steps
    return Reproduction(study, steps, budget, start_s, interrupts).run()


def _device() -> tuple[str, bool]:
    import torch

    from model.trainer import choose_device
    from profiling.environment import device_name

    device = choose_device("auto")
    return device_name(torch.device(device)), device.type == "cuda"


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
        return row if step.repeats else row | self.study.results.get(step.name, {})

    def left_s(self) -> float:
        """What is left of the budget."""
        return self.budget - (time.monotonic() - self.start_s)

    def run(self) -> dict[str, Any]:
        """Do the steps that are left, in order, while there is time; returns the status."""
        status = self._write()
        possible = [step for step in self.steps if self.rows[step.name]["status"] != UNAVAILABLE]
        waiting = [step for step in possible if self.rows[step.name]["status"] != DONE]
        with self.terminal.progress(len(possible), len(possible) - len(waiting), "steps") as meter:
            for step in waiting:
                limit_s = self._limit(step)
                if limit_s < LEAST_S:
                    self.terminal.say(f"{step.name}: left, its share of {self.left_s():.0f} s is too small")
                    continue
                self.terminal.say(f"{step.name}: at most {limit_s:.0f} s of {self.left_s():.0f}", "bold")
                try:
                    row = self._do(step, limit_s)
                except OSError as error:
                    raise self._unwritten(error) from None
                self.terminal.say(f"{step.name}: {row['status']} after {row['seconds']:.0f} s. {row['found']}")
                meter.advance(1, step.name)
                status = self._write()
        try:
            self._finish(status)
        except OSError as error:
            raise self._unwritten(error) from None
        return status

    def _limit(self, step: Step) -> float:
        """Its share, by weight, of what is left for it and the unfinished ones after it."""
        waiting = [s for s in self.steps if self.rows[s.name]["status"] in (LEFT, FAILED, LATE)]
        after = [s for s in waiting[waiting.index(step) :] if s.further == step.further]
        return self.left_s() * step.weight / sum(s.weight for s in after)

    def _do(self, step: Step, limit_s: float) -> dict[str, Any]:
        out, row = self.study.out, self.rows[step.name]
        if step.fresh:
            shutil.rmtree(out / step.fresh, ignore_errors=True)
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
            row["found"] = f"exit code {code}: {last_line(step.name)(out) or 'no output'}"
        else:
            with suppress(OSError, ValueError, KeyError, IndexError, TypeError):
                row["found"] = step.found(out) if step.found else ""
        if step.after:
            step.after(out, row["status"] == DONE)
        if row["status"] == DONE and not step.repeats:
            self.study.once(step.name, lambda: row)
        return row

    def _execute(self, step: Step, limit_s: float) -> tuple[int, bool]:
        """(exit code, whether time ran out). Its output goes to OUT/<name>.log, anew."""
        with open(self.study.out / f"{step.name}.log", "wb") as log:
            process = subprocess.Popen(
                step.words(),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "160", **dict(step.environment)},
                start_new_session=True,  # so that all its processes can be ended, and Ctrl-C comes to us first
            )
            try:
                return process.wait(max(limit_s - min(GRACE_S, limit_s / 4), 0)), False
            except subprocess.TimeoutExpired:
                return _end(process, min(GRACE_S, limit_s / 4)), True
            except BaseException:
                _end(process, GRACE_S)
                raise
            finally:  # a child that did not listen, or all of them after one Ctrl-C more, would go on beside the next
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

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
            raise self._unwritten(error) from None
        return status

    def _unwritten(self, error: OSError) -> RunError:
        return RunError(f"{self.study.out}: {error}; free some space and run the command again")

    def _finish(self, status: dict[str, Any]) -> None:
        """The page of what there is, and what is left."""
        rows, name = status["steps"], self.study.settings["device_name"]
        small = "--small: every training is of the preset laptop for an epoch, whatever its step is called: a look at "
        small += "whether it all works, not a measurement"
        caveats = [small] if self.study.settings["small"] else []
        self.study.finish(
            status,
            [reproduce_page.plot(rows)],
            reproduce_page.sentences(rows, name),
            [reproduce_page.table(rows)],
            caveats,
            reproduce_page.data_identity(self.study.out),
        )
        left = [r["name"] for r in rows if r["status"] not in (DONE, UNAVAILABLE)]
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
