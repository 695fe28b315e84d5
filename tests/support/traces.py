"""Chrome traces made by hand, to the schema that torch.profiler writes. None was recorded, and each says so.

Times are nanoseconds from the beginning of the trace, written as the profiler writes them: microseconds since boot with
three digits behind the point, which do not fit a float.
"""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

from profiling.account.trace import Trace, read

BOOT_NS = 1_414_456_661_601_577
GPU = "NVIDIA H200"
MAIN, AUTOGRAD = 4711, 4799
"""Threads: the program's, and the one in which autograd runs backward on a GPU."""
MADE_BY_HAND = "made by hand in tests/support/traces.py, not recorded"
US, MS = 1_000, 1_000_000


class HandMadeTrace:
    """Events in any order, and the file that they make."""

    def __init__(self, gpu: str | None = GPU):
        self.gpu = gpu
        self.events: list[dict[str, Any]] = []
        self.last_id = 0

    def event(self, category: str, name: str, start: int, duration: int, thread: Any = MAIN, **args: Any) -> None:
        """A complete event of the host, or of the device with `thread` as its stream."""
        pid = 0 if category in ("kernel", "gpu_memcpy", "gpu_memset") else MAIN
        times = {"ts": BOOT_NS + start, "dur": duration}
        self.events.append({"ph": "X", "cat": category, "name": name, "pid": pid, "tid": thread, **times, "args": args})

    def _new_id(self) -> int:
        self.last_id += 1
        return self.last_id

    def annotation(self, name: str, start: int, duration: int) -> None:
        self.event("user_annotation", name, start, duration, **{"External id": self._new_id()})

    def step(self, number: int, start: int, duration: int) -> None:
        self.annotation(f"ProfilerStep#{number}", start, duration)

    def op(self, name: str, start: int, duration: int, dims: list | None = None, thread: int = MAIN) -> None:
        """An operation of PyTorch."""
        args = {"External id": self._new_id(), "Record function id": 0, "Ev Idx": self.last_id}
        if dims is not None:
            args |= {"Input Dims": dims, "Input type": ["float"] * len(dims), "Concrete Inputs": [""] * len(dims)}
        self.event("cpu_op", name, start, duration, thread, **args)

    def call(self, name: str, start: int, duration: int = 5_000, thread: int = MAIN) -> int:
        """A call of the CUDA runtime; its correlation id."""
        self.event("cuda_runtime", name, start, duration, thread, cbid=211, correlation=self._new_id())
        return self.last_id

    def on_device(
        self, name: str, start: int, duration: int, correlation: int, stream=7, category="kernel", **more: int
    ):
        """Work that a launch put on the device; "graph node id" in `more` is the node's number by CUPTI."""
        args = {"External id": 0, "device": 0, "context": 1, "stream": stream, "correlation": correlation}
        args |= {"graph id": more.get("graph node id", 0) >> 32, "graph node id": 0} | more
        if category == "kernel":
            args |= {"queued": 0, "registers per thread": 32, "grid": [1568, 1, 4], "block": [256, 1, 1]}
        self.event(category, name, start, duration, stream, **args)

    def kernel(self, name: str, launch: int, start: int, duration: int, stream: int = 7, thread: int = MAIN) -> int:
        """A kernel and its launch; the correlation id of both."""
        correlation = self.call("cudaLaunchKernel", launch, thread=thread)
        self.on_device(name, start, duration, correlation, stream)
        return correlation

    def graph(self, launch: int, kernels: list[tuple[str, int, int] | tuple[str, int, int, int]]) -> None:
        """A graph launch and its kernels, (name, start, duration, node if it has one)."""
        correlation = self.call("cudaGraphLaunch", launch)
        for name, start, duration, *node in kernels:
            self.on_device(name, start, duration, correlation, **({"graph node id": node[0]} if node else {}))

    def noise(self, count: int, text: int = 300) -> None:
        """Python frames, memory events and flow arrows, a third each: most of a trace, and of no use here."""
        for i in range(count):
            self.event("python_function", f"module_{i % 7}.py(12): {'f' * text}", i, 5, **{"Python id": i})
            self.events.append({"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": BOOT_NS + i, "s": "t"})
            self.events.append({"ph": "s", "cat": "ac2g", "name": "ac2g", "id": i, "ts": BOOT_NS + i, "tid": MAIN})

    def apply(self, *events: tuple) -> "HandMadeTrace":
        """The trace with more events, each (name of a method, *its arguments, those with a name in a dict if any)."""
        for method, *arguments in events:
            named = arguments.pop() if isinstance(arguments[-1], dict) else {}
            getattr(self, method)(*arguments, **named)
        return self

    def training(self, *numbers: int) -> "HandMadeTrace":
        """The trace with a training step of STEP_NS that does BUSY for each of `numbers`, one after another."""
        for number in numbers:
            _training_step(self, number)
        return self

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

    def read(self) -> Trace:
        """The trace as the profiler reads it from a file."""
        with tempfile.TemporaryDirectory() as folder:
            return read(self.write(Path(folder) / "trace.json"))


def _written(event: dict[str, Any]) -> str:
    times = {key: value for key, value in event.items() if key in ("ts", "dur")}
    rest = json.dumps({key: value for key, value in event.items() if key not in times})
    return rest[:-1] + "".join(f', "{key}": {ns // 1000}.{ns % 1000:03d}' for key, ns in times.items()) + "}"


STEP_NS = 1_000 * US
BUSY = {
    "convolution": 140 * US,
    "batch norm": 90 * US,
    "memory-bound": 50 * US,
    "layout and cast": 40 * US,
    "optimiser and loss": 50 * US,
    "augmentation and data": 30 * US,
}
"""The device's work in a training step; another 60 us of layout run behind others on a second stream."""
HOST_GAP_NS, LAUNCH_GAP_NS, STEP_GAP_NS = 60 * US, 10 * US, 530 * US
"""In a step the device waits for the host, and for a kernel that is launched already; between two, for the host."""


def _training_step(trace: HandMadeTrace, number: int) -> None:
    """Forward is launched by the program's thread, backward by autograd's. Times below are in microseconds."""
    x, w, begin = [64, 32, 16, 16], [32, 32, 3, 3], number * STEP_NS

    def op(name: str, start: int, length: int, dims: list | None = None, thread: int = MAIN) -> None:
        trace.op(name, begin + start * US, length * US, dims, thread)

    def kernel(name: str, launch: int, start: int, length: int, stream: int = 7, thread: int = MAIN) -> None:
        trace.kernel(name, begin + launch * US, begin + start * US, length * US, stream, thread)

    trace.step(number, begin, STEP_NS)
    trace.annotation("augmentation", begin + 10 * US, 40 * US)
    kernel("augment_kernel", 20, 100, 30)
    op("aten::conv2d", 60, 60, [x, w, [], [], [], [], []])
    op("aten::cudnn_convolution", 65, 50, [x, w, [], [], [], [], [], [], []])
    kernel("void cudnn::ops::nchwToNhwcKernel<__half>", 70, 130, 40)
    kernel("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", 80, 170, 60)
    op("aten::cudnn_batch_norm", 130, 20, [x, [32]])
    kernel("void cudnn::batchnorm_fwtr_nhwc_semiPersist<__half>", 135, 230, 50)
    op("aten::copy_", 155, 10, [x, x])
    kernel("void at::native::unrolled_elementwise_kernel<direct_copy>", 160, 210, 60, stream=20)
    op("aten::cross_entropy_loss", 170, 30, [[64, 10], [64]])
    op("aten::log_softmax", 172, 20, [[64, 10]])
    kernel("void cunn_SoftMaxForward<float>", 180, 280, 20)

    node = "autograd::engine::evaluate_function: "
    op(f"{node}ConvolutionBackward0", 350, 60, thread=AUTOGRAD)
    op("ConvolutionBackward0", 352, 50, [x], AUTOGRAD)
    op("aten::convolution_backward", 353, 48, [x, x, w], AUTOGRAD)
    kernel("sm90_xmma_wgrad_implicit_gemm_indexed_f16f16_f16f32", 355, 360, 80, thread=AUTOGRAD)
    op(f"{node}CudnnBatchNormBackward0", 412, 18, thread=AUTOGRAD)
    op("aten::cudnn_batch_norm_backward", 414, 14, [x, x, [32]], AUTOGRAD)
    kernel("void cudnn::batchnorm_bwtr_nhwc_semiPersist<__half>", 416, 440, 40, thread=AUTOGRAD)
    op("aten::threshold_backward", 432, 15, [x, x], AUTOGRAD)
    kernel("void at::native::vectorized_elementwise_kernel<4>", 436, 490, 50, thread=AUTOGRAD)
    trace.annotation("Optimizer.step#SGD.step", begin + 460 * US, 40 * US)
    op("aten::_fused_sgd_", 465, 30, [[[32, 32, 3, 3]], []])
    kernel("void at::native::multi_tensor_apply_kernel<FusedSgdMathFunctor>", 470, 540, 30)


PASS_STEP_NS, EAGER = 20 * MS, 2
"""A `profiled_pass`'s length of a step, and the index of the step that runs eagerly."""
PASS_KERNELS = (
    ("sm90_xmma_fprop_implicit_gemm_f16f16", "aten::cudnn_convolution", [[512, 64, 32, 32], [64, 64, 3, 3]], 8 * MS),
    ("cudnn::bn_fw_tr_1C11", "aten::cudnn_batch_norm", [[512, 64, 32, 32], [64]], 5 * MS),
    ("nchwToNhwcKernel", "aten::copy_", [[512, 64, 32, 32], [512, 64, 32, 32]], 1 * MS),
)
"""The kernels of each of its steps, one after another: name, operation, extents, duration."""
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
        runs_eagerly = eager and number == EAGER
        start, ran = begin + 100 * US, []
        for i, (name, _, _, duration) in enumerate(PASS_KERNELS):
            ran.append((name, start, duration, FIRST_NODE + i if nodes else 0))
            start += duration + (100 * US if runs_eagerly else US)
        said = lie(number, ran)
        if not runs_eagerly:
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
