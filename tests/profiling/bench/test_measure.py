import dataclasses
import itertools

import pytest
import torch

from kernels.cost import Cost
from profiling.bench import measure as bench
from profiling.bench.case import Case
from profiling.bench.measure import EAGER, EAGER_NCHW, HYBRID, OURS, Ceilings, Setup, measure
from profiling.bench.timing import QUICK, CpuTimer
from profiling.device.nvml import GpuSample

CPU = torch.device("cpu")


class ScriptedTimer:
    """100 us, give or take a little."""

    source, modes = "script", ("cold", "hot")

    def __init__(self):
        self.jitter = itertools.cycle((0.0, 0.1, 0.2))

    def for_mode(self, mode):
        return self.sample

    def sample(self, run):
        run()
        return 100.0 + next(self.jitter)


def relu_case(ours=torch.relu, **changes) -> Case:
    about = {"operands": lambda d: (d.activation(8, 4),), "library": torch.relu}
    cost = {"cost": lambda x: Cost(flops=x.numel(), bytes=4 * x.numel())}
    return dataclasses.replace(Case("relu", "", "8x4x4", **about, ours=ours, **cost), **changes)


@pytest.fixture
def everything_runs(monkeypatch):
    """Our kernels count as available on the CPU."""
    monkeypatch.setattr(bench, "_why_not", lambda provider, device: None)


def setup_for(timer, **changes) -> Setup:
    return Setup(CPU, torch.float16, 2, QUICK, timer, **changes)


def test_without_a_gpu_the_library_is_timed_and_ours_is_unavailable(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    setup = bench.setup(torch.float16, quick=True)
    results = {r.provider: r for r in measure(relu_case(), setup)}
    assert set(results) == {EAGER_NCHW, EAGER, "torch.compile", "max-autotune", OURS}
    for provider in (EAGER_NCHW, EAGER):
        r = results[provider]
        assert (r.us.status, r.us.source, r.mode) == ("measured", CpuTimer.source, "hot")
        assert r.us.value > 0
        assert r.low_us <= r.us.value <= r.high_us
        assert len(r.samples_us) >= 3
        assert (r.tflops_per_s.status, r.gb_per_s.status) == ("modelled", "modelled")
        assert r.gb_per_s.value == pytest.approx(4 * 256 / r.us.value / 1e3)
        assert r.bound is None
    for provider in ("torch.compile", OURS):
        r = results[provider]
        for number in (r.us, r.tflops_per_s, r.gb_per_s, r.first_call_s):
            assert (number.value, number.status, number.source) == (None, "unavailable", "no CUDA GPU")
        assert r.speedup is None


WRONG = {
    "off_by_a_percent": lambda x: torch.relu(x) * 1.01,
    "one_nan": lambda x: torch.relu(x).index_fill(0, torch.tensor([0]), torch.nan),
    "unwritten": torch.zeros_like,
    "another_shape": lambda x: torch.relu(x)[:1],
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_kernel_is_refused_and_not_timed(everything_runs, wrong):
    timer, calls = ScriptedTimer(), []

    def ours(x):
        calls.append(x)
        return wrong(x)

    results = measure(relu_case(ours), setup_for(timer), providers=(EAGER, OURS))
    assert [r.us.value for r in results if r.provider == OURS] == [None, None]
    assert all(r.wrong and r.us.source.startswith("wrong: ") for r in results if r.provider == OURS)
    assert all(r.us.value for r in results if r.provider == EAGER)
    assert len(calls) == 1


def raising(message: str, after: int = 0):
    """A relu that raises from its `after`-th call on."""
    calls = itertools.count()

    def run(x):
        if next(calls) >= after:
            raise RuntimeError(message)
        return torch.relu(x)

    return run


@pytest.mark.parametrize("after", [0, 3], ids=["at_once", "while_it_is_timed"])
def test_a_provider_that_fails_has_its_reason_and_the_others_are_timed(everything_runs, after):
    ours = raising("out of resource: shared memory\nand more lines", after)
    for r in measure(relu_case(ours), setup_for(ScriptedTimer()), providers=(EAGER, OURS)):
        assert not r.wrong
        if r.provider == OURS:
            assert (r.us.value, r.us.source) == (None, "RuntimeError: out of resource: shared memory")
        else:
            assert r.us.value


def test_nothing_is_held_against_a_library_that_fails(everything_runs):
    case = relu_case(library=raising("not implemented for Half", after=1))  # in float64 it is called first
    results = measure(case, setup_for(ScriptedTimer()), providers=(EAGER, OURS))
    assert {r.us.status for r in results} == {"unavailable"}
    assert "eager channels_last failed" in results[1].us.source


class Tagged:
    """A provider's function that a timer can tell from the others."""

    def __init__(self, provider, x):
        self.provider, self.x = provider, x

    def __call__(self):
        return torch.relu(self.x)


def test_ours_is_compared_with_the_best_alternative(everything_runs, monkeypatch):
    times = {EAGER: 100.0, EAGER_NCHW: 80.0, OURS: 50.0}
    monkeypatch.setattr(bench, "_builder", lambda case, operands, provider: lambda: Tagged(provider, operands[0]))
    timer = ScriptedTimer()
    timer.sample = lambda run: times[run.provider] + next(timer.jitter)
    results = measure(relu_case(), setup_for(timer), providers=(EAGER_NCHW, EAGER, OURS))
    assert [r.mode for r in results] == ["cold"] * 3 + ["hot"] * 3
    for r in results:
        if r.provider == OURS:
            assert (r.verdict, r.best_alternative) == ("FAST", EAGER_NCHW)
            assert r.speedup.value == pytest.approx(1.6, rel=0.01)
            assert r.speedup_low <= r.speedup.value <= r.speedup_high
        else:
            assert r.speedup is None


HOT = GpuSample(900, 3201, ("hardware thermal slowdown",))


def test_a_throttled_gpu_gives_no_numbers_and_a_cool_one_its_clocks():
    for r in measure(relu_case(), setup_for(ScriptedTimer(), gpu=lambda: HOT), providers=(EAGER,)):
        assert (r.us.value, r.us.status, r.discarded) == (None, "unavailable", QUICK.max_discarded)
        assert "throttled (hardware thermal slowdown)" in r.us.source
    cool = GpuSample(1980, 3201, ("idle",))
    (r, _) = measure(relu_case(), setup_for(ScriptedTimer(), gpu=lambda: cool), providers=(EAGER,))
    assert (r.sm_clock_mhz, r.memory_clock_mhz, r.reasons) == (1980, 3201, ("idle",))


def test_a_gpu_under_its_power_cap_gives_numbers_that_say_so(monkeypatch):
    """An H100 does large products there and nowhere else: their ceilings must exist."""
    capped = GpuSample(1400, 3201, ("power cap",))
    results = measure(relu_case(), setup_for(ScriptedTimer(), gpu=lambda: capped), providers=(EAGER,))
    assert all(r.us.value and r.power_capped_share == 1.0 and r.discarded == 0 for r in results)

    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *sizes, **how: draw(4, 4))
    monkeypatch.setattr(torch, "randint", lambda *bounds, **how: torch.zeros(4, dtype=torch.uint8))
    found = bench._ceilings(CPU, torch.float16, ScriptedTimer(), lambda: capped, 0.001)
    assert found.tflops_per_s == pytest.approx(2 * 8192**3 / 100.1e6, rel=0.01)
    assert (found.power_capped_share, found.reason) == (1.0, None)
    assert "hardware thermal slowdown" in bench._ceilings(CPU, torch.float16, ScriptedTimer(), lambda: HOT, 1.0).reason


def test_ours_is_checked_before_another_right_result_lies_in_its_memory(everything_runs, monkeypatch):
    """A case without a mixture has none, and cuDNN's search is left as it was."""
    built, builder, search = [], bench._builder, torch.backends.cudnn.benchmark
    monkeypatch.setattr(bench, "_builder", lambda *about: built.append(about[2]) or builder(*about))
    results = measure(relu_case(), setup_for(ScriptedTimer()), providers=(EAGER_NCHW, EAGER, HYBRID, OURS))
    assert [provider for provider in built if provider != HYBRID] == [EAGER, OURS, EAGER_NCHW]
    assert [r.provider for r in results] == [EAGER_NCHW, EAGER, OURS] * 2
    assert torch.backends.cudnn.benchmark == search


def test_operands_that_do_not_fit_refuse_the_case():
    def operands(d):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand advice")

    results = measure(relu_case(operands=operands), setup_for(ScriptedTimer()), providers=(EAGER, HYBRID, OURS))
    assert [(r.provider, r.mode) for r in results] == [(p, m) for m in ("cold", "hot") for p in (EAGER, OURS)]
    for r in results:
        assert (r.us.value, r.us.source) == (None, "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB")


def test_a_gradient_is_timed_without_its_forward(everything_runs):
    forwards = []

    def library(x, dy):
        forwards.append(x.dtype)
        return torch.relu(x)

    case = relu_case(
        lambda x, dy: torch.where(x > 0, dy, 0),
        operands=lambda d: (d.activation(8, 4), d.activation(8, 4)),
        library=library,
        cost=lambda x, dy: Cost(1, 1),
        gradient_of=(0,),
    )
    results = measure(case, setup_for(CpuTimer()), providers=(EAGER, OURS))
    assert all(r.us.value for r in results)
    assert forwards == [torch.float64, torch.float16]


def test_the_roofline_names_the_longer_time():
    ceilings = Ceilings(tflops_per_s=800.0, gb_per_s=4000.0)
    assert ceilings.bound(flops=10**12, bytes_=10**9) == "compute"
    assert ceilings.bound(flops=10**9, bytes_=10**9) == "memory"
    assert Ceilings().bound(1, 1) is None


def test_the_compiled_providers_are_the_library_compiled(everything_runs, monkeypatch):
    modes = []

    monkeypatch.setattr(torch, "compile", lambda f, dynamic, mode: modes.append((dynamic, mode)) or f)
    providers = (EAGER, "torch.compile", "max-autotune")
    results = measure(relu_case(), setup_for(ScriptedTimer()), providers)
    assert all(r.us.value for r in results)
    assert modes == [(False, None), (False, "max-autotune-no-cudagraphs")]


def test_the_library_in_another_layout_need_not_be_as_accurate(everything_runs):
    """Only what has our kernels in it is held against the library's own error."""
    first = []

    def library(x):
        first.append(x)
        return torch.relu(x) * (1.003 if len(first) == 3 else 1.0)  # called in float64, as the baseline, and in NCHW

    results = measure(relu_case(library=library), setup_for(ScriptedTimer()), providers=(EAGER, EAGER_NCHW))
    assert all(r.us.value for r in results)
