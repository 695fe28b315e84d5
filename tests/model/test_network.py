import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels import reference
from model.network import BatchNorm, ResNet, ResNet9


def images(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return x.to(memory_format=torch.channels_last)


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(ResNet, 5_205_834), (lambda: ResNet(prep_bn_relu=True), 5_205_962), (ResNet9, 6_573_120)],
    ids=["article", "redundant_bn", "resnet9"],
)
def test_parameter_counts_are_the_article_s(build, parameters):
    assert count(build()) == parameters


def library_bn(module: BatchNorm) -> nn.BatchNorm2d:
    """The same batch norm, as PyTorch's module."""
    bn = nn.BatchNorm2d(len(module.weight)).double()
    bn.load_state_dict({**module.state_dict(), "num_batches_tracked": torch.tensor(0)})
    return bn


def article_by_the_book(network: ResNet, x: torch.Tensor) -> torch.Tensor:
    """The layer table of the article's network, line by line, with none of our ops."""
    x = F.conv2d(x, network.prep, padding=1)
    if network.prep_bn is not None:
        x = F.relu(library_bn(network.prep_bn)(x))
    for i, block in enumerate(network.blocks):
        stride = 2 if i in (2, 4, 6) else 1
        a = F.relu(library_bn(block.bn1)(x))
        y = F.conv2d(a, block.conv1, stride=stride, padding=1)
        y = F.conv2d(F.relu(library_bn(block.bn2)(y)), block.conv2, padding=1)
        x = y + (F.conv2d(a, block.conv3, stride=2) if i in (2, 4, 6) else a)
    pooled = torch.cat([F.max_pool2d(x, 4), F.avg_pool2d(x, 4)], 1).flatten(1)
    return F.linear(pooled, network.linear.weight, network.linear.bias)


def resnet9_by_the_book(network: ResNet9, x: torch.Tensor, pool_first: bool) -> torch.Tensor:
    def group(x, w, bn, pool):
        y = F.conv2d(x, w, padding=1)
        y = F.max_pool2d(y, 2) if pool and pool_first else y
        y = F.relu(library_bn(bn)(y))
        return F.max_pool2d(y, 2) if pool and not pool_first else y

    x = group(x, network.prep, network.prep_bn, False)
    for layer, pair in [(network.layer1, network.residual1), (network.layer2, ()), (network.layer3, network.residual3)]:
        x = group(x, layer.conv, layer.bn, True)
        inner = x
        for module in pair:
            inner = group(inner, module.conv, module.bn, False)
        x = x + inner if pair else x
    return F.linear(F.max_pool2d(x, 4).flatten(1), network.linear.weight) * 0.125


@pytest.mark.parametrize("prep_bn_relu", [False, True], ids=["article", "redundant_bn"])
def test_resnet_is_the_article_s_layer_table(prep_bn_relu):
    network = ResNet((8, 24, 16, 16), prep_bn_relu=prep_bn_relu, uniform_gamma=True).double()
    x = images(3, torch.float64)
    expected = article_by_the_book(network, x)
    torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pool_first", [False, True])
def test_resnet9_is_the_article_s_part_4(pool_first):
    network = ResNet9((8, 24, 16, 16), pool_first=pool_first).double()
    x = images(3, torch.float64)
    expected = resnet9_by_the_book(network, x, pool_first)
    torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("build", [ResNet, ResNet9])
def test_gradients_match_float64_autograd_of_the_book(build):
    torch.manual_seed(0)
    network = build((8, 24, 16, 16)).double()
    x = images(4, torch.float64)
    book = article_by_the_book(network, x) if build is ResNet else resnet9_by_the_book(network, x, False)
    # gamma and beta enter the book's copy as constants, so only convolutions and the linear layer are compared
    leaves = [p for name, p in network.named_parameters() if "bn" not in name]
    ours = torch.autograd.grad(network(x).square().sum(), leaves)
    truth = torch.autograd.grad(book.square().sum(), leaves)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_uniform_gamma_is_that_of_pytorch_0_4():
    torch.manual_seed(0)
    gammas = torch.cat([m.weight for m in ResNet(uniform_gamma=True).modules() if isinstance(m, BatchNorm)]).detach()
    assert gammas.min() >= 0
    assert gammas.max() <= 1
    assert abs(gammas.mean() - 0.5) < 0.03
    assert all((m.weight == 1).all() for m in ResNet().modules() if isinstance(m, BatchNorm))


def test_convolutions_start_as_pytorch_s_do():
    torch.manual_seed(0)
    ours, theirs = ResNet().blocks[4].conv1, nn.Conv2d(128, 256, 3).weight
    assert abs(ours.std() / theirs.std() - 1) < 0.01
    assert abs(ours.abs().max() / theirs.abs().max() - 1) < 0.01
    assert ours.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("build", [ResNet, ResNet9])
def test_training_updates_running_statistics_and_evaluation_uses_them(build):
    network, x = build((8, 8, 8, 8)), images(8)
    before = {name: b.clone() for name, b in network.named_buffers()}
    network(x)
    after = dict(network.named_buffers())
    assert all(not torch.equal(before[name], b) for name, b in after.items())
    network.eval()
    torch.testing.assert_close(network(x)[:2], network(x[:2]))
    assert all(torch.equal(after[name], b) for name, b in network.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [ResNet, ResNet9])
def test_layout_and_dtype_are_kept_throughout(build, dtype):
    seen = []

    def watched(op):
        def call(*args):
            result = op(*args)
            seen.append(result[0] if isinstance(result, tuple) else result)
            return result

        return call

    names = ("stem", "preact_block", "conv_bn_relu")
    ops = SimpleNamespace(**{name: watched(getattr(reference, name)) for name in names})
    network = build((8, 8, 8, 8), ops).to(memory_format=torch.channels_last)
    y = network(images(2).to(dtype))
    y.float().sum().backward()
    assert len(seen) >= 8
    assert all(t.dtype == dtype and t.is_contiguous(memory_format=torch.channels_last) for t in seen)
    assert all(p.grad.dtype == torch.float32 for p in network.parameters())


@pytest.mark.parametrize("build", [ResNet, ResNet9])
def test_a_network_can_be_copied(build):
    network = build((8, 8, 8, 8)).eval()
    torch.testing.assert_close(copy.deepcopy(network)(images(2)), network(images(2)))


def test_widths_are_checked():
    with pytest.raises(ValueError, match="four"):
        ResNet((64, 128))
    with pytest.raises(ValueError, match="four"):
        ResNet9((64, 128, 0, 8))
    with pytest.raises(ValueError, match="multiples of 8"):
        ResNet((4, 4, 8, 8))
