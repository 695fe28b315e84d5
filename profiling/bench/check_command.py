"""`python -m profiling bench --check`: what is said and kept of the checks, and the exit code."""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from profiling.output.errors import NoDeviceError

if TYPE_CHECKING:
    import torch

    from profiling.bench.case import Case
    from profiling.output.terminal import Terminal


class How(NamedTuple):
    """`jobs` processes at a time, one being this process itself, without a limit of time; `images` and `limit_s` are
    those of every check; `out` is a file to append rows to. None is the default of `profiling.bench.checks`, or no
    file."""

    jobs: int | None = None
    images: int | None = None
    limit_s: float | None = None
    out: Path | None = None


def run(chosen: Sequence["Case"], dtype: "torch.dtype", how: How, terminal: "Terminal") -> int:
    """Check every case; the exit code, 1 unless all were found right. A line and a row a check, at once.

    Raises NoDeviceError where the kernels cannot run; KeyboardInterrupt and SystemExit after the verdict on what there
    is; OSError where a row cannot be kept.
    """
    import torch

    from kernels import jit, tiles
    from profiling.bench import checks
    from profiling.output.files import append_jsonl

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    reason = jit.unavailable(device)
    if reason:
        raise NoDeviceError(f"--check runs the kernels: {reason}")
    images = checks.images_on(device) if how.images is None else (how.images,)
    known = {case.name: case for case in chosen}
    planned = checks.planned(chosen, images)
    found: collections.Counter[str] = collections.Counter()

    def report(row: dict[str, Any]) -> None:
        found[row["status"]] += 1
        if how.out is not None:
            append_jsonl(how.out, row)
        said = row["status"] if row["error"] is None else f"{row['status']}: {row['error']}"
        tile = f"  ({tiles.Tile(**row['tile'])})" if row["error"] and row["tile"] else ""
        terminal.say(f"{row['case']:<50} {row['batch']:>4} images  {said}{tile}")

    try:
        if how.jobs == 1:
            for row in checks.one_after_another(planned, known, device, dtype):
                report(row)
        else:
            name = str(dtype).removeprefix("torch.")
            limit_s = checks.LIMIT_S[device.type] if how.limit_s is None else how.limit_s

            def failure(one: checks.Check, status: str, error: str) -> dict[str, Any]:
                return checks.row(one, known, device, dtype, status, error)

            checks.Pool(checks.worker(name), how.jobs or checks.slots(device), limit_s, report, failure).run(planned)
    finally:
        words = ", ".join(f"{found[s]} {s}" for s in (checks.RIGHT, checks.WRONG, checks.FAILED, checks.UNKNOWN))
        begun = f"{found.total()} of {sum(map(len, planned))} checks"
        terminal.say(f"{begun} of {len(chosen)} cases on {device}: {words}")
    return 0 if found[checks.RIGHT] == sum(map(len, planned)) else 1
