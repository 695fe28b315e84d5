import json
import math
import re

import pytest
import torch
from pictures import axes_of, named
from runs import tiny_config, tiny_dataset, tiny_session

import train
from experiments import lr_finder
from experiments.study import training
from experiments.study.folder import Request
from profiling.output.terminal import Terminal


def tiny_trainer():
    return training.prepare(tiny_session(), tiny_config(batch_size=5), tiny_dataset())


def sweep(low: float, high: float, trainer=None) -> lr_finder.Sweep:
    return lr_finder.sweep(trainer or tiny_trainer(), tiny_dataset(), low, high)


def everything(trainer) -> dict[str, torch.Tensor]:
    state = {f"state.{i}": t for i, t in enumerate(trainer.step.state())}
    return {k: v.clone() for k, v in {**trainer.tensors(), **state}.items()}


def test_a_sweep_disturbs_nothing_and_begins_from_the_trainers_weights():
    """In the midst of a training, which goes on as if there had been no sweep."""
    disturbed, alone = tiny_trainer(), tiny_trainer()
    fresh, streams = sweep(1e-3, 1e-2), [trainer.train(0) for trainer in (disturbed, alone)]
    for stream in streams:
        for _ in range(3):
            next(stream)
    before, random = everything(disturbed), torch.get_rng_state()
    found = sweep(1e-3, 1e-2, disturbed)
    after = everything(disturbed)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(random, torch.get_rng_state())
    assert found.losses[0] < fresh.losses[0]
    for stream in streams:
        list(stream)
    ours, theirs = everything(disturbed), everything(alone)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_rates_rise_exponentially_and_move_the_weights():
    """The device's table too, not only what the host says of it: other rates change the second batch's loss."""
    slow, fast = sweep(1e-4, 1e-1), sweep(1e-2, 1e-1)
    assert slow.stopped is None
    assert slow.rates == pytest.approx([1e-4 * 1000 ** (n / 13) for n in range(14)])
    assert slow.losses[0] == fast.losses[0]
    assert slow.losses[1] != fast.losses[1]


@pytest.mark.parametrize(
    ("low", "high", "bound", "expected"),
    [(1e-4, 1e38, math.inf, "was not finite at a rate of"), (1e-2, 1e6, 4.0, "times the first|not finite")],
    ids=["gradient_not_finite", "loss_blows_up"],
)
def test_a_blow_up_ends_the_sweep_and_what_came_before_is_kept(monkeypatch, low, high, bound, expected):
    monkeypatch.setattr(lr_finder, "BLOWN_UP", bound)
    found = sweep(low, high)
    assert re.search(expected, found.stopped)
    assert 0 < len(found.rates) < 14
    assert all(map(math.isfinite, found.losses))
    json.dumps(found._asdict(), allow_nan=False)


def curve(loss, n: int = 200, high: float = 1.5, noise: float = 0.0, seed: int = 1) -> tuple[list, list]:
    """(rates, losses) from 1e-4 to 10**high, `loss` being a function of the rate's logarithm."""
    x = torch.linspace(-4, high, n, dtype=torch.float64)
    random = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (10**x).tolist(), (loss(x) + noise * random).tolist()


def valley(x: torch.Tensor) -> torch.Tensor:
    """A loss that falls fastest at 0.1 and is lowest at 1."""
    return 2.3 - 0.8 * torch.sigmoid(6 * (x + 1)) + 0.5 * torch.relu(x) ** 2


def floor(x: torch.Tensor) -> torch.Tensor:
    """Equally low from 0.1 to 10."""
    return 2.3 - 0.3 * (x + 3).clamp(0, 2) + 2 * torch.relu(x - 1)


def two_dips(x: torch.Tensor) -> torch.Tensor:
    return 2.3 - torch.exp(-((x + 2.5) ** 2) / 0.1) - 1.001 * torch.exp(-((x - 0.5) ** 2) / 0.1)


@pytest.mark.parametrize(("noise", "within"), [(0.0, 0.1), (0.1, 0.3)], ids=["exact", "noisy_as_batches_are"])
def test_both_rules_find_what_is_there(noise, within):
    rates, losses = curve(valley, noise=noise)
    found = lr_finder.suggest(rates, losses)
    assert abs(math.log10(found.steepest) + 1) < within
    lowest = rates[min(range(200), key=curve(valley)[1].__getitem__)]
    assert abs(math.log10(10 * found.tenth / lowest)) < 2 * within
    assert not found.at_end


def test_the_bounds_of_the_minimum_follow_from_the_noise():
    """Without noise they hold one rate; a floor two decades wide is as low all along; a dip elsewhere is no part."""
    exact = lr_finder.suggest(*curve(valley))
    assert 0.6 < exact.low < exact.minimum < exact.high < 1.1
    flat = lr_finder.suggest(*curve(floor, noise=0.05, seed=2))
    assert 0.04 < flat.low < 0.3
    assert 4 < flat.high < 14
    dips = lr_finder.suggest(*curve(two_dips, 400, noise=0.02, seed=3))
    assert dips.high < 10 * dips.low
    unsure, sure = (" ".join(lr_finder.sentences(SWEPT, found, tiny_config())) for found in (flat, exact))
    assert f"a tenth of it could be anything from {flat.low / 10:.2g} to {flat.high / 10:.2g}" in unsure
    assert "The minimum is flat" not in sure


SHALLOW = lr_finder.Suggestion(steepest=0.036, tenth=0.29, minimum=2.9, low=0.14, high=4.4, at_end=False)
SWEPT = lr_finder.Sweep([1e-4, 1e-2, 1.0, 100.0], [2.3, 2.0, 1.6, 9.0], None)
HEADLINES = {
    "steepest descent": "Start with a learning rate of 0.036: the loss falls fastest there, and the other rule, a "
    "tenth of the rate at its minimum, says more, 0.29.",
    "a tenth of the minimum's rate": "Start with a learning rate of 0.1: it is a tenth of the rate at the loss's "
    "minimum, and the other rule, where the loss falls fastest, says more, 0.5.",
}


@pytest.mark.parametrize("used", HEADLINES)
def test_sentence_picture_and_table_say_which_rate_to_use(used):
    found = SHALLOW if used == "steepest descent" else SHALLOW._replace(steepest=0.5, tenth=0.1, minimum=1.0)
    said = lr_finder.sentences(SWEPT, found, tiny_config())
    assert said[:2] == [
        HEADLINES[used],
        "Of the two the smaller is the safe one: too low a rate costs time, too high a one the run.",
    ]
    axes = axes_of(lr_finder.picture(SWEPT, found, tiny_config()))
    assert [name for name in named(axes) if "start with it" in name] == [f"{used}: {found.first:.2g}, start with it"]
    assert {"peak of tiny: 0.1", f"lowest loss, within noise: {found.low:.2g} to {found.high:.2g}"} <= {*named(axes)}
    (table,) = lr_finder.tables(found)
    assert [row[0] for row in table.rows if row[1] == f"{found.first:.3g}"] == [f"{used}: start with it"]


def test_a_picture_has_a_tick_for_each_decade_and_without_a_suggestion_only_the_peak():
    axes = axes_of(lr_finder.picture(SWEPT, None, tiny_config()))
    axes.figure.draw_without_rendering()
    low, high = axes.get_xlim()
    ticks = [label.get_text() for label in axes.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert ticks == ["0.0001", "0.001", "0.01", "0.1", "1", "10", "100"]
    assert not any(label.get_visible() for label in axes.get_xticklabels(minor=True))
    assert named(axes) == ["a batch", "smoothed", "peak of tiny: 0.1"]
    assert lr_finder.tables(None) == []
    assert lr_finder.picture(lr_finder.Sweep([0.1], [2.0], "x"), None, tiny_config()).reason


@pytest.mark.parametrize(
    ("peak", "expected"),
    [
        (0.01, "below the rates at which the loss is lowest: a higher peak may train faster"),
        (0.6, "where the loss is as low as anywhere: the sweep has nothing against it"),
        (20.0, "where the loss has risen again: lower it"),
        (200.0, "which the sweep did not reach"),
    ],
)
def test_the_sentence_on_the_schedules_peak_agrees_with_the_curve(peak, expected):
    config = tiny_config(lr_epochs=(0, 1, 3), lr_values=(0, peak, 0))
    said = lr_finder.sentences(SWEPT, SHALLOW._replace(at_end=True), config)
    assert f"The schedule of {config.preset} peaks at {peak:.3g}, {expected}." in said
    assert "a tenth of its rate is a lower bound" in said[-3]


def test_the_last_sentence_says_how_the_sweep_ended():
    rates, losses = curve(valley)  # at 10**1.5 it is 2.6
    stopped = lr_finder.Sweep([0.1, 0.2], [2.0, 1.0], "the loss was not finite at a rate of 0.4")
    rose, fell, ended = (
        lr_finder.sentences(found, None, tiny_config())
        for found in (*(lr_finder.Sweep(rates[:n], losses[:n], None) for n in (200, 140)), stopped)
    )
    first = next(rate for rate, loss in zip(rates, losses, strict=True) if loss > 2.3)
    rate = re.fullmatch(r"From a rate of (\S+) on the .* finite up to the sweep's end, a rate of 31\.6\.", rose[-1])[1]
    assert float(rate) == pytest.approx(first, rel=0.1)
    assert fell[-1] == "The smoothed loss does not rise above its first value up to the sweep's end, a rate of 0.695."
    assert ended == [
        "The sweep suggests no learning rate: its 2 steps are too few.",
        "The sweep ended early: the loss was not finite at a rate of 0.4.",
    ]


def test_nothing_is_suggested_where_nothing_can_be_known():
    rates = [10.0**i for i in range(4)]
    assert lr_finder.suggest(rates, [3, 2, 1, 0.5]).at_end
    assert lr_finder.suggest(rates, [1, 2, 3, 4]) is None
    assert lr_finder.suggest(rates[:2], [1, 1]) is None
    for seed in range(20):  # a loss that only blows up: its lowest batch is one of many that are as low
        rates, losses = curve(lambda x: 2.31 + torch.relu(x - 0.5), 40, 2, 0.01, seed)
        assert lr_finder.suggest(rates, losses) is None
    said = lr_finder.sentences(lr_finder.Sweep(rates, losses, None), None, tiny_config())
    assert "its loss never fell by more than its noise" in said[0]


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
