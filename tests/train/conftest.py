import pytest
import torch
from emulation import EmulatedGraphs
from runs import tiny_config, tiny_dataset, tiny_session
from train_runs import RUN, invoke, tiny

import train


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run that was never stopped: its folder."""
    out = tmp_path_factory.mktemp("whole")
    train.run(tiny_session(), tiny_config(), out)
    return out


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run by the command line: its folder and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, tiny(*RUN, out, "--json")


@pytest.fixture
def cpu_modes(monkeypatch):
    """Steps of every mode on a CPU: CUDA graphs emulated, a compiler that compiles nothing."""
    monkeypatch.setattr("model.capture.recorder", lambda device: EmulatedGraphs())
    monkeypatch.setattr("model.step.COMPILER", "aot_eager")
    yield
    torch.compiler.reset()


@pytest.fixture
def tiny_here(monkeypatch):
    """`train.py` in this process, on the tiny data, for an epoch: `tiny_here(*arguments)`."""
    monkeypatch.setattr("model.data.cifar10.load", lambda *a, **k: tiny_dataset())
    monkeypatch.setattr(train.Interrupts, "install", lambda self: None)  # pytest's handlers stay
    settings = [f"--set={name}={value}" for name, value in {"widths": "8,8,16,16", "batch_size": 20}.items()]
    return lambda *arguments: invoke("--epochs", "1", *settings, *arguments)
