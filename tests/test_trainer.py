import dataclasses

import pytest
import torch
import torch.nn.functional as F
from runs import tiny_config, tiny_dataset

from model.batches import Batches
from model.data import MEAN, STD
from model.distributed import Ranks
from model.errors import DeviceError, NonFiniteError
from model.trainer import Trainer, build_network, choose_device, choose_dtype

CPU = torch.device("cpu")


def make(dataset=None, dtype=torch.float32, **changes) -> Trainer:
    data = dataset or tiny_dataset()
    return Trainer(Batches(data.train_images, data.train_labels, tiny_config(**changes), CPU, dtype), data, Ranks())


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


def test_warm_up_leaves_everything_as_it_was():
    trainer = make()
    list(trainer.train(0))
    before = {name: t.clone() for name, t in trainer.tensors().items()}
    trainer.warm_up()
    assert trainer.step.number == 4
    assert all(torch.equal(t, before[name]) for name, t in trainer.tensors().items())
    trainer.check_finite()


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


def test_a_bad_gradient_is_reported_with_step_seed_and_rate():
    trainer = make(seed=7)
    list(trainer.train(0))
    trainer.step.bad_step.fill_(6)
    with pytest.raises(NonFiniteError, match=r"step 6 \(epoch 2\).*seed 7.*rate 0\.075"):
        trainer.check_finite()


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
