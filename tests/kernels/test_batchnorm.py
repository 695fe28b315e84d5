"""The networks with library convolutions and our batch norm, against the reference networks in float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_as_accurate, channels_last, mostly_slow
from torch import nn

pytest.importorskip("triton")

from kernels import batchnorm, reference
from kernels.bn_apply import bn_apply_cost
from kernels.bn_backward import bn_backward_apply_cost, bn_backward_reduce_cost
from kernels.bn_stats import bn_stats_cost
from model.network import PreactBlock, ResNet, ResNet9, conv_weight

WIDTHS = (8, 16, 16, 24)


class TwoBlocks(nn.Module):
    """The smallest network with everything that a pre-activation block can have: both shortcuts and both strides."""

    def __init__(self, ops):
        super().__init__()
        self.ops = ops
        self.prep = conv_weight(3, 16)
        self.blocks = nn.ModuleList([PreactBlock(ops, 16, 16, 1, False), PreactBlock(ops, 16, 32, 2, False)])
        self.linear = nn.Linear(32, 10)

    def forward(self, x):
        x, statistics = self.ops.stem(x, self.prep)
        for block in self.blocks:
            x, statistics = block(x, statistics)
        return F.linear(x.mean((2, 3)), self.linear.weight.to(x.dtype), self.linear.bias.to(x.dtype))


def networks(make, device) -> list[nn.Module]:
    """Ours, the reference, and the reference in float64, with the same parameters."""
    torch.manual_seed(0)
    first = make(reference).to(device)
    ours, exact = make(batchnorm).to(device), make(reference).to(device).double()
    ours.load_state_dict(first.state_dict())
    exact.load_state_dict(first.state_dict())
    return [ours, first, exact]


def batch(size: int, images: int, dtype: torch.dtype, seed: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    x = channels_last(images, 3, size, size, dtype=dtype, seed=seed, device=device)
    return x, torch.randint(10, (images,), generator=torch.Generator().manual_seed(seed)).to(device)


def loss_of(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


MAKERS = [
    pytest.param(TwoBlocks, 8, id="two_blocks"),
    pytest.param(lambda ops: ResNet(WIDTHS, ops, prep_bn_relu=True), 16, id="resnet"),
    pytest.param(lambda ops: ResNet9(WIDTHS, ops), 16, id="resnet9_pool_last"),
    pytest.param(lambda ops: ResNet9(WIDTHS, ops, pool_first=True), 16, id="resnet9_pool_first"),
]


@pytest.mark.parametrize(
    ("make", "size", "dtype"),
    mostly_slow(
        [
            *(pytest.param(*case.values, torch.float32, id=f"{case.id}_fp32") for case in MAKERS),
            # In fp16 a ReLU or a pool that switches moves a deep network's gradient by more than rounding does.
            pytest.param(TwoBlocks, 8, torch.float16, id="two_blocks_fp16"),
        ],
        "two_blocks_fp32",
    ),
)
def test_logits_gradients_and_running_statistics_match_float64(device, make, size, dtype):
    ours, baseline, exact = networks(make, device)
    x, target = batch(size, 6, dtype, 1, device)
    results = []
    for network, images in ((ours, x), (baseline, x), (exact, x.double())):
        logits = network(images)
        names, parameters = zip(*network.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss_of(logits, target), parameters)
        results.append([logits, *gradients, *network.buffers()])
    names = ["logits", *names, *(name for name, _ in ours.named_buffers())]
    for name, a, b, truth in zip(names, *results, strict=True):
        assert_as_accurate(a, b, truth, name)


@pytest.mark.parametrize(("make", "size"), mostly_slow(MAKERS, "two_blocks"))
def test_evaluation_matches_float64(device, make, size):
    trio = networks(make, device)
    x, _ = batch(size, 5, torch.float16, 2, device)
    with torch.no_grad():
        for network in trio:
            network.eval()
            for name, buffer in network.named_buffers():
                buffer.fill_(0.1 if name.endswith("mean") else 1.5)
        ours, baseline, truth = (network(images) for network, images in zip(trio, (x, x, x.double()), strict=True))
    assert_as_accurate(ours, baseline, truth)


@pytest.mark.slow
def test_twenty_training_steps_stay_with_float64(device):
    """The acceptance of a tier: its losses in fp16 are as close to the float64 run's as twice the reference's."""
    losses = []
    for network, dtype in zip(networks(TwoBlocks, device), (torch.float16, torch.float16, torch.float64), strict=True):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True)
        run = []
        for step in range(20):
            x, target = batch(8, 8, torch.float16, step % 4, device)
            loss = loss_of(network(x.to(dtype)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.detach())
        losses.append(torch.stack(run))
    ours, baseline, exact = losses
    assert exact[-4:].mean() < 0.5 * exact[:4].mean(), "it learns"
    assert_as_accurate(ours, baseline, exact, "losses")


@pytest.mark.slow
def test_two_runs_are_bit_equal(device):
    x, target = batch(8, 8, torch.float16, 3, device)
    runs = []
    for _ in range(2):
        network = networks(TwoBlocks, device)[0]
        loss = loss_of(network(x), target)
        runs.append([loss, *torch.autograd.grad(loss, list(network.parameters())), *network.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_the_same_state_dict(device):
    ours, baseline, _ = networks(lambda ops: ResNet(WIDTHS, ops), device)
    assert list(ours.state_dict()) == list(baseline.state_dict())
    baseline.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("training", mostly_slow([True, False], 0), ids=["training", "evaluation"])
def test_compiles_into_one_graph(device, training):
    network = networks(TwoBlocks, device)[0].train(training)
    x, target = batch(8, 4, torch.float32, 4, device)
    expected = loss_of(network(x), target)
    compiled = torch.compile(lambda x: loss_of(network(x), target), fullgraph=True, backend="aot_eager")
    loss = compiled(x)
    assert torch.equal(loss, expected)
    for a, b in zip(*(torch.autograd.grad(y, list(network.parameters())) for y in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b)  # the graph may add gradients in another order


def test_one_value_per_channel_is_refused_in_training(device):
    bn = reference.BatchNorm(*(torch.ones(16, device=device) for _ in range(4)), True, 0.1, 1e-5)
    x = channels_last(1, 3, 1, 1, dtype=torch.float32, seed=0, device=device)
    with pytest.raises(ValueError, match="more than one value per channel"):
        batchnorm.stem(x, torch.ones(16, 3, 3, 3, device=device), bn)


def test_a_layer_makes_fourteen_passes():
    """Six by the library's convolution (fprop, dgrad and wgrad read or write two each), eight by the kernels here."""
    x = torch.empty(512, 64, 32, 32, dtype=torch.float16, device="meta")
    c, norm, coefficients = (torch.empty(*shape, device="meta") for shape in ((64,), (5, 64), (4, 64)))
    costs = (
        bn_stats_cost(x),
        bn_apply_cost(x, c, c),
        bn_backward_reduce_cost(x, x, norm),
        bn_backward_apply_cost(x, x, norm, coefficients),
    )
    passes = sum(cost.bytes for cost in costs) / (2 * x.numel())
    assert 6 + passes == pytest.approx(14, rel=2e-3)
