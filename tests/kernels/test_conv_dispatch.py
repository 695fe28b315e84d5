"""A convolution by the library with our batch norm around it, against ours; the share of a network that is ours."""

import pytest
import torch
from block_cases import no_overflow_checks, prefer_library  # noqa: F401
from kernel_checks import channels_last

pytest.importorskip("triton")

from kernels import reference, tiles
from kernels.bn_stats import bn_finalize, bn_stats
from kernels.conv_dispatch import Activation, dgrad, fprop, traced_layers, triton_share, wgrad
from kernels.conv_shape import RESNET9_LAYERS, RESNET_LAYERS, ConvShape
from kernels.tiles import OPS, Entry, Gpu
from model.network import ResNet, ResNet9

pytestmark = pytest.mark.usefixtures("no_overflow_checks")


def normal(*shape: int, device, seed: int = 1) -> torch.Tensor:
    return channels_last(*shape, dtype=torch.float32, seed=seed, device=device)


def activation(*shape: int, device, seed: int = 0, normalised: bool = True) -> Activation:
    x, vector = normal(*shape, device=device, seed=seed), torch.linspace(0.5, 1.5, shape[1], device=device)
    return Activation(x, bn_finalize(bn_stats(x), vector, 1 - vector, 1e-5) if normalised else None)


def both(monkeypatch, compute) -> tuple:
    """The results of `compute()` by our kernels and by the library."""
    ours = compute()
    with monkeypatch.context() as patch:
        prefer_library(patch, *OPS)
        return ours, compute()


def assert_same(ours: torch.Tensor, library: torch.Tensor) -> None:
    assert ours.dtype == library.dtype
    assert library.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours, library, rtol=1e-4, atol=1e-4)


def merged(partials: torch.Tensor) -> torch.Tensor:
    """So that tiles do not matter."""
    one = torch.ones(partials.shape[2], device=partials.device)
    return bn_finalize(partials, one, one, 1e-5)


@pytest.mark.parametrize("residual", [None, True, False], ids=["none", "normalised", "plain"])
@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 2)])
def test_fprop(device, monkeypatch, size, stride, residual):
    w = normal(32, 16, size, size, device=device)

    def compute(statistics=True):
        n = 6 // stride
        shortcut = None if residual is None else activation(2, 32, n, n, device=device, seed=2, normalised=residual)
        return fprop(activation(2, 16, 6, 6, device=device), w, stride, shortcut, statistics=statistics)

    (y, partials), (library_y, library_partials) = both(monkeypatch, compute)
    assert_same(y, library_y)
    torch.testing.assert_close(merged(partials), merged(library_partials), rtol=1e-4, atol=1e-4)
    if (size, stride) == (3, 1):
        without = both(monkeypatch, lambda: compute(statistics=False))
        assert_same(without[0][0], without[1][0])
        assert without[0][1].shape == without[1][1].shape == (3, 0, 32)


@pytest.mark.parametrize("shortcut", [None, 1, 2], ids=["none", "of_x", "of_every_second_pixel"])
def test_dgrad(device, monkeypatch, shortcut):
    """The library leaves the mask to the batch norm behind it, so that the sums are what must agree."""
    a, w, dy = (
        activation(2, 16, 6, 6, device=device),
        *(normal(n, m, 3, 3, device=device) for n, m in ((32, 16), (2, 32))),
    )
    if shortcut is not None:
        shortcut = normal(2, 16, 6 // shortcut, 6 // shortcut, device=device, seed=2)
    ours, library = both(monkeypatch, lambda: dgrad(dy, w, 6, 6, 2, shortcut, a))
    positive = a.x * a.norm[3][:, None, None] + a.norm[4][:, None, None] > 0
    assert_same(ours[0], torch.where(positive, library[0], 0).contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(ours[1].sum(1), library[1].sum(1), rtol=1e-4, atol=1e-3)


def test_dgrad_without_an_epilogue(device, monkeypatch):
    w, dy = normal(32, 16, 1, 1, device=device), normal(2, 32, 3, 5, device=device)
    ours, library = both(monkeypatch, lambda: dgrad(dy, w, 3, 5))
    assert_same(ours[0], library[0])
    assert ours[1].shape == library[1].shape == (2, 0, 16)


@pytest.mark.parametrize("normalised", [True, False], ids=["prologue", "plain"])
def test_wgrad(device, monkeypatch, normalised):
    a, dy = activation(2, 16, 6, 6, device=device, normalised=normalised), normal(2, 32, 3, 3, device=device)
    assert_same(*both(monkeypatch, lambda: wgrad(Activation(a.x, a.norm), dy, 3, 2)))


def test_an_activation_is_stored_once_and_only_if_asked_for(device):
    a = activation(2, 16, 4, 4, device=device)
    assert a.kept(needed=True).numel() == 0
    stored = a.store()
    assert a.store() is a.kept(needed=True) is stored
    assert a.kept(needed=False).numel() == 0
    assert torch.equal(Activation(a.x, a.norm, a.kept(needed=False)).store(), stored)
    assert Activation(a.x).store() is a.x


H200 = Gpu("NVIDIA H200", (9, 0))
STEM, LAYER, PROJECTION = (3, 64, 32, 32, 3, 1), (64, 64, 32, 32, 3, 1), (64, 128, 32, 32, 1, 2)


@pytest.fixture
def table(monkeypatch):
    """A table in which the library is faster in one op at one shape."""

    def measured(op: str, shape: ConvShape) -> None:
        tile = tiles.default_tile(op, shape, torch.float16, (9, 0))
        entry = Entry(H200.name, op, str(shape), "float16", "3.6.0", 2.0, 1.0, tile)
        monkeypatch.setattr(tiles, "_by_key", lambda: {entry[:4]: entry})

    return measured


def test_share_of_the_convolutions_that_are_ours(table):
    """The first convolution, the library's, has two thirds of a layer's passes at 3/64 of its FLOPs."""

    def passes(dtype=torch.float16, gpu=H200, **options) -> float:
        return triton_share([STEM, LAYER], dtype, gpu, **options) * (3 + 2 * 3 / 64)

    assert passes() == pytest.approx(3)
    table("conv_wgrad", ConvShape(*LAYER))
    assert passes() == pytest.approx(2)
    others = passes(torch.bfloat16), passes(gpu=Gpu("NVIDIA A100", (8, 0))), passes(forced=True)
    assert others == pytest.approx((3, 3, 3))


def test_a_projection_s_dgrad_is_that_of_stride_1(table):
    table("conv_dgrad", ConvShape(64, 128, 16, 16, R=1))
    assert triton_share([PROJECTION], torch.float16, H200) == pytest.approx(2 / 3)
    table("conv_dgrad", ConvShape(*PROJECTION))
    assert triton_share([PROJECTION], torch.float16, H200) == 1


@pytest.mark.parametrize(("make", "layers", "count"), [(ResNet, RESNET_LAYERS, 20), (ResNet9, RESNET9_LAYERS, 8)])
def test_the_networks_layers(make, layers, count):
    network = make(ops=reference).to("meta")
    traced = traced_layers(lambda: network(torch.empty(2, 3, 32, 32, device="meta")))
    assert len(traced) == count
    assert traced[0] == STEM
    assert {ConvShape(*layer) for layer in traced[1:]} == set(layers)
    assert len(layers) == len(set(layers))
    assert 0.98 < triton_share(traced, torch.float16, H200) < 1
