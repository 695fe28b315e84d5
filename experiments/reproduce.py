"""Everything worth measuring on a device, in three stages of bounded steps: one command for its owner.

    python -m experiments reproduce --stage smoke --pack smoke.tar.gz     # does anything work, how fast is a step?
    python -m experiments reproduce --stage numbers --out FOLDER          # goes on in FOLDER with what can be quoted
    python -m experiments reproduce --budget 600                          # smoke, numbers, peers, as far as it goes

A step is a process group of its own, ended at its limit: first as by Ctrl-C, so that it keeps what it has, then for
good. After each the record and the page are written anew, and after those that run at once the archive, so that
whatever ends this command costs no more than the step that was running. The same command goes on with what is left.
Without a GPU, or with --small, the same steps are done in small.
"""

import ctypes
import datetime
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import reproduce_page
from experiments.reproduce_page import DONE, FAILED, LATE, LEFT, UNAVAILABLE
from experiments.reproduce_plan import FINDINGS, STAGES, VARIED, Plan, Step, plan, take_tiles, tidy, words
from experiments.study.folder import Request, Study
from model.errors import DeviceError, RunError, UsageError
from model.interrupts import Interrupted, Interrupts
from profiling import ROOT
from profiling.output.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from profiling.output.terminal import Terminal

VERSION = 2
GRACE_S = 8.0
"""Time of an interrupted step to save what it has, but at most a quarter of its limit."""
LEAST_SHARE = 0.25
"""A step is not begun with less than this share of its seconds."""
LEAST_S = 5.0
CLOSE_S = 3.0
"""Share of the budget for the last page and archive."""
PATIENCE_S = 60.0
"""For a device to say what it is."""
POLL_S = 0.05
NO_RESULT = ("checkpoint-*", "cifar-10-*", "data_batch_*", "test_batch.bin", ".tmp-*")
"""Patterns of files and folders that the archive leaves out: weights and data."""


def check(request: Request, stage: str | None = None, budget: float | None = None, pack: Path | None = None) -> None:
    """Raise UsageError for what cannot be."""
    if stage is not None and stage not in STAGES:
        raise UsageError(f"--stage {stage} is unknown; expected {', '.join(STAGES)}, or none for all of them in order")
    if budget is not None and not LEAST_S <= budget < math.inf:
        raise UsageError(f"--budget {budget:g}: expected seconds, at least {LEAST_S:g}")
    if pack is not None and (pack.is_dir() or not pack.absolute().parent.is_dir()):
        raise UsageError(f"--pack {pack}: expected a file in a folder that exists, such as results.tar.gz")
    fixed = [name for setting in request.settings if (name := setting.partition("=")[0].strip()) in VARIED]
    if fixed:
        raise UsageError(f"--set {fixed[0]} would make runs alike that are compared; leave it out")


def run(
    request: Request,
    terminal: "Terminal",
    interrupts: Interrupts,
    stage: str | None = None,
    budget: float | None = None,
    pack: Path | None = None,
) -> dict[str, Any]:
    """Do what the budget allows; returns what OUT/reproduce.json holds."""
    start_s = time.monotonic()
    machine = facts()
    name, on_gpu = machine["device_name"], machine["on_gpu"]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    out = request.out or ROOT / "results" / f"{datetime.date.today()}-{slug}"
    small = request.small or not on_gpu
    data = "synthetic" if request.synthetic else "folder" if request.data_dir else "default"
    settings = {"small": small, "set": list(request.settings), "seed": request.seed, "data": data}
    study = Study("reproduce", out, settings | {"device_name": name} | machine["machine"], terminal)
    if on_gpu and take_tiles(out):
        terminal.warn(f"kernels/tiles.json is the one of {out} now, with which its results were measured")
    steps = plan(out.absolute(), request, small, name if on_gpu else None)
    reproduction = Reproduction(study, request, steps, machine["environment"], pack, interrupts)
    return reproduction.run(limits(stage, budget), start_s)


def facts() -> dict[str, Any]:
    """Run `experiments.study.machine`; what it prints. Raises DeviceError where the device does not answer."""
    command = [sys.executable, "-m", "experiments.study.machine"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        reason = f"it did not answer within {PATIENCE_S:g} s"
    except (ValueError, IndexError):
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
    raise DeviceError(f"the device cannot be asked for its name: {reason}; see nvidia-smi and profiling doctor")


def limits(stage: str | None, budget: float | None) -> dict[str, tuple[float, float]]:
    """For each stage in order the seconds, counted from the start, at which it must have ended, and its steps' factor.

    A budget above what the stages take by themselves stretches the limits in proportion: a slower device needs it, a
    faster one trains more seeds. A smaller one leaves out what comes last.
    """
    chosen = {stage: STAGES[stage]} if stage else STAGES
    whole = sum(chosen.values())
    budget = whole if budget is None else budget
    stretch = max(1.0, budget / whole)
    ends = itertools.accumulate(chosen.values())
    return {name: (min(budget, end * stretch), stretch) for name, end in zip(chosen, ends, strict=True)}


class Reproduction:
    """The steps in one folder and their results; the page and the archive of both."""

    def __init__(
        self,
        study: Study,
        request: Request,
        steps: Plan,
        environment: dict[str, Any],
        pack: Path | None,
        interrupts: Interrupts,
    ):
        self.study, self.request, self.plan, self.environment = study, request, steps, environment
        self.out, self.terminal, self.interrupts = study.out, study.terminal, interrupts
        self.pack, self.record = pack, study.out / "reproduce.json"
        self.unwritten: OSError | None = None
        before, self.rows = self._before(), {}
        for stage, groups in steps.items():
            for step in itertools.chain(*groups):
                row = {"name": step.name, "stage": stage, "status": LEFT, "seconds": None}
                row |= {"limit_s": None, "exit_code": None, "why": ""}
                if step.reason:
                    row |= {"status": UNAVAILABLE, "why": step.reason}
                elif before.get(step.name, {}).get("status", UNAVAILABLE) != UNAVAILABLE:
                    row |= before[step.name]
                self.rows[step.name] = row

    def _before(self) -> dict[str, dict[str, Any]]:
        """The rows of earlier calls, by the step."""
        if not self.record.exists():
            return {}
        try:
            return {row["name"]: row for row in read_json(self.record)["steps"]}
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise UsageError(f"{self.record} is damaged ({error}); name a new folder with --out") from None

    def run(self, ends: dict[str, tuple[float, float]], start_s: float) -> dict[str, Any]:
        """Do the steps of these stages, as `limits` has them, while there is time; returns the record."""
        self._write()
        try:
            for stage, (end_s, stretch) in ends.items():
                until_s = start_s + end_s - CLOSE_S
                self.terminal.say(f"{stage}: at most {max(until_s - time.monotonic(), 0):.0f} s", "bold")
                for group in self.plan[stage]:
                    waiting = [step for step in group if self.rows[step.name]["status"] not in (DONE, UNAVAILABLE)]
                    self._do(waiting, until_s, stretch)
        finally:
            self.interrupts.deferred = True
            document, text = self._write()
            self.terminal.say("\n" + reproduce_page.clipped(text))
        if self.unwritten:
            raise RunError(f"not all could be written ({self.unwritten}); free some space and run the command again")
        return document

    def _do(self, group: Sequence[Step], until_s: float, stretch: float) -> None:
        """Run these steps at once, none beyond `until_s` on the monotonic clock; then write their results."""
        running: list[_Running] = []
        try:
            for step in group:
                self._begin(step, until_s - time.monotonic(), stretch, running)
            while waited := [one for one in running if one.process.returncode is None]:
                for one in waited:
                    if one.process.poll() is None:
                        one.enforce()
                    else:
                        self._ended(one)
                time.sleep(POLL_S)
        except Interrupted:
            left = [one for one in running if one.process.returncode is None]
            for one in left:
                self.rows[one.step.name] |= {"status": LEFT, "seconds": one.seconds(), "why": "interrupted"}
                one.signal(signal.SIGINT)
            for one in left:
                with suppress(subprocess.TimeoutExpired):
                    one.process.wait(GRACE_S)
            raise
        finally:  # a child that did not listen, or all of them after one Ctrl-C more, would go on beside the next
            for one in running:
                one.signal(signal.SIGKILL)
        if running:
            self._write()

    def _begin(self, step: Step, left_s: float, stretch: float, running: list["_Running"]) -> None:
        """Start it, with its output in OUT/<name>.log, unless there is not the time, or not what it needs."""
        row, limit_s = self.rows[step.name], min(step.seconds * stretch, left_s)
        if limit_s < LEAST_SHARE * step.seconds:
            return
        if step.needs and not (self.out / step.needs).exists():
            row |= {"status": LEFT, "why": f"it needs {step.needs}"}
            return
        try:
            if step.fresh and (self.out / step.fresh).is_dir():
                shutil.rmtree(self.out / step.fresh)
            elif step.fresh:
                (self.out / step.fresh).unlink(missing_ok=True)
            argv = words(step, self.out, self.request)
            running.append(_Running(step, argv, self.out / f"{step.name}.log", limit_s))
            row |= {"limit_s": limit_s}
        except OSError as error:
            row |= {"status": FAILED, "why": str(error)}
            self.terminal.say(f"{step.name}: failed; {error}")

    def _ended(self, one: "_Running") -> None:
        """Note how it ended, and end what it has left behind."""
        one.signal(signal.SIGKILL)
        code, seconds = one.process.returncode, one.seconds()
        done = code == 0 or (code == 1 and one.step.name in FINDINGS)
        row = self.rows[one.step.name]
        row |= {"exit_code": code, "seconds": seconds, "why": ""}
        row["status"] = DONE if done else LATE if one.interrupted else FAILED
        if not done:
            name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
            how = f"exit code {code}" if code >= 0 else f"killed by {name}"
            row["why"] = f"{how}: {reproduce_page.last_line(one.log)}"
        try:
            tidy(self.out, one.step.name)
        except OSError as error:
            self.unwritten = error
        self.terminal.say(f"{one.step.name}: {row['status']} after {seconds:.0f} s. {row['why']}".strip())
        self._write(pack=False)

    def _write(self, pack: bool = True) -> tuple[dict[str, Any], str]:
        """Write the record and the page, and where no step is at work the archive: (record, page's text)."""
        document = {"version": VERSION, "settings": self.study.settings}
        document |= {"environment": self.environment, "steps": list(self.rows.values())}
        text = reproduce_page.text(self.out, document)
        try:
            write_json(self.record, document)
            write_text(self.out / "reproduce.md", reproduce_page.markdown(text))
            if pack and self.pack:
                archive(self.out, self.pack)
        except OSError as error:
            if self.unwritten is None:
                self.terminal.warn(f"{error}: the record, the page or the archive is not up to date")
            self.unwritten = error
        return document, text


class _Running:
    """A step that has begun: its process, and when it is to end."""

    def __init__(self, step: Step, argv: Sequence[str], log: Path, limit_s: float):
        self.step, self.log, self.interrupted = step, log, False
        self.begun_s = time.monotonic()
        self.over_s = self.begun_s + limit_s
        self.late_s = self.over_s - min(GRACE_S, limit_s / 4)
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                argv,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"},
                start_new_session=True,  # so that all its processes can be ended, and Ctrl-C comes to us first
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,
            )

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.begun_s

    def signal(self, signum: int) -> None:
        """To all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def enforce(self) -> None:
        """Ask it to end, as by Ctrl-C, when its time is over; and make it when that did not help."""
        now_s = time.monotonic()
        if now_s >= self.over_s:
            self.signal(signal.SIGKILL)
        elif now_s >= self.late_s and not self.interrupted:
            self.interrupted = True
            self.signal(signal.SIGINT)


def _end_with_parent() -> None:
    """In a child: to be killed when this command is, for nobody else would end it (prctl(2), PR_SET_PDEATHSIG)."""
    _PRCTL(1, signal.SIGKILL)


_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def archive(out: Path, file: Path) -> None:
    """Replace `file` by an archive, .tar.gz, of the folder `out` without weights and data. Raises OSError."""
    temporary = file.with_name(f".tmp-{os.getpid()}-{file.name}")

    def result(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = Path(member.name).name
        own = (out.parent / member.name).absolute() in (file.absolute(), temporary.absolute())
        return None if own or any(fnmatch(name, pattern) for pattern in NO_RESULT) else member

    try:
        with tarfile.open(temporary, "w:gz", compresslevel=6) as tar:
            tar.add(out, out.name, filter=result)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
