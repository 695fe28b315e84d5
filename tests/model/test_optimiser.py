import copy

import pytest
import torch
from torch import nn

from model.network import ResNet, ResNet9
from model.optimiser import ALIGNMENT, SGD

RATES = torch.tensor([9.0, 0.1, 0.05, 0.02])


def networks(build=ResNet9) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    network = build((8, 24, 16, 16)).to(memory_format=torch.channels_last)
    return network, copy.deepcopy(network)


@pytest.mark.parametrize("build", [ResNet, ResNet9])
def test_packing_changes_nothing_that_can_be_seen(build):
    network, before = networks(build)
    parameters = list(network.parameters())
    optimiser = SGD(network, RATES, 0.9, 0.1)
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert list(network.state_dict()) == list(before.state_dict())
    for p, old, v in zip(parameters, before.parameters(), optimiser.velocities, strict=True):
        assert torch.equal(p, old)
        assert p.stride() == old.stride() == p.grad.stride() == v.stride()
        assert p.data_ptr() % (4 * ALIGNMENT) == optimiser.weights.data_ptr() % (4 * ALIGNMENT)
    assert len({p.untyped_storage()._cdata for p in parameters}) == 1
    network.load_state_dict({name: t + 1 for name, t in before.state_dict().items()})
    assert torch.equal(parameters[0], next(before.parameters()) + 1)
    assert sum(optimiser.weights != 0) <= sum(p.numel() for p in parameters), "nothing between the parameters"


def test_no_two_parameters_share_an_element():
    network, _ = networks()
    optimiser = SGD(network, RATES, 0.9, 0.1)
    for i, p in enumerate(network.parameters()):
        p.data.fill_(i + 1)
    counts = torch.bincount(optimiser.weights.long())
    assert counts[1:].tolist() == [p.numel() for p in network.parameters()]


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_steps_are_those_of_torch_optim(momentum):
    network, other = networks()
    other.double()
    optimiser = SGD(network, RATES, momentum, 0.1)
    theirs = torch.optim.SGD(other.parameters(), lr=1.0, momentum=momentum, nesterov=momentum > 0, weight_decay=0.1)
    for number in range(1, 101):
        generator = torch.Generator().manual_seed(number)
        for gradient, p in zip(optimiser.gradients, other.parameters(), strict=True):
            gradient.copy_(torch.randn(p.shape, generator=generator))
            p.grad = gradient.double()
        theirs.param_groups[0]["lr"] = float(RATES[min(number, 3)])
        theirs.step()
        optimiser.step()
    assert int(optimiser.number) == 100
    assert int(optimiser.bad_step) == -1
    for p, truth in zip(network.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.double(), truth, rtol=1e-5, atol=1e-6)
