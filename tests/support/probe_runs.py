"""Runs of the probe for its tests and those of its verdict."""

import torch

from model import verdict
from model.config import Config
from model.distributed import Ranks

CPU = torch.device("cpu")


def config(ops="fused", network="resnet9", **changes):
    widths = (16, 16, 16, 16)
    return Config(ops=ops, network=network, widths=widths, device="cpu", dtype="float32", batch_size=20, **changes)


def refusal(asked=None, say=lambda text: None, ranks=None):
    return verdict.refusal(asked or config(), CPU, torch.float32, ranks or Ranks(), say)
