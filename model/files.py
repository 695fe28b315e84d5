"""Files written whole or not at all, and files read that anybody may have put there."""

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

TEMPORARY = ".tmp-"
"""Begins the name of a file that is being written; a writer that is killed leaves it behind."""


def write_files(contents: Mapping[Path, bytes]) -> None:
    """Replace files of one folder atomically and durably: all are complete on the disk before the first is renamed.

    They are renamed in the order of `contents`. Raises OSError as the system gave it; no temporary is left.
    """
    # The name is unique, not mkstemp's, whose files only their owner may read.
    unique = f"{TEMPORARY}{secrets.token_hex(4)}"
    temporaries = {path.with_name(f"{unique}-{path.name}"): path for path in contents}
    try:
        for temporary, path in temporaries.items():
            with open(temporary, "xb") as file:
                file.write(contents[path])
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in temporaries.items():
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        for temporary in temporaries:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows can neither open nor sync a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The content of the regular file at `path`, or at the end of a link there.

    Raises OSError, with the reason as its `strerror`, for a pipe, device or folder, and for more than `most_bytes`,
    before any of it is read.
    """
    # Without O_NONBLOCK a pipe that nobody writes to is waited for as it is opened.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "a pipe, device or folder, not a regular file", str(path))
        if status.st_size > most_bytes:
            raise OSError(errno.EFBIG, f"{status.st_size:,} bytes, more than {most_bytes:,}", str(path))
        return file.read(most_bytes)
