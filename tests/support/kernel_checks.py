"""What every kernel test needs: a measured tolerance, poisoned memory, and modules with one line changed."""

import importlib.util
import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import Tensor
from torch.utils._device import _device_constructors

from kernels.accuracy import allowed_error, relative_error

_numbers = itertools.count()


def mostly_slow(cases: Iterable, *plain: str | int) -> list:
    """The cases of a parametrisation, marked slow unless their name or their place is among `plain`."""
    marked = []
    for place, case in enumerate(cases):
        if not isinstance(case, ParameterSet):
            case = pytest.param(*case) if isinstance(case, tuple) else pytest.param(case)
        name = case.id or case.values[0]
        if place not in plain and not (isinstance(name, str) and name in plain):
            case = case._replace(marks=(*case.marks, pytest.mark.slow))
        marked.append(case)
    return marked


def assert_as_accurate(ours: Tensor, baseline: Tensor, truth: Tensor, name: str = "result", units: int = 4) -> None:
    """Assert that `ours` is as close to `truth` (float64) as can be asked of its dtype.

    The bound is `allowed_error` of `baseline`, PyTorch's own result in the same dtype, whose shape `ours` must have.
    """
    assert ours.shape == baseline.shape == truth.shape, (ours.shape, baseline.shape, truth.shape)
    assert (ours.dtype, truth.dtype) == (baseline.dtype, torch.float64), (ours.dtype, baseline.dtype, truth.dtype)
    error, theirs = relative_error(ours, truth), relative_error(baseline, truth)
    allowed = allowed_error(theirs, ours.dtype, units)
    line = f"{name}: error {error:.3g}, PyTorch's {theirs:.3g}, {allowed:.3g} allowed"
    print(line)
    if not error <= allowed:
        worst = (ours.double() - truth).abs().nan_to_num(torch.inf).argmax()
        place = tuple(map(int, torch.unravel_index(worst, ours.shape)))
        where = f"worst at {place} of {tuple(ours.shape)}: {ours[place]:.9g}, truth {truth[place]:.9g}"
        raise AssertionError(f"{line}; {where}")


POISONED_BYTES = 1 << 24
"""Larger tensors stand for a layer's operands where launches are only recorded, and cost nothing while untouched."""


def poison_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch.empty, torch.empty_like and Tensor.new_empty return with NaN (integers: their largest value).

    Tensors of more than `POISONED_BYTES` are left as they are.
    """
    # `with torch.device(...)` remembers the factory functions that it first saw: they must be the real ones.
    _device_constructors()

    def poison(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args, **kwargs) -> Tensor:
            x = allocate(*args, **kwargs)
            if type(x) is not Tensor or x.device.type == "meta" or x.dtype == torch.bool or x.nbytes > POISONED_BYTES:
                return x  # fake tensors have no memory
            return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


class Mutants(NamedTuple):
    """A table of mutants: `changes` name the text to replace in `module`, or in `kernels`, which `module` launches.

    `check(module, device)` must fail for each. `launch(module)` runs all that must compile; of a convolution,
    `launch(module, gpu)`, on an A100 and on an H100. `guarded` tables need the interpreter's guard.
    """

    module: ModuleType
    changes: dict[str, tuple[str, str]]
    check: Callable[[ModuleType, torch.device], None]
    launch: Callable[..., None] | None = None
    kernels: ModuleType | None = None
    guarded: bool = True

    def make(self, name: str, folder: Path) -> ModuleType:
        if self.kernels is None:
            return mutant(self.module, folder, *self.changes[name])
        return mutant_kernel(self.module, self.kernels, folder, *self.changes[name])


def mutant_kernel(op: ModuleType, kernels: ModuleType, folder: Path, old: str, new: str) -> ModuleType:
    """A fresh import of the module `op` that launches the kernels of a `mutant` of `kernels`."""
    changed, fresh = mutant(kernels, folder, old, new), mutant(op, folder, '"""', '"""', count=None)
    for name in vars(kernels):
        if not name.startswith("__") and getattr(fresh, name, None) is getattr(kernels, name):
            setattr(fresh, name, getattr(changed, name))
    return fresh


def mutant(module: ModuleType, folder: Path, old: str, new: str, count: int | None = 1) -> ModuleType:
    """A fresh import of `module` whose source has `old`, which occurs `count` times (None: any), replaced by `new`.

    Its ops are registered under a namespace of their own, and its file is a real one in `folder`: the interpreter and
    the compiler read a kernel's source from disk.
    """
    source = Path(module.__file__).read_text()
    found = source.count(old)
    assert count in (None, found), f"{module.__name__} has {found} occurrences of {old!r}, expected {count}"
    name = f"mutant{next(_numbers)}_{module.__name__.rpartition('.')[2]}"
    path = folder / f"{name}.py"
    path.write_text(source.replace(old, new).replace('"cifar::', f'"{name}::'))
    spec = importlib.util.spec_from_file_location(name, path)
    changed = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed)
    return changed


def assert_caught(check: Callable[[], None]) -> None:
    """Assert that `check` fails by an assertion or by the interpreter guard; any other error is a broken mutant."""
    from interpreter_guard import is_out_of_bounds

    try:
        check()
    except AssertionError:
        return
    except Exception as error:
        if is_out_of_bounds(error):
            return
        raise
    pytest.fail("the mutant passes its module's checks")


def channels_last(*shape: int, dtype: torch.dtype, seed: int, device: torch.device, scale: float = 1.0) -> Tensor:
    """Normal [N, C, H, W] values of deviation `scale`, rounded to `dtype`, channels_last; a function of the seed."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)
