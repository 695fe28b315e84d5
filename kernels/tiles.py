"""The tile that a convolution kernel runs with: a measured entry of a committed table, else a deterministic default.

The table, `tiles.json` beside this file, is a record and no cache: it changes when somebody measures and commits.

    {"schema": 1, "entries": [{"gpu": "NVIDIA H200", "op": "conv_fprop", "shape": "64x32x32-128x3x3-s2",
      "dtype": "float16", "triton": "3.6.0", "us": 41.5, "library_us": 44.0, "tile": {"BLOCK_M": 128, ...}}, ...]}

`us` is the median time of our kernel at that tile, `library_us` that of the library's convolution together with the
elementwise passes that ours saves beside it. Where the library is faster, `prefers_library` says so.

BLOCK_M, BLOCK_N and BLOCK_K cut NPQ, K and C for fprop; NPQ, C and K for dgrad; C, K and NPQ for wgrad.
"""

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.contract import dtype_name
from kernels.conv_shape import ConvShape, boxes_fit, lines_fit, parse
from kernels.jit import INTERPRETED

OPS = ("conv_fprop", "conv_dgrad", "conv_wgrad")
FORMS = ("rows", "columns", "lines")
PROLOGUES = ("fp32", "fp16x2", "stored")
SCHEMA = 1
PATH = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Tile:
    """The shape of one program's work, and how it is compiled.

    descriptors  asks for tensor descriptors (TMA, from compute capability 9.0 on) where the map's shape allows them
    SPLIT, TAPS  of wgrad: the parts that it cuts GEMM_K into, and the taps of the filter that a program computes
    form         of fprop and dgrad: the product's rows are pixels ("rows"), as they are under a prologue, which leaves
                 its operand in registers; or its columns are ("columns"), and wgmma takes both operands from shared
                 memory; or a program keeps its part of the filter in shared memory and walks down a map ("lines"),
                 which loads a pixel 3 times instead of 9
    prologue     of fprop and wgrad: relu(x * scale + shift) is computed in fp32 as x is loaded ("fp32"), or in fp16,
                 two elements an instruction ("fp16x2"), or by a pass of its own beforehand ("stored")
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    SPLIT: int = 1
    TAPS: int = 1
    form: str = "rows"
    prologue: str = "fp32"

    def __str__(self) -> str:
        """Such as "128x64x64 4 warps 3 stages descriptors", without defaults."""
        words = [f"{self.BLOCK_M}x{self.BLOCK_N}x{self.BLOCK_K} {self.num_warps} warps {self.num_stages} stages"]
        words.append("descriptors" if self.descriptors else "pointers")
        words += [f"{name.lower()} {n}" for name, n in (("SPLIT", self.SPLIT), ("TAPS", self.TAPS)) if n > 1]
        words += [self.form] if self.form != "rows" else []
        return " ".join(words + ([self.prologue] if self.prologue != "fp32" else []))

    def check(self, op: str, shape: ConvShape) -> None:
        """Raise ValueError unless the tile can run `op` at `shape`: powers of two that divide the channels, and a form
        and a prologue that the op has."""
        channels = {"conv_fprop": (None, shape.K, shape.C), "conv_dgrad": (None, shape.C, shape.K)}
        extents = channels.get(op, (shape.C, shape.K, None))
        for name, extent in zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), extents, strict=True):
            block = getattr(self, name)
            if block < 16 or block & (block - 1) or (extent is not None and extent % block):
                divides = "" if extent is None else f" that divides {extent}"
                raise ValueError(f"{op} {shape}: {name} is {block}, expected a power of two from 16 on{divides}")
        if self.num_warps not in (1, 2, 4, 8, 16) or self.num_stages < 1 or self.SPLIT < 1:
            raise ValueError(f"{op} {shape}: num_warps, num_stages or SPLIT is out of range in {self}")
        wgrad, plain = op == "conv_wgrad", shape.R == 3 and shape.stride == 1
        if self.TAPS not in ((1, 3) if wgrad and plain else (1,)):
            raise ValueError(f"{op} {shape}: TAPS is {self.TAPS}, expected 1, or 3 for wgrad of 3x3 at stride 1")
        if self.form not in (("rows",) if wgrad else FORMS):
            raise ValueError(f"{op} {shape}: form is {self.form!r}, expected one of {', '.join(FORMS)}; rows for wgrad")
        if self.form == "lines" and not (plain and self.descriptors and lines_fit(self.BLOCK_M, shape)):
            raise ValueError(
                f"{op} {shape}: form is 'lines', for which the filter must be 3x3, the stride 1, the map's width a "
                "power of two that divides BLOCK_M, and descriptors be asked for"
            )
        if self.prologue not in (PROLOGUES if op != "conv_dgrad" else ("fp32",)):
            raise ValueError(f"{op} {shape}: prologue is {self.prologue!r}, expected one of {', '.join(PROLOGUES)}")


class Gpu(NamedTuple):
    """The place where a kernel runs: the device's name and compute capability, None for the interpreter."""

    name: str
    capability: tuple[int, int] | None


class Entry(NamedTuple):
    """One measurement of the table."""

    gpu: str
    op: str
    shape: str
    dtype: str
    triton: str
    us: float
    library_us: float
    tile: Tile


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The `Gpu` of a CUDA device; of any other device, and of all under the interpreter, the interpreter."""
    if device.type != "cuda" or INTERPRETED:
        return Gpu("interpreter", None)
    return Gpu(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


@contextlib.contextmanager
def as_on(gpu: Gpu) -> Iterator[None]:
    """Let every tensor be on `gpu`, as far as tiles are concerned: for ops that are modelled on another device."""
    global gpu_of
    original, gpu_of = gpu_of, lambda device: gpu
    try:
        yield
    finally:
        gpu_of = original


def tile(op: str, shape: ConvShape, dtype: torch.dtype, gpu: Gpu) -> Tile:
    """The tile for `op` at `shape`: the table's where it has measured this GPU, the default otherwise."""
    entry = _by_key().get((gpu.name, op, str(shape), dtype_name(dtype)))
    return default_tile(op, shape, dtype, gpu.capability) if entry is None else entry.tile


def prefers_library(op: str, shape: ConvShape, dtype: torch.dtype, gpu: Gpu) -> bool:
    """Whether the table has measured the library's convolution as the faster; False where nothing was measured."""
    entry = _by_key().get((gpu.name, op, str(shape), dtype_name(dtype)))
    return entry is not None and entry.library_us < entry.us


def default_tile(op: str, shape: ConvShape, dtype: torch.dtype, capability: tuple[int, int] | None) -> Tile:
    """A tile that compiles without spills from compute capability 8.0 on; for None, one that is fast to interpret.

    It has four warps. With eight, Triton has compiled loops like those of fprop and dgrad, over taps and channels in
    one, to wrong numbers on an H100, without a word (pytorch/pytorch#173068, #177823; PyTorch keeps to four since).
    More warps are for the table's entries, which were right on the GPU that measured them. Of a 128x128 block four
    warps hold 128 accumulators a thread: wgrad has registers left, and so have fprop and dgrad on 9.x; on other GPUs
    they spill, hence 64 columns there. The loop of fprop's 1x1 filters may be of a single step, in which ptxas adds
    waits of its own on 9.x unless there are but 64 rows.

    The interpreter's time is per program and not per element, so its tiles are as large as the small maps of a test.
    fp32 has no matrix instruction that keeps fp32's accuracy, hence small tiles of plain multiply-adds.
    """
    if op not in OPS:
        raise ValueError(f"op is {op!r}, expected one of {', '.join(OPS)}")
    if op == "conv_wgrad":
        return _default_wgrad_tile(shape, dtype, capability)
    n, k = (shape.K, shape.C) if op == "conv_fprop" else (shape.C, shape.K)
    if capability is None:
        return Tile(1024, _divisor(n, 256), _divisor(k, 256), num_warps=4, num_stages=1)
    if dtype == torch.float32:
        return Tile(64, _divisor(n, 32), _divisor(k, 32), num_warps=4, num_stages=2)
    if op == "conv_dgrad" and capability[0] == 9:
        return _default_dgrad_tile_of_hopper(shape)
    wide = op == "conv_fprop" and capability[0] == 9
    plain = shape.R == 3 and shape.stride == 1 and k == _divisor(k, 64)  # one block of channels
    if wide and plain and dtype == torch.float16 and lines_fit(64, shape):
        return Tile(64, _divisor(n, 64), k, 4, 2, descriptors=True, form="lines", prologue="fp16x2")
    return Tile(
        64 if wide and shape.R == 1 else 128,
        _divisor(n, 128 if wide else 64),
        _divisor(k, 64),
        num_warps=4,
        num_stages=3,
        descriptors=_has_descriptors(capability),
        form="columns" if wide and shape.R == 3 else "rows",
    )


def _default_dgrad_tile_of_hopper(shape: ConvShape) -> Tile:
    """The tile of four warps that loads least: for each byte, lines do 171 FLOPs, 128x128 columns 64 and 256x64 51.

    Two blocks fit into a multiprocessor, so that one's epilogue is under the other's products: hence lines only where
    the nine taps are of one block of filters, and two stages of 256x64.
    """
    block_n, block_k = _divisor(shape.C, 128), _divisor(shape.K, 64)
    if shape.R == 3 and shape.stride == 1 and block_k == shape.K and lines_fit(64, shape):
        return Tile(64, min(block_n, 64), block_k, 4, 2, descriptors=True, form="lines")
    block_m, stages = (128, 3) if block_n == 128 else (256, 2)
    if block_n < 64 or not boxes_fit(block_m, shape):  # wgmma has 64 rows, which are channels in columns
        return Tile(128, min(block_n, 64), block_k, 4, 3, descriptors=True)
    return Tile(block_m, block_n, block_k, 4, stages, descriptors=True, form="columns")


def _default_wgrad_tile(shape: ConvShape, dtype: torch.dtype, capability: tuple[int, int] | None) -> Tile:
    if capability is None:
        return Tile(_divisor(shape.C, 256), _divisor(shape.K, 256), 1024, num_warps=4, num_stages=1)
    single, descriptors = dtype == torch.float32, _has_descriptors(capability) and dtype != torch.float32
    # On 10.x Triton 3.6 does not compile several products of an operand that a prologue has computed.
    taps = 3 if descriptors and capability[0] == 9 and shape.R == 3 and shape.stride == 1 else 1
    block_m = _divisor(shape.C, 32 if single else 128)
    # Three taps of 128x64 or 64x128: 192 accumulators a thread, as many as leave registers for the rest.
    block_n = _divisor(shape.K, 32 if single else 128 if taps == 1 else min(128, 8192 // block_m))
    programs = shape.R**2 // taps * (shape.C // block_m) * (shape.K // block_n)
    resident = 512  # some four programs for each of the 108 to 142 multiprocessors of a large GPU
    if descriptors:
        # One wave. A multiprocessor holds two of the programs, by ptxas's registers and shared memory, or three small
        # ones; an H100 SXM and an H200 have 132 of them, a B200 has 148.
        # A 1x1 filter's products are so small that its parts would be most of their bytes: one program each.
        each = 1 if shape.R == 1 else 3 if taps * block_m * block_n <= 8192 else 2
        resident = each * (132 if capability[0] == 9 else 148)
    return Tile(
        block_m,
        block_n,
        32 if single else 64,
        num_warps=4,
        num_stages=2 if taps == 3 and block_n > block_m else 3,  # with three there is room for but one program
        descriptors=descriptors,
        SPLIT=max(1, resident // programs),
        TAPS=taps,
        prologue="fp16x2" if descriptors and dtype == torch.float16 else "fp32",
    )


def _has_descriptors(capability: tuple[int, int]) -> bool:
    """Whether descriptors feed wgmma or tcgen05. On 12.x they feed mma.sync, which takes twice the instructions."""
    return (9, 0) <= capability < (12, 0)


def _divisor(channels: int, largest: int) -> int:
    """The largest power of two that divides `channels` and is at most `largest`."""
    return min(channels & -channels, largest)


def load(path: Path = PATH) -> tuple[Entry, ...]:
    """The table's entries. Raises ValueError, naming the file and the entry, for anything that is not by the schema."""
    table = json.loads(path.read_text())
    if not isinstance(table, dict) or table.get("schema") != SCHEMA or not isinstance(table.get("entries"), list):
        raise ValueError(f"{path}: expected an object with schema {SCHEMA} and a list of entries")
    entries = tuple(_entry(record, f"{path}, entry {i}") for i, record in enumerate(table["entries"]))
    keys = [entry[:4] for entry in entries]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{path}: more than one entry for {' '.join(key)}")
    return entries


def document(entries: Iterable[Entry]) -> dict[str, object]:
    """The table of `entries`, sorted by their key, as JSON; `load` reads the same entries back."""
    records = [entry._asdict() | {"tile": asdict(entry.tile)} for entry in sorted(entries, key=lambda entry: entry[:4])]
    return {"schema": SCHEMA, "entries": records}


@functools.cache
def _by_key() -> dict[tuple[str, str, str, str], Entry]:
    return {entry[:4]: entry for entry in load()}


def _entry(record: object, place: str) -> Entry:
    if not isinstance(record, dict) or set(record) != set(Entry._fields):
        raise ValueError(f"{place}: expected the fields {', '.join(Entry._fields)}")
    have, wanted = record["tile"], {field.name: field.type for field in fields(Tile)}
    if not isinstance(have, dict) or {name: type(value) for name, value in have.items()} != wanted:
        raise ValueError(f"{place}: expected a tile of {', '.join(f'{n} ({t.__name__})' for n, t in wanted.items())}")
    entry = Entry(**record | {"tile": Tile(**have)})
    if entry.op not in OPS or not all(isinstance(t, int | float) and t > 0 for t in (entry.us, entry.library_us)):
        raise ValueError(f"{place}: expected an op of {', '.join(OPS)} and positive times")
    try:
        entry.tile.check(entry.op, parse(entry.shape))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return entry
