"""`python -m profiling bench`: what was asked for is checked before torch is imported, then measured and kept."""

import contextlib
import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiling.errors import CommandError, NoDeviceError

if TYPE_CHECKING:
    import torch

    from profiling.case import Case
    from profiling.console import Terminal

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("float16", "bfloat16", "float32")
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


def run(request: Request, terminal: "Terminal") -> int:
    """Do what was asked; the exit code, 1 where a kernel was found wrong or failed. Raises CommandError."""
    _check(request)
    import torch

    if request.check:
        return _verify(request, getattr(torch, request.dtype), terminal)

    if request.tune and not torch.cuda.is_available():
        raise NoDeviceError("--tune times kernels and needs a CUDA GPU; there is none, and the table stays as it is")
    from profiling import cases

    chosen = _chosen(cases.cases(), request)
    dtype = getattr(torch, request.dtype)
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
        _leave_out("--check times nothing", {**results, "--tune": request.tune, "--quick": request.quick})


def _leave_out(reason: str, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise CommandError(f"{reason}; leave {given[0]} out")


def _verify(request: Request, dtype: "torch.dtype", terminal: "Terminal") -> int:
    """Run every kernel once on few images, and hold it against float64."""
    import torch

    from kernels import jit
    from profiling import cases, gate
    from profiling.bench import QUICK_CPU_BATCH, first_line

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    reason = jit.unavailable(device)
    if reason:
        raise NoDeviceError(f"--check runs the kernels: {reason}")
    wrong, chosen = 0, _chosen(cases.cases(), request)
    for case in chosen:
        try:
            refusal = gate.verified(case, device, dtype, QUICK_CPU_BATCH)
        except Exception as error:  # whatever a compiler raises is the finding
            refusal = first_line(error)
        wrong += refusal is not None
        terminal.say(f"{case.name:<50} {refusal or 'right'}")
    terminal.say(f"{len(chosen)} cases of {QUICK_CPU_BATCH} images on {device}, {wrong} of them wrong")
    return 1 if wrong else 0


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
    return [case for case in of_op if not request.shapes or case.shape in request.shapes]


def _bench(request: Request, chosen: list["Case"], dtype: "torch.dtype", terminal: "Terminal") -> int:
    from profiling import bench_records
    from profiling.bench import MAX_AUTOTUNE, OURS, PROVIDERS, measure, setup
    from profiling.environment import environment
    from profiling.kernel_facts import DEFAULT_GPUS, kernel_facts, table_gpus
    from profiling.records import append_jsonl

    where = setup(dtype, request.quick)
    about = environment(where.device, ROOT)
    then, kept = [], set()
    try:
        if request.compare is not None:
            then = bench_records.load(request.compare, bench_records.machine(about))
        if request.resume and request.out.exists():
            kept = bench_records.finished(request.out, about, where)
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from None
    for line in (*bench_records.heading(about, where), "", bench_records.header()):
        terminal.say(line)
    rows: list[dict[str, Any]] = []
    failed = False

    def keep(items: Iterable[Any]) -> None:
        for item in items:
            rows.append(bench_records.row(item, about))
            if request.out is not None:
                append_jsonl(request.out, rows[-1])

    providers = [name for name in PROVIDERS if not (request.quick and name == MAX_AUTOTUNE)]
    with _disk_errors(request.out):
        for case in (case for case in chosen if case.name not in kept):
            results = measure(case, where, providers)
            keep(results)
            failed |= any(r.wrong or (where.on_gpu and r.provider == OURS and not r.samples_us) for r in results)
            for line in bench_records.lines(results):
                terminal.say(line)
        gpus = _here(where.device) if where.on_gpu else (*DEFAULT_GPUS, *table_gpus())
        if request.quick and not where.on_gpu:
            gpus = DEFAULT_GPUS[1:2]
        terminal.say("")
        terminal.say(f"compiling the kernels of {len(chosen)} cases for {', '.join(gpu.name for gpu in gpus)} ...")
        facts = kernel_facts(chosen, gpus, dtype)
        keep(facts)
    for line in bench_records.fact_lines(facts):
        terminal.say(line)
    changes = bench_records.changes(then, rows)
    if request.compare is not None:
        _show_changes(changes, request.compare, terminal)
    if request.json:
        print(json.dumps({"schema": bench_records.SCHEMA, "rows": rows, "changes": [_flat(c) for c in changes]}))
    return 1 if failed else 0


def _here(device: "torch.device") -> tuple:
    from kernels import jit, tiles

    return () if jit.unavailable(device) else (tiles.gpu_of(device),)


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
    from profiling.bench import setup
    from profiling.precompile import Precompiler
    from profiling.tuning import CudaBackend, changed, refreshed, tune

    reason = jit.unavailable(torch.device("cuda", torch.cuda.current_device()))
    if reason:
        raise NoDeviceError(f"--tune: {reason}")
    problems = dict.fromkeys((case.op, case.shape) for case in chosen if case.op in tiles.OPS)
    if not problems:
        raise CommandError("--tune: there is no convolution of that shape")
    before = tiles.load()
    ahead = Precompiler()
    backend = CudaBackend(setup(dtype, request.quick), ahead)
    terminal.say(f"tuning {len(problems)} convolutions on {backend.gpu.name}, triton {triton.__version__}")
    # Those that the table lacks come first, so that a command that was interrupted goes on.
    known = {entry[:4] for entry in before}
    ordered = sorted(problems, key=lambda problem: (backend.gpu.name, *problem, request.dtype) in known)
    try:
        measured = tune(
            backend,
            [(op, parse(shape)) for op, shape in ordered],
            dtype,
            triton.__version__,
            terminal.say,
            lambda measured: tiles.dump(refreshed(before, measured)),
        )
    finally:
        ahead.close()
    differences = changed(before, measured)
    for line in differences or ["no tile changed"]:
        terminal.say(line)
    terminal.say(
        f"{len(measured)} entries measured, {len(differences)} of them new or different; written to {tiles.PATH}"
    )
    return 0
