"""What this machine is, as JSON on stdout: python -m experiments.study.machine. A process of its own, and a short one.

Whoever asks the device for its name opens a context on it, which stays as long as the process does, is counted among
those that use the GPU, and may never come to an end where the driver is ill.
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
