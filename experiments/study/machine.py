"""A description of this machine as JSON on stdout: python -m experiments.study.machine, a short process of its own.

Asking the device for its name opens a context on it, which lives as long as the process, counts as a user of the GPU,
and may hang where the driver is ill.
"""

import json

import torch

from model.trainer import choose_device
from profiling import ROOT
from profiling.device.environment import device_name, environment, machine


def main() -> None:
    device = torch.device(choose_device("auto"))
    about = environment(device, ROOT)
    known = {"device_name": device_name(device), "on_gpu": device.type == "cuda", "environment": about}
    print(json.dumps(known | {"machine": machine(about)}))


if __name__ == "__main__":
    main()
