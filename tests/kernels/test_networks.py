"""The networks by each implementation of the blocks, against the one below and against float64."""

import copy
from dataclasses import replace

import pytest
import torch
from block_cases import (
    batch,
    check_evaluation,
    check_training,
    loss_of,
    no_overflow_checks,  # noqa: F401
    prefer_library,
    prefer_stored,
    results,
    same_networks,
)
from kernel_checks import assert_as_accurate, channels_last
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from kernels import batchnorm, composed, conv_dispatch, fused, reference, tiles
from kernels.accuracy import relative_error
from kernels.tiles import OPS
from model.network import ResNet, ResNet9

pytestmark = pytest.mark.usefixtures("no_overflow_checks")
TIERS = {"batchnorm": batchnorm, "composed": composed, "fused": fused}
BELOW = {"batchnorm": (), "composed": (batchnorm,), "fused": (composed,)}
BOTH = pytest.mark.parametrize("name", ["two_blocks", "resnet9_pool_last"])


def of_tiers(*rows: tuple, plain: tuple[tuple, ...]) -> list:
    """Rows of (tier, network, ...), slow unless among `plain`."""
    return [
        pytest.param(*row, id="-".join(map(str, row)), marks=() if row in plain else pytest.mark.slow) for row in rows
    ]


@pytest.mark.parametrize(
    ("tier", "name", "dtype"),
    of_tiers(
        # In fp16 a ReLU or a pool that switches moves a deeper network's gradient by more than rounding does.
        *((tier, "two_blocks", "float16") for tier in TIERS),
        *((tier, n, "float32") for tier in TIERS for n in ("two_blocks", "resnet9_pool_last", "resnet9_pool_first")),
        ("batchnorm", "resnet", "float32"),
        plain=[(tier, "two_blocks", "float32") for tier in ("batchnorm", "fused")],
    ),
)
def test_training_matches_float64(device, tier, name, dtype):
    """Logits, gradients and running statistics."""
    below, units = BELOW[tier] if dtype == "float32" else (), 4 if tier == "batchnorm" else 16
    check_training(TIERS[tier], name, getattr(torch, dtype), device, *below, units=units)


@pytest.mark.parametrize(
    ("tier", "name"),
    of_tiers(
        *((tier, name) for tier in TIERS for name in ("two_blocks_after_a_bn", "resnet9_pool_last")),
        *(("batchnorm", name) for name in ("two_blocks", "resnet", "resnet9_pool_first")),
        plain=(("batchnorm", "two_blocks"), *((tier, "two_blocks_after_a_bn") for tier in ("composed", "fused"))),
    ),
)
def test_evaluation_matches_float64(device, tier, name):
    check_evaluation(TIERS[tier], name, device)


def hopper(monkeypatch) -> None:
    """The tiles of a Hopper GPU: lines, columns, taps, the prologue in fp16."""
    default = tiles.default_tile
    monkeypatch.setattr(tiles, "tile", lambda op, shape, dtype, gpu: default(op, shape, torch.float16, (9, 0)))


def several_tiles(monkeypatch) -> None:
    """Partials of several tiles travel from block to block, and wgrads have several parts; elsewhere the maps are so
    small that a tile is all of them."""
    default = tiles.default_tile

    def small(op, shape, dtype, gpu):
        tile = default(op, shape, dtype, gpu.capability)
        return replace(tile, BLOCK_K=64, SPLIT=3) if op == "conv_wgrad" else replace(tile, BLOCK_M=128)

    monkeypatch.setattr(tiles, "tile", small)


WAYS = {
    "library": (lambda patch: prefer_library(patch, *OPS), True),
    "library_forward": (lambda patch: prefer_library(patch, "conv_fprop"), True),
    "library_backward": (lambda patch: prefer_library(patch, "conv_dgrad", "conv_wgrad"), True),
    "stored": (lambda patch: prefer_stored(patch, "conv_fprop", "conv_wgrad"), False),
    "stored_forward": (lambda patch: prefer_stored(patch, "conv_fprop"), False),
    "stored_backward": (lambda patch: prefer_stored(patch, "conv_wgrad"), False),
    "hopper": (hopper, True),
    "several_tiles": (several_tiles, False),
}
"""Entries of the tile table, and whether ResNet9 is tested with them too."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "way"),
    [("two_blocks", way) for way in WAYS] + [("resnet9_pool_last", way) for way, (_, both) in WAYS.items() if both],
)
def test_fused_matches_float64_whatever_the_table_says(device, monkeypatch, name, way):
    WAYS[way][0](monkeypatch)
    check_training(fused, name, torch.float32, device)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tier", "orders", "tiles_of"),
    [("batchnorm", 1, "own"), ("fused", 4, "own"), ("fused", 4, "hopper")],
)
def test_twenty_training_steps_stay_with_float64(device, monkeypatch, tier, orders, tiles_of):
    """The acceptance of a tier: its losses in fp16 are as close to the float64 run's as twice the reference's.

    How rounding grows in twenty steps is a matter of chance, so the reference runs several times, with the images of
    its batches in other orders, which changes nothing but rounding; the farthest of its runs counts.
    """
    if tiles_of == "hopper":
        hopper(monkeypatch)
    networks, losses = same_networks("two_blocks", TIERS[tier], *[reference] * orders, device=device), []
    for number, network in enumerate(networks):
        dtype, roll = (torch.float64, 0) if number > orders else (torch.float16, max(number - 1, 0))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        run = []
        for step in range(20):
            x, target = batch("two_blocks", 8, torch.float16, step % 4, device)
            loss = loss_of(network(x.roll(roll, 0).to(dtype)), target.roll(roll, 0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.detach())
        losses.append(torch.stack(run))
    ours, *baselines, exact = losses
    assert exact[-4:].mean() < 0.6 * exact[:4].mean(), "it learns"
    assert_as_accurate(ours, max(baselines, key=lambda run: relative_error(run, exact)), exact, "losses")


@pytest.mark.slow
@pytest.mark.parametrize("tier", TIERS)
def test_two_runs_are_bit_equal(device, tier):
    x, target = batch("two_blocks", 4, torch.float16, 3, device)
    first, second = (results(same_networks("two_blocks", TIERS[tier], device=device)[0], x, target) for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), key


@BOTH
@pytest.mark.parametrize("tier", TIERS)
def test_state_dict_is_the_reference_s(device, tier, name):
    """The same keys in the same order, and each loads the other's."""
    ours, baseline, _ = same_networks(name, TIERS[tier], reference, device=device)
    assert list(ours.state_dict()) == list(baseline.state_dict())
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            tensor.add_(1)
    baseline.load_state_dict(ours.state_dict())
    for key, tensor in ours.state_dict().items():
        assert torch.equal(tensor, baseline.state_dict()[key]), key
    ours.load_state_dict(baseline.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ops", "name", "training"),
    [
        pytest.param(batchnorm, "two_blocks", True, id="batchnorm"),
        pytest.param(batchnorm, "two_blocks", False, id="batchnorm_evaluation"),
        pytest.param(composed, "two_blocks", True, id="composed"),
        pytest.param(fused.implementation("table"), "two_blocks", True, id="fused"),
        pytest.param(fused.implementation("ours"), "two_blocks", False, id="fused_evaluation"),
        pytest.param(fused.implementation("ours"), "resnet9_pool_last", True, id="fused_resnet9"),
    ],
)
def test_compiles_into_one_graph(device, ops, name, training):
    """Forward and backward, with the results of eager mode."""
    network = same_networks(name, ops, device=device)[0].train(training)
    x, target = batch(name, 2, torch.float32, 4, device)
    expected = loss_of(network(x), target)
    compiled = torch.compile(lambda x: loss_of(network(x), target), fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, expected)
    parameters = list(network.parameters())
    for a, b in zip(*(torch.autograd.grad(y, parameters) for y in (compiled, expected)), strict=True):
        torch.testing.assert_close(a, b)  # the graph may add gradients in another order


def test_forced_convolutions_are_ours_whatever_the_table_says(device, monkeypatch):
    """And a network that was given them can be copied."""
    x, _ = batch("two_blocks", 2, torch.float32, 0, device)
    called, conv_fprop = [], conv_dispatch.conv_fprop
    monkeypatch.setattr(conv_dispatch, "conv_fprop", lambda *args: called.append(args) or conv_fprop(*args))
    prefer_library(monkeypatch, *OPS)
    for conv, launches in (("table", 0), ("ours", 5)):
        called.clear()
        copy.deepcopy(same_networks("two_blocks", fused.implementation(conv), device=device)[0])(x)
        assert len(called) == launches


def saved_bytes(make, ops, images: int) -> int:
    """Bytes that a training step's forward keeps for backward, every storage once; on fake tensors."""
    storages = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with FakeTensorMode():
        x = torch.empty(images, 3, 32, 32, dtype=torch.float16).to(memory_format=torch.channels_last)
        network = make(ops=ops)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            network(x)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("make", [ResNet, ResNet9])
def test_memory_saved_for_backward(make):
    """Per image, hence without the weights, their casts and [C] vectors."""
    ours, theirs = (saved_bytes(make, ops, 512) - saved_bytes(make, ops, 256) for ops in (fused, reference))
    assert ours <= 0.6 * theirs, f"{ours / 256:.0f} bytes per image, {ours / theirs:.1%} of the reference's"


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("make", [ResNet, ResNet9])
def test_flops_are_the_reference_s(make, training):
    counts = []
    for ops in (fused, reference):
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            x = torch.empty(2, 3, 32, 32, dtype=torch.float16).to(memory_format=torch.channels_last)
            logits = make(ops=ops).train(training)(x)
            if training:
                logits.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 1e9


def layer(device, c: int = 16, k: int = 16, size: int = 4, images: int = 2) -> tuple:
    """x, and bn1, w1, bn2, w2 of a block of these widths."""
    bn1, bn2 = (reference.BatchNorm(*torch.ones(4, n, device=device), True, 0.1, 1e-5) for n in (c, k))
    w1, w2 = (channels_last(k, n, 3, 3, dtype=torch.float32, seed=1, device=device) for n in (c, k))
    return channels_last(images, c, size, size, dtype=torch.float32, seed=0, device=device), bn1, w1, bn2, w2


ONE_PIXEL = {"size": 1, "images": 1}


@pytest.mark.parametrize(
    ("call", "widths", "message"),
    [
        (lambda x, bn1, w1, bn2, w2: batchnorm.stem(x, w1, bn1), ONE_PIXEL, "more than one value per channel"),
        (lambda x, bn1, w1, bn2, w2: fused.conv_bn_relu(x, w1, bn1), ONE_PIXEL, "more than one value per channel"),
        (lambda *of: fused.preact_block(of[0], None, *of[1:]), ONE_PIXEL, "more than one value per channel"),
        (
            lambda x, bn1, w1, bn2, w2: fused.preact_block(x, None, bn1, w1, bn2._replace(training=False), w2),
            {},
            "one batch norm of the block is training and the other is not",
        ),
        (lambda *of: composed.preact_block(of[0], None, *of[1:]), {"c": 8}, "C is 8 channels"),
        (lambda *of: composed.preact_block(of[0], None, *of[1:]), {"k": 24}, "K is 24 channels"),
    ],
    ids=["stem", "layer", "block", "mixed_block", "c_of_8", "k_of_24"],
)
def test_refused(device, call, widths, message):
    operands = layer(device, **widths)
    with pytest.raises(ValueError, match=message):
        call(*operands)


def test_an_unknown_choice_of_convolutions_is_refused():
    with pytest.raises(ValueError, match="conv is 'cudnn', expected one of table, ours"):
        fused.implementation("cudnn")
