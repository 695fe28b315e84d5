"""The fastest tile, measured: refreshes the committed table of `kernels.tiles`.

For every convolution op and layer shape, with all that the networks fuse into it, the results of a bounded list of
tiles are compared with float64's; a tile that is wrong or spills is refused by name. The others are timed briefly, and
then the best few beside the library's convolution with our batch-norm kernels around it. Pure functions decide by the
timings; the GPU is behind `CudaBackend`.
"""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels import tiles
from kernels.contract import dtype_name
from kernels.conv_shape import ConvShape
from kernels.jit import nothing_launched
from kernels.tiles import Entry, Gpu, Tile
from profiling.bench.ahead_of_time import replaced
from profiling.bench.candidates import candidates
from profiling.bench.case import Case, Correctness, OperandFactory, tensors
from profiling.bench.conv_cases import conv_dgrad_case, conv_fprop_case, conv_wgrad_case
from profiling.bench.kernel_facts import launched, local_bytes
from profiling.bench.measure import Setup, lost, searching
from profiling.bench.timing import QUICK, Samples, first_line, interleave, summarise
from profiling.output.files import write_json

FINALISTS = 3
LIBRARY = "library"
KEEP_WITHIN = 0.01
"""A tile stays in the table unless another is faster by more than this."""
FUSED = {
    "conv_fprop": (conv_fprop_case, "prologue,statistics"),
    "conv_dgrad": (conv_dgrad_case, "mask,sums"),
    "conv_wgrad": (conv_wgrad_case, "prologue"),
}


class Timings(NamedTuple):
    """Median microseconds of one op at one shape: by tile, and of the library; None where it could not be measured.

    `refused` has the reason for each tile that is wrong, spills, does not compile or was disturbed, and the library's
    under None. `power_capped` is the share of a tile's samples under the power cap, if any. `lost`: a tile, by an
    illegal access, has lost the device to this process.
    """

    us: dict[Tile, float]
    library_us: float | None
    refused: dict[Tile | None, str]
    power_capped: dict[Tile, float] | None = None
    lost: bool = False


class Refusal(NamedTuple):
    """A tile that was not timed to the end; None stands for the library, or for the op at that shape."""

    op: str
    shape: ConvShape
    tile: Tile | None
    reason: str

    def __str__(self) -> str:
        what = "not measured" if self.tile is None else f"{self.tile} refused"
        return f"{self.op} {self.shape}: {what}: {self.reason}"


class Tuned(NamedTuple):
    """The measured entries, the refusals, and the problems left after the device was lost."""

    entries: list[Entry]
    refused: list[Refusal]
    left: list[tuple[str, ConvShape]]


class Problem(NamedTuple):
    """An op at a layer's shape, and the tiles to try, of which the first is in use."""

    op: str
    shape: ConvShape
    variant: str
    candidates: tuple[Tile, ...]

    def case(self) -> Case:
        """The case to time."""
        return FUSED[self.op][0](self.shape, self.variant)


def select(gpu: Gpu, problem: Problem, dtype: torch.dtype, triton: str, timings: Timings) -> Entry | None:
    """The table's entry by the timings; None if no tile, or not the library, could be measured."""
    if not timings.us or timings.library_us is None:
        return None
    incumbent, best = problem.candidates[0], min(timings.us, key=timings.us.__getitem__)
    if incumbent in timings.us and timings.us[incumbent] <= timings.us[best] * (1 + KEEP_WITHIN):
        best = incumbent
    us, library_us = round(timings.us[best], 3), round(timings.library_us, 3)
    return Entry(gpu.name, problem.op, str(problem.shape), dtype_name(dtype), triton, us, library_us, best)


def refreshed(entries: Sequence[Entry], measured: Sequence[Entry]) -> tuple[Entry, ...]:
    """The table with `measured` in place of its entries of the same GPU, op, shape and dtype."""
    return tuple(({entry[:4]: entry for entry in entries} | {entry[:4]: entry for entry in measured}).values())


def keep(entries: Sequence[Entry], path: Path = tiles.PATH) -> None:
    """Write `entries` as the table, whole or not at all; `tiles.load` reads them back. Raises OSError."""
    write_json(path, tiles.document(entries))


def changed(entries: Sequence[Entry], measured: Sequence[Entry]) -> list[str]:
    """A line for each new or different entry in `measured`; times alone are no difference."""
    before = {entry[:4]: entry for entry in entries}
    lines = []
    for entry in measured:
        old = before.get(entry[:4])
        if old is None:
            lines.append(f"new: {entry.op} {entry.shape} {entry.dtype}: {_measured(entry)}")
        elif old.tile != entry.tile or _choice(old) != _choice(entry):
            what = f"{_choice(old)}, {old.tile} -> {_measured(entry)}"
            lines.append(f"changed: {entry.op} {entry.shape} {entry.dtype}: {what}")
    return lines


def _choice(entry: Entry) -> str:
    return "library" if entry.library_us < entry.us else "ours"


def _measured(entry: Entry, capped: float | None = None) -> str:
    times = f"ours {entry.us:.1f} us, library {entry.library_us:.1f} us"
    mark = f", power cap in {capped:.0%} of its samples" if capped else ""
    return f"{_choice(entry)} ({times}), {entry.tile}{mark}"


def tune(
    backend: "CudaBackend",
    problems: Sequence[tuple[str, ConvShape]],
    dtype: torch.dtype,
    triton: str,
    say: Callable[[str], None],
    keep: Callable[[list[Entry]], None] = lambda measured: None,
) -> Tuned:
    """Measure every (op, shape) of `problems`. Refusals are said at once; a failure does not end the rest.

    `keep` gets the entries so far after each, in case the last is never reached.
    """
    tuned, planned = Tuned([], [], list(problems)), [_problem(op, shape, dtype, backend.gpu) for op, shape in problems]
    backend.prepare(planned)
    for problem in planned:
        op, shape, _, tried = problem
        tuned.left.pop(0)
        try:
            timings = backend.time(problem.case(), tried)
        except Exception as error:  # out of memory, a failure of the library's own
            timings = Timings({}, None, {None: first_line(error)})
        refused = [Refusal(op, shape, tile, reason) for tile, reason in timings.refused.items()]
        tuned.refused.extend(refused)
        for refusal in refused:
            say(str(refusal))
        entry = select(backend.gpu, problem, dtype, triton, timings)
        if entry is None:
            say(f"{op} {shape}: nothing measured, the table stays as it is")
        else:
            tuned.entries.append(entry)
            keep(tuned.entries)
            say(f"{op} {shape}: {_measured(entry, (timings.power_capped or {}).get(entry.tile))}")
        if timings.lost:
            break
    return tuned


def _problem(op: str, shape: ConvShape, dtype: torch.dtype, gpu: Gpu) -> Problem:
    variant = FUSED[op][1]
    if op == "conv_dgrad" and shape.R == 1:
        variant = ""  # a projection's gradient is masked where it joins that of the block's first convolution
    return Problem(op, shape, variant, tuple(candidates(op, shape, dtype, gpu)))


MOST_PROCESSES = 8
"""Limit of a precompiler's processes: each holds a CUDA context."""


class Precompiler:
    """Compiles candidates in other processes, half of the cores: on a cold cache that takes most of the time.

    The timing process finds the code in Triton's cache on the disk, and there names a candidate that does not compile.
    Without a second process the caller compiles.
    """

    def __init__(self, processes: int | None = None):
        processes = min(MOST_PROCESSES, (os.cpu_count() or 1) // 2) if processes is None else processes
        self._pool = None
        if processes > 1:
            spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
            interrupts_are_the_callers = signal.signal, (signal.SIGINT, signal.SIG_IGN)
            self._pool = concurrent.futures.ProcessPoolExecutor(processes, spawn, *interrupts_are_the_callers)
        self._futures: dict[Hashable, list[concurrent.futures.Future]] = {}

    def submit(self, key: Hashable, function: Callable[..., None], *arguments: object) -> None:
        """Let a process import and call `function`; in the order of submission."""
        if self._pool is not None:
            with contextlib.suppress(BrokenProcessPool, RuntimeError):
                self._futures.setdefault(key, []).append(self._pool.submit(function, *arguments))

    def wait(self, key: Hashable) -> None:
        """Wait for the end, good or bad, of all work submitted under `key`."""
        concurrent.futures.wait(self._futures.pop(key, ()))

    def close(self) -> None:
        """Begin nothing more."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


class CudaBackend:
    """Times on the GPU of `setup`, with a cold cache: in training a layer's operands have left it by their turn.

    `ahead` compiles the prepared candidates in the meantime; its owner closes it.
    """

    def __init__(self, setup: Setup, ahead: Precompiler | None = None):
        self.setup, self.gpu, self.ahead = setup, tiles.gpu_of(setup.device), ahead

    def prepare(self, problems: Sequence[Problem]) -> None:
        """Learn the problems to be timed, in this order."""
        if self.ahead is not None:
            about = self.setup.dtype, self.setup.batch, str(self.setup.device)
            for problem in problems:
                for tile in problem.candidates:
                    one = problem._replace(candidates=(tile,))
                    self.ahead.submit(problem.case().name, compile_candidates, one, *about)

    def time(self, case: Case, candidates: Sequence[Tile]) -> Timings:
        """Check the candidates for a case, look at every right one, then time the best few and the library by the plan.

        The first candidate, the tile in use, is timed by the plan too, unless it is refused.
        """
        setup = self.setup
        if self.ahead is not None:
            self.ahead.wait(case.name)
        operands = case.operands(OperandFactory(setup.batch, setup.device, setup.dtype))
        gate = Correctness(case, operands, setup.dtype)
        baseline = case.library(*operands)
        if wrong := gate.library_refusal(baseline):
            raise RuntimeError(f"{case.name}: the library itself is {wrong}")
        gate.baseline = tensors(baseline)
        runs, refused = {tile: _with_tile(case, operands, tile) for tile in candidates}, {}
        for tile, run in runs.items():
            try:
                reason = _flaw(run, case, gate)
            except Exception as error:  # out of resources, or a tile that does not compile
                reason = first_line(error)
            if reason:
                refused[tile] = reason
                if lost(setup.device):
                    return Timings({}, None, refused, lost=True)
        timer = setup.timer.for_mode("cold")
        right = {tile: run for tile, run in runs.items() if tile not in refused}
        looked_at = _medians(interleave(right, timer, QUICK, setup.gpu), refused)
        finalists = [*sorted(looked_at, key=looked_at.__getitem__)[:FINALISTS], candidates[0]]
        final: dict[Any, Callable] = {tile: runs[tile] for tile in dict.fromkeys(finalists) if tile in looked_at}
        final[LIBRARY] = searching(lambda: case.hybrid(*operands), True)
        with contextlib.suppress(Exception):  # it fails again, and is refused by name, in its timing
            final[LIBRARY]()
        taken = interleave(final, timer, setup.plan, setup.gpu)
        library_us = _medians({None: taken.pop(LIBRARY)}, refused).get(None)
        capped = {tile: samples.power_capped_share for tile, samples in taken.items() if samples.power_capped_share}
        return Timings(_medians(taken, refused), library_us, refused, capped, lost(setup.device))


def compile_candidates(problem: Problem, dtype: torch.dtype, batch: int, device: str) -> None:
    """Compile the kernels of each candidate as `CudaBackend.time` will launch them."""
    case = problem.case()
    operands = case.operands(OperandFactory(batch, torch.device(device), dtype, untouched=True))
    for tile in problem.candidates:
        with torch.no_grad(), nothing_launched():
            _with_tile(case, operands, tile)()


def _flaw(run: Callable[[], Any], case: Case, gate: Correctness) -> str | None:
    """The flaw of a tile, None if it has none: a wrong result, or registers that it spills."""
    with launched() as kernels:
        result = run()
    wrong = gate.refusal(case.comparable(result))
    for x in tensors(result):
        x.fill_(torch.nan)  # the next tile gets this memory, and an element that it does not write must look wrong
    if wrong:
        return f"wrong: {wrong}"
    spilled = max(map(local_bytes, kernels), default=0)
    return f"it spills {spilled} bytes a thread into local memory" if spilled else None


def _medians(taken: dict[Tile, Samples], refused: dict[Tile, str]) -> dict[Tile, float]:
    """Median microseconds; a tile without enough samples, or None for the library, goes to `refused`."""
    refused |= {tile: samples.refusal() for tile, samples in taken.items() if samples.refusal()}
    return {tile: summarise(samples.us).median for tile, samples in taken.items() if not samples.refusal()}


def _with_tile(case: Case, operands: tuple, tile: Tile) -> Callable[[], Any]:
    """The case's op as if the table said `tile`."""

    def run() -> Any:
        with forced(tile):
            return case.ours(*operands)

    return run


def forced(tile: Tile) -> contextlib.AbstractContextManager[None]:
    """Let every convolution in the context take `tile`."""
    return replaced(tiles, "tile", lambda op, shape, dtype, gpu: tile)
