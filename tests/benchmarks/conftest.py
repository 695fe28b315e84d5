"""The benchmarks are collected by `pytest --benchmark-only` alone; other runs do not even import them."""

import torch

from profiling import ROOT
from profiling.bench import table
from profiling.device.environment import environment


def pytest_ignore_collect(collection_path, config):
    return True if not config.getoption("benchmark_only", False) else None


def pytest_benchmark_update_machine_info(config, machine_info):
    """GPU, driver, clocks and versions, so that a comparison shows what it compares."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    about = environment(device, ROOT)
    machine = table.machine(about)
    machine_info |= {"environment": about, "fingerprint": table.fingerprint(machine)}
