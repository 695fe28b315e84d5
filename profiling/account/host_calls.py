"""The host's operations and annotations by thread, which lie inside of one another."""

import functools
import itertools
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

DEEPEST = 64
"""Nested operations kept from the outside, and as many from the inside; PyTorch nests some thirty."""


class Scope(NamedTuple):
    """Nested operations: their names, the outermost first, and the dims of the innermost one that has any."""

    ops: tuple[str, ...] = ()
    dims: str = ""


class Piece(NamedTuple):
    """A stretch of time in which one operation was the innermost of its thread; all its pieces have its number."""

    start_ns: int
    end_ns: int
    thread: int
    number: int
    scope: Scope


class HostCalls:
    """Operations of a trace's threads. They are kept in columns of integers: a trace may have millions of them."""

    def __init__(self) -> None:
        self._threads: list[_Thread] = []
        self._texts, self._numbers = [""], {"": 0}
        self._scopes: dict[Scope, Scope] = {}

    def add(
        self, thread: int, start_ns: int, end_ns: int, name: str, dims: str, external: int, annotation: bool = False
    ) -> None:
        """An operation, or an annotation of the program's.

        `dims` is "" if its inputs have no extents, `external` its External id, -1 if it has none.
        """
        while thread >= len(self._threads):
            self._threads.append(_Thread())
        calls = self._threads[thread]
        calls.start.append(start_ns)
        calls.end.append(end_ns)
        calls.external.append(external)
        calls.annotation.append(annotation)
        calls.name.append(self._number(name))
        calls.dims.append(self._number(dims))

    def _number(self, text: str) -> int:
        number = self._numbers.setdefault(text, len(self._texts))
        if number == len(self._texts):
            self._texts.append(text)
        return number

    def _scope(self, calls: "_Thread", stack: Sequence[int]) -> Scope:
        stack = stack if len(stack) <= 2 * DEEPEST else [*stack[:DEEPEST], *stack[-DEEPEST:]]
        dims = next((calls.dims[i] for i in reversed(stack) if calls.dims[i]), 0)
        scope = Scope(tuple(self._texts[calls.name[i]] for i in stack), self._texts[dims])
        return self._scopes.setdefault(scope, scope)

    def externals_among(self, ids: set[int]) -> set[int]:
        """The subset of `ids` that are an operation's External id."""
        return {i for calls in self._threads for i in calls.external if i in ids}

    def within(self, wanted: Callable[[str, bool], bool]) -> list[tuple[int, int]]:
        """Disjoint intervals in which any thread was inside of what is `wanted(name, whether an annotation)`."""
        keep = functools.cache(lambda name, annotation: wanted(self._texts[name], bool(annotation)))
        found: list[tuple[int, int]] = []
        for calls in self._threads:
            rows = zip(calls.start, calls.end, calls.name, calls.annotation, strict=True)
            found += union((start, end) for start, end, name, annotation in rows if keep(name, annotation))
        return union(found)

    def scopes(self, thread: int, times: Sequence[int]) -> Iterator[Scope]:
        """The scope of `thread` at each of `times`, which rise."""
        calls = self._threads[thread] if thread < len(self._threads) else _Thread()
        order, following, stack = calls.outermost_first(), 0, []
        for time in times:
            while following < len(order) and calls.start[order[following]] <= time:
                calls.drop_ended(stack, calls.start[order[following]])
                stack.append(order[following])
                following += 1
            calls.drop_ended(stack, time)
            yield self._scope(calls, calls.running(stack, time))

    def pieces(self) -> Iterator[Piece]:
        """Each thread's time in operations, cut where the innermost changes; the later of two that overlap has it."""
        before = 0
        for thread, calls in enumerate(self._threads):
            stack: list[int] = []
            done = 0
            for i in [*calls.outermost_first(), None]:
                until = sys.maxsize if i is None else calls.start[i]
                while stack:
                    end = min(calls.end[stack[-1]], until)
                    if end > done:
                        yield Piece(done, end, thread, before + stack[-1], self._scope(calls, stack))
                        done = end
                    if calls.end[stack[-1]] > until:
                        break
                    stack.pop()
                if i is not None:
                    stack.append(i)
                    done = until
            before += len(calls.start)


def union(intervals: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint intervals, by their start, that cover what `intervals` cover."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


class _Thread:
    def __init__(self) -> None:
        self.start, self.end, self.external = array("q"), array("q"), array("q")
        self.name, self.dims, self.annotation = array("q"), array("q"), array("b")

    def outermost_first(self) -> list[int]:
        return sorted(range(len(self.start)), key=lambda i: (self.start[i], -self.end[i]))

    def running(self, stack: list[int], time: int) -> list[int]:
        """The operations of `stack` that have not ended; of many the first and the last."""
        if len(stack) <= 2 * DEEPEST:
            return [i for i in stack if self.end[i] > time]
        ends = range(len(stack)), range(len(stack) - 1, -1, -1)
        kept = {n for end in ends for n in itertools.islice((n for n in end if self.end[stack[n]] > time), DEEPEST)}
        return [stack[n] for n in sorted(kept)]

    def drop_ended(self, stack: list[int], time: int) -> None:
        while stack and self.end[stack[-1]] <= time:
            stack.pop()
