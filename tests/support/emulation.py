"""CUDA graphs, emulated on a CPU: record a function's operations once, then replay them on the same memory.

A replay runs no Python of the function. It executes the operations that were recorded, on the storages and with the
numbers that were recorded, so that a step that hands anything new to its operations goes wrong here as it would there.
What a CUDA graph would do in silence is an error where that can be told: CaptureError.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"tolist", "numpy", "__array__", "__dlpack__"}
"""Ways from a tensor to Python that are no operation."""

WAITING = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "bincount",
    "_unique2",
    "unique_dim",
}
"""Operations whose result, or its shape, the host must know."""


class CaptureError(Exception):
    """A step does what cannot be captured, or would not be replayed right."""


class HostReads:
    """Counts, while the context is open, how often the host asks a tensor for its values."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @property
    def count(self) -> int:
        return len(self.names)

    def __enter__(self) -> "HostReads":
        self._modes = contextlib.ExitStack()
        for mode in (_Functions(self.names), _Operations(self.names)):
            self._modes.enter_context(mode)
        return self

    def __exit__(self, *exception) -> None:
        self._modes.close()


class _Functions(TorchFunctionMode):
    """Adds to `names` each call that takes a tensor's values to Python."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in READS:
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    """Adds to `names` each operation that waits for the device."""

    def __init__(self, names: list[str]):
        super().__init__()
        self.names = names

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if waits(op, args):
            self.names.append(str(op))
        return op(*args, **(kwargs or {}))


def waits(op, args: tuple) -> bool:
    """Whether the host needs the values of `op`'s operands; an index of booleans is as long as it has ones."""
    name = op.name().partition("::")[2].partition(".")[0]
    by_mask = name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])
    return name in WAITING or by_mask


def tensors(*values: object) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


class _Recording(TorchDispatchMode):
    """The operations of a function, with the very tensors that they were given and that they returned."""

    def __init__(self, buffers: set[int] | None):
        super().__init__()
        self.buffers, self.own = buffers, set()
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(op, args):
            raise CaptureError(f"{op} reads device memory on the host")
        given = set(map(storage, tensors(args, kwargs)))
        self._check_writes(op, args, kwargs)
        result = op(*args, **kwargs)
        self.own |= set(map(storage, tensors(result))) - given
        self.operations.append((op, args, kwargs, result))
        return result

    def _check_writes(self, op, args: tuple, kwargs: dict) -> None:
        for i, argument in enumerate(op._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
            for x in tensors(value):
                if self.buffers is not None and storage(x) not in self.buffers | self.own:
                    raise CaptureError(f"{op} writes {list(x.shape)} {x.dtype} outside of the step's buffers")

    def replay(self) -> None:
        with torch.inference_mode():
            for op, args, kwargs, recorded in self.operations:
                given = set(map(storage, tensors(args, kwargs)))
                for x, new in zip(tensors(recorded), tensors(op(*args, **kwargs)), strict=True):
                    if storage(x) not in given:
                        x.copy_(new)


class EmulatedGraphs:
    """A `model.capture.Recorder`. `buffers()` are the tensors that a recording may change, and that must never move."""

    def __init__(self, buffers: Callable[[], list[Tensor]] | None = None):
        self.buffers = buffers
        self.replays = 0
        self.held_bytes = 0

    def rehearse(self, run: Callable[[], None]) -> None:
        run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        buffers = None if self.buffers is None else self.buffers()
        recording = _Recording(None if buffers is None else set(map(storage, buffers)))
        reads: list[str] = []
        with _Functions(reads), recording:
            run()
        if reads:
            raise CaptureError(f"{reads[0]} reads device memory on the host")

        def replay() -> None:
            if buffers is not None:
                for x, now in zip(buffers, self.buffers(), strict=True):
                    if storage(x) != storage(now) or x.data_ptr() != now.data_ptr():
                        raise CaptureError(f"a buffer {list(x.shape)} {x.dtype} has moved since it was recorded")
            self.replays += 1
            recording.replay()

        return replay
