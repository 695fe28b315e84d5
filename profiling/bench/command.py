"""`python -m profiling bench`: what was asked for is checked before torch is imported, then measured and kept."""

import collections
import contextlib
import difflib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiling import ROOT
from profiling.device.specifications import DTYPES
from profiling.output.errors import CommandError, NoDeviceError

if TYPE_CHECKING:
    import torch

    from profiling.bench.case import Case
    from profiling.output.terminal import Terminal

OPS = (
    "augment",
    "conv_fprop",
    "bn_stats",
    "bn_stats_add",
    "bn_finalize",
    "bn_apply",
    "bn_relu",
    "bn_backward_reduce",
    "bn_coefficients",
    "bn_backward_apply",
    "bn_backward",
    "conv_dgrad",
    "conv_wgrad",
)


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


def run(request: Request, terminal: "Terminal") -> int:
    """Do what was asked; the exit code, 1 where a kernel was found wrong or failed. Raises CommandError."""
    _check(request)
    import torch

    if request.tune and not torch.cuda.is_available():
        raise NoDeviceError("--tune times kernels and needs a CUDA GPU; there is none, and the table stays as it is")
    from profiling.bench import cases

    chosen = _chosen(cases.cases(), request)
    dtype = getattr(torch, request.dtype)
    if request.check:
        from profiling.bench import checks

        how = checks.How(request.jobs, request.images, request.limit_s, request.out)
        with _disk_errors(request.out):
            return checks.run(chosen, dtype, how, terminal)
    return _tune(request, chosen, dtype, terminal) if request.tune else _bench(request, chosen, dtype, terminal)


def _check(request: Request) -> None:
    _require("op", request.op, OPS)
    _require("--dtype", request.dtype, DTYPES)
    if request.out is not None and (request.out.is_dir() or not request.out.absolute().parent.is_dir()):
        raise CommandError(f"--out {request.out}: expected a file in a folder that exists")
    if request.compare is not None and not request.compare.is_file():
        raise CommandError(f"--compare {request.compare}: no such file; expected one that `bench --out` wrote")
    if request.tune and request.op is not None and not request.op.startswith("conv_"):
        raise CommandError(f"--tune: {request.op} has no tiles to tune; expected one of the convolutions, or no op")
    if request.resume and request.out is None:
        raise CommandError("--resume goes on with what --out holds; name that file")
    results = {"--out": request.out, "--compare": request.compare, "--json": request.json}
    if request.tune:
        _leave_out("--tune writes the table of tiles", results)
    if request.check:
        timed = {"--tune": request.tune, "--quick": request.quick, "--resume": request.resume}
        _leave_out("--check times nothing", {**results, **timed, "--out": None})
    else:
        of_check = {"--jobs": request.jobs, "--images": request.images, "--limit": request.limit_s}
        _leave_out("without --check there is nothing to spread or to limit", of_check)
    for name, value in {"--jobs": request.jobs, "--images": request.images, "--limit": request.limit_s}.items():
        if value is not None and not value > 0:
            raise CommandError(f"{name} is {value}, expected a positive number")


def _leave_out(reason: str, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise CommandError(f"{reason}; leave {given[0]} out")


def _require(what: str, name: str | None, known: Iterable[str]) -> None:
    known = tuple(dict.fromkeys(known))
    if name is None or name in known:
        return
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]}?" if nearest else f"expected one of {', '.join(known)}"
    raise CommandError(f"{what} {name!r} is unknown; {hint}")


def _chosen(all_cases: Iterable["Case"], request: Request) -> list["Case"]:
    of_op = [case for case in all_cases if request.op in (None, case.op)]
    for shape in request.shapes:
        _require("--shape", shape, [case.shape for case in of_op])
    chosen = [case for case in of_op if not request.shapes or case.shape in request.shapes]
    if request.short:
        from profiling.bench.cases import SHORT

        chosen = [case for case in chosen if case.name in SHORT]
        if not chosen:
            raise CommandError(f"--short has none of these; it is {', '.join(SHORT)}")
    return chosen


def _bench(request: Request, chosen: list["Case"], dtype: "torch.dtype", terminal: "Terminal") -> int:
    from profiling.bench import table
    from profiling.bench.kernel_facts import loaded_facts
    from profiling.bench.measure import MAX_AUTOTUNE, OURS, PROVIDERS, lost, measure, setup
    from profiling.device.environment import environment, machine
    from profiling.output.files import append_jsonl

    quick = request.quick or request.short
    where = setup(dtype, quick)
    about = environment(where.device, ROOT)
    then, kept = [], set()
    try:
        if request.compare is not None:
            then = table.load(request.compare, machine(about))
        if request.resume and request.out.exists():
            kept = table.finished(request.out, about, where)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from None
    for line in (*table.heading(about, where), "", table.header()):
        terminal.say(line)
    rows: list[dict[str, Any]] = []
    failed = False

    def keep(items: Iterable[Any]) -> None:
        for item in items:
            rows.append(table.row(item, about))
            if request.out is not None:
                append_jsonl(request.out, rows[-1])

    providers = [name for name in PROVIDERS if not (quick and name == MAX_AUTOTUNE)]
    ahead, facts, down = collections.deque(case for case in chosen if case.name not in kept), [], False
    with _disk_errors(request.out):
        while ahead and not down:
            case = ahead.popleft()
            results = measure(case, where, providers)
            keep(results)
            failed |= any(r.wrong or (where.on_gpu and r.provider == OURS and not r.samples_us) for r in results)
            for line in table.lines(results):
                terminal.say(line)
            if where.on_gpu and any(r.provider == OURS and r.samples_us for r in results):
                try:
                    found = loaded_facts(case, where)
                except Exception as error:  # they are an extra: without them the timings stand
                    terminal.warn(f"{case.name}: no facts of its kernels: {type(error).__name__}: {error}")
                else:
                    facts += found
                    keep(found)
            down = lost(where.device)
        if not where.on_gpu:
            facts = _compiled(chosen, dtype, quick, terminal)
            keep(facts)
    for line in table.fact_lines(facts):
        terminal.say(line)
    changes = table.changes(then, rows)
    if request.compare is not None:
        _show_changes(changes, request.compare, terminal)
    if request.json:
        terminal.put(json.dumps({"schema": table.SCHEMA, "rows": rows, "changes": [_flat(c) for c in changes]}))
    if down:
        terminal.warn("a kernel has brought the device down for this process; what is left is run by another")
        failed |= any(_rest(request, ((case.op, case.shape) for case in ahead)))
    return 1 if failed else 0


def _compiled(chosen: list["Case"], dtype: "torch.dtype", quick: bool, terminal: "Terminal") -> list[Any]:
    """What the compiler says of the kernels, for GPUs that are not here."""
    from profiling.bench.kernel_facts import DEFAULT_GPUS, kernel_facts, table_gpus

    gpus = DEFAULT_GPUS[1:2] if quick else (*DEFAULT_GPUS, *table_gpus())
    terminal.say("")
    terminal.say(f"compiling the kernels of {len(chosen)} cases for {', '.join(gpu.name for gpu in gpus)} ...")
    return kernel_facts(chosen, gpus, dtype)


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


def _flat(change: Any) -> dict[str, Any]:
    return change._asdict() | {"verdict": change.verdict._asdict()}


def _show_changes(changes: list[Any], path: Path, terminal: "Terminal") -> None:
    if not changes:
        terminal.say(f"{path} has none of these cases")
    for c in changes:
        v = c.verdict
        terminal.say(
            f"{c.case:<50} {c.mode:<4}  {c.provider:<19}  {c.then_us:,.1f} -> {c.now_us:,.1f} us  "
            f"{v.speedup:.2f} [{v.low:.2f}, {v.high:.2f}] {v.word}"
        )


@contextlib.contextmanager
def _disk_errors(path: Path | None) -> Iterator[None]:
    """A failed write of the results ends the command with one line."""
    try:
        yield
    except OSError as error:
        if path is None:
            raise
        raise CommandError(f"--out {path}: {error}") from None


def _tune(request: Request, chosen: list["Case"], dtype: "torch.dtype", terminal: "Terminal") -> int:
    import torch
    import triton

    from kernels import jit, tiles
    from kernels.conv_shape import parse
    from profiling.bench.measure import setup
    from profiling.bench.tuning import CudaBackend, Precompiler, changed, keep, refreshed, tune

    reason = jit.unavailable(torch.device("cuda", torch.cuda.current_device()))
    if reason:
        raise NoDeviceError(f"--tune: {reason}")
    problems = dict.fromkeys((case.op, case.shape) for case in chosen if case.op in tiles.OPS)
    if not problems:
        raise CommandError("--tune: there is no convolution of that shape")
    before = tiles.load()
    ahead = Precompiler()
    backend = CudaBackend(setup(dtype, request.quick or request.short), ahead)
    terminal.say(f"tuning {len(problems)} convolutions on {backend.gpu.name}, triton {triton.__version__}")
    # Those that the table lacks come first, so that a command that was interrupted goes on.
    known = {entry[:4] for entry in before}
    ordered = sorted(problems, key=lambda problem: (backend.gpu.name, *problem, request.dtype) in known)
    try:
        tuned = tune(
            backend,
            [(op, parse(shape)) for op, shape in ordered],
            dtype,
            triton.__version__,
            terminal.say,
            lambda measured: keep(refreshed(before, measured)),
        )
    finally:
        ahead.close()
    differences = changed(before, tuned.entries)
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
