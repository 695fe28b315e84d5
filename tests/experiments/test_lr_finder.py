import json
import math
import re

import pytest
import torch
from runs import tiny_config, tiny_dataset, tiny_session

import train
from experiments import lr_finder
from experiments.study import training
from experiments.study.folder import Request
from profiling.output.terminal import Terminal


def tiny_trainer(**changes):
    return training.prepare(tiny_session(), tiny_config(batch_size=5, **changes), tiny_dataset())


def everything(trainer) -> dict[str, torch.Tensor]:
    state = {f"state.{i}": t for i, t in enumerate(trainer.step.state())}
    return {k: v.clone() for k, v in {**trainer.tensors(), **state}.items()}


def test_a_sweep_disturbs_nothing():
    """Of a trainer in the midst of its training, which then goes on as if there had been no sweep."""
    disturbed, alone = tiny_trainer(), tiny_trainer()
    streams = [trainer.train(0) for trainer in (disturbed, alone)]
    for stream in streams:
        for _ in range(3):
            next(stream)
    before, random = everything(disturbed), torch.get_rng_state()
    found = lr_finder.sweep(disturbed, tiny_dataset())
    assert len(found.rates) > 3
    after = everything(disturbed)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(random, torch.get_rng_state())
    for stream in streams:
        list(stream)
    ours, theirs = everything(disturbed), everything(alone)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_sweep_begins_from_the_trainers_weights():
    trainer = tiny_trainer()
    fresh = lr_finder.sweep(trainer, tiny_dataset(), 1e-3, 1e-2)
    for epoch in range(3):
        list(trainer.train(epoch))
    trained = lr_finder.sweep(trainer, tiny_dataset(), 1e-3, 1e-2)
    assert trained.losses[0] < fresh.losses[0]


def test_rates_rise_exponentially_from_low_to_high():
    found = lr_finder.sweep(tiny_trainer(), tiny_dataset(), 1e-4, 1e-1)
    assert found.stopped is None
    assert len(found.rates) == 14
    assert found.rates[0] == pytest.approx(1e-4)
    assert found.rates[-1] == pytest.approx(1e-1)
    ratios = [b / a for a, b in zip(found.rates, found.rates[1:], strict=False)]
    assert ratios == pytest.approx([1000 ** (1 / 13)] * 13)


def test_the_weights_move_by_the_sweeps_rates():
    """The device's table, not only what the host says of it: ten times the rates change the second batch's loss."""
    slow, fast = (lr_finder.sweep(tiny_trainer(), tiny_dataset(), low, 10 * low) for low in (1e-3, 1e-1))
    assert slow.losses[0] == fast.losses[0]
    assert slow.losses[1] != fast.losses[1]


def test_a_gradient_that_is_not_finite_ends_the_sweep(monkeypatch):
    """Without an error, and what came before is kept."""
    monkeypatch.setattr(lr_finder, "BLOWN_UP", math.inf)
    found = lr_finder.sweep(tiny_trainer(), tiny_dataset(), 1e-4, 1e38)
    assert "not finite" in found.stopped
    assert 0 < len(found.rates) < 14
    assert all(map(math.isfinite, found.losses))
    json.dumps(found._asdict(), allow_nan=False)


def test_a_loss_that_blows_up_ends_the_sweep():
    found = lr_finder.sweep(tiny_trainer(), tiny_dataset(), 1e-2, 1e6)
    assert "times the first" in found.stopped or "not finite" in found.stopped
    assert len(found.rates) < 14


def valley(noise: float = 0.0):
    """A loss that falls fastest at 0.1 and is lowest at 1, over log10 of the rate."""
    x = torch.linspace(-4, 1.5, 200, dtype=torch.float64)
    y = 2.3 - 0.8 * torch.sigmoid(6 * (x + 1)) + 0.5 * torch.relu(x) ** 2
    y = y + noise * torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (10**x).tolist(), y.tolist()


@pytest.mark.parametrize(("noise", "within"), [(0.0, 0.1), (0.1, 0.3)], ids=["exact", "noisy_as_batches_are"])
def test_both_rules_find_what_is_there(noise, within):
    rates, losses = valley(noise)
    found = lr_finder.suggest(rates, losses)
    assert abs(math.log10(found.steepest) + 1) < within
    lowest = rates[min(range(200), key=valley()[1].__getitem__)]
    assert abs(math.log10(10 * found.tenth / lowest)) < 2 * within
    assert not found.at_end


def test_how_sure_the_minimum_is_follows_from_the_noise():
    """Without any it is about one rate; a floor two decades wide is as low all along, and a sentence says so."""
    exact = lr_finder.suggest(*valley())
    assert 0.6 < exact.low < exact.minimum < exact.high < 1.1
    noise = 0.05 * torch.randn(200, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = torch.linspace(-4, 1.5, 200, dtype=torch.float64)
    flat = 2.3 - 0.3 * (x + 3).clamp(0, 2) + 2 * torch.relu(x - 1) + noise  # its floor is from 0.1 to 10
    found = lr_finder.suggest((10**x).tolist(), flat.tolist())
    assert 0.04 < found.low < 0.3
    assert 4 < found.high < 14
    unsure, sure = (
        " ".join(lr_finder.sentences(lr_finder.Sweep([1.0], [1.0], None), s, tiny_config())) for s in (found, exact)
    )
    assert f"a tenth of it could be anything from {found.low / 10:.2g} to {found.high / 10:.2g}" in unsure
    assert "The minimum is flat" not in sure


SHALLOW = lr_finder.Suggestion(steepest=0.036, tenth=0.29, minimum=2.9, low=0.14, high=4.4, at_end=False)
SWEPT = lr_finder.Sweep([1e-4, 1e-2, 1.0, 100.0], [2.3, 2.0, 1.6, 9.0], None)


@pytest.mark.parametrize(
    ("found", "headline"),
    [
        (
            SHALLOW,
            "Start with a learning rate of 0.036: the loss falls fastest there, and the other rule, a tenth of the "
            "rate at its minimum, says more, 0.29.",
        ),
        (
            SHALLOW._replace(steepest=0.5, tenth=0.1, minimum=1.0),
            "Start with a learning rate of 0.1: it is a tenth of the rate at the loss's minimum, and the other rule, "
            "where the loss falls fastest, says more, 0.5.",
        ),
    ],
    ids=["steepest", "tenth"],
)
def test_a_sweep_says_which_of_its_rates_to_use_and_why(found, headline):
    """The smaller, in a sentence, in the chart's legend and in the table."""
    said = lr_finder.sentences(SWEPT, found, tiny_config())
    assert said[0] == headline
    assert said[1] == "Of the two the smaller is the safe one: too low a rate costs time, too high a one the run."
    used = ("steepest descent", "a tenth of the minimum's rate")[found.tenth < found.steepest]
    legend = [one["name"] for one in lr_finder.chart(SWEPT, found, tiny_config()).data]
    assert [name for name in legend if "start with it" in name] == [f"{used}: {found.first:.2g}, start with it"]
    assert f"lowest loss, within noise: {found.low:.2g} to {found.high:.2g}" in legend
    (table,) = lr_finder.tables(found)
    assert [row[0] for row in table.rows if row[1] == f"{found.first:.3g}"] == [f"{used}: start with it"]


@pytest.mark.parametrize(
    ("peak", "expected"),
    [
        (0.01, "below the rates at which the loss is lowest: a higher peak may train faster"),
        (0.6, "where the loss is as low as anywhere: the sweep has nothing against it"),
        (20.0, "where the loss has risen again: lower it"),
        (200.0, "which the sweep did not reach"),
    ],
)
def test_what_is_said_of_the_schedule_s_peak_agrees_with_the_curve(peak, expected):
    config = tiny_config(lr_epochs=(0, 1, 3), lr_values=(0, peak, 0))
    said = next(text for text in lr_finder.sentences(SWEPT, SHALLOW, config) if "peaks at" in text)
    assert said == f"The schedule of {config.preset} peaks at {peak:.3g}, {expected}."


def test_without_a_suggestion_there_is_no_table_of_them():
    assert lr_finder.tables(None) == []


def test_the_axis_of_rates_has_a_tick_for_each_decade():
    """Those between touch each other."""
    assert lr_finder.chart(SWEPT, SHALLOW, tiny_config()).layout["xaxis"]["dtick"] == 1


def test_a_dip_elsewhere_is_no_part_of_the_floor():
    """Two valleys as low as each other: the loss is not as low anywhere between them."""
    x = torch.linspace(-4, 1.5, 400, dtype=torch.float64)
    y = 2.3 - torch.exp(-((x + 2.5) ** 2) / 0.1) - 1.001 * torch.exp(-((x - 0.5) ** 2) / 0.1)
    y = y + 0.02 * torch.randn(400, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = lr_finder.suggest((10**x).tolist(), y.tolist())
    assert found.high < 10 * found.low


def test_a_loss_that_ends_above_its_first_value_is_said_to():
    rates, losses = valley()  # at 10**1.5 it is 2.6
    rises, falls = (
        lr_finder.sentences(lr_finder.Sweep(rates[:n], losses[:n], None), None, tiny_config())[-1] for n in (200, 140)
    )
    first = next(rate for rate, loss in zip(rates, losses, strict=True) if loss > 2.3)
    rate = re.fullmatch(r"From a rate of (\S+) on the .* finite up to the sweep's end, a rate of 31\.6\.", rises)[1]
    assert float(rate) == pytest.approx(first, rel=0.1)
    assert falls == "The smoothed loss does not rise above its first value up to the sweep's end, a rate of 0.695."


def test_too_short_a_sweep_is_not_said_to_have_risen():
    short = lr_finder.Sweep([0.1, 0.2], [2.0, 1.0], "the loss was not finite at a rate of 0.4")
    said = lr_finder.sentences(short, lr_finder.suggest(*short[:2]), tiny_config())[0]
    assert "never fell" not in said
    assert "its 2 steps are too few" in said


@pytest.mark.parametrize(
    ("losses", "at_end"),
    [([3, 2, 1, 0.5], True), ([1, 2, 3, 4], None), ([1, 1], None)],
    ids=["still_falling", "never_falls", "two_steps"],
)
def test_what_cannot_be_suggested_is_not(losses, at_end):
    found = lr_finder.suggest([10.0**i for i in range(len(losses))], losses)
    assert (found.at_end if found else None) == at_end


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_only_blows_up_suggests_nothing(seed):
    """Its lowest batch is one of many that are as low."""
    noise = 0.01 * torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = torch.linspace(-4, 2, 40, dtype=torch.float64)
    losses = (2.31 + noise + torch.relu(x - 0.5)).tolist()
    rates = (10**x).tolist()
    assert lr_finder.suggest(rates, losses) is None
    assert "never fell by more" in lr_finder.sentences(lr_finder.Sweep(rates, losses, None), None, tiny_config())[0]


def test_a_line_is_smoothed_to_itself():
    rates = [10 ** (i / 10) for i in range(30)]
    values, slopes = lr_finder.smooth(rates, [5 - 2 * i / 10 for i in range(30)], 0.5)
    assert values == pytest.approx([5 - 2 * i / 10 for i in range(30)])
    assert slopes == pytest.approx([-2] * 30)


def test_the_experiment_writes_its_folder_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "open_session", lambda *args, **kwargs: tiny_session(tiny_dataset(600)))
    settings = ("widths=8,16,16,32", "batch_size=20", "dtype=float32", "device=cpu")
    request = Request(small=True, out=tmp_path / "a", synthetic=True, settings=settings)
    document = lr_finder.run(request, Terminal(speaks=False), tiny_session().interrupts)
    result, written = document["result"], json.loads((tmp_path / "a" / "lr-finder.json").read_text())
    assert written["result"] == result
    assert f"{min(result['suggestion'][rule] for rule in ('steepest', 'tenth')):.2g}" in document["sentences"][0]
    assert document["caveats"][0] == (
        "--small: a sweep of a narrow network, that of the preset laptop, at batch 20; another network or batch has "
        "other rates, and needs its own."
    )
    assert (tmp_path / "a" / "lr-finder.html").exists()
    monkeypatch.setattr(lr_finder, "sweep", None)  # nothing is measured again
    assert lr_finder.run(request, Terminal(speaks=False), tiny_session().interrupts)["result"] == result
