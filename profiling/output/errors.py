"""Failures that end a command of the profiler: `str(error)` is the line for a person, `exit_code` for a script.

Codes mean the same as in `model.errors`, which this room may not import.
"""


class CommandError(Exception):
    """The command line is invalid."""

    exit_code = 2


class NoDeviceError(CommandError):
    """The command needs a device that is not there."""

    exit_code = 4


class OutOfMemoryError(CommandError):
    """The device has no room even for a small candidate."""

    exit_code = 6


class ReportError(CommandError):
    """The run or its report cannot be read or written."""

    exit_code = 3


class RefusedError(CommandError):
    """The two runs do not compare."""


class InconsistentError(CommandError):
    """The account leaves too much unexplained, or lacks a part."""

    exit_code = 9
