"""Ceilings of this device, measured: the roofs of a run on it.

Candidates are products of large matrices, the library's convolutions at the article's 3x3 layers, a copy and an empty
launch. Each is kept running without a pause (`profiling.device.sustained`); its value is its best window, which a
training can reach and hardly pass.
"""

import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernels.contract import dtype_name
from kernels.conv_shape import RESNET_LAYERS, ConvShape
from profiling import ROOT
from profiling.device.environment import device_name, environment, fingerprint, machine
from profiling.device.sustained import CpuWatch, CudaWatch, captured, sustain
from profiling.output.files import read_json
from profiling.output.forms import COUNT, RATE, SECONDS, SHARE, fit
from profiling.output.units import show

VERSION = 1
CPU_BATCH = 64
"""On a CPU a larger batch is hardly faster and takes long."""
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 29}
"""Bytes read, and as many written: far more than a last-level cache holds."""
UNROLL = 16
"""Convolutions in one CUDA graph: the smallest layers take no longer than their launch from Python."""
GEMMS = {
    "cuda": ((4096, False), (8192, False), (8192, True), (16384, False)),
    "cpu": ((1024, False), (2048, False), (2048, True)),
}
"""(m = n = k, whether the second matrix is transposed in memory)."""

_CEILING = {
    "name": str,
    "shape": str,
    "value": RATE,
    "median": RATE,
    "unit": ("FLOP/s", "B/s", "s"),
    "samples": COUNT,
    "seconds": SECONDS,
    "arithmetic": str,
    "power_capped_share?": SHARE,
}
FORM = {
    "version": VERSION,
    "device": str,
    "dtype": str,
    "gemm": [_CEILING],
    "convolutions": [_CEILING],
    "copy": _CEILING,
    "launch": _CEILING,
    "sm_clock_mhz?": [(COUNT, None)],
    "reasons?": [str],
    "lacks": [str],
    "fingerprint": str,
}
"""The form of records/ceilings.json; see `profiling.output.forms`."""


@dataclass(frozen=True)
class Ceiling:
    """One candidate: `value` in its best window and `median` over the `samples` windows of `seconds` in all.

    unit        "FLOP/s", "B/s" (bytes read plus bytes written) or "s" (per launch)
    arithmetic  the data sheet's peak to compare with: "float16", "bfloat16", "tf32", "float32"; "" for none
    power_capped_share  the share of windows, 0 to 1, in which the power limit held the clock down, as it does in the
                large products of a large GPU; None where it is not known
    """

    name: str
    shape: str
    value: float
    median: float
    unit: str
    samples: int
    seconds: float
    arithmetic: str = ""
    power_capped_share: float | None = None


@dataclass(frozen=True)
class Ceilings:
    """The ceilings of one device in one dtype.

    sm_clock_mhz  before the first candidate and in the last convolution; None where it is not known
    reasons       limits of the products in words: heat, power, other processes; None where they are not known
    lacks         candidates that the library could not run, with its reason
    fingerprint   of the machine: ceilings of different fingerprints do not compare
    """

    device: str
    dtype: str
    gemm: list[Ceiling]
    convolutions: list[Ceiling]
    copy: Ceiling
    launch: Ceiling
    sm_clock_mhz: tuple[int | None, int | None] | None
    reasons: tuple[str, ...] | None
    lacks: tuple[str, ...]
    fingerprint: str

    @property
    def compute(self) -> Ceiling:
        """The fastest of the matrix products and the convolutions."""
        return max(self.gemm + self.convolutions, key=lambda ceiling: ceiling.value)

    @property
    def flops_per_s(self) -> float:
        """P_max of the account: no kernel of a training is expected to be faster."""
        return self.compute.value

    @property
    def bytes_per_s(self) -> float:
        """BW_max of the account: bytes read plus bytes written."""
        return self.copy.value

    @property
    def launch_s(self) -> float:
        """Seconds from one empty launch to the next."""
        return self.launch.value

    def to_json(self) -> dict[str, Any]:
        """The document of records/ceilings.json."""
        return {"version": VERSION} | {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, record: Any) -> "Ceilings":
        """Raises ValueError for anything that `to_json` did not return."""
        try:
            known = fit(record, FORM, "ceilings")
            del known["version"]
            known |= {name: [Ceiling(**c) for c in known[name]] for name in ("gemm", "convolutions")}
            known |= {name: Ceiling(**known[name]) for name in ("copy", "launch")}
            for name in ("sm_clock_mhz", "reasons", "lacks"):
                known[name] = None if known[name] is None else tuple(known[name])
            if not known["gemm"]:
                raise ValueError("ceilings has no matrix product")
        except ValueError as error:
            raise ValueError(f"{error}; measure them again") from None
        return cls(**known)


def reread(path: Path, device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The ceilings that `profiling device --out` wrote to `path` on this machine in `dtype`.

    Raises ValueError for another machine, driver, library or dtype and as `Ceilings.from_json` does, and OSError.
    """
    found = Ceilings.from_json(read_json(path))
    here = device_name(device)
    if (found.device, found.dtype) != (here, dtype_name(dtype)):
        raise ValueError(f"it is of {found.device} in {found.dtype}, and this run on {here} in {dtype_name(dtype)}")
    if found.fingerprint != fingerprint(machine(environment(device, ROOT))):
        raise ValueError("it was measured on another machine, or with another driver, torch, triton or thread count")
    return found


def measure(
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = 2.0,
    batch: int | None = 512,
    say: Callable[[str], None] = lambda text: None,
) -> Ceilings:
    """Run every candidate on `device` for about `seconds`; `say` is told each result.

    Convolutions have `batch` images, on a CPU at most CPU_BATCH; None leaves them out. fp32 is computed in TF32 where
    the process allows it, as in its training. Sizes that do not fit into a GPU's memory are halved.

    Raises ValueError for a dtype that the device does not compute in, as fp16 on a CPU, which emulates it;
    torch.OutOfMemoryError where even the least size does not fit; RuntimeError where the library has no matrix product
    for `dtype`.
    """
    on_gpu = device.type == "cuda"
    known = (*(torch.float16,) * on_gpu, torch.bfloat16, torch.float32)
    if dtype not in known:
        expected = " or ".join(map(dtype_name, known))
        raise ValueError(f"dtype is {dtype_name(dtype)}, expected {expected} on {device.type}")
    about, search, lacks = environment(device, ROOT), torch.backends.cudnn.benchmark, []
    torch.backends.cudnn.benchmark = True  # cuDNN searches for its fastest algorithm
    try:
        with torch.no_grad(), torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
            watch = CudaWatch(device) if on_gpu else CpuWatch()
            bench = _Bench(device, dtype, seconds, watch, say)
            before = watch.clock()
            gemm = bench.gemms()
            images = min(batch, CPU_BATCH) if batch and not on_gpu else batch
            convolutions = bench.convolutions(images, lacks) if images else []
            after, reasons = watch.hot_clock, watch.reasons()
            copy, launch = bench.copy(COPY_BYTES[device.type]), bench.launch()
    finally:
        torch.backends.cudnn.benchmark = search
    clocks = None if before is after is None else (before, after)
    names, mark = (device_name(device), dtype_name(dtype)), fingerprint(machine(about))
    return Ceilings(*names, gemm, convolutions, copy, launch, clocks, reasons, tuple(lacks), mark)


@dataclass(frozen=True)
class _Bench:
    """The candidates on one device, each a Ceiling."""

    device: torch.device
    dtype: torch.dtype
    seconds: float
    watch: CpuWatch | CudaWatch
    say: Callable[[str], None]

    def gemms(self) -> list[Ceiling]:
        found: list[Ceiling] = []
        for size, transposed in GEMMS[self.device.type]:
            # Emulated dtypes take seconds for what tensor cores do in milliseconds.
            if found and 2 * size**3 / found[-1].value > max(self.seconds, 0.5):
                break
            run, fitting = _fitting(lambda m, transposed=transposed: self._gemm(m, transposed), size, 256)
            shape = f"{fitting}^3{', transposed' if transposed else ''}"
            arithmetic = self._arithmetic(torch.backends.cuda.matmul.allow_tf32)
            found.append(self._sustain("matrix product", shape, "FLOP/s", run, 2 * fitting**3, arithmetic))
        return found

    def _gemm(self, size: int, transposed: bool) -> Callable[[], Any]:
        a, b, c = (torch.randn(size, size, dtype=self.dtype, device=self.device) for _ in range(3))
        return _tried(lambda: torch.mm(a, b.t() if transposed else b, out=c))

    def convolutions(self, batch: int, lacks: list[str]) -> list[Ceiling]:
        found, arithmetic = [], self._arithmetic(torch.backends.cudnn.allow_tf32)
        unroll = UNROLL if self.device.type == "cuda" else 1
        for layer in (layer for layer in RESNET_LAYERS if layer.R == 3):
            for name in ("fprop", "dgrad", "wgrad"):
                try:
                    run, n = _fitting(lambda n, layer=layer, name=name: self._convolution(name, layer, n), batch, 1)
                    shape, work = f"{layer}, batch {n}", unroll * layer.flops(n)
                    found.append(self._sustain(name, shape, "FLOP/s", run, work, arithmetic))
                except torch.OutOfMemoryError:
                    raise
                except RuntimeError as error:  # the library has no kernel for this dtype on this device
                    lacks.append(f"{name} {layer}: {str(error).splitlines()[0][:200]}")
        return found

    def _convolution(self, name: str, layer: ConvShape, batch: int) -> Callable[[], Any]:
        def channels_last(n: int, c: int, h: int, w: int) -> torch.Tensor:
            return torch.randn(n, h, w, c, dtype=self.dtype, device=self.device).permute(0, 3, 1, 2)

        x, w = channels_last(batch, layer.C, layer.H, layer.W), channels_last(layer.K, layer.C, layer.R, layer.R)
        dy = channels_last(batch, layer.K, layer.P, layer.Q)
        stride, padding = (layer.stride,) * 2, (layer.R // 2,) * 2
        run = {
            "fprop": lambda: torch.conv2d(x, w, None, stride, padding),
            "dgrad": lambda: conv_backward(dy, x, w, layer, 0),
            "wgrad": lambda: conv_backward(dy, x, w, layer, 1),
        }[name]
        return captured(_tried(run), UNROLL) if self.device.type == "cuda" else _tried(run)

    def copy(self, size: int) -> Ceiling:
        def build(size: int) -> Callable[[], Any]:
            source = torch.ones(size, dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            return _tried(lambda: target.copy_(source))

        run, fitting = _fitting(build, size, 1 << 20)
        return self._sustain("copy", f"{fitting / 2**20:,.0f} MiB", "B/s", run, 2 * fitting)

    def launch(self) -> Ceiling:
        if self.device.type == "cuda":
            return self._sustain("launch", "empty kernel", "s", _tried(lambda: torch.cuda._sleep(0)))
        one = torch.zeros(1)
        return self._sustain("launch", "add to one number", "s", _tried(lambda: one.add_(1)))

    def _sustain(
        self, name: str, shape: str, unit: str, run: Callable[[], Any], work: int | None = None, arithmetic: str = ""
    ) -> Ceiling:
        took = sustain(self.watch, run, self.seconds)
        value, median = (took.best_s, took.median_s) if work is None else (work / took.best_s, work / took.median_s)
        self.say(f"{name} {shape}: {show(value, unit, 4)}")
        kept = took.samples, took.seconds, arithmetic, took.power_capped_share
        return Ceiling(name, shape, value, median, unit, *kept)

    def _arithmetic(self, allow_tf32: bool) -> str:
        tf32 = self.dtype == torch.float32 and self.device.type == "cuda" and allow_tf32
        return "tf32" if tf32 and torch.cuda.get_device_capability(self.device) >= (8, 0) else dtype_name(self.dtype)


def _tried(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run`, called once, so that its compilation, searches, allocations and failures come before the timing."""
    run()
    return run


def _fitting(build: Callable[[int], Callable[[], Any]], size: int, least: int) -> tuple[Callable[[], Any], int]:
    """(`build(size)`, size), with `size` halved until it fits into the device's memory."""
    while True:
        with contextlib.suppress(torch.OutOfMemoryError):
            return build(size), size
        if size // 2 < least:
            raise torch.OutOfMemoryError(f"not even {size} fits into the device's memory")
        torch.cuda.empty_cache()
        size //= 2


def conv_backward(dy: torch.Tensor, x: torch.Tensor, w: torch.Tensor, shape: ConvShape, which: int) -> torch.Tensor:
    """The library's dx (`which` 0) or dw (1) alone; only the extents of x, for dx, or of w, for dw, are read."""
    sides = [[shape.stride] * 2, [shape.R // 2] * 2, [1, 1], False, [0, 0], 1]
    mask = [which == 0, which == 1, False]
    return torch.ops.aten.convolution_backward(dy, x, w, None, *sides, mask)[which]
