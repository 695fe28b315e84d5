"""Small checkpoints for the tests that write, break and read them."""

import dataclasses
import os
from pathlib import Path

import torch

from model.checkpoint import load, save
from model.config import Config
from model.run_state import ROW, TIMED, RunState

SECONDS = dict.fromkeys(TIMED, 0.1)
STATE = RunState(Config(preset="é"), "0" * 64, 1, [], SECONDS)  # of a first epoch, so at any step


def after(epochs: int, steps: int = 10) -> RunState:
    """The state of a run of 35 epochs after some of them."""
    rows = [dict.fromkeys(ROW, 0.5) | {"epoch": n, "step": n * steps} for n in range(1, epochs + 1)]
    return dataclasses.replace(STATE, history=rows)


def tensors_at(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    w = torch.randn(8, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return {"network.conv.weight": w, "network.bn.num_batches_tracked": torch.tensor(step)}


def write(folder: Path, *steps: int) -> Path:
    for step in steps:
        save(folder, step, tensors_at(step), STATE)
    return folder


def bits(tensor: torch.Tensor) -> bytes:
    """Compared as bytes, since NaNs have payloads and zeros have signs."""
    # Filling a fresh tensor gives row-major strides always; contiguous() keeps odd ones where there is one element.
    # numpy has no bfloat16, hence the view, and a 0-dim tensor cannot be viewed, hence the reshape.
    fresh = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return fresh.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_tensors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape), name
        assert bits(got[name]) == bits(want[name]), name


def assert_loads(path: Path, step: int) -> None:
    found = load(path)
    assert (found.step, found.state) == (step, STATE)
    assert_same_tensors(found.tensors, tensors_at(step))


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def pairs(*steps: int) -> set[str]:
    """The names of their checkpoints' files."""
    return {f"checkpoint-{step:08d}.{suffix}" for step in steps for suffix in ("json", "safetensors")}
