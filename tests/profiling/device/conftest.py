"""Scaffolds of this room: a fresh fake NVML."""

import importlib.util
import sys

import pytest

from profiling import ROOT

FAKE = ROOT / "tests" / "support" / "fake_nvml" / "pynvml.py"


@pytest.fixture
def fake(monkeypatch):
    """A fresh fake `pynvml` in the real one's place: an H200 that software thermal slowdown holds down."""
    spec = importlib.util.spec_from_file_location("pynvml", FAKE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module
