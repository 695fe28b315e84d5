"""Which tiles are tried, which is chosen and what the table becomes; the GPU is a script."""

import contextlib
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
from profiling.bench.tuning import CudaBackend, Timings, changed, forced, refreshed, select, tune
from profiling.device.nvml import GpuSample

H200, A100, FP16 = Gpu("NVIDIA H200", (9, 0)), Gpu("NVIDIA A100", (8, 0)), torch.float16
CPU = torch.device("cpu")
SHAPE = ConvShape(64, 128, 32, 32, stride=2)
SMALL, LARGE, WIDE = Tile(64, 64, 64, 4, 3), Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 4)


@pytest.fixture(autouse=True)
def empty_table(monkeypatch):
    """What is committed does not matter here."""
    monkeypatch.setattr(tiles, "_by_key", dict)


@pytest.mark.parametrize("gpu", [A100, H200], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("op", OPS)
def test_candidates_are_legal_and_bounded_and_hold_the_default(op, gpu):
    for shape in LAYERS:
        tried = candidates(op, shape, FP16, gpu)
        for tile in tried:
            tile.check(op, shape)
        assert 4 <= len(tried) == len(set(tried)) <= 42, shape
        assert tried[0] == tiles.default_tile(op, shape, FP16, gpu.capability)
        assert gpu is H200 or not any(tile.descriptors for tile in tried)


@pytest.mark.parametrize(
    ("shape", "forms"),
    [
        (ConvShape(64, 64, 32, 32), "rows columns lines"),
        (ConvShape(128, 128, 16, 16), "rows columns lines"),
        (ConvShape(256, 256, 8, 8), "rows columns"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["conv_fprop", "conv_dgrad"])
def test_every_form_is_tried_whose_operands_fit(op, shape, forms):
    tried = candidates(op, shape, FP16, H200)
    assert {tile.form for tile in tried} == set(forms.split())
    assert {tile.form for tile in candidates(op, shape, FP16, A100)} == {"rows"}
    if op == "conv_fprop":
        assert {tile.prologue for tile in tried if tile.form == "lines"} <= {"fp16x2"}
        assert any(tile.prologue == "stored" for tile in tried if tile.form == "columns")


def test_candidates_of_wgrad_differ_in_all_that_a_tile_has():
    """And one by one from the default, so that a measurement says what each is worth."""
    shape = ConvShape(256, 256, 8, 8)
    tried = candidates("conv_wgrad", shape, FP16, H200)
    default = tried[0]
    assert {(tile.TAPS, tile.num_warps) for tile in tried} == {(1, 4), (3, 4), (1, 8), (3, 8)}
    for name in ("prologue", "num_stages", "SPLIT", "BLOCK_K", "descriptors"):
        others = [t for t in tried if replace(t, **{name: getattr(default, name)}) == default and t != default]
        assert others, name
    assert {tile.prologue for tile in tried} == set(tiles.PROLOGUES)
    assert {tile.prologue for tile in candidates("conv_wgrad", shape, FP16, A100)} == {"fp32", "stored"}


def test_three_taps_have_three_tiles_of_one_operand_in_shared_memory():
    """At 4 stages 128 x 64 x 3 has 160 KB and 128 x 128 x 3 would have 256."""
    tried = candidates("conv_wgrad", ConvShape(256, 256, 8, 8), FP16, H200)
    for tile in tried:
        assert (tile.BLOCK_M + tile.TAPS * tile.BLOCK_N) * tile.BLOCK_K * 2 * tile.num_stages <= 227 * 1024
    assert any(tile.TAPS == 3 and tile.num_stages == 4 for tile in tried)


def test_what_the_table_has_is_tried_again(monkeypatch):
    odd = Tile(32, 16, 16, 1, 1)
    monkeypatch.setattr(tiles, "_by_key", lambda: {(H200.name, "conv_fprop", str(SHAPE), "float16"): entry(tile=odd)})
    assert candidates("conv_fprop", SHAPE, FP16, H200)[0] == odd


def test_fp32_keeps_its_default():
    for op in OPS:
        assert candidates(op, SHAPE, torch.float32, H200) == [tiles.default_tile(op, SHAPE, torch.float32, (9, 0))]


def entry(us: float = 40.0, library_us: float = 50.0, tile: Tile = LARGE, gpu: Gpu = H200) -> Entry:
    return Entry(gpu.name, "conv_fprop", str(SHAPE), "float16", "3.6.0", us, library_us, tile)


def chosen(us: dict[Tile, float], library_us: float | None, incumbent: Tile) -> Entry | None:
    return select(H200, "conv_fprop", SHAPE, FP16, "3.6.0", Timings(us, library_us, {}), incumbent)


def test_the_fastest_tile_is_chosen():
    assert chosen({SMALL: 50.0, LARGE: 40.0, WIDE: 45.0}, 60.0, SMALL) == entry(40.0, 60.0, LARGE)


def test_the_incumbent_stays_within_the_noise():
    assert chosen({SMALL: 40.3, LARGE: 40.0}, 60.0, SMALL).tile == SMALL
    assert chosen({SMALL: 40.5, LARGE: 40.0}, 60.0, SMALL).tile == LARGE


def test_an_incumbent_that_is_wrong_goes():
    assert chosen({LARGE: 90.0}, 60.0, SMALL).tile == LARGE


@pytest.mark.parametrize(("us", "library_us"), [({}, 60.0), ({LARGE: 40.0}, None)], ids=["no_tile", "no_library"])
def test_nothing_measured_is_no_entry(us, library_us):
    assert chosen(us, library_us, SMALL) is None


def test_the_table_keeps_what_was_not_measured(tmp_path):
    old = (entry(), entry(gpu=A100))
    table = refreshed(old, [entry(us=30.0, tile=WIDE)])
    assert set(table) == {entry(us=30.0, tile=WIDE), entry(gpu=A100)}
    tiles.dump(table, tmp_path / "tiles.json")
    assert set(tiles.load(tmp_path / "tiles.json")) == set(table)


@pytest.mark.parametrize(
    ("measured", "line"),
    [
        (entry(us=41.0), None),
        (
            entry(gpu=A100),
            "new: conv_fprop 64x32x32-128x3x3-s2 float16: ours (ours 40.0 us, library 50.0 us), 128x128x64",
        ),
        (
            entry(tile=WIDE),
            "changed: conv_fprop 64x32x32-128x3x3-s2 float16: ours, 128x128x64 8 warps 3 stages pointers -> ",
        ),
        (entry(us=55.0), "-> library (ours 55.0 us, library 50.0 us)"),
    ],
    ids=["only_the_time", "new_gpu", "another_tile", "the_library_now"],
)
def test_what_changed_is_said(measured, line):
    lines = changed([entry()], [measured])
    assert lines == [] if line is None else (len(lines) == 1 and line in lines[0])


class ScriptedBackend:
    """The default tile takes 100 us, the rest are slower by their place; the first of the rest is wrong."""

    gpu = H200

    def __init__(self, library_us: float):
        self.library_us, self.cases, self.prepared = library_us, [], []

    def prepare(self, problems):
        self.prepared += [problem.case().name for problem in problems]

    def time(self, case, tried, incumbent):
        self.cases.append(case.name)
        assert tried[0] == incumbent
        us = {tile: 100.0 + i for i, tile in enumerate(tried)}
        us.pop(tried[1])
        return Timings(us, self.library_us, {tried[1]: "wrong: output 0 is off"})


def test_tuning_measures_the_fused_case_of_every_problem():
    backend, said = ScriptedBackend(library_us=90.0), []
    measured, refused, left = tune(backend, [(op, SHAPE) for op in OPS], FP16, "3.6.0", said.append)
    assert backend.cases == [
        f"conv_fprop[prologue,statistics] {SHAPE}",
        f"conv_dgrad[mask,sums] {SHAPE}",
        f"conv_wgrad[prologue] {SHAPE}",
    ]
    assert backend.prepared == backend.cases
    assert [(e.op, e.us, e.library_us) for e in measured] == [(op, 100.0, 90.0) for op in OPS]
    assert sum("refused: wrong: output 0 is off" in line for line in said) == 3
    assert [(r.op, r.shape, r.reason) for r in refused] == [(op, SHAPE, "wrong: output 0 is off") for op in OPS]
    assert str(refused[0]) in said
    assert left == []
    assert sum("library (ours 100.0 us, library 90.0 us)" in line for line in said) == 3


def test_a_problem_without_a_measurement_leaves_the_table():
    said = []
    tuned = tune(ScriptedBackend(library_us=None), [("conv_fprop", SHAPE)], FP16, "3.6.0", said.append)
    assert tuned.entries == []
    assert said[-1].endswith("nothing measured, the table stays as it is")


class FailingBackend(ScriptedBackend):
    """What happens to each op, in order: an exception, or what to say of it."""

    def __init__(self, *fates):
        super().__init__(90.0)
        self.fates = iter(fates)

    def time(self, case, tried, incumbent):
        fate = next(self.fates)
        if isinstance(fate, Exception):
            raise fate
        return fate or super().time(case, tried, incumbent)


def test_a_problem_that_fails_does_not_end_the_tuning():
    said, kept = [], []
    backend = FailingBackend(torch.OutOfMemoryError("no room\nadvice"), None, RuntimeError("cuDNN says no"))
    tuned = tune(
        backend, [(op, SHAPE) for op in OPS], FP16, "3.6.0", said.append, lambda entries: kept.append(len(entries))
    )
    assert [entry.op for entry in tuned.entries] == [OPS[1]]
    assert f"{OPS[0]} {SHAPE}: not measured: OutOfMemoryError: no room" in said
    assert f"{OPS[2]} {SHAPE}: not measured: RuntimeError: cuDNN says no" in said
    assert kept == [1]


def test_a_tile_that_takes_the_device_down_is_named_and_the_rest_is_left_for_another_process():
    said = []
    fault = Timings({}, None, {LARGE: "AcceleratorError: an illegal memory access"}, lost=True)
    tuned = tune(FailingBackend(None, fault), [(op, SHAPE) for op in OPS], FP16, "3.6.0", said.append)
    assert tuned.left == [(OPS[2], SHAPE)]
    assert f"{OPS[1]} {SHAPE}: 128x128x64 8 warps 3 stages pointers refused: {fault.refused[LARGE]}" in said


def test_a_forced_tile_is_forced_and_let_go():
    original = tiles.tile
    with contextlib.suppress(KeyError), forced(WIDE):
        assert tiles.tile("conv_fprop", SHAPE, FP16, H200) == WIDE
        raise KeyError
    assert tiles.tile is original


class SteadyTimer:
    """Every call runs, and takes 5 us."""

    source = "script"

    def for_mode(self, mode):
        assert mode == "cold"
        return self.sample

    def sample(self, run):
        run()
        return 5.0


def planted_case(monkeypatch, faults: dict[Tile, object], results: list | None = None):
    """A small case whose kernel has a fault at the tiles of `faults`: it raises, is wrong by a factor, or spills.

    `results` keeps every y.
    """
    results = [] if results is None else results
    make, variant = tuning.FUSED["conv_fprop"]
    case = make(ConvShape(16, 16, 4, 4), variant)
    ours, kernels = case.ours, []

    def planted(*operands):
        fault = faults.get(tiles.tile("conv_fprop", SHAPE, FP16, H200))
        if isinstance(fault, Exception):
            raise fault
        kernels.append(types.SimpleNamespace(n_spills=fault if isinstance(fault, int) else 0))
        y, partials = ours(*operands)
        results.append(y * fault if isinstance(fault, float) else y)
        return results[-1], partials

    @contextlib.contextmanager
    def launched():
        kernels.clear()
        yield kernels

    object.__setattr__(case, "ours", planted)
    monkeypatch.setattr(tuning, "launched", launched)
    return case


def test_the_backend_refuses_wrong_and_spilling_tiles_and_times_the_others(monkeypatch, device):
    """The whole of it with the interpreter for a GPU: two tiles that are right, and one with each fault."""
    right, also, raising, wrong, spilling = (Tile(32 * 2**i, 16, 16, 4, 1) for i in range(5))
    faults = {raising: RuntimeError("out of resource"), wrong: 1.1, spilling: 118}
    timed, results = [], []
    case = planted_case(monkeypatch, faults, results)

    class Timer(SteadyTimer):
        def sample(self, run):
            timed.append(run)
            return super().sample(run)

    backend = CudaBackend(Setup(device, FP16, 2, QUICK, Timer(), gpu=lambda: GpuSample(reasons=("power cap",))))
    timings = backend.time(case, [right, also, raising, wrong, spilling], right)
    assert set(timings.us) == {right, also}
    assert timings.power_capped == {right: 1.0, also: 1.0}
    assert timings.library_us == 5.0
    assert timings.refused[raising] == "RuntimeError: out of resource"
    assert timings.refused[wrong].startswith("wrong: output 0 is off by")
    assert timings.refused[spilling] == "it spills 472 bytes a thread into local memory"
    assert len(set(timed)) == 3, "two tiles and the library"
    assert all(y.isnan().all() for y in results[:4]), "the next tile cannot inherit a right result"
    assert not results[4].isnan().any(), "what is timed is left alone"
    assert not timings.lost


def test_a_library_that_fails_is_named_beside_the_tiles_that_are_refused(monkeypatch, device):
    right, raising = Tile(32, 16, 16, 4, 1), Tile(64, 16, 16, 4, 1)
    case = planted_case(monkeypatch, {raising: RuntimeError("out of resource")})
    object.__setattr__(case, "hybrid", lambda *operands: 1 / 0)
    timings = CudaBackend(Setup(device, FP16, 2, QUICK, SteadyTimer())).time(case, [right, raising], right)
    assert (set(timings.us), timings.library_us) == ({right}, None)
    assert timings.refused[None] == "ZeroDivisionError: division by zero"
    assert timings.refused[raising] == "RuntimeError: out of resource"


def test_after_a_tile_that_took_the_device_down_no_other_is_blamed(monkeypatch):
    right, faulty, after = (Tile(32 * 2**i, 16, 16, 4, 1) for i in range(3))
    case = planted_case(monkeypatch, {faulty: RuntimeError("CUDA error: an illegal memory access was encountered")})
    monkeypatch.setattr(tuning, "lost", lambda device: True)
    timings = CudaBackend(Setup(CPU, FP16, 2, QUICK, SteadyTimer())).time(case, [right, faulty, after], right)
    assert (timings.us, set(timings.refused), timings.lost) == ({}, {faulty}, True)


class Ahead:
    """What was submitted and waited for, in order."""

    def __init__(self):
        self.log = []

    def submit(self, key, function, problem, *about):
        assert function is tuning.compile_candidates
        self.log.append((key, problem.candidates, about))

    def wait(self, key):
        self.log.append(("waited", key))


def test_candidates_are_compiled_ahead_one_by_one_in_the_order_of_timing(monkeypatch):
    ahead = Ahead()
    backend = CudaBackend(Setup(CPU, FP16, 2, QUICK, SteadyTimer()), ahead)
    problems = [tuning._problem(op, SHAPE, FP16, H200) for op in ("conv_fprop", "conv_wgrad")]
    backend.prepare(problems)
    submitted = [(p.case().name, (tile,), (FP16, 2, "cpu")) for p in problems for tile in p.candidates]
    assert ahead.log == submitted
    with contextlib.suppress(ZeroDivisionError):
        monkeypatch.setattr(tuning, "Correctness", lambda *arguments: 1 / 0)
        backend.time(problems[0].case(), problems[0].candidates, problems[0].incumbent)
    assert ahead.log[-1] == ("waited", problems[0].case().name)


@pytest.mark.parametrize("op", OPS)
def test_what_is_compiled_ahead_is_what_will_be_launched(op):
    """Types, divisibility and constants alike, or the cache on the disk would not have it."""
    problem = tuning._problem(op, ConvShape(64, 64, 8, 8), FP16, H200)
    problem = problem._replace(candidates=problem.candidates[:3])
    with launches(H200) as ahead:
        tuning.compile_candidates(problem, FP16, 2, "cpu")
    case = problem.case()
    operands = case.operands(OperandFactory(2, torch.device("cpu"), FP16))
    with torch.no_grad(), launches(H200) as launched:
        for tile in problem.candidates:
            with forced(tile):
                case.ours(*operands)
    assert [build.key() for build in ahead] == [build.key() for build in launched]
    assert len({build.key() for build in ahead}) >= 3
