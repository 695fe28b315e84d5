"""Without a GPU the kernels run in Triton's interpreter, with every load and store checked against its tensor.

What a GPU decides is `pytest -m gpu`: the tests that ask for the `device` fixture, and those that need a GPU, which are
marked in their source and skipped without one.
"""

import importlib.util
import ipaddress
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import kernel_checks
import pytest
import torch

os.environ["CIFAR10_MIRRORS"] = "off"  # for the processes that tests start, which `no_network` does not reach
HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 where results are compared
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton decorates a function, its own library's included
    torch.set_num_threads(1)  # the tests' tensors are too small to share


LIMIT_S = 60
"""For a test on a GPU, where a kernel may hang; in the interpreter some take minutes on a busy machine."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu` does not even import a file without such tests: each process of xdist would import them all, and a GPU
    machine may lack what they need."""
    if config.getoption("markexpr") != "gpu" or not collection_path.match("test_*.py"):
        return None
    asks = re.search(r"mark\.gpu|[(,]\s*device\s*[,):]", collection_path.read_text(encoding="utf-8"))
    return None if asks else True


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads how many processes there are
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spread over the cores what is more than a test named on the command line; `-n 0` keeps it in one process."""
    option = config.option
    a_worker = "PYTEST_XDIST_WORKER" in os.environ or not config.pluginmanager.hasplugin("xdist")
    if a_worker or HAS_GPU or option.numprocesses is not None or option.usepdb or option.collectonly:
        return
    if option.benchmark_skip and not any("::" in word for word in config.args):
        option.numprocesses, option.dist = os.cpu_count(), "worksteal"


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if "device" in getattr(item, "fixturenames", ()) and "device" not in parameters:
            item.add_marker("gpu")
        if HAS_GPU and item.get_closest_marker("gpu"):
            # By a thread, since a signal waits for the driver; it ends the process, and xdist starts another.
            item.add_marker(pytest.mark.timeout(LIMIT_S, method="thread"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run in this session: the GPU, or the CPU under the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def not_under_nohup():
    """SIGHUP is what it is at a terminal, in this process and its children: under nohup, as in a CI, it is ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL) if hasattr(signal, "SIGHUP") else None
    yield
    if before is not None:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an op allocates arrives full of NaN, so that an element nobody wrote cannot look right."""
    kernel_checks.poison_fresh_memory(monkeypatch)


def is_here(host: str | bytes | None) -> bool:
    """Whether a host's name or address is this machine's own."""
    if host in (None, "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def no_network():
    """A test that looks up another machine's name, or connects to one, fails, whatever it makes of the error."""
    reached = []

    def refusing(function: Callable, host_of: Callable, what: str) -> Callable:
        def checked(*arguments: object, **options: object) -> object:
            host = host_of(*arguments)
            if not is_here(host):
                reached.append(f"{what} {host}")
                raise OSError("no test reaches for the network")
            return function(*arguments, **options)

        return checked

    def of_address(_: socket.socket, address: object) -> object:
        return address[0] if isinstance(address, tuple) else None  # a Unix socket has no host

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", refusing(socket.getaddrinfo, lambda host, *_: host, "a look-up of"))
        for name in ("connect", "connect_ex"):
            connect = refusing(getattr(socket.socket, name), of_address, "a connection to")
            patch.setattr(socket.socket, name, connect)
        yield reached
    assert not reached, "no test reaches for the network"


@pytest.fixture(autouse=True, scope="session")
def guarded_interpreter():
    """Every interpreted kernel of the session runs under `interpreter_guard`."""
    if not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from interpreter_guard import guard

    with guard():
        yield
