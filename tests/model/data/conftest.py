import threading

import pytest
from mirror_server import Server
from small_archive import SMALL

from model.data import archive, download


@pytest.fixture
def small_archive(monkeypatch):
    """This archive is the official one, and no mirror can be reached."""
    for name, value in SMALL.items():
        monkeypatch.setattr(archive if hasattr(archive, name) else download, name, value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("CIFAR10_MIRRORS", "off")


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.gate.set()
    server.shutdown()
    thread.join()
    server.server_close()
