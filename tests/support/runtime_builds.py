"""The builds of Triton's own runtime for a Hopper GPU that is not there: a process of its own, which prints JSON.

    python tests/support/runtime_builds.py PRESET          a whole run's builds, by the runtime's own keys; none is made
    python tests/support/runtime_builds.py probe PRESET    builds that the probe makes for it, before the run
    python tests/support/runtime_builds.py real            a kernel that is really compiled
    python tests/support/runtime_builds.py keys            of each launch: its kernel, and whether `ahead_of_time`'s
                                                           build of it has the runtime's key of Triton's cache

A driver that says sm_90 stands behind `JITFunction.run`, so that the runtime's own specialisation, signature and
options decide, and not a model of them. A build is counted where the runtime calls its compiler.
"""

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import driver

from kernels import contract, tiles
from kernels.augment import augment
from kernels.bn_apply import bn_apply
from kernels.jit import nothing_launched
from kernels.sgd import sgd
from model import probe
from model.compilation import compile_kernels
from model.presets import preset
from model.trainer import build_network
from profiling.bench.ahead_of_time import launches, source
from profiling.bench.case import OperandFactory
from profiling.bench.cases import cases

TARGET, GPU = GPUTarget("cuda", 90, 32), tiles.Gpu("NVIDIA H100 80GB HBM3", (9, 0))
launched: list[str] = []
loaded: list[str] = []


class Hopper:
    """The driver as the runtime asks it."""

    get_current_target = staticmethod(lambda: TARGET)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

    class utils:
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232_448})

        @staticmethod
        def load_binary(name, *_):
            loaded.append(name)
            return 0, 0, 0, 0, 1024

    @staticmethod
    def launcher_cls(source, metadata):
        return lambda *arguments: launched.append(metadata.name)


driver.set_active(Hopper())
contract.unavailable = lambda device: None
tiles.gpu_of = lambda device: GPU
main, cpu = threading.get_ident(), torch.device("cpu")


class Compiler:
    """Replaces Triton's: notes each request and its thread."""

    def __init__(self):
        self.asked: list[tuple[str, bool]] = []
        self.fails = ""

    def __call__(self, source, target, options, _env_vars=None):
        name = source.fn.fn.__name__
        self.asked.append((f"{name} {source.hash()} {sorted(options.items())}", threading.get_ident() == main))
        if name == self.fails:
            raise RuntimeError("out of resource")
        return SimpleNamespace(
            run=lambda *arguments: launched.append(name), launch_metadata=lambda *_: None, function=0, packed_metadata=0
        )

    def take(self) -> list[tuple[str, bool]]:
        taken, self.asked = self.asked, []
        return taken


def activation(*shape: int) -> Tensor:
    """Untouched memory, hence free."""
    return torch.empty(shape, dtype=torch.float16).contiguous(memory_format=torch.channels_last)


def update(parameters: int, steps: int) -> None:
    w, dw, v, rates = (torch.empty(n) for n in (parameters, parameters, parameters, steps))
    number, bad_step = (torch.zeros(1, dtype=torch.int64) for _ in range(2))
    sgd(w, dw, v, w.half(), rates, number, bad_step, 0.9, 5e-4)


def whole_run(name: str) -> dict:
    """Counts for training batches of 512 and 336, evaluation batches of 500, augmentation and update."""
    config = replace(preset(name), conv="ours")
    compiler = triton.compiler.compile = Compiler()
    network = build_network(config)
    # The library's first convolution is not what is counted, and takes half a minute at such a batch.
    network.stem = lambda x, w, bn=None: (activation(len(x), w.shape[0], 32, 32).requires_grad_(), None)

    def train(size: int, network: nn.Module = network) -> None:
        network.train()
        network(activation(size, 3, 32, 32)).float().sum().backward()

    def evaluate(size: int) -> None:
        network.eval()
        with torch.inference_mode():
            network(activation(size, 3, 32, 32))

    def rest(size: int) -> None:
        images, choices = torch.empty(50_000, 32, 32, 3, dtype=torch.uint8), torch.empty(50_000, 5, dtype=torch.int32)
        mean, rstd = torch.empty(2, 4)[:, :3].clone()
        for pad, cutout, count in ((config.crop_pad, config.cutout, len(images)), (0, 0, 10_000)):
            index = torch.empty(size, dtype=torch.int64)
            augment(images[:count], index, choices[:count], mean, rstd, pad, cutout, torch.float16)
        update(5_205_856, size * 7)

    def run(training: int, evaluation: int) -> None:
        train(training)
        evaluate(evaluation)
        rest(training)

    compile_kernels(lambda: run(2, 2), cpu)
    ahead, launched_ahead = compiler.take(), len(launched)
    for sizes in ((512, 500), (336, 500), (1, 1)):
        run(*sizes)
    later = compiler.take()
    compiler.fails = "bn_apply_kernel"
    compile_kernels(lambda: bn_apply(activation(2, 8, 4, 4), torch.ones(8), torch.ones(8)), cpu)
    try:
        bn_apply(activation(2, 8, 4, 4), torch.ones(8), torch.ones(8))
        failure = ""
    except RuntimeError as error:
        failure = str(error)
    return {
        "ahead": [name for name, _ in ahead],
        "by_the_main_thread": sum(is_main for _, is_main in ahead),
        "launched_ahead": launched_ahead,
        "later": [name for name, _ in later],
        "launched_later": len(launched),
        "failure": failure,
    }


def probed(name: str) -> dict:
    config = replace(preset(name), conv="ours", batch_size=2)
    compiler = triton.compiler.compile = Compiler()
    compile_kernels(lambda: probe._results(config, cpu, torch.float16), cpu)
    return {"ahead": [name for name, _ in compiler.take()], "launched_ahead": len(launched)}


def really() -> dict:
    compile_kernels(lambda: bn_apply(activation(2, 16, 4, 4), torch.ones(16), torch.ones(16)), cpu)
    ahead = loaded[:], launched[:]
    bn_apply(activation(512, 16, 4, 4), torch.ones(16), torch.ones(16))
    return {"ahead": ahead, "later": (loaded, launched)}


def keys() -> list[tuple[str, bool]]:
    """For every kernel of the benchmark and the optimiser's, with sizes that 16 does and does not divide."""

    def key(src, options: dict) -> str:
        return f"{src.hash()}-{make_backend(TARGET).parse_options(options).hash()}"

    def run_all() -> None:
        with torch.no_grad():
            for n, s in ((4096, 320), (4099, 3431)):
                update(n, s)
            for batch in (2, 3):
                for case in cases():
                    case.ours(*case.operands(OperandFactory(batch, cpu, torch.float16, untouched=True)))

    asked: list[tuple[str, str]] = []
    triton.compiler.compile = lambda src, target, options, **_: asked.append((src.fn.__name__, key(src, options)))
    with nothing_launched():
        run_all()
    with launches(GPU) as builds:
        run_all()
    ours = {key(source(build), build.options) for build in builds}
    return [(name, theirs in ours) for name, theirs in asked]


what, *names = sys.argv[1:]
commands = {"real": really, "probe": probed, "keys": keys}
print(json.dumps(commands[what](*names) if what in commands else whole_run(what)))
