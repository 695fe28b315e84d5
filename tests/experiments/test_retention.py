import copy

import pytest
import torch
import torch.nn.functional as F
from runs import loaded, tiny_config, tiny_dataset, tiny_session

from experiments import forgetting_rules, retention
from experiments.study import training

CHOSEN = {"images": 70, "epochs": 2, "constant": 3, "last": 2}


def trained(**changes):
    trainer = training.prepare(tiny_session(), tiny_config(**changes), tiny_dataset())
    training.fit(trainer, lambda n: None)
    return trainer


def test_past_losses_are_those_of_the_batches_that_were_seen_in_their_order():
    """Seen again from what the batches were made of in training, which is recorded while it goes on."""
    trainer = training.prepare(tiny_session(), tiny_config(), tiny_dataset())
    seen, load = [], trainer.step.load

    def recording(*batch):
        made = load(*batch)
        seen.append(made)
        return made

    trainer.step.load = recording
    training.fit(trainer, lambda n: None)
    assert len(seen) == 12
    network = copy.deepcopy(trainer.network).train()
    with torch.no_grad():
        expected = [float(F.cross_entropy(network(x).float(), labels)) for x, labels in seen[4:]]
    assert retention.past_losses(trainer, 1) == pytest.approx(expected[::-1], rel=1e-5)


def test_weights_are_frozen():
    trainer = trained()
    before = {name: p.clone() for name, p in trainer.network.named_parameters()}
    retention.past_losses(trainer, 0)
    assert all(torch.equal(before[name], p) for name, p in trainer.network.named_parameters())


def test_batches_of_an_epoch_are_the_same_again():
    trainer = trained()
    first, again = loaded(trainer.batches, 1), loaded(trainer.batches, 1)
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("name", "images", "augmented"), [("half", 35, False), ("all", 70, True)])
def test_a_run_is_of_its_setting(monkeypatch, name, images, augmented):
    prepared = []
    prepare = training.prepare

    def spy(*arguments):
        prepared.append(prepare(*arguments))
        return prepared[-1]

    monkeypatch.setattr(training, "prepare", spy)
    counted = []
    row = retention.look_back(tiny_session(), tiny_config(), CHOSEN, name, 0.05, counted.append)
    config = prepared[0].config
    assert (config.crop_pad > 0, config.flip != "none", config.cutout > 0) == (augmented,) * 3
    assert config.lr_epochs == (0, 5, 8)
    assert config.lr_values == (0, 0.05, 0.05)
    steps = -(-images // 20)
    assert (row["images"], row["epoch_steps"], len(row["losses"])) == (images, steps, 2 * steps)
    assert sum(counted) == images * 8 == retention.images_to_train(CHOSEN, name)


def test_a_run_that_blows_up_is_a_result():
    row = retention.look_back(tiny_session(), tiny_config(), CHOSEN, "all", 1e38, lambda n: None)
    assert row["losses"] == []
    assert row["seen"] is None
    rows = dict.fromkeys(retention.RUNS, row)
    assert retention.fits(rows) == {}
    assert "a run blew up" in retention.sentences(rows, {})[0]
    assert retention.chart("high", rows, {}).reason
    assert retention.table(rows, {}).rows[0][2:] == ["blew up", "blew up", "blew up", "none", "none"]


def rows(high: float, low: float, noise: float = 0.0, seen: tuple[float, float] = (1.0, 1.0)) -> dict:
    """Runs that forget with these memories at the high and the low rate."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for key, (name, rate) in retention.RUNS.items():
        ages = torch.arange(1, 101, dtype=torch.float64)
        losses = 1 - 0.3 * torch.exp(-ages / (high if rate == "high" else low))
        losses = losses + noise * torch.randn(100, generator=generator, dtype=torch.float64)
        last = seen[0] if name == "half" else seen[1]
        made[key] = {"losses": losses.tolist(), "epoch_steps": 100, "seen": last, "rate": 0.1, "images": 1}
    return made


@pytest.mark.parametrize(
    ("high", "low", "noise", "expected"),
    [
        (5, 40, 0.01, "the climb is more gradual"),
        (20, 20, 0.0, "the climb is not more gradual"),
        (5, 1000, 0.0, "the climb is more gradual, at least"),
        (1000, 1000, 0.0, "cannot be told from one epoch"),
        (1e-3, 1e-3, 0.1, "no climb is told from noise"),
    ],
    ids=["as_the_article", "equal", "longer_than_an_epoch", "both_longer_than_an_epoch", "nothing_but_noise"],
)
def test_sentences_on_the_climb_follow_the_data(high, low, noise, expected):
    made = rows(high, low, noise)
    for sentence in retention.sentences(made, retention.fits(made))[2:]:
        assert expected in sentence


@pytest.mark.parametrize(
    ("high", "noise", "expected"),
    [
        (5, 0.0, "fit to the last epoch: 63 % forgotten after 5 steps"),
        (1000, 0.0, "fit to the last epoch: 63 % forgotten after at least 100 steps"),
        (1e-3, 0.1, "fit to the last epoch: no forgetting told from noise"),
    ],
    ids=["within_an_epoch", "longer_than_an_epoch", "nothing_but_noise"],
)
def test_a_fit_is_named_by_what_it_says(high, noise, expected):
    """In the picture, in the table and in a sentence, by words that need no definition."""
    made = rows(high, high, noise)
    fits = retention.fits(made)
    assert {t["name"] for t in retention.chart("high", made, fits).data[2::3]} == {expected}
    table = retention.table(made, fits)
    assert table.columns[-1] == "63 % forgotten after, steps"
    if not noise:
        assert (
            f"63 % of the difference is forgotten after {table.rows[0][-1]} steps" in retention.sentences(made, fits)[2]
        )


@pytest.mark.parametrize(("seen", "expected"), [((1.0, 1.05), ": the same"), ((0.5, 1.0), ": not the same")])
def test_sentences_on_the_last_loss_follow_the_data(seen, expected):
    made = rows(5, 40, seen=seen)
    assert expected in retention.sentences(made, retention.fits(made))[0]


def test_too_few_batches_have_no_fit_and_are_still_drawn_in_the_table():
    row = retention.look_back(tiny_session(), tiny_config(), CHOSEN, "all", 0.05, lambda n: None)
    assert row["epoch_steps"] < forgetting_rules.LEAST
    made = dict.fromkeys(retention.RUNS, row)
    assert retention.fits(made) == {}
    assert "too few batches" in retention.sentences(made, {})[-1]
    assert retention.table(made, {}).rows[0][-1] == "none"
