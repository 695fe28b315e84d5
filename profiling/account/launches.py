"""The launches of kernels, by correlation id, which several launches share in merged or long traces."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple


class Launch(NamedTuple):
    """A call of the runtime that puts something on the device; `kind` is "kernel", "graph" or "copy"."""

    start_ns: int
    end_ns: int
    thread: int
    process: Any
    kind: str


class DeviceWork(NamedTuple):
    """Work of a device before its launch is known; see `trace.Kernel`."""

    name: str
    start_ns: int
    end_ns: int
    stream: int
    device: int
    kind: str
    correlation: int
    external: int
    node: int | None


class Launches:
    """The launches of a trace by correlation id."""

    def __init__(self) -> None:
        self._by_id: dict[int, list[Launch]] = {}

    def add(self, correlation: int, launch: Launch) -> None:
        """Add a launch; a call within the last one of its id, or the same again, is that launch."""
        known = self._by_id.setdefault(correlation, [])
        last = known[-1] if known else None
        if not (last and last.thread == launch.thread and last.start_ns <= launch.start_ns <= last.end_ns):
            known.append(launch)

    def __contains__(self, correlation: int) -> bool:
        return correlation in self._by_id

    def __iter__(self) -> Iterator[tuple[int, Launch]]:
        return ((correlation, launch) for correlation, known in self._by_id.items() for launch in known)

    def pair(self, work: Sequence[DeviceWork]) -> list[Launch | None]:
        """The launch of each of `work`, None if the trace does not have it; in n log n.

        Of several of one id it is one of the process that launches on the same device, the last that began before and
        that no other work has taken; of a graph all its kernels take it.
        """
        found: list[Launch | None] = [None] * len(work)
        clashing: dict[int, list[int]] = defaultdict(list)
        votes: dict[int, Counter[Any]] = defaultdict(Counter)
        for i, one in enumerate(work):
            known = self._by_id.get(one.correlation, ())
            if len(known) > 1:
                clashing[one.correlation].append(i)
            elif known:
                found[i] = known[0]
                votes[one.device][known[0].process] += 1
        owners = {device: processes.most_common(1)[0][0] for device, processes in votes.items()}
        for correlation, indices in clashing.items():
            known = sorted(self._by_id[correlation], key=lambda launch: launch.start_ns)
            processes = {launch.process for launch in known}
            of_owner: dict[Any, list[int]] = defaultdict(list)
            for i in sorted(indices, key=lambda i: work[i].start_ns):
                owner = owners.get(work[i].device)
                of_owner[owner if owner in processes else None].append(i)
            for owner, theirs in of_owner.items():
                candidates = [launch for launch in known if owner is None or launch.process == owner]
                for i, launch in zip(theirs, _latest(candidates, [work[i].start_ns for i in theirs]), strict=True):
                    found[i] = launch
        return found


def _latest(launches: list[Launch], starts: list[int]) -> Iterator[Launch]:
    """The last untaken launch before each of `starts`, which rise like `launches`."""
    waiting: list[Launch] = []
    following, latest = 0, launches[0]
    for start in starts:
        while following < len(launches) and launches[following].start_ns <= start:
            waiting.append(launches[following])
            following += 1
        if waiting:
            latest = waiting[-1] if waiting[-1].kind == "graph" else waiting.pop()
        yield latest
