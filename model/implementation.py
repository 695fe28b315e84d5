"""The kernels or reference ops that a run computes with, as `Config.ops` and `Config.conv` choose them."""

import importlib
from typing import Any

from model.config import Config


def implementation(config: Config) -> Any:
    """A module with the functions of `kernels.reference`: the networks' blocks, the augmentation and the optimiser.

    It is the one that `config.ops` and `config.conv` name, for all of a run.
    """
    if config.ops == "fused":
        from kernels import fused

        return fused.implementation(config.conv)
    return importlib.import_module(f"kernels.{config.ops}")
