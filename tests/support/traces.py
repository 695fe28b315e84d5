"""Chrome traces made by hand, to the schema that torch.profiler writes: none of them was recorded, and each says so.

Times are given in nanoseconds from the beginning of the trace, and written as the profiler writes them: microseconds
since boot with three digits behind the point, which do not fit a float.
"""

import gzip
import json
from pathlib import Path
from typing import Any

BOOT_NS = 1_414_456_661_601_577
GPU = "NVIDIA H200"
MAIN, AUTOGRAD = 4711, 4799
"""Threads: the program's, and the one in which autograd runs backward on a GPU."""
MADE_BY_HAND = "made by hand in tests/support/traces.py, not recorded"


class HandMadeTrace:
    """Events in any order, and the file that they make."""

    def __init__(self, gpu: str | None = GPU):
        self.gpu = gpu
        self.events: list[dict[str, Any]] = []
        self.last_id = 0

    def event(self, category: str, name: str, start: int, duration: int, thread: Any = MAIN, **args: Any) -> None:
        """A complete event of the host, or of the device with `thread` as its stream."""
        self.events.append(
            {
                "ph": "X",
                "cat": category,
                "name": name,
                "pid": 0 if category in ("kernel", "gpu_memcpy", "gpu_memset") else MAIN,
                "tid": thread,
                "ts": BOOT_NS + start,
                "dur": duration,
                "args": args,
            }
        )

    def new_id(self) -> int:
        self.last_id += 1
        return self.last_id

    def step(self, number: int, start: int, duration: int) -> None:
        self.event("user_annotation", f"ProfilerStep#{number}", start, duration, **{"External id": self.new_id()})

    def op(self, name: str, start: int, duration: int, dims: list | None = None, thread: int = MAIN) -> int:
        """An operation of PyTorch; its External id."""
        identity = self.new_id()
        args = {"External id": identity, "Record function id": 0, "Ev Idx": identity}
        if dims is not None:
            args |= {"Input Dims": dims, "Input type": ["float"] * len(dims), "Concrete Inputs": [""] * len(dims)}
        self.event("cpu_op", name, start, duration, thread, **args)
        return identity

    def annotation(self, name: str, start: int, duration: int) -> None:
        self.event("user_annotation", name, start, duration, **{"External id": self.new_id()})

    def call(self, name: str, start: int, duration: int = 5_000, thread: int = MAIN) -> int:
        """A call of the CUDA runtime; its correlation id."""
        correlation = self.new_id()
        self.event("cuda_runtime", name, start, duration, thread, cbid=211, correlation=correlation)
        return correlation

    def on_device(
        self,
        name: str,
        start: int,
        duration: int,
        correlation: int,
        stream: int = 7,
        category: str = "kernel",
        external: int = 0,
        node: int = 0,
    ) -> None:
        """What a launch put on the device; `node` of the graph, as CUPTI numbers it, 0 if launched alone."""
        args = {"External id": external, "device": 0, "context": 1, "stream": stream, "correlation": correlation}
        args |= {"graph id": node >> 32, "graph node id": node}
        if category == "kernel":
            args |= {"queued": 0, "registers per thread": 32, "grid": [1568, 1, 4], "block": [256, 1, 1]}
        self.event(category, name, start, duration, stream, **args)

    def kernel(
        self, name: str, launch: int, start: int, duration: int, stream: int = 7, thread: int = MAIN, external: int = 0
    ) -> int:
        """A kernel and its launch; the correlation id of both."""
        correlation = self.call("cudaLaunchKernel", launch, thread=thread)
        self.on_device(name, start, duration, correlation, stream, external=external)
        return correlation

    def graph(self, launch: int, kernels: list[tuple[str, int, int] | tuple[str, int, int, int]]) -> int:
        """A graph launch and its kernels, (name, start, duration, node if it has one); the correlation id of all."""
        correlation = self.call("cudaGraphLaunch", launch)
        for name, start, duration, *node in kernels:
            self.on_device(name, start, duration, correlation, node=node[0] if node else 0)
        return correlation

    def noise(self, count: int, text: int = 300) -> None:
        """Python frames, memory events and flow arrows, a third each: most of a trace, and of no use here."""
        for i in range(count):
            self.event("python_function", f"module_{i % 7}.py(12): {'f' * text}", i, 5, **{"Python id": i})
            self.events.append({"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": BOOT_NS + i, "s": "t"})
            self.events.append({"ph": "s", "cat": "ac2g", "name": "ac2g", "id": i, "ts": BOOT_NS + i, "tid": MAIN})

    def text(self) -> str:
        """The file's content."""
        head = {
            "schemaVersion": 1,
            "madeByHand": MADE_BY_HAND,
            "deviceProperties": [{"id": 0, "name": self.gpu, "computeMajor": 9, "numSms": 132}] if self.gpu else [],
            "record_shapes": 1,
            "displayTimeUnit": "ms",
        }
        body = ",\n  ".join(map(_written, self.events))
        return (
            f'{json.dumps(head, indent=2)[:-2]},\n  "traceEvents": [\n  {body}\n  ],\n  "traceName": "trace.json"\n}}'
        )

    def write(self, path: Path) -> Path:
        """To `path`, compressed if it ends in .gz."""
        data = self.text().encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        return path


def _written(event: dict[str, Any]) -> str:
    times = {key: value for key, value in event.items() if key in ("ts", "dur")}
    rest = json.dumps({key: value for key, value in event.items() if key not in times})
    return rest[:-1] + "".join(f', "{key}": {ns // 1000}.{ns % 1000:03d}' for key, ns in times.items()) + "}"


US = 1_000
STEP_NS = 1_000 * US
BUSY = {
    "convolution": 140 * US,
    "batch norm": 90 * US,
    "memory-bound": 50 * US,
    "layout and cast": 40 * US,
    "optimiser and loss": 50 * US,
    "augmentation and data": 30 * US,
}
"""What the device does in a `training_step`; another 60 us of layout run behind others on a second stream."""
HOST_GAP_NS, LAUNCH_GAP_NS, STEP_GAP_NS = 60 * US, 10 * US, 530 * US
"""In a step the device waits for the host, and for a kernel that is launched already; between two, for the host."""


def training_step(trace: HandMadeTrace, number: int, start: int) -> None:
    """A step of STEP_NS that does BUSY. Forward is launched by the program's thread, backward by autograd's."""
    x, w = [64, 32, 16, 16], [32, 32, 3, 3]

    def at(us: int) -> int:
        return start + us * US

    trace.step(number, start, STEP_NS)
    trace.annotation("augmentation", at(10), 40 * US)
    trace.kernel("augment_kernel", at(20), at(100), 30 * US)

    trace.op("aten::conv2d", at(60), 60 * US, [x, w, [], [], [], [], []])
    trace.op("aten::cudnn_convolution", at(65), 50 * US, [x, w, [], [], [], [], [], [], []])
    trace.kernel("void cudnn::ops::nchwToNhwcKernel<__half>", at(70), at(130), 40 * US)
    trace.kernel("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", at(80), at(170), 60 * US)
    trace.op("aten::cudnn_batch_norm", at(130), 20 * US, [x, [32]])
    trace.kernel("void cudnn::batchnorm_fwtr_nhwc_semiPersist<__half>", at(135), at(230), 50 * US)
    trace.op("aten::copy_", at(155), 10 * US, [x, x])
    trace.kernel("void at::native::unrolled_elementwise_kernel<direct_copy>", at(160), at(210), 60 * US, stream=20)
    trace.op("aten::cross_entropy_loss", at(170), 30 * US, [[64, 10], [64]])
    trace.op("aten::log_softmax", at(172), 20 * US, [[64, 10]])
    trace.kernel("void cunn_SoftMaxForward<float>", at(180), at(280), 20 * US)

    node, there = "autograd::engine::evaluate_function: ", {"thread": AUTOGRAD}
    trace.op(f"{node}ConvolutionBackward0", at(350), 60 * US, **there)
    trace.op("ConvolutionBackward0", at(352), 50 * US, [x], **there)
    trace.op("aten::convolution_backward", at(353), 48 * US, [x, x, w], **there)
    trace.kernel("sm90_xmma_wgrad_implicit_gemm_indexed_f16f16_f16f32", at(355), at(360), 80 * US, **there)
    trace.op(f"{node}CudnnBatchNormBackward0", at(412), 18 * US, **there)
    trace.op("aten::cudnn_batch_norm_backward", at(414), 14 * US, [x, x, [32]], **there)
    trace.kernel("void cudnn::batchnorm_bwtr_nhwc_semiPersist<__half>", at(416), at(440), 40 * US, **there)
    trace.op("aten::threshold_backward", at(432), 15 * US, [x, x], **there)
    trace.kernel("void at::native::vectorized_elementwise_kernel<4>", at(436), at(490), 50 * US, **there)
    trace.annotation("Optimizer.step#SGD.step", at(460), 40 * US)
    trace.op("aten::_fused_sgd_", at(465), 30 * US, [[[32, 32, 3, 3]], []])
    trace.kernel("void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor>", at(470), at(540), 30 * US)


MS = 1_000 * US
PASS_STEP_NS, EAGER = 20 * MS, 2
"""Of a `profiled_pass`: a step's length, and the index of the one that runs eagerly."""
PASS_KERNELS = (
    ("sm90_xmma_fprop_implicit_gemm_f16f16", "aten::cudnn_convolution", [[512, 64, 32, 32], [64, 64, 3, 3]], 8 * MS),
    ("cudnn::bn_fw_tr_1C11", "aten::cudnn_batch_norm", [[512, 64, 32, 32], [64]], 5 * MS),
    ("nchwToNhwcKernel", "aten::copy_", [[512, 64, 32, 32], [512, 64, 32, 32]], 1 * MS),
)
"""What each of its steps runs, one after another: name, operation, extents, duration."""
FIRST_NODE = 1 << 33


def profiled_pass(
    path: Path, replays: int = 20, lie=lambda number, kernels: kernels, nodes: bool = True, eager: bool = True
) -> tuple[Path, dict[str, Any]]:
    """A pass as `profiling.run.collect` records it, one step run eagerly among replays: (its trace, profile.json).

    Without `eager` that step is one more replay.
    `lie(number, kernels)` gives what the trace says of the step of that index, of [(name, start, duration, node), ...].
    """
    made, count = HandMadeTrace(), replays + 1
    for number in range(count):
        begin = number * PASS_STEP_NS
        made.step(number, begin, PASS_STEP_NS)
        start, ran = begin + 100 * US, []
        for i, (name, _, _, duration) in enumerate(PASS_KERNELS):
            ran.append((name, start, duration, FIRST_NODE + i if nodes else 0))
            start += duration + (100 * US if eager and number == EAGER else US)
        said = lie(number, ran)
        if number != EAGER or not eager:
            made.graph(begin + 10 * US, said)
            continue
        launched = {}
        for i, (name, op, dims, _) in enumerate(PASS_KERNELS):
            made.op(op, begin + i * 30 * US, 25 * US, dims)
            launched[name] = made.call("cudaLaunchKernel", begin + i * 30 * US + 5 * US)
        for name, start, duration, _ in said:
            made.on_device(name, start, duration, launched[name])
    profile = {"version": 1, "eager_step": EAGER if eager else None, "error": None}
    return made.write(path), profile | {"step_images": [512] * count, "step_ns": [PASS_STEP_NS] * count}


def record_training(path: Path, network: str, dtype: str, steps: int = 2) -> Path:
    """Not by hand: this project's training steps on the CPU, on the reference ops, as torch.profiler records them."""
    import torch
    from runs import tiny_config, tiny_dataset
    from torch.profiler import ProfilerActivity, profile, schedule

    from model.data.batches import Batches
    from model.distributed import Ranks
    from model.trainer import Trainer

    config = tiny_config(network=network, dtype=dtype, ops="reference", widths=(8, 16, 16, 16), batch_size=32)
    dataset = tiny_dataset(32 * (steps + 1), 10)
    batches = Batches(dataset.train_images, dataset.train_labels, config, torch.device("cpu"), getattr(torch, dtype))
    trainer = Trainer(batches, dataset, Ranks())
    trainer.warm_up()
    plan = schedule(wait=0, warmup=1, active=steps, repeat=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=plan, record_shapes=True) as session:
        for _ in trainer.train(0):
            session.step()
    session.export_chrome_trace(str(path))
    return path
