import sys

import pytest
import torch
from runs import loaded, tiny_config, tiny_dataset

from model.data.batches import Batches, Part, normalisation
from model.data.choices import draw_order

CPU = torch.device("cpu")
BATCH_BYTES = 20 * 3 * 32 * 32 * 4
PIPELINES = [
    ("every_epoch", "per_image", 2),
    ("once", "per_image", 2),
    ("once", "per_epoch", 1),
    ("once", "per_epoch", 0),
    ("every_epoch", "per_epoch", 0),
]


def make(dtype=torch.float32, **changes) -> Batches:
    data = tiny_dataset()
    return Batches(data.train_images, data.train_labels, tiny_config(**changes), CPU, dtype)


@pytest.mark.parametrize(
    ("preprocess", "draw", "workers", "dtype"),
    [(*pipeline, torch.float32) for pipeline in PIPELINES]
    + [(*PIPELINES[-2], torch.bfloat16), (*PIPELINES[-1], torch.bfloat16), (*PIPELINES[-1], torch.float16)],
    ids=str,
)
def test_every_pipeline_gives_the_same_batches_bit_for_bit(preprocess, draw, workers, dtype):
    ours, other = make(dtype), make(dtype, preprocess=preprocess, draw=draw, workers=workers)
    for epoch in (0, 2):
        for (x, labels), (x2, labels2) in zip(loaded(ours, epoch), loaded(other, epoch), strict=True):
            assert torch.equal(x, x2)
            assert torch.equal(labels, labels2)
            assert x.dtype == x2.dtype == dtype
            assert x.is_contiguous(memory_format=torch.channels_last)
            assert x2.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("free", "world", "workers", "says"),
    [
        (None, 1, 2, ""),
        (5 * BATCH_BYTES, 1, 2, ""),
        (5 * BATCH_BYTES - 1, 1, 1, "1 of them work"),
        (5 * BATCH_BYTES, 2, 0, "this process makes them itself"),
        (0, 1, 0, "this process makes them itself"),
    ],
)
def test_there_are_no_more_workers_than_shared_memory_has_room_for(monkeypatch, free, world, workers, says):
    """More of them would die of SIGBUS in the midst of an epoch."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8))
    monkeypatch.setattr("model.data.batches.free_shared_bytes", lambda: free)
    said, data = [], tiny_dataset(80)
    config = tiny_config(preprocess="once", workers=2, batch_size=20 * world)
    batches = Batches(data.train_images, data.train_labels, config, CPU, torch.float32, 0, world, said.append)
    assert batches.loader.num_workers == workers
    assert len(said) == bool(says)
    assert all(says in line and "/dev/shm has" in line and "--shm-size" in line for line in said)


@pytest.mark.skipif(sys.platform != "linux", reason="another way to start processes")
@pytest.mark.parametrize("preprocess", ["once", "every_epoch"])
def test_workers_have_the_images_without_a_copy_in_shared_memory(preprocess):
    batches = make(preprocess=preprocess, workers=1)
    loaded(batches, 0)
    samples = batches.loader.dataset
    assert not (samples.padded if preprocess == "once" else samples.images).is_shared()


def test_an_epoch_has_every_image_once_and_a_short_last_batch():
    batches = make()
    sizes = [len(x) for x, _ in loaded(batches, 0)]
    assert sizes == [20, 20, 20, 10]
    assert batches.kinds() == [(Part(0, 20),), (Part(0, 10),)]
    assert [x.shape[0] for x, _ in make(preprocess="once").kinds()] == [20, 10]
    labels = torch.cat([labels for _, labels in loaded(batches, 0)])
    order = draw_order(0, 0, 70)
    assert torch.equal(labels, order % 10)


def test_epochs_differ():
    a, b = (torch.cat([x for x, _ in loaded(make(), epoch)]) for epoch in (0, 1))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("preprocess", ["on_device", "once"])
@pytest.mark.parametrize("first", [0, 1, 3, 4])
def test_an_epoch_can_start_at_any_step(preprocess, first):
    batches = make(preprocess=preprocess)
    whole, rest = loaded(batches, 1), loaded(batches, 1, first)
    assert len(rest) == 4 - first
    for (x, y), (x2, y2) in zip(whole[first:], rest, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_augmentation_moves_flips_and_cuts():
    images = torch.arange(3 * 32 * 32, dtype=torch.int64).remainder(251).to(torch.uint8).view(1, 32, 32, 3)
    config = tiny_config(cutout=6, crop_pad=4)
    batches = Batches(images, torch.zeros(1, dtype=torch.int64), config, CPU, torch.float32)
    ((x, _),) = loaded(batches, 0)
    dy, dx, flip, cut_y, cut_x = batches.augmentation.choose(0, 0, 0)
    mean, rstd = normalisation(CPU)
    plain = ((images[0].float() - mean) * rstd).permute(2, 0, 1)
    expected = torch.nn.functional.pad(plain, (4, 4, 4, 4), mode="reflect")[:, dy : dy + 32, dx : dx + 32]
    expected = (expected.flip(-1) if flip else expected).clone()
    expected[:, cut_y : cut_y + 6, cut_x : cut_x + 6] = 0
    assert torch.equal(x[0], expected)
    assert (x == 0).sum() >= 3 * 6 * 6


def test_the_data_set_is_not_changed():
    data = tiny_dataset()
    before = data.train_images.clone()
    for preprocess in ("on_device", "once", "every_epoch"):
        config = tiny_config(preprocess=preprocess)
        loaded(Batches(data.train_images, data.train_labels, config, CPU, torch.float32), 0)
    assert torch.equal(data.train_images, before)
