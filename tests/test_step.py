import copy

import pytest
import torch
import torch.nn.functional as F
from runs import tiny_config

from model.network import ResNet9
from model.schedule import piecewise_linear
from model.step import TrainingStep

KINK = ((0, 15, 15, 30, 35), (0, 0.1, 0.105, 0.005, 0))


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [(0, 0), (7.5, 0.05), (14.999999, 0.1), (15, 0.105), (22.5, 0.055), (30, 0.005), (32.5, 0.0025), (35, 0), (99, 0)],
)
def test_the_schedule_of_the_341_s_entry(epoch, rate):
    assert piecewise_linear(epoch, *KINK) == pytest.approx(rate, abs=1e-8)


def test_before_the_first_knot_the_first_value_holds():
    assert piecewise_linear(-1, (0, 1), (0.5, 1)) == 0.5


def batch(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    return x, torch.randint(0, 10, (n,), generator=generator)


def make(**changes) -> TrainingStep:
    torch.manual_seed(0)
    network = ResNet9((4, 4, 4, 4))
    return TrainingStep(network, tiny_config(**changes), steps_per_epoch=4)


def test_the_update_is_nesterov_on_the_summed_loss_with_the_article_s_decay():
    """float64 by hand: v = mu v + (g + wd B w); w -= lr / B (g + wd B w + mu v); a short batch is not rescaled."""
    step = make(weight_decay=0.01)
    truth = copy.deepcopy(step.network).double()
    velocity = {p: torch.zeros_like(p) for p in truth.parameters()}
    for number, n in enumerate([20, 20, 20, 10, 20], start=1):
        x, labels = batch(n, number)
        F.cross_entropy(truth(x.double()), labels, reduction="sum").backward()
        rate = piecewise_linear(number / 4, (0, 1, 3), (0, 0.1, 0)) / 20
        with torch.no_grad():
            for p in truth.parameters():
                g = p.grad + 0.01 * 20 * p
                velocity[p] = 0.9 * velocity[p] + g
                p -= rate * (g + 0.9 * velocity[p])
                p.grad = None
        step(x, labels)
    for ours, expected in zip(step.network.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=2e-4, atol=2e-5)


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
