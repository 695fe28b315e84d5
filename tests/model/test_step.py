import copy

import pytest
import torch
import torch.nn.functional as F
from block_cases import no_overflow_checks  # noqa: F401
from runs import tiny_config

from kernels import fused, reference
from model import step as module
from model.network import ResNet, ResNet9
from model.schedule import piecewise_linear
from model.step import TrainingStep


def batch(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    return x, torch.randint(0, 10, (n,), generator=generator)


def small(x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in maps of a sixteenth, for the interpreter."""
    return x[:, :, ::4, ::4].contiguous(memory_format=torch.channels_last), labels


def make(**changes) -> TrainingStep:
    torch.manual_seed(0)
    network = ResNet9((8, 8, 8, 8))
    return TrainingStep(network, tiny_config(**changes), steps_per_epoch=4)


def test_the_update_is_nesterov_on_the_summed_loss_with_the_article_s_decay():
    """float64 by hand: v = mu v + (g + wd B w); w -= lr / B (g + wd B w + mu v); a short batch is not rescaled.

    The gradient is float64's as far as a ReLU or a pool near a tie allows; from it the update follows exactly.
    """
    step = make(weight_decay=0.01)
    weights = [p.detach().double() for p in step.network.parameters()]
    velocities = [torch.zeros_like(w) for w in weights]
    for number, n in enumerate([20, 20, 20, 10, 20], start=1):
        x, labels = batch(n, number)
        truth = copy.deepcopy(step.network).double()
        F.cross_entropy(truth(x.double()), labels, reduction="sum").backward()
        step(x, labels)
        rate = piecewise_linear(number / 4, (0, 1, 3), (0, 0.1, 0)) / 20
        for i, (gradient, p) in enumerate(zip(step.optimiser.gradients, truth.parameters(), strict=True)):
            assert (gradient - p.grad).norm() <= 0.05 * p.grad.norm()
            g = gradient.double() + 0.01 * 20 * weights[i]
            velocities[i] = 0.9 * velocities[i] + g
            weights[i] = weights[i] - rate * (g + 0.9 * velocities[i])
    for ours, expected in zip(step.network.parameters(), weights, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


def test_sums_are_of_the_images_seen():
    step = make()
    x, labels = batch(20)
    logits = step.network(x)
    step(x, labels)
    assert float(step.loss_sum) == pytest.approx(F.cross_entropy(logits, labels, reduction="sum").item(), rel=1e-5)
    assert int(step.correct) == int((logits.argmax(1) == labels).sum())
    step.start_epoch()
    assert float(step.loss_sum) == int(step.correct) == 0


@pytest.mark.parametrize("poison", ["gradient", "image"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_from_the_first_bad_step_on_the_weights_stay(poison, value):
    step = make()
    step(*batch(20, 1))
    good = {k: v.clone() for k, v in {**dict(step.network.named_parameters()), **step.tensors()}.items()}
    hook = None
    x, labels = batch(20, 2)
    if poison == "gradient":
        hook = step.network.linear.weight.register_hook(lambda g: g.index_fill(0, torch.tensor(3), value))
    else:
        x[0, 0, 0, 0] = value
    step(x, labels)
    if hook:
        hook.remove()
    step(*batch(20, 3))  # a good batch after it changes nothing any more
    assert int(step.bad_step) == 2
    now = {**dict(step.network.named_parameters()), **step.tensors()}
    for name, tensor in good.items():
        if not name.startswith("sums."):
            assert torch.equal(now[name], tensor), name


def test_good_steps_are_not_masked():
    step = make()
    before = step.network.linear.weight.clone()
    step(*batch(20))
    assert int(step.bad_step) == -1
    assert not torch.equal(step.network.linear.weight, before)


def test_an_empty_batch_changes_no_statistics_and_no_sums():
    step = make(weight_decay=0.0)
    before = {k: v.clone() for k, v in step.network.state_dict().items()}
    x, labels = batch(0)
    step(x, labels)
    assert all(torch.equal(v, before[k]) for k, v in step.network.state_dict().items())
    assert float(step.loss_sum) == 0
    assert step.number == 1
    assert step.network.training


def test_without_momentum():
    step = make(momentum=0.0)
    step(*batch(20))
    assert set(step.tensors()) == {"sums.loss", "sums.correct"}


@pytest.mark.usefixtures("no_overflow_checks")
@pytest.mark.parametrize(
    ("network", "ops", "widths", "dtype", "sizes"),
    [
        pytest.param(ResNet, reference, (8, 8, 8, 8), torch.bfloat16, (20, 10), id="resnet"),
        pytest.param(ResNet9, reference, (8, 8, 8, 8), torch.bfloat16, (20, 10), id="resnet9"),
        pytest.param(ResNet9, fused, (16, 16, 16, 16), torch.float16, (2,), id="fused"),
    ],
)
def test_the_16_bit_copies_are_the_casts_bit_for_bit(network, ops, widths, dtype, sizes):
    """And the gradients that arrive through them are fp32 as through the masters: the fused ops' unrounded."""
    steps = []
    for casts in (False, True):
        torch.manual_seed(0)
        step = TrainingStep(network(widths, ops=ops), tiny_config(), steps_per_epoch=4, dtype=dtype)
        assert len(step.copies) == sum(p.dim() > 1 for p in step.network.parameters())
        if casts:
            step.copies = {}
        for seed, n in enumerate(sizes):
            x, labels = small(*batch(n, seed))
            step(x.to(dtype), labels)
        steps.append(step)
    copies, casts = steps
    for a, b in zip(copies.state(), casts.state(), strict=True):
        assert torch.equal(a, b)
    if ops is fused:
        of_a_convolution = copies.network.layer1.conv.grad
        assert not torch.equal(of_a_convolution, of_a_convolution.to(dtype).float())


def test_copies_follow_the_weights():
    torch.manual_seed(0)
    step = TrainingStep(ResNet9((8, 8, 8, 8)), tiny_config(), steps_per_epoch=4, dtype=torch.bfloat16)
    with torch.no_grad():
        step.network.prep.fill_(0.3)
    step.go_to(2)
    for name, p in step.network.named_parameters():
        if name in step.copies:
            assert torch.equal(step.copies[name], p.bfloat16())
            assert step.copies[name].stride() == p.stride()


@pytest.fixture
def compiler(monkeypatch):
    """One that traces forward and backward, with their decompositions, and then runs them as they are."""
    monkeypatch.setattr(module, "COMPILER", "aot_eager")
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiler", "no_overflow_checks")
@pytest.mark.parametrize(
    ("network", "ops", "widths", "sizes"),
    [
        pytest.param(ResNet, reference, (8, 8, 8, 8), (4,), id="resnet", marks=pytest.mark.slow),
        pytest.param(ResNet9, reference, (8, 8, 8, 8), (4, 4, 0), id="resnet9"),
        pytest.param(ResNet9, fused, (16, 16, 16, 16), (2,), id="fused", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_is_the_step_in_one_graph(network, ops, widths, sizes):
    """fullgraph=True is an error at the first graph break; there is a graph for each size of batch."""
    steps = []
    for compiled in (False, True):
        torch.manual_seed(0)
        step = TrainingStep(network(widths, ops=ops), tiny_config(), steps_per_epoch=4)
        if compiled:
            step.compile()
        for seed, n in enumerate(sizes):
            step(*small(*batch(n, seed)))
        steps.append(step)
    eager, compiled = steps
    for a, b in zip(eager.state(), compiled.state(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # the graph may add gradients in another order


@pytest.mark.usefixtures("compiler")
def test_a_graph_break_is_an_error():
    step = make()
    forward = step.network.forward

    def broken(x):
        return forward(x) if x.sum() > 0 else forward(-x)

    step.network.forward = broken
    step.compile()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        step(*batch(20))
    step.disable_capture()
    step(*batch(20))


def test_the_state_is_all_that_a_step_changes():
    step = make()
    step(*batch(20))
    everything = {id(t): t for t in [*step.state(), *step.network.parameters(), *step.tensors().values()]}
    kept = {key: t.clone() for key, t in everything.items()}
    before = [t.clone() for t in step.state()]
    step(*batch(20, 1))
    assert all(not torch.equal(t, kept[key]) for key, t in everything.items() if t is not step.bad_step)
    for t, old in zip(step.state(), before, strict=True):
        t.copy_(old)
    with torch.no_grad():
        assert all(torch.equal(t, kept[key]) for key, t in everything.items())
