import pytest

from profiling.device.specifications import (
    _BY_NAME,
    SPECIFICATIONS,
    V100_FLOPS_PER_S,
    boost_mhz,
    specification,
)

PRO_6000 = "RTX PRO 6000 Blackwell Workstation Edition"
# Driver's names, then SMs, FLOP per clock of each in dense fp16 products with fp32 sums, their clock in GHz, both in
# fp32. Where no document names the clock of B200, GB200 and H100 NVL, it is one that gives the peak: a sparse peak
# would need twice of it.
CLOCKED = {
    "V100 SXM2": ("Tesla V100-SXM2-16GB, Tesla V100-SXM2-32GB", 80, 1024, 1.53, 128, 1.53),
    "V100 PCIe": ("Tesla V100-PCIE-16GB, Tesla V100-PCIE-32GB", 80, 1024, 1.38, 128, 1.38),
    "T4": ("Tesla T4, NVIDIA T4", 40, 1024, 1.59, 128, 1.59),
    "A100 SXM 40 GB": ("NVIDIA A100-SXM4-40GB, A100-SXM4-40GB", 108, 2048, 1.41, 128, 1.41),
    "A100 SXM 80 GB": ("NVIDIA A100-SXM4-80GB", 108, 2048, 1.41, 128, 1.41),
    "A100 PCIe 40 GB": ("NVIDIA A100-PCIE-40GB", 108, 2048, 1.41, 128, 1.41),
    "A100 PCIe 80 GB": ("NVIDIA A100 80GB PCIe", 108, 2048, 1.41, 128, 1.41),
    "A30": ("NVIDIA A30", 56, 2048, 1.44, 128, 1.44),
    "A40": ("NVIDIA A40", 84, 1024, 1.74, 256, 1.74),
    "A10": ("NVIDIA A10", 72, 1024, 1.695, 256, 1.695),
    "A10G": ("NVIDIA A10G", 80, 512, 1.71, 256, 1.71),
    "RTX A6000": ("NVIDIA RTX A6000", 84, 1024, 1.8, 256, 1.8),
    "GeForce RTX 3090": ("NVIDIA GeForce RTX 3090", 82, 512, 1.695, 256, 1.695),
    "GeForce RTX 4080": ("NVIDIA GeForce RTX 4080", 76, 512, 2.505, 256, 2.505),
    "GeForce RTX 4090": ("NVIDIA GeForce RTX 4090", 128, 512, 2.52, 256, 2.52),
    "RTX 6000 Ada": ("NVIDIA RTX 6000 Ada Generation", 142, 1024, 2.505, 256, 2.505),
    "L4": ("NVIDIA L4", 58, 1024, 2.04, 256, 2.04),
    "L40S": ("NVIDIA L40S", 142, 1024, 2.49, 256, 2.52),
    "H100 SXM": ("NVIDIA H100 80GB HBM3", 132, 4096, 1.83, 256, 1.98),
    "H100 PCIe": ("NVIDIA H100 PCIe", 114, 4096, 1.62, 256, 1.755),
    "H100 NVL": ("NVIDIA H100 NVL", 132, 4096, 1.545, 256, 1.785),
    "H200 SXM": ("NVIDIA H200", 132, 4096, 1.83, 256, 1.98),
    "B200": ("NVIDIA B200", 148, 8192, 1.86, 256, 1.98),
    "GB200": ("NVIDIA GB200", 152, 8192, 2.01, 256, 2.06),
    "GeForce RTX 5090": ("NVIDIA GeForce RTX 5090", 170, 512, 2.407, 256, 2.407),
    PRO_6000: (f"NVIDIA {PRO_6000}", 188, 1024, 2.617, 256, 2.617),
}


@pytest.mark.parametrize("spec", SPECIFICATIONS, ids=lambda spec: spec.name)
def test_an_entry_is_whole_and_its_peaks_are_dense_with_fp32_sums(spec):
    """A sparse figure, or a GeForce's with fp16 sums, would be twice SMs times FLOP per clock times clock."""
    names, units, tensor, tensor_ghz, plain, plain_ghz = CLOCKED[spec.name]
    assert all(specification(name) is spec for name in names.split(", "))
    peaks, half = spec.flops_per_s, units * tensor * tensor_ghz * 1e9
    assert set(peaks) in ({"float16", "float32"}, {"float16", "bfloat16", "tf32", "float32"})
    assert peaks["float16"] == pytest.approx(half, rel=0.01)
    assert peaks["float32"] == pytest.approx(units * plain * plain_ghz * 1e9, rel=0.02)
    if "tf32" in peaks:
        assert peaks["bfloat16"] == peaks["float16"]
        assert peaks["tf32"] == pytest.approx(half / 2, rel=0.02)
    undocumented = spec.name in ("B200", "GB200", "H100 NVL")
    quoted_at = None if undocumented else 1000 * tensor_ghz
    assert [boost_mhz(spec, arithmetic) for arithmetic in ("float16", "tf32")] == [quoted_at] * 2
    assert boost_mhz(spec, "float32") == (None if spec.name in ("B200", "GB200") else 1000 * plain_ghz)
    assert 0.3e12 <= spec.bytes_per_s <= 8e12
    assert spec.l2_bytes % 2**20 == 0
    assert "NVIDIA" in spec.source


def test_the_table_knows_these_and_no_name_twice():
    names = [spec.name for spec in SPECIFICATIONS]
    assert len(set(names)) == len(names)
    assert set(names) == set(CLOCKED)
    known = ", ".join(names for names, *_ in CLOCKED.values())
    assert set(_BY_NAME) == {name.removeprefix("NVIDIA ") for name in known.split(", ")}
    v100 = specification("Tesla V100-SXM2-16GB")
    assert (v100.flops_per_s["float16"], v100.bytes_per_s) == (V100_FLOPS_PER_S, 0.9e12), "the article's"
    assert not {"bfloat16", "tf32"} & set(v100.flops_per_s)


UNKNOWN = (
    *("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H200 MIG 3g.71gb", "GRID A100-10C"),  # parts of a GPU
    *("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4080 SUPER"),
    *("NVIDIA GeForce RTX 4090 D", "NVIDIA H800", "NVIDIA H20"),  # export versions
    "NVIDIA GeForce RTX 3080",  # one name of two cards
    *("NVIDIA H200 NVL", "NVIDIA GH200 144G HBM3e", "NVIDIA B300 SXM6 AC", "NVIDIA A100-SXM-64GB", "NVIDIA L40G"),
    *("NVIDIA RTX PRO 6000 Blackwell Server Edition", "Tesla V100S-PCIE-32GB", "Tesla V100-SXM3-32GB", "Tesla T40"),
    *("AMD Instinct MI300X", "AMD EPYC", "A100", "nvidia h200", ""),  # other makers, a part of a name, another case
)


@pytest.mark.parametrize("gpu", UNKNOWN)
def test_an_unknown_gpu_has_no_specification(gpu):
    assert specification(gpu) is None
