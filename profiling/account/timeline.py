"""The timeline of a run: its phases and what the device's sensors reported under them."""

from typing import Any

from profiling.device.nvml import GpuSample
from profiling.run.telemetry import Telemetry

FIELDS = {
    "sm_clock_mhz": ("SM clock", "MHz"),
    "memory_clock_mhz": ("memory clock", "MHz"),
    "power_w": ("power", "W"),
    "temperature_c": ("temperature", "°C"),
    "kernel_running": ("some kernel running", "share"),
    "sm_active": ("SMs active", "share"),
    "tensor_active": ("tensor cores active", "share"),
    "dram_active": ("DRAM active", "share"),
}
"""Fields of `GpuSample` that are drawn -> (name, unit)."""

MOST_SAMPLES = 2000
"""Points that a chart needs; where there are more samples, neighbours are averaged."""


def timeline(phases: dict[str, Any] | None, telemetry: Telemetry) -> dict[str, Any]:
    """Seconds from the run's start; fields that no sample has are unavailable, with the reason."""
    start_ns = phases["start_ns"] if phases else (telemetry.samples[0].t_ns if telemetry.samples else 0)
    together = max(1, -(-len(telemetry.samples) // MOST_SAMPLES))
    groups = [telemetry.samples[i : i + together] for i in range(0, len(telemetry.samples), together)]
    drawn = {name: [_mean(group, name) for group in groups] for name in FIELDS}
    known = {name: values for name, values in drawn.items() if any(v is not None for v in values)}
    missing = {name: telemetry.unavailable.get(name, "no sample has it") for name in FIELDS if name not in known}
    return {
        "phases": [
            {"name": p["name"], "start_s": (p["start_ns"] - start_ns) / 1e9, "end_s": (p["end_ns"] - start_ns) / 1e9}
            for p in (phases["phases"] if phases else ())
        ],
        "samples": {"t_s": [(_mean(group, "t_ns") - start_ns) / 1e9 for group in groups], **known} if known else {},
        "fields": {name: {"label": FIELDS[name][0], "unit": FIELDS[name][1]} for name in known},
        "unavailable": missing,
        "reason": None if known else telemetry.reason or "there are no samples",
    }


def _mean(samples: list[GpuSample], field: str) -> float | None:
    """The mean of the samples that have the field: activity has fewer than the rest."""
    known = [value for s in samples if (value := getattr(s, field)) is not None]
    return sum(known) / len(known) if known else None
