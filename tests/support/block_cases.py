"""Small networks that an implementation of the blocks is tested with, beside the reference and in float64."""

import contextlib
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_as_accurate, channels_last
from torch import Tensor, nn

from kernels import reference, tiles
from kernels.accuracy import relative_error
from model.network import BatchNorm, PreactBlock, ResNet9, conv_weight


class TwoBlocks(nn.Module):
    """The smallest network with everything that a pre-activation block can have: both shortcuts and both strides."""

    def __init__(self, ops, prep_bn: bool = False):
        super().__init__()
        self.stem = ops.stem
        self.prep = conv_weight(3, 16)
        self.prep_bn = BatchNorm(16) if prep_bn else None
        self.blocks = nn.ModuleList([PreactBlock(ops, 16, 16, 1, True), PreactBlock(ops, 16, 32, 2, True)])
        self.linear = nn.Linear(32, 10)

    def forward(self, x):
        x, statistics = self.stem(x, self.prep, self.prep_bn and self.prep_bn())
        for block in self.blocks:
            x, statistics = block(x, statistics)
        return F.linear(x.mean((2, 3)), self.linear.weight.to(x.dtype), self.linear.bias.to(x.dtype))


def narrow_resnet9(ops, pool_first: bool = False) -> nn.Module:
    return ResNet9((16, 16, 16, 32), ops, pool_first=pool_first)


NETWORKS = {
    "two_blocks": TwoBlocks,
    "two_blocks_after_a_bn": lambda ops: TwoBlocks(ops, prep_bn=True),
    "resnet9_pool_last": narrow_resnet9,
    "resnet9_pool_first": lambda ops: narrow_resnet9(ops, pool_first=True),
}
GRADIENT_CASES = [
    pytest.param("two_blocks", torch.float32, id="two_blocks_fp32"),
    # In fp16 a ReLU or a pool that switches moves a deeper network's gradient by more than rounding does.
    pytest.param("two_blocks", torch.float16, id="two_blocks_fp16"),
    pytest.param("resnet9_pool_last", torch.float32, id="resnet9_pool_last_fp32"),
    pytest.param("resnet9_pool_first", torch.float32, id="resnet9_pool_first_fp32"),
]


def same_networks(name: str, *implementations, device) -> list[nn.Module]:
    """The network with each of the implementations, and with the reference in float64, all with the same parameters."""
    torch.manual_seed(0)
    first = NETWORKS[name](reference)
    with torch.no_grad():
        for p in first.parameters():
            if p.dim() == 1:  # neither gammas of one nor betas of zero, which would hide a factor or a term
                p += 0.2 * torch.randn(p.shape)
    networks = [NETWORKS[name](ops) for ops in implementations] + [NETWORKS[name](reference).double()]
    for network in networks:
        network.load_state_dict(first.state_dict())
    return [network.to(device) for network in networks]


def batch(name: str, images: int, dtype: torch.dtype, seed: int, device) -> tuple[Tensor, Tensor]:
    size = 16 if name.startswith("resnet9") else 8  # which halves it three times
    x = channels_last(images, 3, size, size, dtype=dtype, seed=seed, device=device)
    return x, torch.randint(10, (images,), generator=torch.Generator().manual_seed(seed)).to(device)


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), target)


def results(network: nn.Module, x: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Logits, gradients and running statistics of a training step."""
    logits = network(x)
    names, parameters = zip(*network.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss_of(logits, target), parameters)
    return {"logits": logits.detach(), **dict(zip(names, gradients, strict=True)), **dict(network.named_buffers())}


def check_training(ops, name: str, dtype: torch.dtype, device, *below) -> None:
    """A step with `ops` is as near to float64's as twice the reference's, or a tier's `below` if that is farther.

    In fp16, of one of three batches: rounding switches a ReLU of some batch, what is wrong is wrong for each.
    """
    *tries, last = (1, 2, 3) if dtype == torch.float16 else (1,)
    for seed in tries:
        with contextlib.suppress(AssertionError):
            return _check_training(ops, name, dtype, device, below, seed)
    return _check_training(ops, name, dtype, device, below, last)


def _check_training(ops, name: str, dtype: torch.dtype, device, below, seed: int) -> None:
    x, target = batch(name, 5, dtype, seed, device)
    ours, *others, exact = same_networks(name, ops, reference, *below, device=device)
    truth, mine = results(exact, x.double(), target), results(ours, x, target)
    theirs = [results(other, x, target) for other in others]
    for key in truth:
        baseline = max((other[key] for other in theirs), key=lambda tensor: relative_error(tensor, truth[key]))
        # A dozen ops deep, fp32 was 8 eps off on a GPU where PyTorch was 4.
        assert_as_accurate(mine[key], baseline, truth[key], key, units=16 if dtype == torch.float32 else 4)


def check_evaluation(ops, name: str, device) -> None:
    """Logits by the running statistics, and their gradients, are as near to float64's as twice the reference's."""
    x, target = batch(name, 5, torch.float16, 2, device)
    networks = same_networks(name, ops, reference, device=device)
    for network in networks:
        network.eval()
        for key, buffer in network.named_buffers():
            buffer.fill_(0.1 if key.endswith("mean") else 1.5)
    ours, baseline, truth = (results(n, i, target) for n, i in zip(networks, (x, x, x.double()), strict=True))
    for key in truth:
        assert_as_accurate(ours[key], baseline[key], truth[key], key)


def check_two_runs(ops, name: str, device) -> None:
    """Bit for bit the same results twice."""
    x, target = batch(name, 4, torch.float16, 3, device)
    first, second = (results(same_networks(name, ops, device=device)[0], x, target) for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), key


def check_compiles(ops, name: str, device, training: bool) -> None:
    """One graph, forward and backward, with the results of eager mode."""
    network = same_networks(name, ops, device=device)[0].train(training)
    x, target = batch(name, 2, torch.float32, 4, device)
    expected = loss_of(network(x), target)
    compiled = torch.compile(lambda x: loss_of(network(x), target), fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, expected)
    parameters = list(network.parameters())
    for a, b in zip(*(torch.autograd.grad(y, parameters) for y in (compiled, expected)), strict=True):
        torch.testing.assert_close(a, b)  # the graph may add gradients in another order


def check_state_dict(ops, name: str, device) -> None:
    """The same keys in the same order, and each loads the other's."""
    ours, baseline, _ = same_networks(name, ops, reference, device=device)
    assert list(ours.state_dict()) == list(baseline.state_dict())
    with torch.no_grad():
        for tensor in ours.state_dict().values():
            tensor.add_(1)
    baseline.load_state_dict(ours.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(ours.state_dict().values(), baseline.state_dict().values(), strict=True)
    )
    ours.load_state_dict(baseline.state_dict())


def skip_overflow_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the interpreter without its check of every integer addition, a third of its time; the ops' tests have it."""
    from triton.runtime import interpreter  # may be absent

    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.fixture
def no_overflow_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_overflow_checks(monkeypatch)


def prefer_library(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """Let the table have measured the library as the faster for `ops`."""
    monkeypatch.setattr(tiles, "prefers_library", lambda op, shape, dtype, gpu: op in ops)


def prefer_stored(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """Let the table have found it best to store the activation that `ops` read."""
    tile = tiles.tile

    def storing(op: str, *rest) -> tiles.Tile:
        found = tile(op, *rest)
        return dataclasses.replace(found, prologue="stored") if op in ops else found

    monkeypatch.setattr(tiles, "tile", storing)
