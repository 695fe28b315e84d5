"""Bounds, checked: a guard around the loads and stores of Triton's interpreter.

The interpreter dereferences whatever address a kernel computes; one past the end of a tensor reads or writes its
neighbour in silence. Under the guard a kernel sees virtual addresses instead: each tensor argument of a launch gets a
range of its own, far from every other, so that an address says which tensor it was computed from. Every access that its
mask lets through must lie within that tensor, and no element may be stored twice in one launch (on a GPU that is a race
between programs, or wasted work; the interpreter runs programs one after another and hides it). Tensor descriptors are
covered: the interpreter turns them into addresses and masks.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
from triton.runtime import interpreter

RANGE_BITS = 44  # 16 TiB of addresses for each tensor, 2**19 tensors in one launch


class OutOfBoundsError(Exception):
    """A kernel accessed memory outside the tensor that it computed the address from, or stored an element twice."""


def is_out_of_bounds(error: BaseException | None) -> bool:
    """Whether the guard's error is behind this one: the interpreter wraps what a kernel raises."""
    while error is not None and not isinstance(error, OutOfBoundsError):
        error = error.__cause__
    return error is not None


class _Tensors:
    """The tensor arguments of one launch and where they really are."""

    def __init__(self) -> None:
        self.virtual: list[int] = []
        self.real: list[int] = []
        self.sizes: list[int] = []  # bytes from the first element to the last
        self.names: list[str] = []
        self.written: list[np.ndarray] = []
        self.keep: list[object] = []  # the interpreter's host copies must outlive the launch

    def add(self, tensor) -> int:
        """Register a tensor argument; return the virtual address of its first element."""
        real = tensor.data_ptr()
        # Half a range of room on either side, and the real alignment.
        virtual = (len(self.real) + 1 << RANGE_BITS) + (1 << RANGE_BITS - 1) + real % 4096
        elements = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.virtual.append(virtual)
        self.real.append(real)
        self.sizes.append(elements * tensor.element_size() if tensor.numel() else 0)
        self.names.append(f"{list(tensor.shape)} {tensor.dtype}")
        self.written.append(np.zeros(self.sizes[-1], dtype=bool))
        self.keep.append(tensor)
        return virtual

    def translate(self, pointers, mask: np.ndarray, storing: bool) -> interpreter.TensorHandle:
        """Real addresses for virtual ones; raise OutOfBoundsError if one that `mask` lets through is illegal."""
        virtual = pointers.data
        mask = np.broadcast_to(mask, virtual.shape).astype(bool)  # a product of masks arrives as integers
        real = np.zeros_like(virtual)
        itemsize = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        which = (virtual >> np.uint64(RANGE_BITS)).astype(np.int64) - 1
        for k in np.unique(which[mask]):
            if not 0 <= k < len(self.real):
                raise OutOfBoundsError(f"an address of no tensor argument: {virtual[mask][0]:#x}")
            mine = mask & (which == k)
            offsets = (virtual[mine] - np.uint64(self.virtual[k])).astype(np.int64)
            bad = (offsets < 0) | (offsets + itemsize > self.sizes[k])
            verb = "stored" if storing else "loaded"
            if bad.any():
                raise OutOfBoundsError(
                    f"{verb} {int(bad.sum())} elements outside a tensor {self.names[k]} of {self.sizes[k]} bytes: "
                    f"byte offsets {offsets[bad].min()} to {offsets[bad].max()}"
                )
            if storing:
                if self.written[k][offsets].any() or len(np.unique(offsets)) != len(offsets):
                    raise OutOfBoundsError(f"stored an element of a tensor {self.names[k]} twice in one launch")
                self.written[k][offsets] = True
            real[mine] = (offsets + self.real[k]).astype(np.uint64)
        return interpreter.TensorHandle(real, pointers.dtype)


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Check every access of every kernel that is launched in the interpreter while the context is open."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    places = [*((builder, name) for name in names), (executor, "__call__"), (interpreter, "_implicit_cvt")]
    originals = {(owner, name): getattr(owner, name) for owner, name in places}
    convert, tensors = interpreter._implicit_cvt, _Tensors()

    def launch(self, *args, **kwargs):
        nonlocal tensors
        tensors = _Tensors()
        return originals[executor, "__call__"](self, *args, **kwargs)

    def convert_argument(arg):
        converted = convert(arg)
        if hasattr(arg, "data_ptr"):
            converted.handle.data = np.array([tensors.add(arg)], dtype=np.uint64)
        return converted

    # `rest` differs from one Triton to the next: cache and eviction policies.
    def masked_load(self, ptrs, mask, *rest, **policies):
        real = tensors.translate(ptrs, mask.data, storing=False)
        return originals[builder, "create_masked_load"](self, real, mask, *rest, **policies)

    def masked_store(self, ptrs, value, mask, *rest, **policies):
        real = tensors.translate(ptrs, mask.data, storing=True)
        return originals[builder, "create_masked_store"](self, real, value, mask, *rest, **policies)

    def atomic_rmw(self, operation, ptr, value, mask, semantics, scope):
        real = tensors.translate(ptr, mask.data, storing=False)
        return originals[builder, "create_atomic_rmw"](self, operation, real, value, mask, semantics, scope)

    def atomic_cas(self, ptr, *rest):
        real = tensors.translate(ptr, np.ones(ptr.data.shape, dtype=bool), storing=False)
        return originals[builder, "create_atomic_cas"](self, real, *rest)

    replacements = (masked_load, masked_store, atomic_rmw, atomic_cas, launch, convert_argument)
    for (owner, name), replacement in zip(originals, replacements, strict=True):
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)
