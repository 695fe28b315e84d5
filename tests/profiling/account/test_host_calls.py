from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiling.account.host_calls import DEEPEST, HostCalls, Scope


def calls_of(*rows: tuple) -> HostCalls:
    """Of (start, end, name, dims), on thread 0."""
    calls = HostCalls()
    for number, (start, end, name, dims) in enumerate(rows):
        calls.add(0, start, end, name, dims, 100 + number)
    return calls


def test_scope_is_what_encloses_a_time():
    calls = calls_of((0, 100, "outer", "[[8]]"), (10, 20, "first", ""), (10, 18, "leaf", "[[4]]"), (30, 40, "next", ""))
    times = [0, 9, 10, 18, 20, 35, 100]
    assert list(calls.scopes(0, times)) == [
        Scope(("outer",), "[[8]]"),
        Scope(("outer",), "[[8]]"),
        Scope(("outer", "first", "leaf"), "[[4]]"),
        Scope(("outer", "first"), "[[8]]"),
        Scope(("outer",), "[[8]]"),
        Scope(("outer", "next"), "[[8]]"),
        Scope((), ""),
    ]


def test_scope_does_not_hold_what_overlaps_without_enclosing():
    calls = calls_of((0, 10, "a", ""), (5, 20, "b", ""))
    assert [scope.ops for scope in calls.scopes(0, [7, 15])] == [("a", "b"), ("b",)]


def test_of_very_many_nested_operations_a_scope_has_the_outermost_and_the_innermost():
    """What kept all of them in the scope of each would go with the square of their number."""
    many = 5_000
    calls = calls_of(*((i, 3 * many - i, f"op {i}", "[[1]]" if i == 0 else "") for i in range(many)))
    (deepest,) = calls.scopes(0, [many])
    wanted = [*range(DEEPEST), *range(many - DEEPEST, many)]
    assert deepest == Scope(tuple(f"op {i}" for i in wanted), "[[1]]")
    (half,) = calls.scopes(0, [3 * many - many // 2])  # the inner half has ended
    assert half.ops[-1] == f"op {many // 2 - 1}"
    pieces = list(calls.pieces())
    assert len(pieces) == 2 * many - 1
    assert max(len(piece.scope.ops) for piece in pieces) == 2 * DEEPEST


def test_thread_without_operations_has_no_scopes():
    assert list(calls_of((0, 9, "a", "")).scopes(3, [5])) == [Scope()]


def test_equal_scopes_are_one_object():
    calls = calls_of((0, 10, "a", "[[1]]"), (20, 30, "a", "[[1]]"))
    first, second = calls.scopes(0, [5, 25])
    assert first is second


def test_pieces_are_the_time_that_is_not_of_an_operation_inside():
    calls = calls_of((0, 100, "outer", ""), (10, 30, "inner", ""), (12, 15, "leaf", ""), (30, 40, "next", ""))
    calls.add(1, 5, 8, "elsewhere", "", -1)
    pieces = [(p.start_ns, p.end_ns, p.thread, p.scope.ops[-1]) for p in calls.pieces()]
    assert pieces == [
        (0, 10, 0, "outer"),
        (10, 12, 0, "inner"),
        (12, 15, 0, "leaf"),
        (15, 30, 0, "inner"),
        (30, 40, 0, "next"),
        (40, 100, 0, "outer"),
        (5, 8, 1, "elsewhere"),
    ]
    numbers = Counter(p.number for p in calls.pieces())
    assert sorted(numbers.values()) == [1, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("rows", "pieces"),
    [
        pytest.param([(0, 10, "a", ""), (5, 15, "b", "")], [(0, 5, "a"), (5, 15, "b")], id="overlap_without_nesting"),
        pytest.param([(3, 3, "a", ""), (3, 8, "b", "")], [(3, 8, "b")], id="no_duration"),
        pytest.param([(-9, -4, "a", "")], [(-9, -4, "a")], id="before_zero"),
        pytest.param([(0, 4, "a", ""), (9, 12, "b", "")], [(0, 4, "a"), (9, 12, "b")], id="time_between_is_nobodys"),
        pytest.param([(0, 4, "a", ""), (0, 4, "b", "")], [(0, 4, "b")], id="inside_is_what_came_later"),
    ],
)
def test_pieces_of_odd_operations(rows, pieces):
    assert [(p.start_ns, p.end_ns, p.scope.ops[-1]) for p in calls_of(*rows).pieces()] == pieces


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 15)), max_size=12))
def test_pieces_paint_the_union_once(intervals):
    """Whatever the operations: each unit of time in any is in one piece, and none outside."""
    calls = calls_of(*((start, start + length, str(i), "") for i, (start, length) in enumerate(intervals)))
    painted = Counter(t for piece in calls.pieces() for t in range(piece.start_ns, piece.end_ns))
    union = {t for start, length in intervals for t in range(start, start + length)}
    assert painted == Counter(union)


def test_external_ids_are_found():
    assert calls_of((0, 1, "a", ""), (2, 3, "b", "")).externals_among({101, 7}) == {101}
