"""Tiles tried, compiled ahead, timed, refused and chosen, and the table they make; the GPU is a script."""

import contextlib
import os
import types
from dataclasses import replace

import pytest
import torch

from kernels import tiles
from kernels.conv_shape import ConvShape
from kernels.tiles import OPS, Entry, Gpu, Tile
from profiling.bench import tuning
from profiling.bench.ahead_of_time import launches
from profiling.bench.candidates import candidates
from profiling.bench.case import OperandFactory
from profiling.bench.cases import LAYERS
from profiling.bench.measure import Setup
from profiling.bench.timing import QUICK
from profiling.bench.tuning import CudaBackend, Precompiler, Problem, Timings, forced, tune
from profiling.device.nvml import GpuSample

H200, A100, FP16 = Gpu("NVIDIA H200", (9, 0)), Gpu("NVIDIA A100", (8, 0)), torch.float16
CPU = torch.device("cpu")
SHAPE = ConvShape(64, 128, 32, 32, stride=2)
SMALL, LARGE, WIDE = Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 4)


@pytest.fixture(autouse=True)
def empty_table(monkeypatch):
    """Nothing is committed."""
    monkeypatch.setattr(tiles, "_by_key", dict)


@pytest.mark.parametrize("gpu", [A100, H200], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("op", OPS)
def test_candidates_are_legal_bounded_and_of_every_form_that_fits(op, gpu):
    for shape in LAYERS:
        tried = candidates(op, shape, FP16, gpu)
        for tile in tried:
            tile.check(op, shape)
        assert 4 <= len(tried) == len(set(tried)) <= 60, shape
        assert tried[0] == tiles.default_tile(op, shape, FP16, gpu.capability)
        assert gpu is H200 or {(tile.descriptors, tile.form) for tile in tried} == {(False, "rows")}
    if gpu is A100 or op == "conv_wgrad":
        return
    for shape in (ConvShape(64, 64, 32, 32), ConvShape(128, 128, 16, 16), ConvShape(256, 256, 8, 8)):
        tried = candidates(op, shape, FP16, H200)
        prologues = {form: {tile.prologue for tile in tried if tile.form == form} for form in {t.form for t in tried}}
        assert set(prologues) == {"rows", "columns"} | ({"lines"} if shape.C < 256 else set())
        if op == "conv_fprop":
            assert prologues["rows"] == {"fp32", "fp16x2"}
            assert prologues.get("lines", {"fp16x2"}) == {"fp16x2"}
            assert "stored" in prologues["columns"]


def test_candidates_of_wgrad_differ_in_every_field_of_a_tile():
    """One by one from the default, so that a measurement says what each is worth; three taps have three tiles of one
    operand in shared memory: at 4 stages 128 x 64 x 3 has 160 KB and 128 x 128 x 3 would have 256."""
    shape = ConvShape(256, 256, 8, 8)
    tried = candidates("conv_wgrad", shape, FP16, H200)
    default = tried[0]
    assert {(tile.TAPS, tile.num_warps) for tile in tried} == {(1, 4), (3, 4), (1, 8), (3, 8)}
    for name in ("prologue", "num_stages", "SPLIT", "BLOCK_K", "descriptors"):
        others = [t for t in tried if replace(t, **{name: getattr(default, name)}) == default and t != default]
        assert others, name
    assert {tile.prologue for tile in tried} == set(tiles.PROLOGUES)
    assert {tile.prologue for tile in candidates("conv_wgrad", shape, FP16, A100)} == {"fp32", "stored"}
    for tile in tried:
        assert (tile.BLOCK_M + tile.TAPS * tile.BLOCK_N) * tile.BLOCK_K * 2 * tile.num_stages <= 227 * 1024
    assert any(tile.TAPS == 3 and tile.num_stages == 4 for tile in tried)


def test_fp32_keeps_its_default_and_the_table_is_tried_again(monkeypatch):
    for op in OPS:
        assert candidates(op, SHAPE, torch.float32, H200) == [tiles.default_tile(op, SHAPE, torch.float32, (9, 0))]
    odd = Tile(32, 16, 16, 1, 1)
    monkeypatch.setattr(tiles, "_by_key", lambda: {(H200.name, "conv_fprop", str(SHAPE), "float16"): entry(tile=odd)})
    assert candidates("conv_fprop", SHAPE, FP16, H200)[0] == odd


def entry(us: float = 40.0, library_us: float = 50.0, tile: Tile = LARGE, gpu: Gpu = H200) -> Entry:
    return Entry(gpu.name, "conv_fprop", str(SHAPE), "float16", "3.6.0", us, library_us, tile)


@pytest.mark.parametrize(
    ("us", "library_us", "best"),
    [
        ({SMALL: 50.0, LARGE: 40.0, WIDE: 45.0}, 60.0, LARGE),
        ({SMALL: 40.3, LARGE: 40.0}, 60.0, SMALL),
        ({SMALL: 40.5, LARGE: 40.0}, 60.0, LARGE),
        ({LARGE: 90.0}, 60.0, LARGE),
        ({}, 60.0, None),
        ({LARGE: 40.0}, None, None),
    ],
    ids=["fastest", "incumbent_within_noise", "beyond_noise", "wrong_incumbent", "no_tile", "no_library"],
)
def test_selected_tile(us, library_us, best):
    """SMALL is in use."""
    found = tuning.select(H200, Problem("conv_fprop", SHAPE, "", (SMALL,)), FP16, "3.6.0", Timings(us, library_us, {}))
    assert found == (None if best is None else entry(us[best], library_us, best))


def test_the_table_keeps_what_was_not_measured_and_is_written_whole(tmp_path):
    table = tuning.refreshed((entry(), entry(gpu=A100)), [entry(us=30.0, tile=WIDE)])
    assert set(table) == {entry(us=30.0, tile=WIDE), entry(gpu=A100)}
    path = tmp_path / "tiles.json"
    tuning.keep(table, path)
    assert set(tiles.load(path)) == set(table)
    with pytest.raises(ValueError, match="us is nan"):
        tuning.keep([entry(us=float("nan"))], path)
    assert set(tiles.load(path)) == set(table), "the old one is intact"


NAME = f"conv_fprop {SHAPE} float16"


@pytest.mark.parametrize(
    ("measured", "line"),
    [
        (entry(us=41.0), None),
        (entry(gpu=A100), f"new: {NAME}: ours (ours 40.0 us, library 50.0 us), 128x128x64"),
        (entry(tile=WIDE), f"changed: {NAME}: ours, 128x128x64 8 warps 3 stages pointers -> "),
        (entry(us=55.0), "-> library (ours 55.0 us, library 50.0 us)"),
    ],
    ids=["only_the_time", "new_gpu", "another_tile", "the_library_now"],
)
def test_changes_are_said(measured, line):
    lines = tuning.changed([entry()], [measured])
    assert lines == [] if line is None else (len(lines) == 1 and line in lines[0])


class ScriptedBackend:
    """The default tile takes 100 us, the rest are slower by their place; the first of the rest is wrong. What happens
    to each op instead may be among `fates`, in order: an exception to raise, or timings."""

    gpu = H200

    def __init__(self, library_us: float | None = 90.0, fates=()):
        self.library_us, self.fates, self.cases, self.prepared = library_us, [*fates], [], []

    def prepare(self, problems):
        self.prepared += [problem.case().name for problem in problems]

    def time(self, case, tried):
        self.cases.append(case.name)
        fate = self.fates.pop(0) if self.fates else None
        if isinstance(fate, Exception):
            raise fate
        us = {tile: 100.0 + i for i, tile in enumerate(tried) if i != 1}
        return fate or Timings(us, self.library_us, {tried[1]: "wrong: output 0 is off"})


def tuned(backend, ops=OPS):
    """(what was tuned, what was said, how many entries were kept each time)."""
    said, kept = [], []
    found = tune(backend, [(op, SHAPE) for op in ops], FP16, "3.6.0", said.append, lambda all_: kept.append(len(all_)))
    return found, said, kept


def test_tuning_measures_the_fused_case_of_every_problem():
    backend = ScriptedBackend()
    (measured, refused, left), said, kept = tuned(backend)
    variants = ("prologue,statistics", "mask,sums", "prologue")
    assert backend.cases == [f"{op}[{variant}] {SHAPE}" for op, variant in zip(OPS, variants, strict=True)]
    assert backend.prepared == backend.cases
    assert [(e.op, e.us, e.library_us) for e in measured] == [(op, 100.0, 90.0) for op in OPS]
    assert [(r.op, r.shape, r.reason) for r in refused] == [(op, SHAPE, "wrong: output 0 is off") for op in OPS]
    assert {str(refusal) for refusal in refused} < {*said}
    assert sum("library (ours 100.0 us, library 90.0 us)" in line for line in said) == 3
    assert (left, kept) == ([], [1, 2, 3])
    backend = ScriptedBackend()
    tune(backend, [("conv_dgrad", ConvShape(64, 128, 32, 32, 1, 2))], FP16, "3.6.0", said.append)
    assert backend.cases == ["conv_dgrad 64x32x32-128x1x1-s2"], "a projection's is masked elsewhere"


def test_a_problem_that_fails_leaves_the_table_and_does_not_end_the_tuning():
    fates = torch.OutOfMemoryError("no room\nadvice"), None, RuntimeError("cuDNN says no")
    found, said, kept = tuned(ScriptedBackend(fates=fates))
    assert ([entry.op for entry in found.entries], kept) == ([OPS[1]], [1])
    assert f"{OPS[0]} {SHAPE}: not measured: OutOfMemoryError: no room" in said
    assert f"{OPS[2]} {SHAPE}: not measured: RuntimeError: cuDNN says no" in said
    found, said, _ = tuned(ScriptedBackend(library_us=None), OPS[:1])
    assert found.entries == []
    assert said[-1].endswith("nothing measured, the table stays as it is")


def test_a_tile_that_loses_the_device_is_named_and_the_rest_is_left():
    fault = Timings({}, None, {LARGE: "AcceleratorError: an illegal memory access"}, lost=True)
    found, said, _ = tuned(ScriptedBackend(fates=(None, fault)))
    assert found.left == [(OPS[2], SHAPE)]
    assert f"{OPS[1]} {SHAPE}: 128x128x64 8 warps 3 stages pointers refused: {fault.refused[LARGE]}" in said


def test_a_forced_tile_is_forced_and_let_go():
    original = tiles.tile
    with contextlib.suppress(KeyError), forced(WIDE):
        assert tiles.tile("conv_fprop", SHAPE, FP16, H200) == WIDE
        raise KeyError
    assert tiles.tile is original


class SteadyTimer:
    """Every call runs, is noted, and takes 5 us; those of the function timed first take 6."""

    source = "script"

    def __init__(self):
        self.timed = []

    def for_mode(self, mode):
        assert mode == "cold"
        return self.sample

    def sample(self, run):
        self.timed.append(run)
        run()
        return 6.0 if run is self.timed[0] else 5.0


def planted_case(monkeypatch, faults: dict[Tile, object], **changes):
    """(a small case whose kernel has a fault at the tiles of `faults`: it raises, is wrong by a factor, or spills;
    every y of it)."""
    make, variant = tuning.FUSED["conv_fprop"]
    case = make(ConvShape(16, 16, 4, 4), variant)
    kernels, results = [], []

    def planted(*operands):
        fault = faults.get(tiles.tile("conv_fprop", SHAPE, FP16, H200))
        if isinstance(fault, Exception):
            raise fault
        kernels.append(types.SimpleNamespace(n_spills=fault if isinstance(fault, int) else 0))
        y, partials = case.ours(*operands)
        results.append(y * fault if isinstance(fault, float) else y)
        return results[-1], partials

    @contextlib.contextmanager
    def launched():
        kernels.clear()
        yield kernels

    monkeypatch.setattr(tuning, "launched", launched)
    return replace(case, ours=planted, **changes), results


def test_the_backend_refuses_faulty_tiles_and_times_the_others(monkeypatch, device):
    """With the interpreter for a GPU: two tiles that are right, and one with each fault.

    The tile in use is in the final, though it is slower than the only finalist.
    """
    monkeypatch.setattr(tuning, "FINALISTS", 1)
    right, also, raising, wrong, spilling = (Tile(32 * 2**i, 16, 16, 4, 1) for i in range(5))
    case, results = planted_case(monkeypatch, {raising: RuntimeError("out of resource"), wrong: 1.1, spilling: 118})
    timer = SteadyTimer()
    backend = CudaBackend(Setup(device, FP16, 2, QUICK, timer, gpu=lambda: GpuSample(reasons=("power cap",))))
    timings = backend.time(case, [right, also, raising, wrong, spilling])
    assert (timings.us, timings.power_capped) == ({also: 5.0, right: 6.0}, {right: 1.0, also: 1.0})
    assert (timings.library_us, timings.lost) == (5.0, False)
    assert timings.refused.pop(wrong).startswith("wrong: output 0 is off by")
    spills = "it spills 472 bytes a thread into local memory"
    assert timings.refused == {raising: "RuntimeError: out of resource", spilling: spills}
    assert len(set(timer.timed)) == 3, "two tiles and the library"
    assert all(y.isnan().all() for y in results[:4]), "the next tile cannot inherit a right result"
    assert not results[4].isnan().any(), "what is timed is left alone"


def test_the_backend_names_a_failing_library_and_blames_none_after_a_lost_device(monkeypatch, device):
    right, raising, after = (Tile(32 * 2**i, 16, 16, 4, 1) for i in range(3))
    faults = {raising: RuntimeError("out of resource")}
    case, _ = planted_case(monkeypatch, faults, hybrid=lambda *operands: 1 / 0)
    backend = CudaBackend(Setup(device, FP16, 2, QUICK, SteadyTimer()))
    timings = backend.time(case, [right, raising])
    assert (set(timings.us), timings.library_us) == ({right}, None)
    assert timings.refused == {raising: "RuntimeError: out of resource", None: "ZeroDivisionError: division by zero"}
    monkeypatch.setattr(tuning, "lost", lambda device: True)
    timings = backend.time(case, [right, raising, after])
    assert (timings.us, set(timings.refused), timings.lost) == ({}, {raising}, True)
    monkeypatch.setattr(tuning.Correctness, "library_refusal", lambda gate, result: "off")
    with pytest.raises(RuntimeError, match="the library itself is off"):
        backend.time(case, [right])


def test_candidates_are_compiled_ahead_in_the_order_of_timing(monkeypatch):
    log = []
    ahead = types.SimpleNamespace(submit=lambda *about: log.append(about), wait=lambda key: log.append(("waited", key)))
    backend = CudaBackend(Setup(CPU, FP16, 2, QUICK, SteadyTimer()), ahead)
    problems = [tuning._problem(op, SHAPE, FP16, H200) for op in ("conv_fprop", "conv_wgrad")]
    backend.prepare(problems)
    assert log == [
        (p.case().name, tuning.compile_candidates, p._replace(candidates=(tile,)), FP16, 2, "cpu")
        for p in problems
        for tile in p.candidates
    ]
    with contextlib.suppress(ZeroDivisionError):
        monkeypatch.setattr(tuning, "Correctness", lambda *arguments: 1 / 0)
        backend.time(problems[0].case(), problems[0].candidates)
    assert log[-1] == ("waited", problems[0].case().name)


@pytest.mark.parametrize("op", OPS)
def test_compiled_ahead_is_what_will_be_launched(op):
    """Types, divisibility and constants alike, or the cache on the disk would not have it."""
    problem = tuning._problem(op, ConvShape(64, 64, 8, 8), FP16, H200)
    problem = problem._replace(candidates=problem.candidates[:3])
    with launches(H200) as ahead:
        tuning.compile_candidates(problem, FP16, 2, "cpu")
    case = problem.case()
    operands = case.operands(OperandFactory(2, CPU, FP16))
    with torch.no_grad(), launches(H200) as launched:
        for tile in problem.candidates:
            with forced(tile):
                case.ours(*operands)
    assert [build.key() for build in ahead] == [build.key() for build in launched]
    assert len({build.key() for build in ahead}) >= 3


def test_work_submitted_has_ended_when_waited_for(tmp_path):
    """In other processes, badly too; one that dies costs no more than its work, and after close nothing begins."""
    pool = Precompiler(2)
    for name in ("one", "two", "no/parent"):
        pool.submit("work", os.mkdir, str(tmp_path / name))
    for key in ("work", "work", "never submitted"):
        pool.wait(key)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    for function, argument in ((os._exit, 1), (os.mkdir, str(tmp_path / "after"))):
        pool.submit("dead", function, argument)
        pool.wait("dead")
    pool.close()
    closed = Precompiler(2)
    closed.close()
    closed.submit("late", os.mkdir, str(tmp_path / "late"))
    closed.wait("late")
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize(("cores", "processes"), [(16, 8), (64, 8), (6, 3), (2, 0), (None, 0)])
def test_half_of_the_cores_compile_ahead(monkeypatch, cores, processes):
    made = []
    monkeypatch.setattr(tuning.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(tuning.concurrent.futures, "ProcessPoolExecutor", lambda count, *more: made.append(count))
    Precompiler()
    assert made == [processes] * (processes > 0)
