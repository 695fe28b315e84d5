"""Ops of whole training steps, counted once for all tests that want them."""

import dataclasses
import functools

import torch

from model.presets import preset
from model.trainer import modelled_step
from profiling.account.work import Work, work_of


@functools.cache
def step(name: str = "article-256", ops: str = "reference", batch: int = 512) -> tuple[Work, ...]:
    """A step of a preset in fp16."""
    config = dataclasses.replace(preset(name), ops=ops, batch_size=batch, conv="table")
    return tuple(work_of(*modelled_step(config, torch.float16)))
