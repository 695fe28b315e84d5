import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from modelled_steps import step

from profiling.account.terms import ARTICLE_S, Busy, Evidence, article_terms, levers, terms

FLOPS_PER_IMAGE = 2_756_474_880
S = 10**9
BUSY = Busy({"convolution": 4.0 * S, "batch norm": 2.0 * S, "unknown": 0.1 * S}, (0.3 * S, 0.1 * S, 0.1 * S), True)


def evidence(**changes) -> Evidence:
    """Ten seconds of training: 2 s of arithmetic at the peak, 2.5 s at the ceiling; no rows."""
    whole = {"training_ns": 10 * S, "steps_ns": 9 * S, "flops": 2 * 10**15, "rows": None, "steps": 100.0}
    return Evidence(**whole | {"peak": 1e15, "ceiling": 0.8e15, "bandwidth": 1e12, "busy": BUSY} | changes)


def by_key(found) -> dict[str, int]:
    return {t.key: t.ns for t in found}


NEEDED = {"ideal": 2 * S, "ceiling_gap": S // 2}
KERNELS = {"conv_inefficiency": 4 * S - 5 * S // 2, "batch norm": 2 * S, "unknown": S // 10}
ONE_IDEAL, ON_CPU = {"ideal": 5 * S // 2}, dataclasses.replace(BUSY, on_gpu=False)
NO_GAPS = Busy({"convolution": 4.0 * S}, None, True)
WHOLE = NEEDED | KERNELS | {"idle": 29 * S // 10, "residual": S}
UNATTRIBUTED = {"unattributed": 39 * S // 10}
KNOWN = {
    "all": ({}, WHOLE),
    "negative_idle_is_shown": ({"steps_ns": 6 * S}, WHOLE | {"idle": -S // 10, "residual": 4 * S}),
    "idle_of_a_cpu": (
        {"busy": ON_CPU, "peak": None},
        ONE_IDEAL | KERNELS | {"idle": S // 2, "residual": 34 * S // 10},
    ),
    "no_trace": ({"busy": None}, NEEDED | {"unattributed": 75 * S // 10}),
    "no_steps": ({"steps_ns": None}, NEEDED | KERNELS | UNATTRIBUTED),
    "trace_without_gaps": (
        {"busy": NO_GAPS},
        NEEDED | {"conv_inefficiency": 3 * S // 2, "unattributed": 6 * S},
    ),
    "nothing": (
        {"steps_ns": None, "flops": 0, "peak": None, "ceiling": None, "bandwidth": None, "busy": None},
        {"unattributed": 10 * S},
    ),
}


@pytest.mark.parametrize(("known", "expected"), KNOWN.values(), ids=KNOWN)
def test_terms_cover_only_known_quantities(known, expected):
    assert by_key(terms(evidence(**known))) == expected


def test_ideal_and_gap_are_one_without_a_data_sheet():
    ideal = terms(evidence(peak=None))[0]
    assert (ideal.key, ideal.ns) == ("ideal", 5 * S // 2)
    assert "measured ceiling" in ideal.name


def test_bytes_of_convolutions_are_a_term_of_their_own():
    rows = [r for r in step() if r.family == "fprop"]
    found = by_key(terms(evidence(rows=rows, ceiling=math.inf, peak=None)))
    assert found["conv_bytes"] == pytest.approx(1e9 * 100 * sum(r.bytes for r in rows) / 1e12, rel=1e-6)
    assert by_key(terms(evidence(rows=rows, ceiling=1e6, peak=None)))["conv_bytes"] == 0  # hidden by the arithmetic


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


def test_articles_column():
    found = article_terms(step(), 512, 125e12, 0.9e12, FLOPS_PER_IMAGE)
    seconds = {t.key: t.ns / 1e9 for t in found}
    assert sum(t.ns for t in found) == round(1e9 * ARTICLE_S)
    assert seconds["ideal"] == pytest.approx(38.6, abs=0.05)
    assert ARTICLE_S - seconds["validation"] - seconds["unattributed"] == pytest.approx(73.8, rel=0.01)
    assert {t.status for t in found} == {"modelled", "quoted"}
    assert pytest.approx(1 / 0.151, rel=0.003) == ARTICLE_S * 125e12 / (35 * 50_000 * FLOPS_PER_IMAGE)


def test_levers_multiply_to_the_speed_up():
    factors = levers(10**15, 20.0, 1e15, 35 * 50_000 * FLOPS_PER_IMAGE, 125e12)
    assert math.prod(f for _, f in factors) == pytest.approx(256 / 20)
    assert [name for name, _ in factors] == ["fewer FLOPs", "better use of the peak", "more peak"]


def test_gain_of_a_term_at_its_floor():
    term = next(t for t in terms(evidence()) if t.key == "batch norm")
    record = dataclasses.replace(term, floor_ns=S).to_json(10 * S)
    assert (record["recoverable_ns"], record["what_if"]) == (S, "training takes 9 s, 1.11 times as fast")
    for below in ({"floor_ns": 3 * S}, {"ns": -5}):
        assert dataclasses.replace(term, **below).to_json(10 * S)["recoverable_ns"] == 0


def test_only_time_above_a_floor_is_recoverable():
    found = {t.key: t for t in terms(evidence(rows=step(), steps=1.0))}
    passes = [r for r in step() if r.op in ("aten::native_batch_norm", "aten::native_batch_norm_backward")]
    assert found["batch norm"].floor_ns == round(sum(1e9 * r.bytes / 1e12 for r in passes)) > 0
    assert found["batch norm"].recoverable_ns == found["batch norm"].ns - found["batch norm"].floor_ns
    assert {k for k, t in found.items() if not t.recoverable_ns} == {"ideal", "ceiling_gap", "conv_bytes", "residual"}
    assert found["idle"].recoverable_ns == found["idle"].ns


def test_batch_norm_is_called_so_where_nothing_is_fused_behind_it():
    names = [next(t.name for t in terms(evidence(fused=f)) if t.key == "batch norm") for f in (False, True)]
    assert names == ["", "batch norm and fused epilogues"]
