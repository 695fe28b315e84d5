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
from model.network import BatchNorm, PreactBlock, ResNet, ResNet9, conv_weight


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


WIDTHS = (16, 16, 16, 32)
NETWORKS = {
    "two_blocks": TwoBlocks,
    "two_blocks_after_a_bn": lambda ops: TwoBlocks(ops, prep_bn=True),
    "resnet": lambda ops: ResNet((8, 16, 16, 24), ops, prep_bn_relu=True),  # widths that only the library convolves
    "resnet9_pool_last": lambda ops: ResNet9(WIDTHS, ops),
    "resnet9_pool_first": lambda ops: ResNet9(WIDTHS, ops, pool_first=True),
}


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
    size = 16 if name.startswith("resnet") else 8  # which halves it three times
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


def check_training(ops, name: str, dtype: torch.dtype, device, *below, units: int = 16) -> None:
    """A step with `ops` is as near to float64's as twice the reference's, or a tier's `below` if that is farther.

    In fp32 `units` of rounding are allowed: a dozen ops deep it was 8 eps off on a GPU where PyTorch was 4. In fp16 one
    of three batches must pass: rounding switches a ReLU of some batch, what is wrong is wrong for each.
    """
    *tries, last = (1, 2, 3) if dtype == torch.float16 else (1,)
    for seed in tries:
        with contextlib.suppress(AssertionError):
            return _check_training(ops, name, dtype, device, below, 4, seed)
    return _check_training(ops, name, dtype, device, below, 4 if dtype == torch.float16 else units, last)


def _check_training(ops, name: str, dtype: torch.dtype, device, below, units: int, seed: int) -> None:
    x, target = batch(name, 5, dtype, seed, device)
    ours, *others, exact = same_networks(name, ops, reference, *below, device=device)
    truth, mine = results(exact, x.double(), target), results(ours, x, target)
    theirs = [results(other, x, target) for other in others]
    for key in truth:
        baseline = max((other[key] for other in theirs), key=lambda tensor: relative_error(tensor, truth[key]))
        assert_as_accurate(mine[key], baseline, truth[key], key, units)


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
