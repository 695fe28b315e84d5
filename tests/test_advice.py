import pytest
import report_sample

from profiling.account import NAMES
from profiling.advice import NEXT, NEXT_IDLE, assumption, headline, sentences
from profiling.attribution import CAUSES

S = 10**9


def report(**ns) -> dict:
    """Ten seconds of training, or what `ns` says, on a GPU."""
    ns = ns or {"ideal": 4 * S, "batch norm": 3 * S, "idle": 2 * S, "residual": 1 * S}
    made = report_sample.gpu()
    made["run"]["on_gpu"] = True
    made["terms"] = [
        {"key": key, "name": NAMES[key], "ns": n, "recoverable_ns": 0 if key == "ideal" else max(n, 0), "what_if": ""}
        for key, n in ns.items()
    ]
    return made


def test_the_headline_has_the_total_the_ideal_and_the_largest_loss():
    text = headline(report())
    assert "10 s" in text
    assert "4 s at the data sheet's peak" in text
    assert "batch norm and fused epilogues, 3 s" in text


def test_the_largest_losses_come_first_each_with_what_to_do():
    said = sentences(report())
    assert said[0].startswith("Batch norm")
    assert NEXT["batch norm"] in said[0]
    assert said[1].startswith("Idle")
    assert any("remain unexplained" in line for line in said)


@pytest.mark.parametrize("cause", CAUSES)
def test_the_advice_for_idle_time_is_of_its_largest_part(cause):
    made = report()
    idle = next(term for term in made["terms"] if term["key"] == "idle")
    idle["parts"] = [{"name": name, "ns": 1 + (name == cause)} for name in CAUSES]
    (said,) = (line for line in sentences(made) if line.startswith("Idle"))
    assert f"for the largest part, {cause} (2e-09 s), {NEXT_IDLE[cause]}." in said


def test_a_negative_term_is_spoken_of():
    assert any("negative" in line for line in sentences(report(**{"ideal": 8 * S, "idle": -2 * S, "residual": S})))


@pytest.mark.parametrize("sample", ["gpu", "cpu", "no_training"])
def test_nothing_is_said_of_what_is_not_known(sample):
    made = report(residual=0) if sample == "no_training" else getattr(report_sample, sample)()
    made["figures"].setdefault("perturbation", {"value": None})
    text = " ".join([headline(made), *sentences(made), assumption(made)])
    assert "None" not in text
    assert "nan" not in text.lower().split()


def test_every_term_that_can_be_won_back_has_advice():
    assert set(NAMES) - set(NEXT) == {"ideal", "validation"}
