import pytest

from profiling.account.attribution import CAUSES
from profiling.account.terms import NAMES, NECESSARY, UNEXPLAINED, Term
from profiling.report.sentences import FUSED_NEXT, NEXT, NEXT_IDLE, assumption, headline, sentences

S = 10**9
FIXED = (*NECESSARY, *UNEXPLAINED)
TEN = {"ideal": 4 * S, "batch norm": 3 * S, "idle": 2 * S, "residual": 1 * S}


def plain(lines: list[str]) -> list[str]:
    return [line.replace("\xa0", " ") for line in lines]


def said(whole, on_gpu=True, ops="reference", dtype="float16", threads=2, **ns) -> list[str]:
    """The headline and the sentences of a run whose training has these terms, in nanoseconds; TEN if none is given."""
    terms = [Term(key, n, "measured", "made up") for key, n in (ns or TEN).items()]
    whole["terms"] = [term.to_json(sum(t.ns for t in terms)) for term in terms]
    whole["run"] |= {"on_gpu": on_gpu, "ops": ops, "dtype": dtype, "batch_size": 512}
    whole["environment"] |= {"cores": 2, "threads": threads}
    return plain([headline(whole), *sentences(whole)])


def test_the_largest_costs_come_first_each_with_a_remedy(whole):
    told = said(whole)
    assert told == [
        "10.0 s of training, of which the arithmetic needs 4.00 s at the data sheet's peak; the largest cost is "
        "batch norm, 3.00 s.",
        "Batch norm: 3.00 s, 30.0 % of training; without that training takes 7 s, 1.43 times as fast. "
        f"Next: {NEXT['batch norm']}.",
        f"Idle: 2.00 s, 20.0 % of training; without that training takes 8 s, 1.25 times as fast. Next: {NEXT['idle']}.",
        "A step took 20.00 ms in the median; nine in ten took 20 to 20 ms.",
        "Outside training the process spent 1.98 s (49.5 % of its wall clock), most of it in set-up (1.00 s).",
        "At this device's ceilings training could not take less than 10.6 ms with eager kernels, 5.52 ms with this "
        "project's fused ones.",
        "1.00 s (10.0 %) of training remain unexplained.",
    ]
    assert plain([assumption(whole)]) == [
        "Assumed: operations take as long in the run as in the profiled pass. A profiled step took 1.05 times as long "
        "as one that was not."
    ]


def test_a_term_above_its_floor_is_said_to_be_more_than_its_bytes_need(whole):
    text = ", 497 ms of it more than its bytes need"
    (line,) = (line for line in plain(whole["sentences"]) if line.startswith("Batch norm: "))
    assert f"24.8 % of training{text}; without that" in line
    whole["terms"] = [term for term in whole["terms"] if term["key"] in ("ideal", "batch norm")]
    assert plain([headline(whole)])[0].endswith(f"batch norm, 500 ms{text}.")


def test_every_recoverable_term_has_advice_without_markup(whole):
    """A command stands as it is typed: the page and the terminal show a back tick, and report.md one behind a slash."""
    assert set(NAMES) - set(NEXT) == set(FIXED)
    assert set(NEXT_IDLE) == set(CAUSES)
    every = (*NEXT.values(), *FUSED_NEXT.values(), *NEXT_IDLE.values())
    assert not [words for words in every if "`" in words or "*" in words]
    assert f"Next: {FUSED_NEXT['batch norm']}." in said(whole, ops="fused")[1]


def test_advice_for_idle_time_is_of_its_largest_part(whole):
    idle = next(term for term in whole["terms"] if term["key"] == "idle")
    for cause in CAUSES:
        idle["parts"] = [{"name": name, "ns": 1 + (name == cause)} for name in CAUSES]
        (line,) = (line for line in plain(sentences(whole)) if line.startswith("Idle"))
        assert f"for the largest part, {cause} (2 ns), {NEXT_IDLE[cause]}." in line


@pytest.mark.parametrize(
    ("key", "changes", "action"),
    [
        ("batch norm", {"threads": 1}, "OMP_NUM_THREADS=2: the run had 1 of 2 cores"),
        ("conv_inefficiency", {"threads": 1}, "OMP_NUM_THREADS=2"),
        ("batch norm", {"dtype": "bfloat16"}, "--set batch_size=256, so that more of a layer stays in the cache"),
        ("memory-bound", {"dtype": "float32"}, "--set dtype=bfloat16"),
        ("idle", {}, "--set batch_size=1024"),
        ("augmentation and data", {}, "--set preprocess=on_device"),
    ],
)
def test_advice_for_a_cpu_is_something_to_do(whole, key, changes, action):
    assert f"Next: {action}" in said(whole, on_gpu=False, **changes, **{"ideal": 4 * S, key: 6 * S})[1]


def test_the_same_advice_is_given_once(whole):
    told = said(whole, on_gpu=False, **{"ideal": 4 * S, "batch norm": 3 * S, "memory-bound": 3 * S})
    assert " ".join(told).count("Next: ") == 1


def test_a_negative_term_is_spoken_of_unless_it_is_doubted_already(whole):
    ns = {"ideal": 8 * S, "idle": -2 * S, "residual": S}
    said(whole, **ns)
    assert any(line.startswith("Idle is \N{MINUS SIGN}2.00 s: ") for line in said(whole, **ns))
    whole["doubts"] = ["Idle is -2 s, -28.6% of training."]
    assert not any(line.startswith("Idle is") for line in said(whole, **ns))


def test_unknown_values_have_no_sentence(bare, whole):
    assert said(whole, residual=0) == [
        "No training was recorded.",
        "No training was recorded, so there is nothing to account for.",
    ]
    assert plain([bare["headline"], *bare["sentences"], bare["assumption"]]) == [
        "2.02 s of training.",
        "Assumed: operations take as long in the run as in the profiled pass.",
    ]
