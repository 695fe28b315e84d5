"""The fused networks against the tier below and against float64, by training too; memory, FLOPs, machine code."""

import copy
from dataclasses import replace

import pytest
import torch
from block_cases import (
    GRADIENT_CASES,
    batch,
    check_compiles,
    check_evaluation,
    check_state_dict,
    check_training,
    check_two_runs,
    loss_of,
    no_overflow_checks,  # noqa: F401
    prefer_library,
    prefer_stored,
    same_networks,
)
from kernel_checks import assert_as_accurate, channels_last, mostly_slow
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from kernels import composed, conv_dispatch, fused, reference, tiles
from kernels.accuracy import relative_error
from kernels.tiles import OPS
from model.network import ResNet, ResNet9

pytestmark = pytest.mark.usefixtures("no_overflow_checks")


@pytest.mark.parametrize(("name", "dtype"), mostly_slow(GRADIENT_CASES, "two_blocks_fp32", "resnet9_pool_last_fp32"))
def test_logits_gradients_and_running_statistics_match_float64(device, name, dtype):
    below = (composed,) if dtype == torch.float32 else ()
    check_training(fused, name, dtype, device, *below)


@pytest.mark.parametrize(
    "ops", [OPS, ("conv_fprop",), ("conv_dgrad", "conv_wgrad")], ids=["everything", "forward", "backward"]
)
@pytest.mark.parametrize("name", ["two_blocks", "resnet9_pool_last"])
@pytest.mark.slow
def test_convolutions_that_the_table_leaves_to_the_library(device, monkeypatch, name, ops):
    prefer_library(monkeypatch, *ops)
    check_training(fused, name, torch.float32, device)


@pytest.mark.parametrize("tiles_of", ["hopper"], indirect=True)
@pytest.mark.parametrize("name", ["two_blocks", "resnet9_pool_last"])
@pytest.mark.slow
def test_the_forms_of_a_hopper_gpu_match_float64(device, tiles_of, name):
    check_training(fused, name, torch.float32, device)


@pytest.mark.parametrize("ops", [("conv_fprop", "conv_wgrad"), ("conv_fprop",), ("conv_wgrad",)], ids="-".join)
@pytest.mark.slow
def test_activations_that_the_table_stores(device, monkeypatch, ops):
    prefer_stored(monkeypatch, *ops)
    check_training(fused, "two_blocks", torch.float32, device)


@pytest.mark.slow
def test_statistics_of_several_tiles_travel_from_block_to_block(device, monkeypatch):
    """And wgrads of several parts; elsewhere the maps are so small that a tile is all of them."""
    default = tiles.default_tile

    def small(op, shape, dtype, gpu):
        tile = default(op, shape, dtype, gpu.capability)
        return replace(tile, BLOCK_K=64, SPLIT=3) if op == "conv_wgrad" else replace(tile, BLOCK_M=128)

    monkeypatch.setattr(tiles, "tile", small)
    check_training(fused, "two_blocks", torch.float32, device)


@pytest.mark.parametrize("name", mostly_slow(["two_blocks_after_a_bn", "resnet9_pool_last"], 0))
def test_evaluation_matches_float64(device, name):
    check_evaluation(fused, name, device)


@pytest.fixture(params=["own", "hopper"])
def tiles_of(request, monkeypatch):
    """The tiles that these tests run with, or those of a Hopper GPU: lines, columns, taps, the prologue in fp16."""
    if request.param == "hopper":
        default = tiles.default_tile
        monkeypatch.setattr(tiles, "tile", lambda op, shape, dtype, gpu: default(op, shape, torch.float16, (9, 0)))


@pytest.mark.slow
def test_twenty_training_steps_stay_with_float64(device, tiles_of):
    """The acceptance of a tier: its losses in fp16 are as close to the float64 run's as twice the reference's.

    How rounding grows in twenty steps is a matter of chance, so the reference runs several times, with the images of
    its batches in other orders, which changes nothing but rounding; the farthest of its runs counts.
    """
    orders = 4
    networks, losses = same_networks("two_blocks", fused, *[reference] * orders, device=device), []
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
def test_two_runs_are_bit_equal(device):
    check_two_runs(fused, "two_blocks", device)


@pytest.mark.parametrize("name", ["two_blocks", "resnet9_pool_last"])
def test_the_same_state_dict(device, name):
    check_state_dict(fused, name, device)


@pytest.mark.parametrize(
    ("name", "conv", "training"),
    [("two_blocks", "table", True), ("two_blocks", "ours", False), ("resnet9_pool_last", "ours", True)],
    ids=["training", "evaluation", "resnet9"],
)
@pytest.mark.slow
def test_compiles_into_one_graph(device, name, conv, training):
    check_compiles(fused.implementation(conv), name, device, training)


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


def test_an_unknown_choice_of_convolutions_is_refused():
    with pytest.raises(ValueError, match="conv is 'cudnn', expected one of table, ours"):
        fused.implementation("cudnn")


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


def saved_bytes_per_image(make, ops) -> float:
    """What grows with the batch, hence without the weights, their casts and [C] vectors."""
    return (saved_bytes(make, ops, 512) - saved_bytes(make, ops, 256)) / 256


@pytest.mark.parametrize("make", [ResNet, ResNet9], ids=["resnet", "resnet9"])
def test_memory_saved_for_backward(make):
    share = saved_bytes_per_image(make, fused) / saved_bytes_per_image(make, reference)
    print(f"{saved_bytes_per_image(make, fused):.0f} bytes per image, {share:.1%} of the reference's")
    assert share <= 0.6


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("make", [ResNet, ResNet9], ids=["resnet", "resnet9"])
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


def block_operands(device, c: int = 16, k: int = 16, size: int = 4) -> list:
    bn1, bn2 = (reference.BatchNorm(*torch.ones(4, n, device=device), True, 0.1, 1e-5) for n in (c, k))
    w1, w2 = (channels_last(k, n, 3, 3, dtype=torch.float32, seed=1, device=device) for n in (c, k))
    x = channels_last(2, c, size, size, dtype=torch.float16, seed=0, device=device)
    return [x, None, bn1, w1, bn2, w2, None, 1]


def test_a_block_with_one_batch_norm_in_training_is_refused(device):
    operands = block_operands(device)
    operands[4] = operands[4]._replace(training=False)
    with pytest.raises(ValueError, match="one batch norm of the block is training and the other is not"):
        fused.preact_block(*operands)


def test_one_value_per_channel_is_refused_in_training(device):
    x, _, bn, w, *_ = block_operands(device, size=1)
    with pytest.raises(ValueError, match="more than one value per channel"):
        fused.preact_block(x[:1], None, bn, w, bn, w)
    with pytest.raises(ValueError, match="more than one value per channel"):
        fused.conv_bn_relu(x[:1], w, bn)
