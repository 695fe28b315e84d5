"""What the driver says about a GPU at one moment: clocks, and the reasons why they are not higher.

Nothing here raises: without the library, without a driver, or for a field that the GPU does not support, it is None.
"""

from collections.abc import Callable
from typing import NamedTuple

REASONS = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x100: "display clocks",
}
"""NVML's clock event reasons (nvml.h, nvmlClocksEventReasons) in words."""

THROTTLING = {
    "power cap",
    "hardware slowdown",
    "software thermal slowdown",
    "hardware thermal slowdown",
    "power brake",
}
"""Those under which a timing says more about the room than about the kernel."""


class GpuSample(NamedTuple):
    """Clocks in MHz and the event reasons in words, empty if there are none; None is not known."""

    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    reasons: tuple[str, ...] | None

    @property
    def throttled(self) -> bool:
        """Whether the clocks are known to be held down by heat or power."""
        return bool(THROTTLING.intersection(self.reasons or ()))


def in_words(mask: int) -> tuple[str, ...]:
    """NVML's bit mask of reasons; a bit that is not in the table keeps its number."""
    bits = [1 << i for i in range(mask.bit_length()) if mask >> i & 1]
    return tuple(REASONS.get(bit, f"reason {bit:#x}") for bit in bits)


def sampler(uuid: str) -> Callable[[], GpuSample | None]:
    """A function that samples the GPU of this UUID ("GPU-..."), or that returns None where NVML cannot."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except Exception:  # no library, no driver, or another one than the library's: each its own exception class
        return lambda: None

    def read(function: Callable, *arguments: int) -> int | None:
        try:
            return function(handle, *arguments)
        except pynvml.NVMLError:
            return None

    def sample() -> GpuSample:
        mask = read(pynvml.nvmlDeviceGetCurrentClocksEventReasons)
        return GpuSample(
            read(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            read(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
            None if mask is None else in_words(mask),
        )

    return sample
