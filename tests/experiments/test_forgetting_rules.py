import json
import math

import numpy as np
import pytest

from experiments import forgetting_rules
from experiments.forgetting_rules import GUESSING, LEAST, Evidence, Limits, climb, curve, limits, smoothed
from model.errors import UsageError

RATES = [2.0**i for i in range(-3, 5)]
LEARNED_NOTHING = limits(10, RATES, [2.3] * 8)


def test_limits_are_where_a_tenth_and_half_of_what_was_learned_are_given_back():
    """Linear in the rate's logarithm: from 0.3 to guessing, ten equal probabilities, over one doubling."""
    assert pytest.approx(-math.log(0.1)) == GUESSING
    found = limits(100, RATES, [0.6, 0.3, GUESSING, *[None] * 5])
    assert (found.best_rate, found.best_loss) == (0.25, 0.3)
    assert (found.rises, found.blows_up) == pytest.approx((0.25 * 2**0.1, 0.25 * 2**0.5))
    dip = limits(1, RATES, [0.5, 0.4, 0.3, 1.0, 0.5, 0.4, 0.4, None])  # after the rise, which it does not move
    assert 0.5 < dip.rises < 1
    with pytest.raises(ValueError, match="no run on 100 images has a loss"):
        limits(100, RATES, [None] * 8)


@pytest.mark.parametrize(
    ("losses", "rises", "blows_up"),
    [
        ([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], False, False),
        ([0.3] * 6 + [0.9, 1.0], True, False),
        ([0.3] * 7 + [None], True, True),
        ([2.3] * 8, False, False),
    ],
    ids=["falls_to_the_end", "rises_only", "not_finite", "learned_nothing"],
)
def test_a_limit_that_is_not_reached_is_none(losses, rises, blows_up):
    found = limits(100, RATES, losses)
    assert (found.rises is not None, found.blows_up is not None) == (rises, blows_up)
    assert found == limits(100, RATES, [1e30 if loss is None else loss for loss in losses])  # huge is not finite


def curves(bests: list[int], cliffs: list[int], rise: float = 0.3) -> list[Limits]:
    """Curves of sizes that double: lowest at RATES[best], rising by `rise` a rate, blown up from RATES[cliff] on."""
    made = []
    for i, (best, cliff) in enumerate(zip(bests, cliffs, strict=True)):
        losses = [0.5 + (0.3 * (best - n) if n < best else rise * (n - best)) for n in range(8)]
        made.append(limits(1000 * 2**i, RATES, [None if n >= cliff else loss for n, loss in enumerate(losses)]))
    return made


@pytest.mark.parametrize(
    ("found", "which", "expected"),
    [
        (curves([6, 4, 3, 2], [7] * 4), 0, "times earlier: the mark of forgetting"),
        (curves([3, 3, 3, 3], [7] * 4), 0, "no difference that these rates can tell"),
        (curves([2, 3, 4, 5], [7] * 4), 0, "later with more images, the opposite"),
        (curves([7, 7], [9, 9]), 0, "Fewer than two curves start to rise"),
        (curves([3, 3, 3], [7] * 3, 0.05), 1, "All 3 curves blow up together"),
        (curves([3, 3, 3], [7] * 3, 0.05), 1, "as the article saw about 8 (quoted)"),
        (curves([0, 0, 0], [2] * 3, 0.05), 1, "where the article saw about 8"),
        (curves([1, 1, 1], [7, 5, 3], 0.05), 1, "do not blow up together"),
        ([LEARNED_NOTHING, *curves([3], [7])], 1, "Fewer than two curves learned"),
        (curves([3, 3, 3], [7, 7, 9], 0.05), 1, "on 4,000 images none did"),
        ([LEARNED_NOTHING, *curves([3, 3], [7, 7])], -1, "On 10 images no rate learned anything to give back"),
    ],
)
def test_sentences_follow_the_data(found, which, expected):
    assert expected in forgetting_rules.sentences(found)[which]


def test_one_curve_has_no_limit_in_common_and_nothing_learned_is_all_that_is_said():
    assert forgetting_rules.curvature_limit(curves([3], [7])) is None
    assert len(forgetting_rules.sentences([LEARNED_NOTHING])) == 1


def test_evidence_is_that_of_the_largest_set_and_of_all_curves(tmp_path):
    rows = [Limits(10, 1, 0.5, 4.0, 8.0)._asdict(), Limits(20, 1, 0.5, 2.0, 8.0)._asdict()]
    result = {"limits": rows, "base_rate": 0.1, "recipe": {"batch_size": 128}}
    (tmp_path / "forgetting.json").write_text(json.dumps({"result": result, "settings": {"small": False}}))
    found = forgetting_rules.read_evidence(tmp_path)
    assert (found.images, found.batch) == (20, 128)
    assert (found.forgetting, found.curvature) == pytest.approx((0.2, 0.8))


def test_linear_scaling_leaves_forgetting_alone_and_approaches_curvature():
    """The article's argument: 128 and 512 at the same rate for an image."""
    found = Evidence({}, 50_000, 128, 0.2, 0.8, False)
    assert found.headroom(128, 0.1) == pytest.approx((2, 8))
    assert found.headroom(512, 0.4) == pytest.approx((2, 2))
    assert Evidence({}, 1, 128, None, None, False).headroom(1, 1) == (None, None)


@pytest.mark.parametrize("text", [None, "{}", "[]", "not json"], ids=["absent", "empty", "list", "torn"])
def test_a_folder_without_evidence_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "forgetting.json").write_text(text)
    with pytest.raises(UsageError, match="has no finished forgetting"):
        forgetting_rules.read_evidence(tmp_path)


def losses(drop: float, memory: float, noise: float = 0.0) -> list[float]:
    age = np.arange(1, 101)
    return list(1 - drop * np.exp(-age / memory) + noise * np.random.default_rng(0).standard_normal(100))


@pytest.mark.parametrize("memory", [3, 20, 60])
def test_a_climb_is_found(memory):
    fit = climb(losses(0.3, memory))
    assert fit.clear
    assert (fit.memory, fit.drop) == pytest.approx((memory, 0.3), rel=0.1)
    assert fit.plateau == pytest.approx(1, rel=0.05)
    assert curve(fit, [1, 50]) == pytest.approx([losses(0.3, memory)[i] for i in (0, 49)], abs=0.01)


def test_a_climb_is_told_from_noise_and_from_a_fall():
    noisy = climb(losses(0.3, 20, noise=0.08))
    assert noisy.clear
    assert 10 < noisy.memory < 40
    generator = np.random.default_rng(1)  # of noise alone, though the memory is chosen to make the drop large
    assert sum(climb(list(generator.standard_normal(60))).clear for _ in range(100)) <= 5
    assert not climb(losses(-0.3, 20, noise=0.01)).clear
    assert climb([0.01 * age for age in range(100)]).bounded
    with pytest.raises(ValueError, match=f"expected at least {LEAST}"):
        climb([1.0] * (LEAST - 1))


def test_smoothing_keeps_the_length_and_the_mean_of_a_line():
    assert smoothed([1, 2, 3, 4, 5], 3) == pytest.approx([1.5, 2, 3, 4, 4.5])
