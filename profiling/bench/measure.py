"""Micro-benchmarks of the kernels: each op at each layer shape, beside the best that PyTorch offers for the same work.

Operands are drawn outside of the clock; every provider's result is compared with float64; its first call (compilation,
the library's search) is timed apart; then the providers take turns by the protocol of `profiling.bench.timing`. A
provider that is wrong or fails is refused with the reason, and the others go on. Without a GPU the eager providers are
timed on the CPU, and `profiling.bench.kernel_facts` reports what the compiler says of our kernels.
"""

import dataclasses
import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from kernels import jit
from kernels.contract import dtype_name
from kernels.cost import Cost
from profiling.bench.case import Case, Correctness, OperandFactory, tensors
from profiling.bench.timing import QUICK, CpuTimer, CudaTimer, Plan, Samples, first_line, interleave, summarise, verdict
from profiling.device import ceilings, nvml
from profiling.device.ceilings import Ceilings
from profiling.device.environment import gpu_uuid
from profiling.output.numbers import Number, measured, modelled, unavailable

OURS, HYBRID = "ours", "library conv + ours"
EAGER_NCHW, EAGER = "eager NCHW", "eager channels_last"
COMPILED, MAX_AUTOTUNE = "torch.compile", "max-autotune"
PROVIDERS = (EAGER_NCHW, EAGER, COMPILED, MAX_AUTOTUNE, HYBRID, OURS)
WITH_KERNELS = (HYBRID, OURS)
BATCH = 512
CPU_BATCH, QUICK_CPU_BATCH = 8, 2
NO_GPU = "no CUDA GPU"


@dataclass(frozen=True)
class Result:
    """One provider of one case, in one mode: "cold" or "hot".

    `us` is the median, `low_us` and `high_us` its 95 % interval. `speedup` is the best alternative's median over ours;
    `bound` is the op's limit by the roofline of the measured ceilings. `power_capped_share` is the share of the
    samples, 0 to 1, under the power cap; None where it is not known.
    """

    case: str
    op: str
    variant: str
    shape: str
    dtype: str
    batch: int
    provider: str
    mode: str
    us: Number
    first_call_s: Number
    tflops_per_s: Number
    gb_per_s: Number
    bound: str | None
    p20_us: float | None = None
    p80_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    samples_us: tuple[float, ...] = ()
    discarded: int = 0
    power_capped_share: float | None = None
    converged: bool = False
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    reasons: tuple[str, ...] | None = None
    speedup: Number | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    verdict: str | None = None
    best_alternative: str | None = None
    wrong: bool = False


@dataclass(frozen=True)
class Setup:
    """Where and how cases are measured. `gpu` samples clocks and event reasons, or returns None.

    `ceilings` are those of the device, or in words why there are none.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    plan: Plan
    timer: Any
    gpu: Callable[[], nvml.GpuSample | None] = lambda: None
    ceilings: Ceilings | str = NO_GPU

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def bound(self, cost: Cost) -> str | None:
        """ "compute" or "memory", whichever takes longer at the ceilings; None without them."""
        if isinstance(self.ceilings, str):
            return None
        compute_s, memory_s = cost.flops / self.ceilings.flops_per_s, cost.bytes / self.ceilings.bytes_per_s
        return "compute" if compute_s > memory_s else "memory"


def setup(dtype: torch.dtype, quick: bool = False) -> Setup:
    """The GPU if there is one, at batch 512; else the CPU at a small batch, with less patience."""
    if not torch.cuda.is_available():
        plan = QUICK if quick else dataclasses.replace(QUICK, seconds=0.5)
        return Setup(torch.device("cpu"), dtype, QUICK_CPU_BATCH if quick else CPU_BATCH, plan, CpuTimer())
    device = torch.device("cuda", torch.cuda.current_device())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # all providers at one precision
    importlib.import_module("torch._functorch.config").donated_buffer = False  # a compiled backward is timed repeatedly
    plan = QUICK if quick else Plan()
    gpu = nvml.sampler(gpu_uuid(device))
    return Setup(device, dtype, BATCH, plan, CudaTimer(device), gpu, measured_ceilings(device, dtype, plan.seconds))


def measured_ceilings(device: torch.device, dtype: torch.dtype, seconds: float) -> Ceilings | str:
    """The ceilings of the matrix products and the copy, `seconds` for each; in words why there are none."""
    try:
        return ceilings.measure(device, dtype, seconds, batch=None)
    except RuntimeError as error:  # no memory for the least size, or no matrix product of this dtype
        return first_line(error)


def measure(case: Case, setup: Setup, providers: Sequence[str] = PROVIDERS) -> list[Result]:
    """Check and time a case: a Result for each mode and provider, in the order of `providers`.

    A provider's exception, or operands that do not fit into memory, are the reason of a Result without figures.
    """
    results: list[Result] = []
    search = torch.backends.cudnn.benchmark
    try:
        cost, ready, refused, first_call_s = _prepared(case, setup, providers)
        for mode in setup.timer.modes:
            taken = interleave(ready, setup.timer.for_mode(mode), setup.plan, setup.gpu)
            rows = [
                _result(case, setup, cost, provider, mode, taken.get(provider), refused, first_call_s)
                for provider in providers
                if provider in ready or provider in refused
            ]
            results += _compared(rows)
    finally:
        torch.backends.cudnn.benchmark = search
    return results


def _prepared(case: Case, setup: Setup, providers: Sequence[str]) -> tuple[Cost | None, dict, dict, dict]:
    """(the cost, and `_ready`'s three); every provider is refused where the operands or float64's result fail."""
    try:
        if setup.on_gpu:
            torch.compiler.reset()  # a case is a shape, and recompilations are counted over all of them
        operands = case.operands(OperandFactory(setup.batch, setup.device, setup.dtype))
        return case.cost(*operands), *_ready(case, operands, setup, providers)
    except Exception as error:  # out of memory, or a device that an earlier kernel has brought down
        applicable = [provider for provider in providers if provider != HYBRID or case.hybrid is not None]
        return None, {}, dict.fromkeys(applicable, (first_line(error), False)), {}


def _ready(
    case: Case, operands: tuple, setup: Setup, providers: Sequence[str]
) -> tuple[dict[str, Callable[[], Any]], dict[str, tuple[str, bool]], dict[str, float]]:
    """By provider: (functions to time, refused with reason and whether wrong, seconds of the first calls)."""
    ready, refused, first_call_s = {}, {}, {}
    gate = Correctness(case, operands, setup.dtype)
    # Eager is the baseline. Ours come next, before their memory can hold another provider's right result.
    for provider in sorted(providers, key=lambda name: (name != EAGER, name != OURS)):
        try:
            build = _builder(case, operands, provider)
            if build is None:
                continue
            reason = _why_not(provider, setup.device)
            if reason is None and provider in WITH_KERNELS and gate.baseline is None:
                reason = f"nothing to compare it with: {EAGER} failed"
            if reason:
                refused[provider] = reason, False
                continue
            start = time.perf_counter()
            run = build()
            result = run()
            if setup.on_gpu:
                torch.cuda.synchronize(setup.device)
            first_call_s[provider] = time.perf_counter() - start
            wrong = gate.refusal(case.comparable(result)) if provider in WITH_KERNELS else gate.library_refusal(result)
        except Exception as error:  # a compiler's or a library's failure is the finding
            refused[provider] = first_line(error), False
            continue
        if wrong:
            refused[provider] = f"wrong: {wrong}", True
            continue
        if provider == EAGER:
            gate.baseline = tensors(result)
        ready[provider] = run
    return ready, refused, first_call_s


def _builder(case: Case, operands: tuple, provider: str) -> Callable[[], Callable[[], Any]] | None:
    """Builds a provider's function to time; None where the provider does not apply to the case."""
    if provider == OURS:
        return lambda: lambda: case.ours(*operands)
    if provider == HYBRID:
        return None if case.hybrid is None else lambda: searching(lambda: case.hybrid(*operands), True)
    if provider == EAGER_NCHW:
        nchw = tree_map_only(Tensor, lambda x: x.contiguous() if x.is_floating_point() else x, operands)
        alike = all(a.stride() == b.stride() for a, b in zip(tensors(nchw), tensors(operands), strict=True))
        return None if alike else lambda: searching(case.call(case.library, nchw), False)
    if provider == EAGER:
        return lambda: searching(case.call(case.library, operands), True)
    # CUDA graphs would copy the operands into their own buffers, and hide a launch that the protocol hides already.
    mode = "max-autotune-no-cudagraphs" if provider == MAX_AUTOTUNE else None
    return lambda: searching(case.call(torch.compile(case.library, dynamic=False, mode=mode), operands), True)


def searching(run: Callable[[], Any], search: bool) -> Callable[[], Any]:
    """`run` with or without cuDNN's search for the fastest algorithm, which it remembers by shape."""

    def call() -> Any:
        torch.backends.cudnn.benchmark = search
        return run()

    return call


def _why_not(provider: str, device: torch.device) -> str | None:
    if provider in (EAGER_NCHW, EAGER):
        return None
    return NO_GPU if device.type != "cuda" else jit.unavailable(device) if provider in WITH_KERNELS else None


def _result(
    case: Case,
    setup: Setup,
    cost: Cost | None,
    provider: str,
    mode: str,
    samples: Samples | None,
    refused: dict[str, tuple[str, bool]],
    first_call_s: dict[str, float],
) -> Result:
    dtype = dtype_name(setup.dtype)
    reason, wrong = refused.get(provider, (samples and samples.refusal(), False))
    first = first_call_s.get(provider)
    about = {
        **{name: getattr(case, name) for name in ("op", "variant", "shape")},
        **{"case": case.name, "dtype": dtype, "batch": setup.batch, "provider": provider, "mode": mode},
        "bound": setup.bound(cost) if cost else None,
        "first_call_s": unavailable("s", reason) if first is None else measured(first, "s", "wall clock"),
        "wrong": wrong,
    }
    if reason:
        us, tflops, gb = (unavailable(unit, reason) for unit in ("us", "TFLOP/s", "GB/s"))
        return Result(**about, us=us, tflops_per_s=tflops, gb_per_s=gb, discarded=samples.discarded if samples else 0)
    s = summarise(samples.us)
    source = "modelled work over measured time"
    clocks = samples.last or nvml.GpuSample(None, None, None)
    return Result(
        **about,
        us=measured(s.median, "us", setup.timer.source),
        tflops_per_s=modelled(cost.flops / s.median / 1e6, "TFLOP/s", source),
        gb_per_s=modelled(cost.bytes / s.median / 1e3, "GB/s", source),
        **{"p20_us": s.p20, "p80_us": s.p80, "low_us": s.low, "high_us": s.high, "samples_us": tuple(samples.us)},
        discarded=samples.discarded,
        power_capped_share=samples.power_capped_share,
        converged=samples.converged(setup.plan),
        sm_clock_mhz=clocks.sm_clock_mhz,
        memory_clock_mhz=clocks.memory_clock_mhz,
        reasons=clocks.reasons,
    )


def _compared(results: list[Result]) -> list[Result]:
    """The same with our kernels' speed-up over the best alternative."""
    alternatives = [r for r in results if r.provider != OURS and r.samples_us]
    best = min(alternatives, key=lambda r: r.us.value, default=None)
    for i, ours in enumerate(results):
        if ours.provider == OURS and ours.samples_us and best:
            v = verdict(ours.samples_us, best.samples_us)
            results[i] = dataclasses.replace(
                ours,
                speedup=measured(v.speedup, "x", f"median of {best.provider} over ours"),
                **{"speedup_low": v.low, "speedup_high": v.high, "verdict": v.word, "best_alternative": best.provider},
            )
    return results


def lost(device: torch.device) -> bool:
    """Whether a kernel has brought the device down: every later call of this process then fails."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return True
    return False
