"""The failures that end a run. Each is one line for a person and one exit code for a script."""


class RunError(Exception):
    """A failure that ends the run: `str(error)` says what was wrong, what was expected and what to do."""

    exit_code = 1


class WorkerError(RunError):
    """A process that makes batches has ended before its time; the step before is whole."""


class UsageError(RunError):
    """The command line or a configuration contradicts itself."""

    exit_code = 2


class DataError(RunError):
    """The named data is missing or is not CIFAR-10 in its binary layout."""

    exit_code = 3


class DeviceError(RunError):
    """The device that was asked for is absent or cannot run what was asked of it."""

    exit_code = 4


class NonFiniteError(RunError):
    """The loss or a gradient became NaN or infinite."""

    exit_code = 5


class OutOfMemoryError(RunError):
    """The device has too little memory for this network at this batch size."""

    exit_code = 6


class TargetMissedError(RunError):
    """The run ended below the accuracy that `--target-accuracy` asked for."""

    exit_code = 7


class CheckpointError(RunError):
    """A checkpoint is missing, damaged, of another run, or could not be written at the end of one."""

    exit_code = 8
