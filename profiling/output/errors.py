"""Failures that end a command of the profiler: `str(error)` is the line for a person, `exit_code` for a script."""


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
    """The run cannot be read at all."""

    exit_code = 3


class RefusedError(CommandError):
    """The comparison would mislead."""


class InconsistentError(CommandError):
    """The account leaves too much unexplained, or lacks a part."""

    exit_code = 9
