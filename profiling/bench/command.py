"""`python -m profiling bench`: check the request, then measure, check or tune the kernels and keep the results."""

import collections
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import jit, tiles
from kernels.conv_shape import parse
from profiling import ROOT
from profiling.bench import cases, checks, kernel_facts, measure, table, tuning
from profiling.bench.case import Case
from profiling.device import environment
from profiling.output.command_line import require
from profiling.output.errors import CommandError, NoDeviceError
from profiling.output.files import append_jsonl
from profiling.output.terminal import Terminal


@dataclass(frozen=True)
class Request:
    """The command line."""

    op: str | None = None
    shapes: tuple[str, ...] = ()
    dtype: str = "float16"
    out: Path | None = None
    compare: Path | None = None
    json: bool = False
    tune: bool = False
    quick: bool = False
    check: bool = False
    resume: bool = False
    short: bool = False
    jobs: int | None = None
    images: int | None = None
    limit_s: float | None = None


def run(request: Request, terminal: Terminal) -> int:
    """Do what was asked; the exit code, 1 where a kernel was found wrong or failed. Raises CommandError."""
    _check(request)
    chosen, dtype = _chosen(request), getattr(torch, request.dtype)
    with _disk_errors(request.out):
        if request.check:
            options = (request.out, request.jobs, request.images, request.limit_s)
            return checks.run(chosen, dtype, terminal, *options)
        return (_tune if request.tune else _bench)(request, chosen, dtype, terminal)


def _check(request: Request) -> None:
    if request.out is not None and (request.out.is_dir() or not request.out.absolute().parent.is_dir()):
        raise CommandError(f"--out {request.out}: expected a file in a folder that exists")
    if request.compare is not None and not request.compare.is_file():
        raise CommandError(f"--compare {request.compare}: no such file; expected one that `bench --out` wrote")
    if request.tune and request.op is not None and request.op not in tiles.OPS:
        raise CommandError(f"--tune: {request.op} has no tiles to tune; expected one of the convolutions, or no op")
    if request.resume and request.out is None:
        raise CommandError("--resume goes on with what --out holds; name that file")
    results = {"--out": request.out, "--compare": request.compare, "--json": request.json}
    of_check = {"--jobs": request.jobs, "--images": request.images, "--limit": request.limit_s}
    if request.tune:
        _leave_out("--tune writes the table of tiles", results)
    if request.check:
        timed = {"--tune": request.tune, "--quick": request.quick, "--resume": request.resume}
        _leave_out("--check times nothing", {**results, **timed, "--out": None})
    else:
        _leave_out("without --check there is nothing to spread or to limit", of_check)
    for name, value in of_check.items():
        if value is not None and not value > 0:
            raise CommandError(f"{name} is {value}, expected a positive number")
    if request.tune and not torch.cuda.is_available():
        raise NoDeviceError("--tune times kernels and needs a CUDA GPU; there is none, and the table stays as it is")


def _leave_out(reason: str, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise CommandError(f"{reason}; leave {given[0]} out")


def _chosen(request: Request) -> list[Case]:
    of_op = [case for case in cases.cases() if request.op in (None, case.op)]
    for shape in request.shapes:
        require("--shape", shape, [case.shape for case in of_op])
    chosen = [case for case in of_op if not request.shapes or case.shape in request.shapes]
    if request.short:
        chosen = [case for case in chosen if case.name in cases.SHORT]
        if not chosen:
            raise CommandError(f"--short has none of these; it is {', '.join(cases.SHORT)}")
    return chosen


@contextlib.contextmanager
def _disk_errors(path: Path | None) -> Iterator[None]:
    """A failed write of the results ends the command with one line."""
    try:
        yield
    except OSError as error:
        if path is None:
            raise
        raise CommandError(f"--out {path}: {error}") from None


def _bench(request: Request, chosen: list[Case], dtype: torch.dtype, terminal: Terminal) -> int:
    quick = request.quick or request.short
    where = measure.setup(dtype, quick)
    about = environment.environment(where.device, ROOT)
    then, kept = [], set()
    try:
        if request.compare is not None:
            then = table.load(request.compare, environment.machine(about))
        if request.resume and request.out.exists():
            kept = table.finished(request.out, about, where)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from None
    for line in (*table.heading(about, where), "", table.header()):
        terminal.say(line)
    rows: list[dict[str, Any]] = []

    def keep(items: Iterable[Any]) -> None:
        for item in items:
            rows.append(table.row(item, about))
            if request.out is not None:
                append_jsonl(request.out, rows[-1])

    providers = [name for name in measure.PROVIDERS if not (quick and name == measure.MAX_AUTOTUNE)]
    ahead, facts = collections.deque(case for case in chosen if case.name not in kept), []
    failed = down = False
    while ahead and not down:
        case = ahead.popleft()
        results = measure.measure(case, where, providers)
        keep(results)
        ours = [r for r in results if r.provider == measure.OURS]
        failed |= any(r.wrong for r in results) or (where.on_gpu and any(not r.samples_us for r in ours))
        for line in table.lines(results):
            terminal.say(line)
        if where.on_gpu and any(r.samples_us for r in ours):
            try:
                facts += (found := kernel_facts.loaded_facts(case, where))
            except Exception as error:  # they are an extra: without them the timings stand
                terminal.warn(f"{case.name}: no facts of its kernels: {type(error).__name__}: {error}")
            else:
                keep(found)
        down = measure.lost(where.device)
    if not where.on_gpu:
        gpus = kernel_facts.DEFAULT_GPUS[1:2] if quick else (*kernel_facts.DEFAULT_GPUS, *kernel_facts.table_gpus())
        terminal.say("")
        terminal.say(f"compiling the kernels of {len(chosen)} cases for {', '.join(gpu.name for gpu in gpus)} ...")
        keep(facts := kernel_facts.kernel_facts(chosen, gpus, dtype))
    for line in table.fact_lines(facts):
        terminal.say(line)
    changes = table.changes(then, rows)
    if request.compare is not None:
        for line in map(str, changes) if changes else [f"{request.compare} has none of these cases"]:
            terminal.say(line)
    if request.json:
        flat = [change._asdict() | {"verdict": change.verdict._asdict()} for change in changes]
        terminal.put(json.dumps({"schema": table.SCHEMA, "rows": rows, "changes": flat}))
    if down:
        terminal.warn("a kernel has brought the device down for this process; what is left is run by another")
        failed |= any(_rest(request, ((case.op, case.shape) for case in ahead)))
    return 1 if failed else 0


def _rest(request: Request, problems: Iterable[tuple[str, str]]) -> list[int]:
    """The same command for some ops and shapes, in a process an op that has the device anew; the exit codes."""
    shapes: dict[str, list[str]] = {}
    for op, shape in dict.fromkeys(problems):
        shapes.setdefault(op, []).append(f"--shape={shape}")
    options = ["--dtype", request.dtype]
    options += [f"--{name}" for name in ("tune", "quick", "short") if getattr(request, name)]
    if request.out is not None:
        options += [f"--out={request.out.absolute()}", "--resume"]
    command = [sys.executable, "-m", "profiling", "bench"]
    return [subprocess.run([*command, op, *of_op, *options], cwd=ROOT).returncode for op, of_op in shapes.items()]


def _tune(request: Request, chosen: list[Case], dtype: torch.dtype, terminal: Terminal) -> int:
    import triton

    reason = jit.unavailable(torch.device("cuda", torch.cuda.current_device()))
    if reason:
        raise NoDeviceError(f"--tune: {reason}")
    problems = dict.fromkeys((case.op, case.shape) for case in chosen if case.op in tiles.OPS)
    if not problems:
        raise CommandError("--tune: there is no convolution of that shape")
    before = tiles.load()
    ahead = tuning.Precompiler()
    backend = tuning.CudaBackend(measure.setup(dtype, request.quick or request.short), ahead)
    terminal.say(f"tuning {len(problems)} convolutions on {backend.gpu.name}, triton {triton.__version__}")
    # Those that the table lacks come first, so that a command that was interrupted goes on.
    known = {entry[:4] for entry in before}
    ordered = sorted(problems, key=lambda problem: (backend.gpu.name, *problem, request.dtype) in known)
    try:
        tuned = tuning.tune(
            backend,
            [(op, parse(shape)) for op, shape in ordered],
            dtype,
            triton.__version__,
            terminal.say,
            lambda measured: tuning.keep(tuning.refreshed(before, measured)),
        )
    finally:
        ahead.close()
    differences = tuning.changed(before, tuned.entries)
    for line in differences or ["no tile changed"]:
        terminal.say(line)
    wrong = sum(refusal.reason.startswith("wrong") for refusal in tuned.refused)
    terminal.say(
        f"{len(tuned.entries)} entries measured, {len(differences)} of them new or different; "
        f"{len(tuned.refused)} tiles refused, {wrong} of them wrong; written to {tiles.PATH}"
    )
    if not tuned.left:
        return 0
    terminal.warn("a tile has brought the device down for this process; what is left is tuned by another")
    return max(_rest(request, ((op, str(shape)) for op, shape in tuned.left)))
