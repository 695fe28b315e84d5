import pytest

from profiling.device.specifications import (
    H100,
    H200,
    MACHINES,
    SPECIFICATIONS,
    V100_FLOPS_PER_S,
    boost_mhz,
    machine,
    specification,
)

NAMES = {
    "Tesla V100-SXM2-16GB": "V100 SXM2",
    "Tesla V100-SXM2-32GB": "V100 SXM2",
    "Tesla V100-PCIE-16GB": "V100 PCIe",
    "NVIDIA A100-SXM4-40GB": "A100 SXM 40 GB",
    "A100-SXM4-40GB": "A100 SXM 40 GB",  # drivers before 470 do not say NVIDIA
    "NVIDIA A100-SXM4-80GB": "A100 SXM 80 GB",
    "NVIDIA A100-PCIE-40GB": "A100 PCIe 40 GB",
    "NVIDIA A100 80GB PCIe": "A100 PCIe 80 GB",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H200": "H200 SXM",
    "NVIDIA B200": "B200",
    "NVIDIA GeForce RTX 3090": "GeForce RTX 3090",
    "NVIDIA GeForce RTX 4090": "GeForce RTX 4090",
    "NVIDIA L4": "L4",
    "Tesla T4": "T4",
}


@pytest.mark.parametrize(("gpu", "name"), NAMES.items(), ids=NAMES)
def test_a_known_gpu_by_the_driver_s_name(gpu, name):
    assert specification(gpu).name == name


UNKNOWN = {
    "mig_slice": "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "mig_slice_of_h200": "NVIDIA H200 MIG 3g.71gb",
    "laptop": "NVIDIA GeForce RTX 4090 Laptop GPU",
    "ti": "NVIDIA GeForce RTX 3090 Ti",
    "export_version": "NVIDIA GeForce RTX 4090 D",
    "smaller": "NVIDIA GeForce RTX 4080",
    "newer": "NVIDIA GeForce RTX 5090",
    "h100_nvl": "NVIDIA H100 NVL",
    "h200_nvl": "NVIDIA H200 NVL",
    "grace_hopper": "NVIDIA GH200 480GB",
    "grace_blackwell": "NVIDIA GB200",
    "export_h100": "NVIDIA H800",
    "h20": "NVIDIA H20",
    "cut_down_a100": "NVIDIA A100-SXM-64GB",
    "faster_v100": "Tesla V100S-PCIE-32GB",
    "dgx2_v100": "Tesla V100-SXM3-32GB",
    "l40": "NVIDIA L40",
    "l40s": "NVIDIA L40S",
    "t40": "Tesla T40",
    "virtual": "GRID A100-10C",
    "amd": "AMD Instinct MI300X",
    "cpu": "AMD EPYC",
    "part_of_a_name": "A100",
    "other_case": "nvidia h200",
    "nothing": "",
}


@pytest.mark.parametrize("gpu", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_gpu_has_no_specification(gpu):
    assert specification(gpu) is None


def test_the_v100_is_the_article_s():
    v100 = specification("Tesla V100-SXM2-16GB")
    assert v100.flops_per_s["float16"] == V100_FLOPS_PER_S
    assert v100.bytes_per_s == 0.9e12
    assert "bfloat16" not in v100.flops_per_s
    assert "tf32" not in v100.flops_per_s


# (multiprocessors, FLOP per clock of each in dense fp16 products with fp32 sums, their clock in GHz, both in fp32)
CLOCKED = {
    "V100 SXM2": (80, 1024, 1.53, 128, 1.53),
    "V100 PCIe": (80, 1024, 1.38, 128, 1.38),
    "A100 SXM 40 GB": (108, 2048, 1.41, 128, 1.41),
    "A100 SXM 80 GB": (108, 2048, 1.41, 128, 1.41),
    "A100 PCIe 40 GB": (108, 2048, 1.41, 128, 1.41),
    "A100 PCIe 80 GB": (108, 2048, 1.41, 128, 1.41),
    "H100 SXM": (132, 4096, 1.83, 256, 1.98),
    "H100 PCIe": (114, 4096, 1.62, 256, 1.755),
    "H200 SXM": (132, 4096, 1.83, 256, 1.98),
    "B200": (148, 8192, 1.86, 256, 1.98),
    "GeForce RTX 3090": (82, 512, 1.695, 256, 1.695),
    "GeForce RTX 4090": (128, 512, 2.52, 256, 2.52),
    "L4": (58, 1024, 2.04, 256, 2.04),
    "T4": (40, 1024, 1.59, 128, 1.59),
}


@pytest.mark.parametrize("spec", SPECIFICATIONS, ids=lambda spec: spec.name)
def test_peaks_are_dense_with_fp32_sums(spec):
    """A sparse figure, or a GeForce's with fp16 sums, would be twice what units times clock give."""
    units, tensor, tensor_ghz, plain, plain_ghz = CLOCKED[spec.name]
    peaks, half = spec.flops_per_s, units * tensor * tensor_ghz * 1e9
    assert peaks["float16"] == pytest.approx(half, rel=0.01)
    assert peaks["float32"] == pytest.approx(units * plain * plain_ghz * 1e9, rel=0.02)
    if "tf32" in peaks:
        assert peaks["bfloat16"] == peaks["float16"]
        assert peaks["tf32"] == pytest.approx(half / 2, rel=0.02)


@pytest.mark.parametrize("spec", SPECIFICATIONS, ids=lambda spec: spec.name)
def test_a_peak_is_quoted_at_the_clock_that_gives_it(spec):
    if spec.name == "B200":  # of which no document names the clock
        assert boost_mhz(spec, "float16") is None
        return
    _, _, tensor_ghz, _, plain_ghz = CLOCKED[spec.name]
    assert [boost_mhz(spec, arithmetic) for arithmetic in ("float16", "tf32")] == [1000 * tensor_ghz] * 2
    assert boost_mhz(spec, "float32") == 1000 * plain_ghz


@pytest.mark.parametrize("spec", SPECIFICATIONS, ids=lambda spec: spec.name)
def test_every_entry_is_whole(spec):
    assert set(spec.flops_per_s) in ({"float16", "float32"}, {"float16", "bfloat16", "tf32", "float32"})
    assert 0.3e12 <= spec.bytes_per_s <= 8e12
    assert spec.l2_bytes % 2**20 == 0
    assert "NVIDIA" in spec.source


def test_names_are_unique():
    names = [spec.name for spec in SPECIFICATIONS]
    assert len(set(names)) == len(names) == 14


def test_predictions_assume_no_more_than_the_data_sheet_promises():
    for one in MACHINES:
        sheet = specification(one.name)
        assert one.flops_per_s < sheet.flops_per_s["float16"]
        assert one.bytes_per_s < sheet.bytes_per_s
        low, high = one.l2_range
        assert one.bytes_per_s < low < one.l2_bytes_per_s < high
        assert high < one.multiprocessors * one.multiprocessor_bytes_per_s
        assert one.flops_per_s < 2 * one.matrix_macs_per_cycle * one.multiprocessors * one.instructions_per_s / 4


def test_a_machine_is_found_by_the_drivers_name_and_by_no_neighbours():
    assert machine("NVIDIA H200") is machine("H200") is H200
    assert machine("NVIDIA H100 80GB HBM3") is H100
    assert machine("NVIDIA H100 PCIe") is None
    assert machine("AMD EPYC") is None
