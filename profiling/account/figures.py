"""The key figures of a run: each a number with its unit and provenance, or the reason why it is not known."""

from statistics import median
from typing import Any

from profiling.account.analysis import Analysis
from profiling.account.run_folder import Run
from profiling.device.specifications import V100_FLOPS_PER_S, boost_mhz
from profiling.output.numbers import Number, measured, modelled, unavailable

OF_GPUS = ("mfu", "mfu_at_clock", "sm_clock_hz", "throttled_share", "energy_j")
"""Figures that a CPU cannot have: no driver says so much of it, and no data sheet's peak is known."""


def figures(run: Run, a: Analysis) -> dict[str, dict[str, Any]]:
    """Key -> record with its label, in the order in which they are shown; those that only a GPU has, on a GPU."""
    e = a.evidence
    seconds = e.training_ns / 1e9
    rate = e.flops / seconds if seconds and e.flops else None
    no_rate = "the work of a step was not counted, or no step was made"
    no_peak = "this GPU's data sheet is not in the table"
    clock = "monotonic clock of the run"
    images = f"test images, {run.summary['data_identity']} data, n = 1"

    def of_summary(key: str, unit: str, source: str) -> Number:
        return _known(run.summary[key], unit, source, "the run did not get that far")

    def share_of(peak: float | None, source: str, reason: str) -> Number:
        if rate is None:
            return unavailable("share", no_rate)
        return _known(rate / peak if peak else None, "share", f"achieved over {source}", reason)

    flops = unavailable("FLOP", no_rate)
    if e.flops:
        flops = modelled(e.flops, "FLOP", "PyTorch's formulas for each op, times images")
    step, spread = _step(a)
    found = {
        "training_s": ("training", measured(seconds, "s", clock)),
        "step_s": ("a step, median", step),
        "train_plus_eval_s": ("training, evaluation", of_summary("train_plus_eval_s", "s", clock)),
        "wall_s": ("process", of_summary("wall_s", "s", clock)),
        "test_accuracy": ("test accuracy", of_summary("test_accuracy", "share", images)),
        "images_per_s": (
            "throughput",
            of_summary("images_per_s", "1/s", "training images over preprocessing and training"),
        ),
        "flops": ("model FLOPs", flops),
        "achieved_flops_per_s": ("achieved", _known(rate, "FLOP/s", "model FLOPs over the training phase", no_rate)),
        "v100_normalised": ("V100-normalised", share_of(V100_FLOPS_PER_S, "the V100's 125 TFLOP/s; not MFU", no_rate)),
        "mfu": ("MFU", share_of(e.peak, e.peak_source, no_peak)),
        "mfu_at_clock": (
            "MFU at the sampled clock",
            _mfu_at_clock(run, a, rate, no_peak if e.peak is None else no_rate),
        ),
        "sm_clock_hz": ("SM clock in training", run.telemetry.sm_clock(run.training)),
        "of_ceiling": (
            "of the measured ceiling",
            share_of(e.ceiling, "the best sustained rate", "the ceilings were not measured"),
        ),
        "perturbation": (
            "profiled / timed step",
            _known(a.perturbation, "ratio", "medians of the two runs' steps", "needs both passes"),
        ),
        "unknown_share": (
            "unknown kernels",
            _known(a.unknown_share, "share", "of the busy time of the profiled pass", "no trace"),
        ),
        "peak_memory_bytes": (
            "peak memory",
            of_summary("peak_memory_bytes", "B", "of the device, or of the process on a CPU"),
        ),
        "throttled_share": ("throttled", run.telemetry.throttled_share()),
        "energy_j": ("energy", run.telemetry.energy()),
    }
    records = {key: one.to_json(label) for key, (label, one) in found.items() if e.on_gpu or key not in OF_GPUS}
    records["step_s"]["spread"] = spread
    return records


def _known(value: float | int | None, unit: str, source: str, reason: str) -> Number:
    """Measured, or unavailable for `reason`."""
    return unavailable(unit, reason) if value is None else measured(value, unit, source)


def _step(a: Analysis) -> tuple[Number, str]:
    """The median of the timed run's steps, and where nine in ten of them lie."""
    steps = a.step_ns
    if not steps:
        return unavailable("s", "the timed run's steps are not known"), ""
    low, high = (steps[round(share * (len(steps) - 1))] / 1e6 for share in (0.05, 0.95))
    spread = f"nine in ten took {low:.4g} to {high:.4g} ms"
    return measured(median(steps) / 1e9, "s", f"of {len(steps):,} steps of the timed run; {spread}"), spread


def _mfu_at_clock(run: Run, a: Analysis, rate: float | None, reason: str) -> Number:
    """The share of the peak that the GPU had at the clocks it really ran at; `reason` is for want of the other two."""
    if rate is None or a.evidence.peak is None or a.specification is None:
        return unavailable("share", reason)
    clock, quoted_mhz = run.telemetry.sm_clock(run.training), boost_mhz(a.specification, a.arithmetic)
    if clock.value is None:
        return unavailable("share", clock.source)
    if quoted_mhz is None:
        return unavailable("share", f"no document says at which clock the peak of {a.specification.name} is quoted")
    share = rate / (a.evidence.peak * clock.value / (1e6 * quoted_mhz))
    clocks = f"{clock.value / 1e6:,.0f} MHz sampled / {quoted_mhz:,} MHz of the peak"
    return modelled(share, "share", f"achieved over the peak times {clocks}; {a.evidence.peak_source}")
