"""Every case and provider through pytest-benchmark: its statistics, JSON and compare, of samples by our protocol.

    pytest --benchmark-only --benchmark-json=kernels.json
    pytest --benchmark-only --benchmark-compare -k bn_stats

pytest-benchmark reads a host's clock around a call, which for a kernel is the time to launch it. So a case is sampled
first, all providers in turns, and each benchmark then replays its provider's samples as its timer. On a GPU the samples
are of a cold cache; on a CPU they are PyTorch's reference timings at a small batch, in the group's name.
"""

import functools
from collections.abc import Iterator

import pytest
import torch

from profiling.bench import measure
from profiling.bench.cases import cases
from profiling.bench.kernel_facts import loaded_facts

ON_GPU = torch.cuda.is_available()
PROVIDERS = measure.PROVIDERS if ON_GPU else (measure.EAGER_NCHW, measure.EAGER)
CASES = {case.name: case for case in cases()}


class Replay:
    """A timer whose differences, two calls at a time, are the samples that it was given."""

    def __init__(self):
        self.readings: Iterator[float] = iter(())

    def load(self, samples_s: list[float]) -> None:
        self.readings = iter([reading for s in samples_s for reading in (0.0, s)])

    def __call__(self) -> float:
        return next(self.readings)


replay = Replay()


@functools.cache
def setup() -> measure.Setup:
    return measure.setup(torch.float16, quick=not ON_GPU)


@functools.lru_cache(maxsize=1)
def results(name: str) -> dict[str, measure.Result]:
    """The first mode's results of a case by provider; the providers of a case are neighbours, so one is kept."""
    where = setup()
    return {r.provider: r for r in measure.measure(CASES[name], where, PROVIDERS) if r.mode == where.timer.modes[0]}


@functools.lru_cache(maxsize=1)
def loaded(name: str) -> list[dict]:
    facts = loaded_facts(CASES[name], setup())
    return [{"kernel": f.kernel, "registers": f.registers, "local_bytes": f.local_bytes} for f in facts]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.benchmark(timer=replay)
def test_kernel(benchmark, name, provider):
    result = results(name).get(provider)
    if result is None:
        pytest.skip("does not apply to this case")
    if result.wrong:
        pytest.fail(result.us.source)
    if not result.samples_us:
        pytest.skip(f"unavailable: {result.us.source}")
    benchmark.group = f"{name}, batch {result.batch}" + ("" if ON_GPU else ", CPU reference timings")
    plain = ("mode", "sm_clock_mhz", "discarded", "power_capped_share", "verdict")
    benchmark.extra_info |= {name: getattr(result, name) for name in plain}
    benchmark.extra_info |= {name: getattr(result, name).value for name in ("tflops_per_s", "gb_per_s", "first_call_s")}
    benchmark.extra_info |= {"source": result.us.source, "event_reasons": result.reasons}
    if provider == measure.OURS:
        benchmark.extra_info["kernels"] = loaded(name)
    replay.load([us / 1e6 for us in result.samples_us])
    benchmark.pedantic(lambda: None, rounds=len(result.samples_us), iterations=1)
