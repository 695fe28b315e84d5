from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiling.account.host_calls import DEEPEST, HostCalls, Scope


def calls_of(*rows: tuple) -> HostCalls:
    """Calls from (start, end, name, dims if any), on thread 0."""
    calls = HostCalls()
    for number, (start, end, name, *dims) in enumerate(rows):
        calls.add(0, start, end, name, *(dims or [""]), 100 + number)
    return calls


def test_scope_encloses_a_time():
    calls = calls_of((0, 100, "outer", "[[8]]"), (10, 20, "first"), (10, 18, "leaf", "[[4]]"), (30, 40, "next"))
    at = {0: ["outer"], 9: ["outer"], 10: ["outer", "first", "leaf"], 18: ["outer", "first"], 20: ["outer"]}
    at |= {35: ["outer", "next"], 100: []}
    dims = {10: "[[4]]", 100: ""}
    found = list(calls.scopes(0, list(at)))
    assert found == [Scope(tuple(ops), dims.get(time, "[[8]]")) for time, ops in at.items()]
    assert found[0] is found[1]  # equal scopes are one object
    assert list(calls.scopes(3, [5])) == [Scope()]  # of a thread without operations
    assert calls.externals_among({101, 7}) == {101}


def test_overlap_without_enclosing_is_no_scope():
    calls = calls_of((0, 10, "a"), (5, 20, "b"))
    assert [scope.ops for scope in calls.scopes(0, [7, 15])] == [("a", "b"), ("b",)]


def test_scope_has_the_outermost_and_the_innermost_of_very_many():
    """A scope that kept all of them would make the cost quadratic."""
    many = 5_000
    calls = calls_of(*((i, 3 * many - i, f"op {i}", "[[1]]" if i == 0 else "") for i in range(many)))
    (deepest,) = calls.scopes(0, [many])
    assert deepest == Scope(tuple(f"op {i}" for i in [*range(DEEPEST), *range(many - DEEPEST, many)]), "[[1]]")
    (half,) = calls.scopes(0, [3 * many - many // 2])  # the inner half has ended
    assert half.ops[-1] == f"op {many // 2 - 1}"
    pieces = list(calls.pieces())
    assert len(pieces) == 2 * many - 1
    assert max(len(piece.scope.ops) for piece in pieces) == 2 * DEEPEST


NESTED = [(0, 100, "outer"), (10, 30, "inner"), (12, 15, "leaf"), (30, 40, "next")]
OF_NESTED = [
    (0, 10, "outer"),
    (10, 12, "inner"),
    (12, 15, "leaf"),
    (15, 30, "inner"),
    (30, 40, "next"),
    (40, 100, "outer"),
]
PIECES = {
    "less_what_is_inside": (NESTED, OF_NESTED),
    "overlap_without_nesting": ([(0, 10, "a"), (5, 15, "b")], [(0, 5, "a"), (5, 15, "b")]),
    "no_duration": ([(3, 3, "a"), (3, 8, "b")], [(3, 8, "b")]),
    "before_zero": ([(-9, -4, "a")], [(-9, -4, "a")]),
    "time_between_is_nobodys": ([(0, 4, "a"), (9, 12, "b")], [(0, 4, "a"), (9, 12, "b")]),
    "inside_is_what_came_later": ([(0, 4, "a"), (0, 4, "b")], [(0, 4, "b")]),
}


@pytest.mark.parametrize(("rows", "expected"), PIECES.values(), ids=PIECES)
def test_pieces_are_the_time_of_the_innermost_operation(rows, expected):
    calls = calls_of(*rows)
    calls.add(1, 5, 8, "elsewhere", "", -1)
    pieces = list(calls.pieces())
    assert [(p.start_ns, p.end_ns, p.scope.ops[-1]) for p in pieces] == [*expected, (5, 8, "elsewhere")]
    assert [p.thread for p in pieces] == [0] * len(expected) + [1]
    assert len({p.number for p in pieces}) == len({p.scope.ops[-1] for p in pieces})  # one number an operation


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)), max_size=12))
def test_pieces_paint_the_union_once(intervals):
    """Each unit of time in any operation is in one piece, and none outside."""
    calls = calls_of(*((start, start + length, str(i)) for i, (start, length) in enumerate(intervals)))
    painted = Counter(t for piece in calls.pieces() for t in range(piece.start_ns, piece.end_ns))
    assert painted == Counter({t for start, length in intervals for t in range(start, start + length)})
