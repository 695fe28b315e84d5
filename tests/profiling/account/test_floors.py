import pytest
from modelled_steps import step

from profiling.account.floors import CUTS, FUSED_PASSES, floor_ns, fused_kernels, kernels

V100, H200 = (125e12, 0.9e12), (790e12, 4.3e12)
STEPS = 35 * 50_000 / 512
# Seconds for 35 epochs, V100 and H200, calculated by hand from passes and layer sizes when the project was designed.
EXPECTED = {
    "eager": (73.8, 13.5),
    "compiled": (64.7, None),
    "compiled, reductions fused": (60.5, 10.8),
    "limit": (41.9, 7.09),
    "fused": (46.8, 7.97),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_floors_of_the_articles_run(name):
    """The fused floor is of the fused network's kernels as they are."""
    cuts = {cut.name: cut for cut in CUTS}
    rows = kernels(step(), cuts[name]) if name in cuts else fused_kernels(step(ops="fused"))
    for machine, expected in zip((V100, H200), EXPECTED[name], strict=True):
        assert expected is None or floor_ns(rows, *machine) / 1e9 * STEPS == pytest.approx(expected, rel=0.01)


def test_compute_alone_is_the_articles_40_seconds():
    assert sum(row.flops for row in step()) * STEPS / V100[0] == pytest.approx(38.6, rel=0.002)


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: cut.name)
def test_cut_makes_the_passes_it_names(cut):
    """For a 64-channel layer on the largest map, whose tensors are all of one size and whose weights are small."""
    pass_bytes = 512 * 64 * 32 * 32 * 2
    rows = [r for r in kernels(step(), cut) if r.layer in ("64x32x32-64x3x3-s1", "512x64x32x32") and r.family != "add"]
    layers = sum(r.family == "fprop" for r in rows)
    batch_norms = 5  # the fifth is the next block's, whose convolution has another layer's size
    of_convolutions = sum(r.bytes for r in rows if r.family in ("fprop", "dgrad", "wgrad"))
    elementwise = sum(r.bytes for r in rows) - of_convolutions
    assert round((elementwise / batch_norms + of_convolutions / layers) / pass_bytes, 1) == cut.passes


def test_fusing_more_never_takes_longer():
    floors = [floor_ns(kernels(step(), cut), *V100) for cut in CUTS]
    assert floors == sorted(floors, reverse=True)
    assert CUTS[2].passes > FUSED_PASSES
