"""Records on disk: JSON documents written whole or not at all, and JSON lines appended one row at a time.

A record is JSON values under string keys; None is null, and means "not known". A document is complete on the disk
before it takes the old one's name. A last row without a newline is torn (its writer was killed): readers skip it and
the next append removes it. One process at a time may append to a file.
"""

import contextlib
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from profiling.output.forms import fit

LARGEST_BYTES = 1 << 28
"""The largest file that is read as a record; a day's telemetry is smaller."""


def write_json(path: Path, value: Any) -> None:
    """Replace the document at `path` by `value`, atomically and durably.

    Raises ValueError naming the key of a NaN or an infinity, TypeError for other values that JSON lacks, and OSError as
    the system gave it; in each case the old document is intact and no temporary is left.
    """
    write_text(path, _encode(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace the text at `path`, atomically and durably. Raises OSError, the old text intact."""
    with replacing(Path(path)) as new:
        new.write_bytes(text.encode("utf-8", errors="replace"))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a file to write; it replaces that at `path`, atomically and durably, unless the context raises."""
    # The name is unique, not mkstemp's, whose files only their owner may read.
    temporary = path.with_name(f".tmp-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if os.name != "nt":  # Windows can neither open nor sync a folder
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_bytes(path: Path, limit: int = LARGEST_BYTES) -> bytes:
    """The file at `path`. Raises ValueError naming it unless it is a regular file within `limit` bytes, and OSError."""
    require_regular(path, limit)
    return Path(path).read_bytes()


def require_regular(path: Path, limit: int = LARGEST_BYTES) -> None:
    """Raise as `read_bytes` would; a pipe or a device is never opened."""
    about = os.stat(path)
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{path} is not a regular file; expected a record written by this program")
    if about.st_size > limit:
        raise ValueError(f"{path} has {about.st_size:,} bytes, expected at most {limit:,}")


def read_json(path: Path, form: Any = None) -> Any:
    """The document at `path`, of that `profiling.output.forms` form if one is given.

    Raises ValueError naming the file where it is not JSON or not of the form, and as `read_bytes` does.
    """
    value = _decode(read_bytes(path), str(path))
    return value if form is None else fit(value, form, Path(path).name)


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Remove a torn last line and append `row` as one line; the system has it on return.

    Raises as `write_json` does; the rows before are intact.
    """
    line = (_encode(row, indent=None) + "\n").encode()
    # Unbuffered: a buffer would write its rest at close, behind the truncation that undoes a failed write.
    with open(path, "a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if end > 0:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                end = file.readall().rfind(b"\n") + 1
                file.truncate(end)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


def read_jsonl(path: Path, form: Any = None) -> list[Any]:
    """Every row of `path` but a torn last one, each of `form` if one is given.

    Raises ValueError naming file and line of a damaged row, and as `read_bytes` does.
    """
    *lines, _torn = read_bytes(path).split(b"\n")
    rows = [_decode(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]
    return rows if form is None else [fit(row, form, f"{Path(path).name}[{i}]") for i, row in enumerate(rows)]


def _encode(value: Any, indent: int | None) -> str:
    _require_finite(value, "")
    return json.dumps(value, indent=indent, allow_nan=False)


def _decode(data: bytes, where: str) -> Any:
    try:
        return json.loads(data, parse_constant=_not_json, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error}); expected a record written by this program") from None


def _not_json(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _finite(digits: str) -> float:
    return number if math.isfinite(number := float(digits)) else _not_json(digits[:40])


def _require_finite(value: Any, key: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{key or 'the value'} is {value}, which JSON cannot hold: write None for a number not known")
    if isinstance(value, dict):
        for name, item in value.items():
            _require_finite(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_finite(item, f"{key}[{index}]")
