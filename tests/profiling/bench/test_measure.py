"""Providers of a case: compared with float64, refused or timed, and ours beside the best of the others."""

import dataclasses
import itertools

import pytest
import torch

from kernels.cost import Cost
from profiling.bench import measure as bench
from profiling.bench.case import Case
from profiling.bench.measure import EAGER, EAGER_NCHW, HYBRID, OURS, Setup, measure
from profiling.bench.timing import QUICK, CpuTimer
from profiling.device import ceilings
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


def measured(case, *providers, timer=None, **changes) -> list[bench.Result]:
    return measure(case, Setup(CPU, torch.float16, 2, QUICK, timer or ScriptedTimer(), **changes), providers)


def test_without_a_gpu_the_library_is_timed_and_ours_is_unavailable(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = {r.provider: r for r in measure(relu_case(), bench.setup(torch.float16, quick=True))}
    assert set(results) == {EAGER_NCHW, EAGER, "torch.compile", "max-autotune", OURS}
    for provider in (EAGER_NCHW, EAGER):
        r = results[provider]
        assert (r.us.status, r.us.source, r.mode, r.bound) == ("measured", CpuTimer.source, "hot", None)
        assert 0 < r.low_us <= r.us.value <= r.high_us
        assert len(r.samples_us) >= 3
        assert (r.tflops_per_s.status, r.gb_per_s.status) == ("modelled", "modelled")
        assert r.gb_per_s.value == pytest.approx(4 * 256 / r.us.value / 1e3)
    for provider in ("torch.compile", OURS):
        r = results[provider]
        assert r.speedup is None
        for number in (r.us, r.tflops_per_s, r.gb_per_s, r.first_call_s):
            assert (number.value, number.status, number.source) == (None, "unavailable", "no CUDA GPU")


WRONG = {
    "off_by_a_percent": lambda x: torch.relu(x) * 1.01,
    "one_nan": lambda x: torch.relu(x).index_fill(0, torch.tensor([0]), torch.nan),
    "unwritten": torch.zeros_like,
    "another_shape": lambda x: torch.relu(x)[:1],
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_kernel_is_refused_and_not_timed(everything_runs, wrong):
    calls = []
    for r in measured(relu_case(lambda x: calls.append(x) or wrong(x)), EAGER, OURS):
        if r.provider == OURS:
            assert (r.us.value, r.wrong, r.us.source[:7]) == (None, True, "wrong: ")
        else:
            assert r.us.value
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
    for r in measured(relu_case(ours), EAGER, OURS):
        assert not r.wrong
        if r.provider == OURS:
            assert (r.us.value, r.us.source) == (None, "RuntimeError: out of resource: shared memory")
        else:
            assert r.us.value


def test_nothing_is_compared_with_a_library_that_fails(everything_runs):
    case = relu_case(library=raising("not implemented for Half", after=1))  # in float64 it is called first
    results = measured(case, EAGER, OURS)
    assert {r.us.status for r in results} == {"unavailable"}
    assert "eager channels_last failed" in results[1].us.source


def test_ours_is_compared_with_the_best_alternative(everything_runs, monkeypatch):
    class Tagged:
        def __init__(self, provider, x):
            self.provider, self.x = provider, x

        def __call__(self):
            return torch.relu(self.x)

    times = {EAGER: 100.0, EAGER_NCHW: 80.0, OURS: 50.0}
    monkeypatch.setattr(bench, "_builder", lambda case, operands, provider: lambda: Tagged(provider, operands[0]))
    timer = ScriptedTimer()
    timer.sample = lambda run: times[run.provider] + next(timer.jitter)
    results = measured(relu_case(), EAGER_NCHW, EAGER, OURS, timer=timer)
    assert [r.mode for r in results] == ["cold"] * 3 + ["hot"] * 3
    for r in results:
        if r.provider == OURS:
            assert (r.verdict, r.best_alternative) == ("FAST", EAGER_NCHW)
            assert r.speedup.value == pytest.approx(1.6, rel=0.01)
            assert r.speedup_low <= r.speedup.value <= r.speedup_high
        else:
            assert r.speedup is None


@pytest.mark.parametrize(
    ("clocks", "reasons", "share"),
    [(900, ("hardware thermal slowdown",), None), (1980, ("idle",), 0.0), (1400, ("power cap",), 1.0)],
    ids=["throttled", "idle", "power_capped"],
)
def test_a_throttled_gpu_gives_no_numbers_and_others_their_clocks(clocks, reasons, share):
    """An H100 does large products under its power cap, and nowhere else."""
    for r in measured(relu_case(), EAGER, gpu=lambda: GpuSample(clocks, 3201, reasons)):
        if share is None:
            assert (r.us.value, r.us.status, r.discarded) == (None, "unavailable", QUICK.max_discarded)
            assert "throttled (hardware thermal slowdown)" in r.us.source
        else:
            assert (r.sm_clock_mhz, r.memory_clock_mhz, r.reasons, r.discarded) == (clocks, 3201, reasons, 0)
            assert r.us.value
            assert r.power_capped_share == share


def test_ours_is_checked_before_another_right_result_lies_in_its_memory(everything_runs, monkeypatch):
    """A case without a mixture has none, and cuDNN's search is left as it was."""
    built, builder, search = [], bench._builder, torch.backends.cudnn.benchmark
    monkeypatch.setattr(bench, "_builder", lambda *about: built.append(about[2]) or builder(*about))
    results = measured(relu_case(), EAGER_NCHW, EAGER, HYBRID, OURS)
    assert [provider for provider in built if provider != HYBRID] == [EAGER, OURS, EAGER_NCHW]
    assert [r.provider for r in results] == [EAGER_NCHW, EAGER, OURS] * 2
    assert torch.backends.cudnn.benchmark == search


def test_operands_that_do_not_fit_refuse_the_case():
    def operands(d):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand advice")

    results = measured(relu_case(operands=operands), EAGER, HYBRID, OURS)
    assert [(r.provider, r.mode) for r in results] == [(p, m) for m in ("cold", "hot") for p in (EAGER, OURS)]
    for r in results:
        assert (r.us.value, r.us.source) == (None, "OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB")


def test_a_gradient_is_timed_without_its_forward(everything_runs):
    forwards = []
    gradient = {"library": lambda x, dy: forwards.append(x.dtype) or torch.relu(x), "gradient_of": (0,)}
    gradient |= {"operands": lambda d: (d.activation(8, 4), d.activation(8, 4)), "cost": lambda x, dy: Cost(1, 1)}
    assert all(
        r.us.value for r in measured(relu_case(lambda x, dy: torch.where(x > 0, dy, 0), **gradient), EAGER, OURS)
    )
    assert forwards == [torch.float64, torch.float16]


def test_the_compiled_providers_are_the_library_compiled(everything_runs, monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, mode: modes.append((dynamic, mode)) or f)
    assert all(r.us.value for r in measured(relu_case(), EAGER, "torch.compile", "max-autotune"))
    assert modes == [(False, None), (False, "max-autotune-no-cudagraphs")]


def test_the_library_in_another_layout_need_not_be_as_accurate(everything_runs):
    """Only a provider with our kernels is bounded by the library's own error."""
    calls = itertools.count(1)  # in float64, as the baseline, and in NCHW
    case = relu_case(library=lambda x: torch.relu(x) * (1.003 if next(calls) == 3 else 1.0))
    assert all(r.us.value for r in measured(case, EAGER, EAGER_NCHW))


def test_the_ceilings_are_the_device_s_and_bound_an_op(monkeypatch):
    """The products and the copy alone are measured; without them the reason stands."""
    monkeypatch.setattr(ceilings, "GEMMS", {"cpu": ((64, False),)})
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1 << 20})
    found = bench.measured_ceilings(CPU, torch.float32, 0.001)
    assert (len(found.gemm), found.convolutions) == (1, [])
    assert min(found.flops_per_s, found.bytes_per_s) > 0
    one = dataclasses.replace(found.copy, value=4e12)
    found = dataclasses.replace(found, gemm=[dataclasses.replace(one, value=8e14)], copy=one)
    setup = Setup(CPU, torch.float16, 2, QUICK, CpuTimer(), ceilings=found)
    assert [setup.bound(Cost(flops, 10**9)) for flops in (10**12, 10**9)] == ["compute", "memory"]

    def full(*arguments, **options):
        raise torch.OutOfMemoryError("not even 256 fits\nand advice")

    monkeypatch.setattr(ceilings, "measure", full)
    found = bench.measured_ceilings(CPU, torch.float32, 0.001)
    assert found == "OutOfMemoryError: not even 256 fits"
    assert dataclasses.replace(setup, ceilings=found).bound(Cost(1, 1)) is None
