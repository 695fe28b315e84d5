import copy

import pytest
import torch
import torch.nn.functional as F
from pictures import axes_of, named
from runs import tiny_config, tiny_dataset, tiny_session

from experiments import forgetting_rules, retention
from experiments.study import training

CHOSEN = {"images": 70, "epochs": 2, "constant": 3, "last": 2}


def test_past_losses_are_those_of_the_batches_that_were_seen_by_frozen_weights():
    """From what the batches were made of in training, which is recorded while it goes on; the youngest comes first."""
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
    before = {name: p.clone() for name, p in trainer.network.named_parameters()}
    assert retention.past_losses(trainer, 1) == pytest.approx(expected[::-1], rel=1e-5)
    assert all(torch.equal(before[name], p) for name, p in trainer.network.named_parameters())


@pytest.mark.parametrize(("name", "images", "augmented"), [("half", 35, False), ("all", 70, True)])
def test_a_run_is_of_its_setting(monkeypatch, name, images, augmented):
    prepare, prepared, counted = training.prepare, [], []

    def spy(*arguments):
        prepared.append(prepare(*arguments))
        return prepared[-1]

    monkeypatch.setattr(training, "prepare", spy)
    row = retention.look_back(tiny_session(), tiny_config(), CHOSEN, name, 0.05, counted.append)
    config = prepared[0].config
    assert (config.crop_pad > 0, config.flip != "none", config.cutout > 0) == (augmented,) * 3
    assert (config.lr_epochs, config.lr_values) == ((0, 5, 8), (0, 0.05, 0.05))
    steps = -(-images // 20)
    assert (row["images"], row["epoch_steps"], len(row["losses"])) == (images, steps, 2 * steps)
    assert sum(counted) == images * 8 == retention.images_to_train(CHOSEN, name)
    assert steps < forgetting_rules.LEAST  # too few for a fit, and in the table all the same
    made = dict.fromkeys(retention.RUNS, row)
    assert retention.fits(made) == {}
    assert "too few batches" in retention.sentences(made, {})[-1]
    assert retention.table(made, {}).rows[0][-1] == "none"


def test_a_run_that_blows_up_is_a_result():
    row = retention.look_back(tiny_session(), tiny_config(), CHOSEN, "all", 1e38, lambda n: None)
    assert (row["losses"], row["seen"]) == ([], None)
    rows = dict.fromkeys(retention.RUNS, row)
    assert retention.fits(rows) == {}
    assert "a run blew up" in retention.sentences(rows, {})[0]
    assert {plot.reason for plot in retention.plots(rows, {})} == {"both runs blew up"}
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
    ("high", "low", "noise", "expected", "fit"),
    [
        (5, 40, 0.01, "the climb is more gradual", "63 % forgotten after 5 steps"),
        (20, 20, 0.0, "the climb is not more gradual", "63 % forgotten after 19 steps"),
        (5, 1000, 0.0, "the climb is more gradual, at least", "63 % forgotten after 5 steps"),
        (1000, 1000, 0.0, "cannot be told from one epoch", "63 % forgotten after at least 100 steps"),
        (1e-3, 1e-3, 0.1, "no climb is told from noise", "no forgetting told from noise"),
    ],
    ids=["as_the_article", "equal", "longer_than_an_epoch", "both_longer_than_an_epoch", "nothing_but_noise"],
)
def test_sentences_picture_and_table_name_the_climb_by_words_that_need_no_definition(high, low, noise, expected, fit):
    made = rows(high, low, noise)
    fits = retention.fits(made)
    said, table = retention.sentences(made, fits), retention.table(made, fits)
    assert all(expected in sentence for sentence in said[2:])
    names = named(axes_of(retention.plots(made, fits)[0]))
    assert set(names[1::2]) == {f"fit to the last epoch: {fit}"}
    assert names[::2] == list(retention.SETTINGS.values())
    assert table.columns[-1] == "63 % forgotten after, steps"
    alone = {key: found for key, found in fits.items() if key != "half, high"}
    assert named(axes_of(retention.plots(made, alone)[0])) == names[2:]
    if not noise:
        losses = made["half, high"]["losses"]
        assert table.rows[0][3:5] == [f"{sum(part) / 10:.3f}" for part in (losses[:10], losses[-10:])]
        assert f"63 % of the difference is forgotten after {table.rows[0][-1]} steps" in said[2]


@pytest.mark.parametrize(("seen", "expected"), [((1.0, 1.05), ": the same"), ((0.5, 1.0), ": not the same")])
def test_sentences_on_the_last_loss_follow_the_data(seen, expected):
    made = rows(5, 40, seen=seen)
    assert expected in retention.sentences(made, retention.fits(made))[0]
