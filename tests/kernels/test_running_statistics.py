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


def batch_norm(training: bool) -> BatchNorm:
    gamma, beta, mean, var = torch.rand(4, 5, generator=torch.Generator().manual_seed(0))
    return BatchNorm(gamma, beta, mean, var, training, 0.1, 1e-5)


def test_running_statistics_as_partials_normalise_as_they_are():
    bn = batch_norm(training=False)
    mean, _, rstd, *_ = bn_finalize_reference(running_partials(bn), bn.gamma, bn.beta, bn.eps)
    torch.testing.assert_close(mean, bn.running_mean)
    torch.testing.assert_close(rstd, (bn.running_var + bn.eps).rsqrt())


def test_whose_statistics():
    x, given, taken = torch.zeros(2, 5, 3, 3), torch.ones(3, 1, 5), torch.zeros(3, 1, 5)
    assert partials_for(batch_norm(training=True), x, given) is given
    assert partials_for(batch_norm(training=True), x, None, lambda x: taken) is taken
    evaluation = batch_norm(training=False)
    assert torch.equal(partials_for(evaluation, x, given), running_partials(evaluation))


def test_update_is_pytorch_s():
    x = torch.randn(4, 5, 3, 3)
    bn, library = batch_norm(training=True), torch.nn.BatchNorm2d(5)
    library.running_mean.copy_(bn.running_mean)
    library.running_var.copy_(bn.running_var)
    library(x)
    update_running(bn, torch.stack([x.mean((0, 2, 3)), x.var((0, 2, 3)), *torch.full((3, 5), torch.nan)]))
    torch.testing.assert_close(bn.running_mean, library.running_mean)
    torch.testing.assert_close(bn.running_var, library.running_var)


def test_no_update_in_evaluation():
    bn = batch_norm(training=False)
    before = bn.running_mean.clone()
    update_running(bn, torch.full((5, 5), torch.nan))
    assert torch.equal(bn.running_mean, before)


def test_one_value_per_channel_is_refused_in_training_only():
    x = torch.zeros(1, 5, 1, 1)
    check_has_statistics(batch_norm(training=False), x)
    with pytest.raises(ValueError, match="more than one value per channel"):
        check_has_statistics(batch_norm(training=True), x)


def test_updates_wait_for_the_owner_of_their_list():
    norms = torch.rand(2, 5, 5)
    at_once, waiting, updates = [], [], []
    for norm in norms:
        at_once.append(batch_norm(training=True))
        update_running(at_once[-1], norm)
        waiting.append(batch_norm(training=True)._replace(updates=updates))
        update_running(waiting[-1], norm)
        assert torch.equal(waiting[-1].running_mean, batch_norm(training=True).running_mean), "not yet"
    make_updates(updates)
    for one, other in zip(at_once, waiting, strict=True):
        assert torch.equal(one.running_mean, other.running_mean)
        assert torch.equal(one.running_var, other.running_var)
    make_updates([])


@pytest.mark.parametrize(("make", "tensors"), [(ResNet, 32), (ResNet9, 16)], ids=["resnet", "resnet9"])
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
        assert moved == [(torch.ops.aten._foreach_lerp_, {id(b) for b in network.buffers()})]
        assert len(moved[0][1]) == tensors
        network.eval()(x)
    assert len(moved) == 1
