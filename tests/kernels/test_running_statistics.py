"""Which statistics a batch norm normalises by, and how the running ones move."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from kernels import fused
from kernels.bn_stats import bn_finalize_reference
from kernels.reference import BatchNorm
from kernels.running_statistics import (
    check_has_statistics,
    make_updates,
    partials_for,
    running_partials,
    update_running,
)
from model.network import ResNet, ResNet9


def batch_norm(training: bool = True, updates: list | None = None) -> BatchNorm:
    gamma, beta, mean, var = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    return BatchNorm(gamma, beta, mean, var, training, 0.1, 1e-5, updates)


def test_partials_are_the_given_the_taken_or_the_running_ones():
    x, given, taken = torch.zeros(2, 5, 3, 3), torch.ones(3, 1, 5), torch.zeros(3, 1, 5)
    assert partials_for(batch_norm(), x, given) is given
    assert partials_for(batch_norm(), x, None, lambda x: taken) is taken
    bn = batch_norm(training=False)
    partials = partials_for(bn, x, given)
    assert torch.equal(partials, running_partials(bn))
    mean, _, rstd, *_ = bn_finalize_reference(partials, bn.gamma, bn.beta, bn.eps)
    torch.testing.assert_close(mean, bn.running_mean)
    torch.testing.assert_close(rstd, (bn.running_var + bn.eps).rsqrt())


def test_update_is_pytorch_s_and_none_in_evaluation():
    x = torch.randn(4, 5, 3, 3)
    norm = torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3)), *torch.full((3, 5), torch.nan)])
    bn, evaluation, library = batch_norm(), batch_norm(training=False), torch.nn.BatchNorm2d(5)
    library.running_mean.copy_(bn.running_mean)
    library.running_var.copy_(bn.running_var)
    library(x)
    update_running(bn, norm)
    update_running(evaluation, norm)
    torch.testing.assert_close(bn.running_mean, library.running_mean)
    torch.testing.assert_close(bn.running_var, library.running_var)
    assert torch.equal(evaluation.running_mean, batch_norm().running_mean)


def test_one_value_per_channel_is_refused_in_training_only():
    x = torch.zeros(1, 5, 1, 1)
    check_has_statistics(batch_norm(training=False), x)
    with pytest.raises(ValueError, match="more than one value per channel"):
        check_has_statistics(batch_norm(), x)


def test_updates_wait_for_the_owner_of_their_list():
    updates = []
    both = [(batch_norm(), batch_norm(updates=updates)) for _ in range(2)]
    for norm, pair in zip(torch.rand(2, 5, 5), both, strict=True):
        for bn in pair:
            update_running(bn, norm)
        assert torch.equal(pair[1].running_mean, batch_norm().running_mean), "not yet"
    make_updates(updates)
    for at_once, waited in both:
        assert torch.equal(at_once.running_mean, waited.running_mean)
        assert torch.equal(at_once.running_var, waited.running_var)
    make_updates([])


@pytest.mark.parametrize(("make", "tensors"), [(ResNet, 32), (ResNet9, 16)])
def test_a_network_s_running_statistics_move_in_one_operation(make, tensors):
    moved = []

    class Moves(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if "lerp" in str(op):
                moved.append((op.overloadpacket, {id(t) for t in args[0]}))
            return op(*args, **(kwargs or {}))

    with FakeTensorMode(), Moves():
        network = make((16, 16, 16, 16), fused.implementation("ours"))
        x = torch.empty(2, 3, 32, 32, dtype=torch.float16).to(memory_format=torch.channels_last)
        network(x)
        network.eval()(x)
        assert moved == [(torch.ops.aten._foreach_lerp_, {id(b) for b in network.buffers()})]
    assert len(moved[0][1]) == tensors
