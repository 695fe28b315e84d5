"""A step that is recorded and replayed is the step, and one that cannot be is found out."""

import contextlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from block_cases import no_overflow_checks  # noqa: F401
from emulation import CaptureError, EmulatedGraphs, HostReads
from runs import tiny_config, tiny_dataset

from model import capture
from model.capture import CudaGraphs, Program
from model.data.batches import Batches
from model.data.choices import draw_choices
from model.distributed import Ranks
from model.network import ResNet9
from model.optimiser import SGD
from model.step import TrainingStep
from model.trainer import Trainer

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def make(device=CPU, dtype=torch.float32, **changes) -> Trainer:
    data, config = tiny_dataset(), tiny_config(**changes)
    return Trainer(Batches(data.train_images, data.train_labels, config, device, dtype), data, Ranks())


def emulated(monkeypatch, **changes) -> tuple[Trainer, EmulatedGraphs]:
    """A trainer whose steps are recorded and replayed."""
    trainer = make(step="captured", **changes)
    graphs = EmulatedGraphs(lambda: [*trainer.step.state(), *trainer.evaluator.state()])
    monkeypatch.setattr(capture, "recorder", lambda device: graphs)
    assert trainer.warm_up() is None
    return trainer, graphs


def learned(trainer: Trainer, epochs: int = 2) -> dict:
    """Everything that an epoch leaves."""
    results = {}
    for epoch in range(epochs):
        list(trainer.train(epoch))
        results[f"epoch {epoch}"] = trainer.epoch_result(), trainer.evaluate()
        trainer.check_finite()
    return {**results, **{name: t.clone() for name, t in trainer.tensors().items()}}


def same(a: dict, b: dict) -> bool:
    """Bit for bit; a NaN is itself."""
    return a.keys() == b.keys() and all(
        torch.equal(x, b[name]) if isinstance(x, torch.Tensor) else repr(x) == repr(b[name]) for name, x in a.items()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preprocess": "once"},
        {"network": "resnet", "epochs": 1, "lr_epochs": (0, 0.5, 1)},
        {"momentum": 0.0},
        {"batch_size": 10},
    ],
    ids=["on_device", "batches_from_the_host", "the_article_s_network", "without_momentum", "no_short_batch"],
)
def test_replayed_steps_are_eager_steps_bit_for_bit(monkeypatch, changes):
    trainer, graphs = emulated(monkeypatch, **changes)
    epochs = min(2, trainer.config.epochs)
    assert trainer.step_mode == "captured"
    assert same(learned(trainer, epochs), learned(make(**changes), epochs))
    assert graphs.replays == epochs * (trainer.epoch_steps + 1), "steps and a batch of evaluation"


def test_a_replay_goes_on_in_the_middle_of_an_epoch(monkeypatch):
    first, _ = emulated(monkeypatch)
    steps = first.train(0)
    next(steps), next(steps)
    kept = {name: t.clone() for name, t in first.tensors().items()}
    list(steps)
    second, _ = emulated(monkeypatch)
    second.restore(kept, 2)
    list(second.train(0))
    assert same(first.tensors(), second.tensors())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernels need triton")
@pytest.mark.slow
@pytest.mark.usefixtures("no_overflow_checks")
def test_a_replayed_fused_step_is_the_eager_step_bit_for_bit():
    """In fp16, with the weights' copies; on maps of a sixteenth, for the interpreter."""
    from kernels import fused

    generator, steps = torch.Generator().manual_seed(0), []
    x = torch.randn(2, 3, 8, 8, generator=generator).half().contiguous(memory_format=torch.channels_last)
    for recorder in (None, EmulatedGraphs()):
        torch.manual_seed(0)
        step = TrainingStep(ResNet9((16, 16, 16, 16), fused), tiny_config(), steps_per_epoch=4, dtype=torch.float16)
        step.program.recorder = recorder
        step(x, torch.tensor([3, 7]))
        steps.append(step)
    eager, replayed = steps
    assert recorder.replays == 1
    assert all(torch.equal(a, b) for a, b in zip(eager.state(), replayed.state(), strict=True))


# Broken steps


def python_learning_rate(monkeypatch, trainer):
    def step(self):
        self.number += 1
        self.weights -= 1e-3 * trainer.step.number * self.gradient

    monkeypatch.setattr(SGD, "step", step)


def moved_tensor(monkeypatch, trainer):
    def start_epoch(self):
        self.loss_sum = torch.zeros_like(self.loss_sum)

    monkeypatch.setattr(TrainingStep, "start_epoch", start_epoch)


def rebound_view(monkeypatch, trainer):
    original = Batches.epoch

    def epoch(self, epoch, first=0):
        for batch in original(self, epoch, first):
            self.choices = draw_choices(self.augmentation, self.config.seed, epoch, self.count)
            yield batch

    monkeypatch.setattr(Batches, "epoch", epoch)


def in_the_loss(change):
    """`change(step, loss, labels)` is the loss."""

    def broken(monkeypatch, trainer):
        loss = TrainingStep._loss
        changed = lambda self, x, labels: change(self, loss(self, x, labels), labels)  # noqa: E731
        monkeypatch.setattr(TrainingStep, "_loss", changed)

    return broken


average = torch.zeros(())
READS = {  # name: (break the step, words of the error)
    "host_read": (in_the_loss(lambda step, loss, _: loss * min(1, int(step.correct) + 1)), "reads device memory"),
    "host_read_without_an_operation": (
        in_the_loss(lambda step, loss, _: loss * len(step.correct.view(1).tolist())),
        "tolist reads device memory",
    ),
    "mask_as_an_index": (
        in_the_loss(lambda step, loss, labels: loss + 0 * labels[labels > 4].sum()),
        "reads device memory",
    ),
}
BROKEN = READS | {
    "python_learning_rate": (python_learning_rate, None),
    "moved_tensor": (moved_tensor, "has moved"),
    "rebound_view": (rebound_view, None),
    "update_outside_of_the_buffers": (
        in_the_loss(lambda step, loss, _: loss + average.add_(1e-3)),
        r"writes \[\].* outside",
    ),
}


@pytest.mark.parametrize(("broken", "words"), BROKEN.values(), ids=BROKEN)
def test_a_step_that_cannot_be_replayed_is_caught(monkeypatch, broken, words):
    """By its name, or because it ends elsewhere than the same step run eagerly."""
    eager, trainer = make(momentum=0.0), make(step="captured", momentum=0.0)
    with monkeypatch.context() as patch:
        broken(patch, eager)
        expected = learned(eager)
    broken(monkeypatch, trainer)
    trainer.step.program.recorder = EmulatedGraphs(lambda: [*trainer.step.state(), *trainer.evaluator.state()])
    if words:
        with pytest.raises(CaptureError, match=words):
            learned(trainer)
    else:
        assert not same(learned(trainer), expected)


# The program around a recording


def counting() -> tuple[Program, torch.Tensor, list]:
    total, runs = torch.zeros(3), []

    def run(x, factor):
        runs.append(factor)
        total.add_(x * factor)

    return Program(run, lambda: [total]), total, runs


def test_a_recording_is_for_a_kind_of_batch():
    program, total, runs = counting()
    program.recorder = EmulatedGraphs(lambda: [total])
    for x, factor in ((1.0, 2), (2.0, 2), (3.0, 5), (4.0, 5)):
        program(torch.full((3,), x), factor)
    assert runs == [2, 2, 5, 5], "rehearsed and recorded, for each kind"
    assert total.tolist() == [2 + 4 + 15 + 20] * 3


def test_preparing_leaves_the_state_and_a_failure_does_too():
    program, total, _ = counting()
    total.fill_(7)
    program.prepare(torch.ones(3), 2)
    program.recorder = EmulatedGraphs(lambda: [total])
    program.prepare(torch.ones(3), 2)
    assert total.tolist() == [7, 7, 7]
    program.recorder = EmulatedGraphs(list)  # total is none of its buffers
    with pytest.raises(CaptureError):
        program.prepare(torch.ones(3), 3)
    assert total.tolist() == [7, 7, 7]
    program.disable_capture()
    program(torch.ones(3), 3)
    assert total.tolist() == [10, 10, 10]


def test_nothing_is_recorded_without_a_gpu():
    with pytest.raises(RuntimeError, match="needs a CUDA GPU, and this run is on cpu"):
        capture.recorder(CPU)


# Reads


def test_an_epoch_reads_three_times():
    """Once for a gradient that was not finite, once for the sums, once for the evaluation."""
    trainer = make()
    learned(trainer, 1)
    with HostReads() as reads:
        list(trainer.train(1))
    assert reads.count == 0, reads.names
    with HostReads() as reads:
        trainer.check_finite()
        trainer.epoch_result()
        trainer.evaluate()
    assert reads.count == 3, reads.names


@pytest.mark.parametrize("broken", [broken for broken, _ in READS.values()], ids=READS)
def test_a_read_that_is_added_is_counted(monkeypatch, broken):
    trainer = make()
    broken(monkeypatch, trainer)
    with HostReads() as reads:
        list(trainer.train(0))
    assert reads.count == trainer.epoch_steps


def test_a_recording_holds_what_it_allocated_of_its_own(monkeypatch):
    """The largest of them, since they share their memory; what was there before it is not its own."""
    bytes_now, peak = [100], [900]
    fakes = {
        "Stream": lambda device: None,
        "graph_pool_handle": lambda: None,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda *args, **kwargs: contextlib.nullcontext(),
        "stream": lambda stream: contextlib.nullcontext(),
        "memory_allocated": lambda device: bytes_now[0],
        "max_memory_allocated": lambda device: peak[0],
        "reset_peak_memory_stats": lambda device: peak.__setitem__(0, bytes_now[0]),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    graphs = CudaGraphs(GPU)
    for own in (40, 60, 10):
        graphs.record(lambda own=own: peak.__setitem__(0, bytes_now[0] + own))
    assert graphs.held_bytes == 60


# With a GPU


@pytest.fixture
def deterministic(monkeypatch):
    """The library may choose convolutions that add in any order."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("network", ["resnet", "resnet9"])
@pytest.mark.parametrize("ops", ["reference", "batchnorm", "fused"])
@pytest.mark.parametrize("preprocess", ["on_device", "once"])
def test_fifty_captured_steps_are_fifty_eager_steps(ops, network, preprocess):
    results = []
    for step in ("eager", "captured"):
        trainer = make(
            GPU, torch.float16, step=step, ops=ops, network=network, preprocess=preprocess,
            widths=(16, 32, 32, 32), epochs=13, lr_epochs=(0, 5, 13),
        )  # fmt: skip
        assert trainer.warm_up() is None
        assert trainer.step_mode == step
        results.append(learned(trainer, 13))  # 52 steps
    assert same(*results)


@pytest.mark.gpu
def test_an_epoch_on_a_gpu_waits_for_nothing():
    trainer = make(GPU, torch.float16, step="captured")
    trainer.warm_up()
    list(trainer.train(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(trainer.train(1))
        trainer.evaluator(lambda: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_recording_that_fails_leaves_a_gpu_that_trains(monkeypatch):
    """A host read in the step: not captured, and eager from then on."""
    trainer = make(GPU, torch.float16, step="captured")
    READS["host_read"][0](monkeypatch, trainer)
    reason = trainer.warm_up()
    assert reason
    assert "\n" not in reason
    assert trainer.step_mode == "eager"
    learned(trainer, 1)
