"""Which tests a GPU decides, and how long they may take there; that none reaches for the network."""

import os
import socket
import subprocess
import sys
import types
import urllib.request
from pathlib import Path

import pytest

from profiling import ROOT


@pytest.fixture
def conftest(pytestconfig):
    """The module: of its name there is another one in a folder below."""
    return pytestconfig.pluginmanager.get_plugin(str(Path(__file__).with_name("conftest.py")))


def test_a_gpu_decides_the_tests_that_ask_for_the_device_and_those_marked_for_it():
    """And not one whose parameter has the same name, or that names the device without asking for it."""
    names = (
        "kernels/test_costs",
        "profiling/bench/test_timing",
        "profiling/bench/test_tuning",
        "profiling/device/test_sustained",
    )
    files = [f"tests/{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", "-m", "gpu", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert [line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line] == [
        "tests/profiling/bench/test_tuning.py::test_the_backend_refuses_faulty_tiles_and_times_the_others",
        "tests/profiling/bench/test_tuning.py::test_the_backend_names_a_failing_library_and_blames_none_after_a_lost_device",
        "tests/profiling/device/test_sustained.py::test_a_captured_call_is_replayed",
    ], done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "ignored"),
    [
        ("import plotly\n\ndef test_x(tmp_path): ...", True),
        ("def test_x(tmp_path, device): ...", None),
        ("@pytest.mark.gpu\ndef test_x(): ...", None),
    ],
    ids=["neither", "asks", "marked"],
)
def test_a_file_without_such_a_test_is_not_even_imported(conftest, tmp_path, text, ignored):
    """A GPU machine may lack what it needs, and a file that cannot be imported ends the whole collection."""
    path = tmp_path / "test_x.py"
    path.write_text(text)
    for markers, expected in (("gpu", ignored), ("", None)):
        config = types.SimpleNamespace(getoption={"markexpr": markers}.get)
        assert conftest.pytest_ignore_collect(path, config) is expected


class Item:
    """The part of a test that the hook reads."""

    def __init__(self, *fixtures: str):
        self.fixturenames, self.markers = fixtures, {}

    def get_closest_marker(self, name):
        return self.markers.get(name)

    def add_marker(self, marker):
        mark = getattr(pytest.mark, marker) if isinstance(marker, str) else marker
        self.markers[mark.name] = mark


@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "no_gpu"])
def test_on_a_gpu_a_test_that_it_decides_is_bounded(conftest, monkeypatch, gpu):
    monkeypatch.setattr(conftest, "HAS_GPU", gpu)
    asking, other = Item("device", "tmp_path"), Item("tmp_path")
    conftest.pytest_collection_modifyitems([asking, other])
    assert set(asking.markers) == ({"gpu", "timeout"} if gpu else {"gpu"})
    assert not other.markers


@pytest.mark.parametrize(
    ("reach", "caught"),
    [
        (lambda: urllib.request.urlopen("https://example.org/"), "a look-up of example.org"),
        (lambda: urllib.request.urlopen("http://192.0.2.1/"), "a look-up of 192.0.2.1"),
        (lambda: socket.socket().connect(("192.0.2.1", 80)), "a connection to 192.0.2.1"),
        (lambda: socket.socket().connect(("example.org", 80)), "a connection to example.org"),
        (lambda: socket.socket().connect_ex(("8.8.8.8", 53)), "a connection to 8.8.8.8"),
    ],
    ids=["name", "address", "connect", "connect_by_name", "connect_ex"],
)
def test_a_test_that_reaches_for_the_network_is_caught(no_network, reach, caught):
    with pytest.raises(OSError, match="no test reaches for the network"):
        reach()
    assert no_network == [caught]
    no_network.clear()


def test_this_machine_can_be_reached(no_network):
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(("localhost", server.getsockname()[1])).close()
    assert no_network == []
    assert os.environ["CIFAR10_MIRRORS"] == "off"
