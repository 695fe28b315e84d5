import dataclasses

import pytest
import torch
import torch.nn.functional as F
from emulation import EmulatedGraphs
from runs import tiny_config, tiny_dataset
from torch.utils._python_dispatch import TorchDispatchMode

from model import capture
from model.data.batches import Batches, normalisation
from model.data.cifar10 import MEAN, STD
from model.distributed import Ranks
from model.errors import DeviceError
from model.trainer import Trainer, build_network, choose_device, choose_dtype, search_convolutions, step_mode

CPU = torch.device("cpu")


def make(dataset=None, dtype=torch.float32, device=CPU, **changes) -> Trainer:
    data = dataset or tiny_dataset()
    return Trainer(Batches(data.train_images, data.train_labels, tiny_config(**changes), device, dtype), data, Ranks())


class OurOps(TorchDispatchMode):
    """The names of this project's ops that run within."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "cifar":
            self.names.add(op._opname)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("ops", ["reference", "batchnorm", pytest.param("composed", marks=pytest.mark.slow), "fused"])
def test_ops_choose_the_batch_and_the_update_too(device, ops):
    """`reference` is PyTorch alone, on a GPU as well: what the others are held against must have nothing of ours."""
    trainer = make(tiny_dataset(4, 2), device=device, ops=ops, widths=(16, 16, 16, 16), batch_size=2)
    with OurOps() as training:
        next(iter(trainer.train(0)))
    with OurOps() as evaluation:
        trainer.evaluate()
    if ops == "reference":
        assert not training.names | evaluation.names
    else:
        assert training.names >= {"augment", "sgd"}
        assert "augment" in evaluation.names


@pytest.mark.parametrize("ops", ["reference", "fused"])
def test_a_rank_without_images_of_the_last_batch_makes_an_empty_one(ops):
    data = tiny_dataset(70, 10)
    batches = Batches(
        data.train_images, data.train_labels, tiny_config(ops=ops, widths=(16,) * 4), CPU, torch.float32, 11, 12
    )
    *_, last = batches.epoch(0)
    x, labels = batches.load(*last)
    assert x.shape == (0, 3, 32, 32)
    assert len(labels) == 0


def test_training_reads_no_inference_tensors(monkeypatch):
    """A tensor that is cannot be trained with, not even by the next run of the process."""
    seen = []

    def watched(device):
        seen.append(torch.is_inference_mode_enabled())
        return normalisation(device)

    for module in ("data.batches", "evaluation"):
        monkeypatch.setattr(f"model.{module}.normalisation", watched)
    make(preprocess="once").evaluate()
    assert seen
    assert not any(seen)


def test_initial_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(1)
    a = build_network(tiny_config())
    before = torch.random.get_rng_state()
    b = build_network(tiny_config())
    assert torch.equal(before, torch.random.get_rng_state())
    other = build_network(tiny_config(seed=1))
    for name, tensor in a.state_dict().items():
        assert torch.equal(tensor, b.state_dict()[name])
    assert not torch.equal(a.prep, other.prep)


@pytest.mark.parametrize("preprocess", ["on_device", "once"])
@pytest.mark.parametrize("mode", ["eager", "compiled", "captured"])
def test_warm_up_leaves_everything_as_it_was(monkeypatch, mode, preprocess):
    trainer = make(step=mode, preprocess=preprocess)
    monkeypatch.setattr("model.step.COMPILER", "eager")
    monkeypatch.setattr("model.capture.recorder", lambda device: EmulatedGraphs())
    list(trainer.train(0))
    trainer.evaluate()
    state = [*trainer.step.state(), *trainer.evaluator.state()]
    before, random = [t.clone() for t in state], torch.random.get_rng_state()
    tensors, said = {name: t.clone() for name, t in trainer.tensors().items()}, []
    assert trainer.warm_up(said.append) is None
    assert trainer.step_mode == mode
    assert len(said) == 3, "two sizes of a training batch, one of evaluation"
    assert trainer.step.number == 4
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(t, tensors[name]) for name, t in trainer.tensors().items())
    moved = {id(t) for t in trainer.evaluator.state()}
    assert all(torch.equal(t, old) for t, old in zip(state, before, strict=True) if id(t) not in moved)
    trainer.check_finite()


def test_on_a_gpu_the_kernels_of_every_kind_of_batch_are_compiled_before_the_warm_up(monkeypatch):
    trainer, events = make(), []
    prepare = capture.Program.prepare
    monkeypatch.setattr(capture.Program, "prepare", lambda self, *kind: (events.append(kind), prepare(self, *kind)))

    def compile_(run, device):
        events.append("compiling")
        run()
        events.append("compiled")

    monkeypatch.setattr("model.trainer.compile_kernels", compile_)
    trainer.device, trainer.config = torch.device("cuda"), dataclasses.replace(trainer.config, ops="batchnorm")
    trainer.step_requested = "eager"
    trainer.warm_up()
    kinds = [*trainer.batches.kinds(), *((size,) for size in dict.fromkeys(trainer.evaluator.sizes()))]
    assert events == ["compiling", *kinds, "compiled", *kinds]


@pytest.mark.parametrize(
    ("mode", "place", "reason"),
    [
        ("captured", None, "a CUDA graph needs a CUDA GPU, and this run is on cpu"),
        ("captured", "record", "out of memory"),
        ("captured", "gloo", "gloo"),
        ("compiled", "COMPILER", "Invalid backend"),
    ],
    ids=["no_gpu", "too_little_memory", "sums_over_gloo", "no_compiler"],
)
def test_a_step_that_cannot_run_as_asked_runs_eagerly_and_says_why(monkeypatch, mode, place, reason):
    trainer, expected = make(step=mode), make()
    if place == "record":

        def fail(self, run):
            run()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore than there is")

        monkeypatch.setattr(EmulatedGraphs, "record", fail)
        monkeypatch.setattr("model.capture.recorder", lambda device: EmulatedGraphs())
    elif place == "gloo":
        monkeypatch.setattr(Ranks, "capturable", False)
    elif place == "COMPILER":
        monkeypatch.setattr("model.step.COMPILER", "no_such_compiler")
    said = trainer.warm_up()
    assert reason in said
    assert "\n" not in said
    assert (trainer.step_mode, trainer.step_requested) == ("eager", mode)
    for run in (trainer, expected):
        list(run.train(0))
    assert all(torch.equal(t, expected.tensors()[name]) for name, t in trainer.tensors().items())


def test_an_eager_step_that_fails_in_warm_up_fails(monkeypatch):
    trainer = make()
    monkeypatch.setattr(trainer.network, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.warm_up()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_convolutions_are_searched_for_on_a_gpu(monkeypatch, device):
    """Like the measurement of the tile table: the library and ours are compared as they will run."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    search_convolutions(torch.device(device))
    assert torch.backends.cudnn.benchmark == (device == "cuda")


def test_captured_is_the_default_on_a_gpu_only():
    assert step_mode(tiny_config(), CPU) == "eager"
    assert step_mode(tiny_config(), torch.device("cuda")) == "captured"
    assert step_mode(tiny_config(step="compiled"), CPU) == "compiled"


def test_it_learns():
    trainer = make(dataset=tiny_dataset(200), epochs=8, lr_epochs=(0, 2, 8), widths=(8, 8, 16, 16), cutout=0)
    losses = []
    for epoch in range(8):
        list(trainer.train(epoch))
        losses.append(trainer.epoch_result()[0])
    assert losses[-1] < 0.6 * losses[0]


def test_evaluation_is_that_of_all_images_at_once():
    trainer = make(tiny_dataset(70, 613))
    list(trainer.train(0))
    result = trainer.evaluate()
    trainer.network.eval()
    images = (trainer.evaluator.images.float() - torch.tensor(MEAN)) / torch.tensor(STD)
    with torch.no_grad():
        logits = trainer.network(images.permute(0, 3, 1, 2))
    right = logits.argmax(1) == trainer.evaluator.labels
    assert result.accuracy == pytest.approx(right.float().mean().item())
    assert result.loss == pytest.approx(F.cross_entropy(logits, trainer.evaluator.labels).item(), rel=1e-4)
    assert result.class_accuracy["airplane"] == pytest.approx(
        right[trainer.evaluator.labels == 0].float().mean().item()
    )
    assert list(result.class_accuracy) == [
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ]  # fmt: skip


def test_evaluation_changes_nothing():
    trainer = make()
    list(trainer.train(0))
    before = {name: t.clone() for name, t in trainer.tensors().items()}
    trainer.evaluate()
    assert all(torch.equal(t, before[name]) for name, t in trainer.tensors().items())


def test_images_seen_counts_short_batches():
    trainer = make()
    seen = [trainer.images_seen()]
    for n in (*trainer.train(0), *trainer.train(1)):
        seen.append(seen[-1] + n)
    assert seen == [0, 20, 40, 60, 70, 90, 110, 130, 140]
    assert trainer.images_seen() == 140
    assert "accuracy" in trainer.so_far()


@pytest.mark.parametrize("name", ["cuda:7", "tpu", "cuda:x", "mps"])
def test_an_absent_device_is_refused(name):
    with pytest.raises(DeviceError, match="device="):
        choose_device(name)


def test_fp16_is_not_for_cpus():
    with pytest.raises(DeviceError, match="float16"):
        choose_dtype("float16", CPU)
    assert choose_dtype("float32", CPU) is torch.float32
    assert choose_dtype("auto", CPU) in (torch.float32, torch.bfloat16)
    assert choose_dtype("auto", torch.device("cuda")) is torch.float16


def test_bf16_trains():
    trainer = make(dtype=torch.bfloat16)
    list(trainer.train(0))
    trainer.check_finite()
    assert all(p.dtype == torch.float32 for p in trainer.network.parameters())


def test_a_dataset_s_fingerprint_is_of_all_its_bytes():
    data = tiny_dataset()
    other = dataclasses.replace(data, test_labels=data.test_labels.roll(1))
    assert data.fingerprint() == tiny_dataset().fingerprint() != other.fingerprint()
