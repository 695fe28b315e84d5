"""Data sheets of GPUs, and limits of their multiprocessors. Hardware is named nowhere else.

Every peak is dense; a data sheet that prints only its sparse figure is halved. Products accumulate in fp32, as training
does: GeForce cards do so at half of their advertised fp16 rate, workstation cards at the whole. Bytes are decimal,
caches binary.
"""

from dataclasses import dataclass
from typing import NamedTuple

V100_FLOPS_PER_S = 125e12
"""Dense fp16 tensor-core peak of the article's GPU (NVIDIA's Tesla V100 SXM2 data sheet; the article uses it too)."""

DTYPES = ("float16", "bfloat16", "float32")
"""Dtypes of a training's activations and of its kernels."""


@dataclass(frozen=True)
class Specification:
    """One GPU.

    `flops_per_s` is the dense peak for "float16", "bfloat16", "tf32" and "float32" (without tensor cores), without the
    dtypes that the GPU has no unit for. `bytes_per_s` is of device memory. `source` names the document.
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


def boost_mhz(gpu: Specification, arithmetic: str) -> int | None:
    """The SM clock that the peak in `arithmetic` is quoted at, None where it is not known.

    A peak is FLOP per clock times clock, so at another clock it is another one.
    """
    row = next(row for row in _ROWS if row.name == gpu.name)
    return row.plain_mhz if arithmetic == "float32" and row.plain_mhz else row.mhz


class _Row(NamedTuple):
    """Peaks in TFLOP/s: `half` of fp16 and bf16, which are equally fast on a GPU that has bf16; `single` without tensor
    cores. `tf32` is None before compute capability 8.0, which has no bf16 either. Boost clocks in MHz, None where no
    document names one; `plain_mhz` is of `single`, where it differs. `drivers` are the driver's names without "NVIDIA".
    """

    name: str
    half: float
    tf32: float | None
    single: float
    gb_per_s: float
    l2_mib: int
    mhz: int | None
    source: str
    drivers: tuple[str, ...] = ()
    plain_mhz: int | None = None

    def specification(self) -> Specification:
        peaks = {"float16": self.half, "bfloat16": self.half, "tf32": self.tf32, "float32": self.single}
        known = {k: v * 1e12 for k, v in peaks.items() if self.tf32 is not None or k in ("float16", "float32")}
        return Specification(self.name, known, self.gb_per_s * 1e9, self.l2_mib * 2**20, self.source)


_V100 = "NVIDIA V100 data sheet; L2: Tesla V100 GPU architecture white paper"
_A100 = "NVIDIA A100 data sheet; L2: A100 architecture white paper"
_H100 = "NVIDIA H100 architecture white paper, final clocks; bandwidth: H100 data sheet"
_GA102 = "NVIDIA Ampere GA102 architecture white paper"
_ADA = "NVIDIA Ada GPU architecture white paper"
_T4 = "NVIDIA T4 data sheet; L2: Turing architecture white paper"
_PRO_ADA = "NVIDIA Ada architecture white paper for professional GPUs"
_RTX_PRO = "RTX PRO 6000 Blackwell Workstation Edition"
_HALVED = "its sparse figures halved"
_L2 = "L2: as the driver reports it"
_GB200 = f"NVIDIA GB200 NVL72 data sheet, {_HALVED}; L2: Blackwell tuning guide"

_ROWS = (
    _Row("V100 SXM2", 125, None, 15.7, 900, 6, 1530, _V100, ("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB")),
    _Row("V100 PCIe", 112, None, 14, 900, 6, 1380, _V100, ("Tesla V100-PCIE-16GB", "Tesla V100-PCIE-32GB")),
    _Row("T4", 65, None, 8.1, 320, 4, 1590, _T4, ("Tesla T4", "T4")),
    _Row("A100 SXM 40 GB", 312, 156, 19.5, 1555, 40, 1410, _A100, ("A100-SXM4-40GB",)),
    _Row("A100 SXM 80 GB", 312, 156, 19.5, 2039, 40, 1410, _A100, ("A100-SXM4-80GB",)),
    _Row("A100 PCIe 40 GB", 312, 156, 19.5, 1555, 40, 1410, _A100, ("A100-PCIE-40GB",)),
    _Row("A100 PCIe 80 GB", 312, 156, 19.5, 1935, 40, 1410, _A100, ("A100 80GB PCIe",)),
    _Row("A30", 165, 82, 10.3, 933, 24, 1440, f"NVIDIA A30 data sheet; {_L2}"),
    _Row("A40", 149.7, 74.8, 37.4, 696, 6, 1740, f"NVIDIA A40 data sheet; L2: {_GA102}"),
    _Row("A10", 125, 62.5, 31.2, 600, 6, 1695, f"NVIDIA A10 data sheet; {_L2}"),
    _Row("A10G", 70, 35, 35, 600, 6, 1710, f"NVIDIA A10G data sheet for AWS; {_L2}"),
    _Row("RTX A6000", 154.8, 77.4, 38.7, 768, 6, 1800, _GA102),
    _Row("GeForce RTX 3090", 71, 35.6, 35.6, 936, 6, 1695, _GA102),
    _Row("GeForce RTX 4080", 97.5, 48.7, 48.7, 716.8, 64, 2505, _ADA),
    _Row("GeForce RTX 4090", 165.2, 82.6, 82.6, 1008, 72, 2520, _ADA),
    _Row("RTX 6000 Ada", 364.2, 182.1, 91.1, 960, 96, 2505, _PRO_ADA, ("RTX 6000 Ada Generation",)),
    _Row("L4", 121, 60, 30.3, 300, 48, 2040, f"NVIDIA L4 data sheet, {_HALVED}; L2: {_ADA}"),
    _Row("L40S", 362.05, 183, 91.6, 864, 96, 2490, f"NVIDIA L40S data sheet; {_L2}", plain_mhz=2520),
    _Row("H100 SXM", 989.4, 494.7, 66.9, 3350, 50, 1830, _H100, ("H100 80GB HBM3",), 1980),
    _Row("H100 PCIe", 756, 378, 51.2, 2000, 50, 1620, _H100, ("H100 PCIe",), 1755),
    _Row("H100 NVL", 835.5, 417.5, 60, 3900, 60, None, f"NVIDIA H100 data sheet, {_HALVED}; {_L2}", (), 1785),
    _Row("H200 SXM", 989.5, 494.5, 67, 4800, 60, 1830, f"NVIDIA H200 data sheet, {_HALVED}; {_L2}", ("H200",), 1980),
    _Row("B200", 2250, 1125, 75, 7700, 126, None, f"NVIDIA Blackwell data sheet, HGX B200, {_HALVED}; {_L2}"),
    _Row("GB200", 2500, 1250, 80, 8000, 126, None, _GB200),
    _Row("GeForce RTX 5090", 209.5, 104.8, 104.8, 1792, 96, 2407, "NVIDIA RTX Blackwell architecture white paper"),
    _Row(_RTX_PRO, 503.8, 251.9, 125, 1792, 128, 2617, "NVIDIA RTX PRO Blackwell architecture white paper, data sheet"),
)
"""`mhz`: boost clocks of the architecture white papers or, where those lack the GPU, the highest that the driver names;
of H200 the H100's, by which their peaks are as many FLOP a clock. Left out are the RTX 3080, a name that the
driver gives to two cards (10 and 12 GB), and B300, GH200 and L40, of whose L2 no document was seen."""

SPECIFICATIONS: tuple[Specification, ...] = tuple(row.specification() for row in _ROWS)
"""Every GPU of the table."""

_BY_NAME = {
    name: entry for row, entry in zip(_ROWS, SPECIFICATIONS, strict=True) for name in row.drivers or (row.name,)
}


class Limits(NamedTuple):
    """Limits of the resident blocks of one multiprocessor together: warps, blocks, bytes of shared memory,
    tensor-memory columns (0 without such memory); and the bytes of shared memory that one block may use."""

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
MULTIPROCESSORS = 132
"""The multiprocessors of an H100 SXM and an H200 (NVIDIA H100 architecture white paper)."""
REGISTERS = 64 * 1024
"""32-bit registers of a multiprocessor; a warp gets them in units of 256 (the same table)."""
RESERVED_SHARED_BYTES = 1024
"""The system takes so much of each block's share of shared memory (the same guide)."""
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""The beginning of the mnemonic of the tensor cores' fp16 product, by architecture."""
CAPABILITY = {"NVIDIA A100": (8, 0), "NVIDIA H100": (9, 0), "NVIDIA H200": (9, 0), "NVIDIA B200": (10, 0)}
"""Compute capability, by the beginning of the driver's name of the GPU."""
