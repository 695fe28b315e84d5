"""What the vendor promises of a GPU, and of two what predictions assume: what knows hardware by name.

Every peak is dense; a data sheet that prints only its sparse figure is halved. Products accumulate in fp32, as training
does, which GeForce cards do at half of their advertised fp16 rate. Bytes are decimal, caches binary.
"""

from dataclasses import dataclass
from typing import NamedTuple

V100_FLOPS_PER_S = 125e12
"""Dense fp16 tensor-core peak of the article's GPU (NVIDIA's Tesla V100 SXM2 data sheet; the article uses it too)."""

DTYPES = ("float16", "bfloat16", "float32")
"""Of a training's activations and its kernels."""


@dataclass(frozen=True)
class Specification:
    """One GPU.

    `flops_per_s` is the dense peak for "float16", "bfloat16", "tf32" and "float32" (without tensor cores); what the GPU
    has no unit for is absent. `bytes_per_s` is of device memory. `source` is the document that says so.
    """

    name: str
    flops_per_s: dict[str, float]
    bytes_per_s: float
    l2_bytes: int
    source: str


def specification(gpu_name: str) -> Specification | None:
    """The entry of the GPU that the driver calls `gpu_name`; None for one that the table lacks, never a neighbour's.

    The name must agree to the letter but for a leading "NVIDIA ", which older drivers leave out: a MIG slice, a GPU
    for laptops, a Ti or a D is another device under a longer name.
    """
    return _BY_NAME.get(gpu_name.strip().removeprefix("NVIDIA "))


_BOOST_MHZ = {
    "V100 SXM2": 1530,
    "V100 PCIe": 1380,
    "A100 SXM 40 GB": 1410,
    "A100 SXM 80 GB": 1410,
    "A100 PCIe 40 GB": 1410,
    "A100 PCIe 80 GB": 1410,
    "H100 SXM": 1830,
    "H100 PCIe": 1620,
    "H200 SXM": 1830,
    "GeForce RTX 3090": 1695,
    "GeForce RTX 4090": 2520,
    "L4": 2040,
    "T4": 1590,
}
"""Architecture white papers' boost clocks; H200: the H100's, by which its own peaks are as many FLOP a clock."""
_BOOST_MHZ_WITHOUT_TENSOR_CORES = {"H100 SXM": 1980, "H100 PCIe": 1755, "H200 SXM": 1980}
"""Where the same paper has another one for "float32"."""


def boost_mhz(gpu: Specification, arithmetic: str) -> int | None:
    """The SM clock that the peak in `arithmetic` is quoted at, None where it is not known.

    A peak is FLOP per clock times clock, so at another clock it is another one.
    """
    of_arithmetic = _BOOST_MHZ_WITHOUT_TENSOR_CORES if arithmetic == "float32" else {}
    return of_arithmetic.get(gpu.name, _BOOST_MHZ.get(gpu.name))


_MIB = 2**20


def _peaks(half: float, tf32: float, single: float) -> dict[str, float]:
    """From TFLOP/s; fp16 and bf16 are equally fast on everything that has bf16."""
    return {"float16": half * 1e12, "bfloat16": half * 1e12, "tf32": tf32 * 1e12, "float32": single * 1e12}


def _volta_or_turing(half: float, single: float) -> dict[str, float]:
    """From FLOP/s; neither bf16 nor tf32 before compute capability 8.0."""
    return {"float16": half, "float32": single}


_V100_SHEET = "NVIDIA V100 data sheet; L2: Tesla V100 GPU architecture white paper"
_A100_SHEET = "NVIDIA A100 data sheet; L2: A100 architecture white paper"
_H100_PAPER = "NVIDIA H100 architecture white paper, final clocks; bandwidth: H100 data sheet"

_ENTRIES: tuple[tuple[Specification, tuple[str, ...]], ...] = (
    (
        Specification("V100 SXM2", _volta_or_turing(V100_FLOPS_PER_S, 15.7e12), 0.9e12, 6 * _MIB, _V100_SHEET),
        ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"),
    ),
    (
        Specification("V100 PCIe", _volta_or_turing(112e12, 14e12), 0.9e12, 6 * _MIB, _V100_SHEET),
        ("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB"),
    ),
    (
        Specification("A100 SXM 40 GB", _peaks(312, 156, 19.5), 1.555e12, 40 * _MIB, _A100_SHEET),
        ("A100-SXM4-40GB",),
    ),
    (
        Specification("A100 SXM 80 GB", _peaks(312, 156, 19.5), 2.039e12, 40 * _MIB, _A100_SHEET),
        ("A100-SXM4-80GB",),
    ),
    (
        Specification("A100 PCIe 40 GB", _peaks(312, 156, 19.5), 1.555e12, 40 * _MIB, _A100_SHEET),
        ("A100-PCIE-40GB",),
    ),
    (
        Specification("A100 PCIe 80 GB", _peaks(312, 156, 19.5), 1.935e12, 40 * _MIB, _A100_SHEET),
        ("A100 80GB PCIe",),
    ),
    (
        Specification("H100 SXM", _peaks(989.4, 494.7, 66.9), 3.35e12, 50 * _MIB, _H100_PAPER),
        ("H100 80GB HBM3",),
    ),
    (
        Specification("H100 PCIe", _peaks(756, 378, 51.2), 2.0e12, 50 * _MIB, _H100_PAPER),
        ("H100 PCIe",),
    ),
    (
        Specification(
            "H200 SXM",
            _peaks(989.5, 494.5, 67),
            4.8e12,
            60 * _MIB,
            "NVIDIA H200 data sheet, its sparse figures halved; L2: as the driver reports it",
        ),
        ("H200",),
    ),
    (
        Specification(
            "B200",
            _peaks(2250, 1125, 75),
            7.7e12,
            126 * _MIB,
            "NVIDIA Blackwell data sheet, HGX B200, its sparse figures halved; L2: as the driver reports it",
        ),
        ("B200",),
    ),
    (
        Specification(
            "GeForce RTX 3090",
            _peaks(71, 35.6, 35.6),
            0.936e12,
            6 * _MIB,
            "NVIDIA Ampere GA102 architecture white paper",
        ),
        ("GeForce RTX 3090",),
    ),
    (
        Specification(
            "GeForce RTX 4090", _peaks(165.2, 82.6, 82.6), 1.008e12, 72 * _MIB, "NVIDIA Ada architecture white paper"
        ),
        ("GeForce RTX 4090",),
    ),
    (
        Specification(
            "L4",
            _peaks(121, 60, 30.3),
            0.3e12,
            48 * _MIB,
            "NVIDIA L4 data sheet, its sparse figures halved; L2: Ada architecture white paper",
        ),
        ("L4",),
    ),
    (
        Specification(
            "T4",
            _volta_or_turing(65e12, 8.1e12),
            0.32e12,
            4 * _MIB,
            "NVIDIA T4 data sheet; L2: Turing architecture white paper",
        ),
        ("Tesla T4", "T4"),
    ),
)

SPECIFICATIONS: tuple[Specification, ...] = tuple(entry for entry, _ in _ENTRIES)
"""Every GPU that the table knows."""

_BY_NAME = {name: entry for entry, names in _ENTRIES for name in names}


class Machine(NamedTuple):
    """What a prediction needs to know of a GPU; of which data sheet, `specification(name)` says.

    flops_per_s, bytes_per_s     of a large fp16 product and of a copy in device memory, as `source` has them (quoted)
    l2_bytes_per_s               what all multiprocessors together read through the L2 cache, and `l2_range`, within
                                 which it may be (assumed)
    l2_latency_us                of a load that the L2 cache answers (assumed)
    multiprocessor_bytes_per_s   that one multiprocessor reads: 64 bytes a cycle
    instructions_per_s           that one multiprocessor issues: four warps, one a cycle each
    matrix_macs_per_cycle        fp16 multiply-adds of one multiprocessor's tensor cores, by its peak
    """

    short: str
    name: str
    capability: tuple[int, int]
    flops_per_s: float
    bytes_per_s: float
    source: str
    l2_bytes_per_s: float = 6.5e12
    l2_range: tuple[float, float] = (5.5e12, 7e12)
    l2_latency_us: float = 0.15
    multiprocessors: int = 132
    multiprocessor_bytes_per_s: float = 64 * 1.755e9
    instructions_per_s: float = 4 * 1.755e9
    matrix_macs_per_cycle: int = 2048
    assumed: str = (
        "assumed: some 28 bytes a cycle for each multiprocessor from the L2 cache, whose port takes 64, and 260 cycles "
        "until it answers, at 1.755 GHz; measure its rate first, it decides most"
    )


_ELSEWHERE = "a large fp16 product and a copy in device memory, measured elsewhere on one"

H100 = Machine("H100", "NVIDIA H100 80GB HBM3", (9, 0), 798e12, 3.0e12, _ELSEWHERE)
H200 = Machine("H200", "NVIDIA H200", (9, 0), 790e12, 4.3e12, _ELSEWHERE)
MACHINES = (H100, H200)
"""Those that predictions are made for."""


def machine(gpu_name: str) -> Machine | None:
    """What predictions assume of the GPU that the driver calls `gpu_name`; None where none are made for it."""
    sheet = specification(gpu_name)
    return next((one for one in MACHINES if sheet is not None and specification(one.name) == sheet), None)


class Limits(NamedTuple):
    """What the resident blocks of one multiprocessor share: warps, blocks, bytes of shared memory, tensor-memory
    columns (0 where there is no such memory); and the bytes of shared memory that one block may use."""

    warps: int
    blocks: int
    shared_bytes: int
    tensor_columns: int
    block_shared_bytes: int


LIMITS = {
    80: Limits(64, 32, 164 * 1024, 0, 163 * 1024),
    90: Limits(64, 32, 228 * 1024, 0, 227 * 1024),
    100: Limits(64, 32, 228 * 1024, 512, 227 * 1024),
}
"""By architecture, from the table of technical specifications in NVIDIA's CUDA C++ Programming Guide."""
REGISTERS = 64 * 1024
"""32-bit registers of a multiprocessor; a warp gets them in units of 256 (the same table)."""
RESERVED_SHARED_BYTES = 1024
"""Of each block's share of shared memory, what the system takes (the same guide)."""
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""By architecture, how the mnemonic of its tensor cores' fp16 product begins."""
CAPABILITY = {"NVIDIA A100": (8, 0), "NVIDIA H100": (9, 0), "NVIDIA H200": (9, 0), "NVIDIA B200": (10, 0)}
"""Compute capability, by how the driver's name of the GPU begins."""
