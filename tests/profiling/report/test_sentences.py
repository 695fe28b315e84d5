import pytest
import report_sample

from profiling.account.attribution import CAUSES
from profiling.account.terms import NAMES, NECESSARY, UNEXPLAINED
from profiling.report.sentences import FUSED_NEXT, NEXT, NEXT_IDLE, assumption, headline, sentences

S = 10**9
FIXED = (*NECESSARY, *UNEXPLAINED)


def report(**ns) -> dict:
    """Ten seconds of training, or what `ns` says, on a GPU."""
    ns = ns or {"ideal": 4 * S, "batch norm": 3 * S, "idle": 2 * S, "residual": 1 * S}
    made = report_sample.gpu()
    made["run"]["on_gpu"] = True
    made["terms"] = [
        {"key": key, "name": NAMES[key], "ns": n, "recoverable_ns": 0 if key in FIXED else max(n, 0), "what_if": ""}
        for key, n in ns.items()
    ]
    return made


def test_the_headline_has_the_total_the_ideal_and_the_largest_cost():
    assert headline(report()) == (
        "10 s of training, of which the arithmetic needs 4 s at the data sheet's peak; the largest cost is "
        "batch norm, 3 s."
    )


def test_what_can_be_won_back_is_said_beside_what_it_costs():
    made = report()
    made["terms"][1] |= {"recoverable_ns": int(2.5 * S), "what_if": "training takes 7.5 s, 1.33 times as fast"}
    assert headline(made).endswith("the largest cost is batch norm, 3 s, 2.5 s of it more than its bytes need.")
    assert "; without that training takes 7.5 s, 1.33 times as fast. Next: " in sentences(made)[0]


def test_the_largest_costs_come_first_each_with_what_to_do():
    said = sentences(report())
    assert said[0].startswith("Batch norm")
    assert FUSED_NEXT["batch norm"] in said[0]
    other = report()
    other["run"]["ops"] = "batchnorm"
    assert NEXT["batch norm"] in sentences(other)[0]
    assert said[1].startswith("Idle")
    assert any("remain unexplained" in line for line in said)


@pytest.mark.parametrize("cause", CAUSES)
def test_the_advice_for_idle_time_is_of_its_largest_part(cause):
    made = report()
    idle = next(term for term in made["terms"] if term["key"] == "idle")
    idle["parts"] = [{"name": name, "ns": 1 + (name == cause)} for name in CAUSES]
    (said,) = (line for line in sentences(made) if line.startswith("Idle"))
    assert f"for the largest part, {cause} (2e-09 s), {NEXT_IDLE[cause]}." in said


def test_no_sentence_has_markup_which_markdown_would_escape():
    """A command stands as it is typed: the page and the terminal show a back tick, and report.md one behind a slash."""
    assert not [
        words for words in (*NEXT.values(), *FUSED_NEXT.values(), *NEXT_IDLE.values()) if "`" in words or "*" in words
    ]


def test_a_negative_term_is_spoken_of():
    said = sentences(report(**{"ideal": 8 * S, "idle": -2 * S, "residual": S}))
    assert any(line.startswith("Idle is -2 s: ") for line in said)


@pytest.mark.parametrize(
    ("key", "change", "action"),
    [
        ("batch norm", {"threads": 1}, "OMP_NUM_THREADS=2: the run had 1 of 2 cores"),
        ("batch norm", {}, "--set batch_size=256, so that more of a layer stays in the cache"),
        ("memory-bound", {"dtype": "float32"}, "--set dtype=bfloat16"),
        ("conv_inefficiency", {"threads": 1}, "OMP_NUM_THREADS=2"),
        ("idle", {}, "--set batch_size=1024"),
        ("augmentation and data", {}, "--set preprocess=on_device"),
    ],
)
def test_advice_for_a_cpu_is_something_to_do(key, change, action):
    made = report(**{"ideal": 4 * S, key: 6 * S})
    made["run"] |= {"on_gpu": False, "dtype": change.get("dtype", "bfloat16")}
    made["environment"] |= {"cores": 2, "threads": change.get("threads", 2)}
    assert f"Next: {action}" in sentences(made)[0]


def test_the_same_advice_is_given_once():
    made = report(**{"ideal": 4 * S, "batch norm": 3 * S, "memory-bound": 3 * S})
    made["run"]["on_gpu"] = False
    assert " ".join(sentences(made)).count("Next: ") == 1


def test_how_far_steps_lie_apart_is_said_beside_their_median():
    assert any(
        line == "A step took 2.84 ms in the median; nine in ten took 2.81 to 2.93 ms." for line in sentences(report())
    )


@pytest.mark.parametrize("sample", ["gpu", "cpu", "no_training"])
def test_nothing_is_said_of_what_is_not_known(sample):
    made = report(residual=0) if sample == "no_training" else getattr(report_sample, sample)()
    made["figures"].setdefault("perturbation", {"value": None})
    text = " ".join([headline(made), *sentences(made), assumption(made)])
    assert "None" not in text
    assert "nan" not in text.lower().split()


def test_every_term_that_can_be_won_back_has_advice():
    assert set(NAMES) - set(NEXT) == set(FIXED)
