"""Reading files that anybody may have put there: regular ones only, and none longer than it can be."""

import errno
import os
import stat
from pathlib import Path


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
