"""Without a GPU the kernels run in Triton's interpreter, with every load and store checked against its tensor."""

import importlib.util
import os

import kernel_checks
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton decorates a function, its own library's included
    torch.set_num_threads(1)  # the tests' tensors are too small to share


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in this session: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an op allocates arrives full of NaN, so that an element nobody wrote cannot look right."""
    kernel_checks.poison_fresh_memory(monkeypatch)


@pytest.fixture(autouse=True, scope="session")
def guarded_interpreter():
    """Every interpreted kernel of the session runs under `interpreter_guard`."""
    if not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from interpreter_guard import guard

    with guard():
        yield
