import json
import math

import numpy as np
import pytest

from experiments import forgetting_rules
from experiments.forgetting_rules import LEAST, climb, curve, smoothed
from model.errors import UsageError

RATES = [2.0**i for i in range(-3, 5)]


def bowl(best: int, loss: float = 0.5, rise: float = 0.05, cliff: int = 7) -> list[float | None]:
    """A curve that is lowest at RATES[best], rises by `rise` a rate, and blows up at RATES[cliff]."""
    return [None if i >= cliff else loss + (0.3 * (best - i) if i < best else rise * (i - best)) for i in range(8)]


def test_rates_at_which_a_tenth_and_half_are_given_back():
    """Linear in the logarithm between tested rates: a line from 0.3 to ln 10 over one doubling."""
    losses = [0.6, 0.3, forgetting_rules.GUESSING, *[None] * 5]
    found = forgetting_rules.limits(100, RATES, losses)
    assert (found.best_rate, found.best_loss) == (0.25, 0.3)
    assert found.rises == pytest.approx(0.25 * 2**0.1)
    assert found.blows_up == pytest.approx(0.25 * 2**0.5)


@pytest.mark.parametrize(
    ("losses", "rises", "blows_up"),
    [
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], False, False),
        ([0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.9, 1.0], True, False),
        ([0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, None], True, True),
        ([0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 1e30], True, True),
        ([2.3] * 8, False, False),
    ],
    ids=["falls_to_the_end", "rises_only", "not_finite", "huge", "learned_nothing"],
)
def test_a_limit_that_is_not_reached_is_none(losses, rises, blows_up):
    found = forgetting_rules.limits(100, RATES, losses)
    assert (found.rises is not None, found.blows_up is not None) == (rises, blows_up)


def test_not_finite_and_huge_are_the_same():
    same = [forgetting_rules.limits(1, RATES, [0.3] * 7 + [last]) for last in (None, 1e30)]
    assert same[0] == same[1]


def test_a_curve_without_a_loss_is_refused():
    with pytest.raises(ValueError, match="no run on 100 images has a loss"):
        forgetting_rules.limits(100, RATES, [None] * 8)


def test_a_dip_after_the_rise_does_not_move_the_limit():
    found = forgetting_rules.limits(1, RATES, [0.5, 0.4, 0.3, 1.0, 0.5, 0.4, 0.4, None])
    assert 0.5 < found.rises < 1


def curves(bests: list[int], cliffs: list[int], rise: float = 0.3) -> list[forgetting_rules.Limits]:
    many = (1000 * 2**i for i in range(len(bests)))
    return [
        forgetting_rules.limits(n, RATES, bowl(b, rise=rise, cliff=c))
        for n, b, c in zip(many, bests, cliffs, strict=True)
    ]


@pytest.mark.parametrize(
    ("bests", "cliffs", "expected"),
    [
        ([6, 4, 3, 2], [7, 7, 7, 7], "times earlier: the mark of forgetting"),
        ([3, 3, 3, 3], [7, 7, 7, 7], "no difference that these rates can tell"),
        ([2, 3, 4, 5], [7, 7, 7, 7], "later with more images, the opposite"),
    ],
    ids=["as_the_article", "no_difference", "the_opposite"],
)
def test_the_sentence_on_forgetting_follows_the_data(bests, cliffs, expected):
    said = forgetting_rules.sentences(curves(bests, cliffs))
    assert expected in said[0]


def test_the_sentence_on_curvature_follows_the_data():
    together = forgetting_rules.sentences(curves([3, 3, 3], [7, 7, 7], rise=0.05))[1]
    assert "All 3 curves blow up together" in together
    assert "as the article saw about 8 (quoted)" in together
    low = forgetting_rules.sentences(curves([0, 0, 0], [2, 2, 2], rise=0.05))[1]
    assert "where the article saw about 8" in low
    apart = forgetting_rules.sentences(curves([1, 1, 1], [7, 5, 3], rise=0.05))[1]
    assert "do not blow up together" in apart
    alone = forgetting_rules.sentences([forgetting_rules.limits(10, RATES, [2.3] * 8), *curves([3], [7])])[1]
    assert "Fewer than two curves" in alone
    assert forgetting_rules.curvature_limit(curves([3], [7])) is None
    never = forgetting_rules.sentences(curves([3, 3, 3], [7, 7, 9], rise=0.05))[1]
    assert "on 4,000 images none did" in never


def test_a_set_on_which_nothing_is_learned_is_named():
    said = forgetting_rules.sentences([forgetting_rules.limits(10, RATES, [2.3] * 8), *curves([3, 3], [7, 7])])
    assert said[-1].startswith("On 10 images no rate learned anything")
    assert forgetting_rules.sentences([forgetting_rules.limits(10, RATES, [2.3] * 8)]) == [said[-1]]


def document(folder, rows: list[forgetting_rules.Limits], base: float = 0.1, batch: int = 128) -> None:
    result = {"limits": [row._asdict() for row in rows], "base_rate": base, "recipe": {"batch_size": batch}}
    (folder / "forgetting.json").write_text(json.dumps({"result": result, "settings": {"small": False}}))


def test_evidence_is_that_of_the_largest_set_and_of_all_curves(tmp_path):
    rows = [forgetting_rules.Limits(10, 1, 0.5, 4.0, 8.0), forgetting_rules.Limits(20, 1, 0.5, 2.0, 8.0)]
    document(tmp_path, rows)
    found = forgetting_rules.read_evidence(tmp_path)
    assert (found.images, found.batch) == (20, 128)
    assert found.forgetting == pytest.approx(0.2)
    assert found.curvature == pytest.approx(0.8)


def test_linear_scaling_leaves_forgetting_alone_and_approaches_curvature():
    """The article's argument: 128 and 512 at the same rate for an image."""
    found = forgetting_rules.Evidence({}, 50_000, 128, 0.2, 0.8, False)
    small, large = found.headroom(128, 0.1), found.headroom(512, 0.4)
    assert small[0] == pytest.approx(large[0]) == pytest.approx(2)
    assert small[1] == pytest.approx(8)
    assert large[1] == pytest.approx(2)
    assert forgetting_rules.Evidence({}, 1, 128, None, None, False).headroom(1, 1) == (None, None)


@pytest.mark.parametrize("text", [None, "{}", "[]", "not json"], ids=["absent", "empty", "list", "torn"])
def test_a_folder_without_evidence_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "forgetting.json").write_text(text)
    with pytest.raises(UsageError, match="has no finished forgetting"):
        forgetting_rules.read_evidence(tmp_path)


def test_guessing_is_the_loss_of_ten_equal_probabilities():
    assert -math.log(0.1) == pytest.approx(forgetting_rules.GUESSING)


def losses(n: int, drop: float, memory: float, noise: float = 0.0) -> list[float]:
    age = np.arange(1, n + 1)
    return list(1 - drop * np.exp(-age / memory) + noise * np.random.default_rng(0).standard_normal(n))


@pytest.mark.parametrize("memory", [3, 20, 60])
def test_a_climb_is_found(memory):
    fit = climb(losses(100, 0.3, memory))
    assert fit.clear
    assert fit.memory == pytest.approx(memory, rel=0.1)
    assert fit.drop == pytest.approx(0.3, rel=0.1)
    assert fit.plateau == pytest.approx(1, rel=0.05)
    assert curve(fit, [1, 50]) == pytest.approx([losses(100, 0.3, memory)[i] for i in (0, 49)], abs=0.01)


def test_a_climb_is_found_in_the_noise_of_batches():
    fit = climb(losses(100, 0.3, 20, noise=0.08))
    assert fit.clear
    assert 10 < fit.memory < 40


def test_noise_alone_is_no_climb():
    """Of a hundred series, though the memory is chosen to make the drop large."""
    generator = np.random.default_rng(1)
    assert sum(climb(list(generator.standard_normal(60))).clear for _ in range(100)) <= 5


def test_a_loss_that_falls_with_age_is_no_climb():
    assert not climb(losses(100, -0.3, 20, noise=0.01)).clear


def test_a_straight_climb_is_bounded():
    assert climb([0.01 * age for age in range(100)]).bounded


def test_too_few_batches_are_refused():
    with pytest.raises(ValueError, match=f"expected at least {LEAST}"):
        climb([1.0] * (LEAST - 1))


def test_smoothing_keeps_the_length_and_the_mean_of_a_line():
    assert smoothed([1, 2, 3, 4, 5], 3) == pytest.approx([1.5, 2, 3, 4, 4.5])
