import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelled_steps import step

from profiling.account.terms import ARTICLE_S, Busy, Evidence, article_terms, levers, terms

FLOPS_PER_IMAGE = 2_756_474_880
S = 10**9


def evidence(**changes) -> Evidence:
    """Ten seconds of training: 2 s of arithmetic at the peak, 2.5 s at the ceiling; no rows."""
    busy = Busy({"convolution": 4.0 * S, "batch norm": 2.0 * S, "unknown": 0.1 * S}, (0.3 * S, 0.1 * S, 0.1 * S), True)
    whole = {
        "training_ns": 10 * S,
        "steps_ns": 9 * S,
        "flops": 2 * 10**15,
        "rows": None,
        "steps": 100.0,
        "peak": 1e15,
        "ceiling": 0.8e15,
        "bandwidth": 1e12,
        "busy": busy,
    }
    return Evidence(**whole | changes)


def by_key(found) -> dict[str, int]:
    return {t.key: t.ns for t in found}


def test_each_term_is_what_it_says():
    assert by_key(terms(evidence())) == {
        "ideal": 2 * S,
        "ceiling_gap": S // 2,
        "conv_inefficiency": 4 * S - 5 * S // 2,
        "batch norm": 2 * S,
        "unknown": S // 10,
        "idle": 9 * S - 61 * S // 10,
        "residual": S,
    }


def test_bytes_of_convolutions_are_a_term_of_their_own():
    rows = [r for r in step() if r.family == "fprop"]
    found = by_key(terms(evidence(rows=rows, ceiling=math.inf, peak=None)))
    assert found["conv_bytes"] == pytest.approx(1e9 * 100 * sum(r.bytes for r in rows) / 1e12, rel=1e-6)
    slow_memory_hides_nothing = by_key(terms(evidence(rows=rows, ceiling=1e6, peak=None)))
    assert slow_memory_hides_nothing["conv_bytes"] == 0


@given(
    st.integers(0, 10**13), st.integers(0, 10**13), st.lists(st.floats(0, 1e13), min_size=3, max_size=3),
    st.sampled_from([None, 1e12]), st.sampled_from([None, 9e11]), st.booleans(), st.booleans(),
)  # fmt: skip
def test_terms_sum_to_the_phase_in_whole_nanoseconds(training, steps, ns, peak, ceiling, has_gaps, on_gpu):
    categories = dict(zip(("convolution", "batch norm", "communication"), ns, strict=True))
    busy = Busy(categories, (1.0, 2.0, 3.0) if has_gaps else None, on_gpu)
    found = terms(evidence(training_ns=training, steps_ns=steps, busy=busy, peak=peak, ceiling=ceiling))
    assert sum(t.ns for t in found) == training
    assert all(isinstance(t.ns, int) for t in found)
    assert all(sum(ns for _, ns in t.parts) == t.ns for t in found if t.parts)


def test_a_negative_term_is_shown():
    found = by_key(terms(evidence(steps_ns=6 * S)))
    assert found["idle"] == 6 * S - 61 * S // 10 < 0


def test_idle_on_a_cpu_is_what_the_pass_saw_between_operations():
    busy = dataclasses.replace(evidence().busy, on_gpu=False)
    found = by_key(terms(evidence(busy=busy, peak=None)))
    assert found["idle"] == S // 2
    assert found["residual"] == 10 * S - 61 * S // 10 - S // 2


def test_without_a_data_sheet_ideal_and_gap_are_one():
    found = terms(evidence(peak=None))
    assert found[0].key == "ideal"
    assert found[0].ns == 5 * S // 2
    assert "measured ceiling" in found[0].name
    assert "ceiling_gap" not in by_key(found)


@pytest.mark.parametrize(
    "missing",
    [{"busy": None}, {"steps_ns": None}, {"busy": Busy({"convolution": 4.0 * S}, None, True)}],
    ids=["no_trace", "no_steps", "trace_without_gaps"],
)
def test_what_was_not_seen_is_no_idle(missing):
    found = by_key(terms(evidence(**missing)))
    assert "idle" not in found
    assert "residual" not in found
    assert sum(found.values()) == 10 * S


def test_with_nothing_known_nothing_is_claimed():
    found = terms(Evidence(S, None, 0, None, 0.0, None, None, None, None))
    assert by_key(found) == {"unattributed": S}


def test_the_articles_column():
    found = article_terms(step(), 512, 125e12, 0.9e12, FLOPS_PER_IMAGE)
    seconds = {t.key: t.ns / 1e9 for t in found}
    assert sum(t.ns for t in found) == round(1e9 * ARTICLE_S)
    assert seconds["ideal"] == pytest.approx(38.6, abs=0.05)
    floor = sum(seconds.values()) - seconds["validation"] - seconds["unattributed"]
    assert floor == pytest.approx(73.8, rel=0.01)
    assert {t.status for t in found} == {"modelled", "quoted"}
    assert pytest.approx(1 / 0.151, rel=0.003) == ARTICLE_S * 125e12 / (35 * 50_000 * FLOPS_PER_IMAGE)


def test_rounded_flops_give_the_articles_own_number():
    assert pytest.approx(39.2) == 35 * 50_000 * 2.8e9 / 125e12


def test_the_levers_multiply_to_the_speed_up():
    factors = levers(10**15, 20.0, 1e15, 35 * 50_000 * FLOPS_PER_IMAGE, 125e12)
    assert math.prod(f for _, f in factors) == pytest.approx(256 / 20)
    assert [name for name, _ in factors] == ["fewer FLOPs", "better use of the peak", "more peak"]


def test_what_a_term_at_its_floor_would_give():
    term = next(t for t in terms(evidence()) if t.key == "batch norm")
    record = dataclasses.replace(term, floor_ns=S).to_json(10 * S)
    assert record["recoverable_ns"] == S
    assert record["what_if"] == "training takes 9 s, 1.11 times as fast"
    assert dataclasses.replace(term, floor_ns=3 * S).to_json(10 * S)["recoverable_ns"] == 0
    assert dataclasses.replace(term, ns=-5).to_json(10 * S)["recoverable_ns"] == 0


def test_only_what_is_above_a_floor_can_be_won_back():
    found = {t.key: t for t in terms(evidence(rows=step(), steps=1.0))}
    passes = [r for r in step() if r.op in ("aten::native_batch_norm", "aten::native_batch_norm_backward")]
    assert found["batch norm"].floor_ns == round(sum(1e9 * r.bytes / 1e12 for r in passes)) > 0
    assert found["batch norm"].recoverable_ns == found["batch norm"].ns - found["batch norm"].floor_ns
    assert {k for k, t in found.items() if not t.recoverable_ns} == {"ideal", "ceiling_gap", "conv_bytes", "residual"}
    assert found["idle"].recoverable_ns == found["idle"].ns


def test_batch_norm_is_called_so_where_nothing_is_fused_behind_it():
    names = [next(t.name for t in terms(evidence(fused=f)) if t.key == "batch norm") for f in (False, True)]
    assert names == ["", "batch norm and fused epilogues"]
