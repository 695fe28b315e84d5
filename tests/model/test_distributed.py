"""Two and three processes that learn as one, with gloo on the CPU."""

import copy

import forks
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from runs import final_tensors, loaded, tiny_config, tiny_dataset
from train_runs import needs_gloo

from model.data.batches import Batches
from model.data.choices import draw_order
from model.distributed import LEAVE_S, STEP_S, Ranks, join
from model.errors import DeviceError, UsageError
from model.step import TrainingStep
from model.trainer import Trainer, build_network
from profiling.output.files import read_json, read_jsonl

CPU = torch.device("cpu")


def in_ranks(world: int, job: str, *arguments: object, **env: str) -> None:
    """A function of `rank_jobs` in as many forks, each of which ends well."""
    for done in forks.run(f"rank_jobs:{job}", *map(str, arguments), world=world, env=env):
        assert (done.returncode, done.stdout) == (0, b""), done.stderr.decode()


# Shards, and one process


@pytest.mark.parametrize(
    ("images", "batch_size", "world"),
    [
        pytest.param(64, 16, 2, id="all_divide"),
        pytest.param(65, 20, 3, id="nothing_divides"),
        pytest.param(41, 20, 2, id="last_batch_leaves_a_rank_empty"),
        pytest.param(10, 3, 5, id="every_batch_leaves_ranks_empty"),
        pytest.param(2, 20, 3, id="fewer_images_than_ranks"),
    ],
)
@pytest.mark.parametrize("preprocess", ["on_device", "once"])
def test_the_ranks_batches_are_one_process_s_batches_cut_up(images, batch_size, world, preprocess):
    data = tiny_dataset(images)
    config = tiny_config(batch_size=batch_size, preprocess=preprocess)

    def batches(rank: int, world: int) -> Batches:
        return Batches(data.train_images, torch.arange(images), config, CPU, torch.float32, rank, world)

    for epoch in (0, 1):
        whole = loaded(batches(0, 1), epoch)
        parts = [loaded(batches(rank, world), epoch) for rank in range(world)]
        assert [len(part) for part in parts] == [len(whole)] * world  # the same number of steps, or somebody waits
        seen = []
        for number, (x, labels) in enumerate(whole):
            assert torch.equal(torch.cat([part[number][0] for part in parts]), x)
            assert torch.equal(torch.cat([part[number][1] for part in parts]), labels)
            assert all(part[number][0].shape[1:] == (3, 32, 32) for part in parts)  # an empty one too
            sizes = [len(part[number][1]) for part in parts]
            assert max(sizes) - min(sizes) <= 1
            seen += labels.tolist()
        assert sorted(seen) == list(range(images))
        assert seen == draw_order(config.seed, epoch, images).tolist()


def test_without_torchrun_there_is_one_rank_and_nothing_to_agree_on(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ranks, x = join(CPU), torch.randn(3)
    assert ranks == Ranks()
    assert ranks.is_first
    assert ranks.sum(x) is x
    assert ranks.any(15) == 15
    assert ranks.all_equal("a")
    ranks.wait()
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("env", "device", "error", "words"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "cuda:0", DeviceError, r"cuda:0 is one GPU.*device=auto"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "cpu", UsageError, r"MASTER_ADDR.*torchrun"),
        *(
            ({"RANK": "0", "WORLD_SIZE": "1", "CIFAR10_RANK_TIMEOUT_S": text}, "cpu", UsageError, "RANK_TIMEOUT_S")
            for text in ("soon", "0", "-1", "nan", "inf")
        ),
    ],
    ids=["shared_gpu", "half_an_environment", "soon", "0", "-1", "nan", "inf"],
)
def test_an_environment_that_cannot_be_is_refused(monkeypatch, env, device, error, words):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=words):
        join(torch.device(device))


def test_a_hanging_rank_ends_the_job_within_a_minute():
    torchrun_s = 30  # between its SIGTERM and its SIGKILL, by default
    assert STEP_S + LEAVE_S + torchrun_s < 57


# What ranks learn and agree on


class Ghosts:
    """The reference: one process passes each shard through the network, with statistics of its own for each."""

    def __init__(self, world: int):
        self.data, config = tiny_dataset(65, 33), tiny_config()
        network = build_network(config).to(memory_format=torch.channels_last)
        self.networks = [network, *(copy.deepcopy(network) for _ in range(world - 1))]
        self.batches = [
            Batches(self.data.train_images, self.data.train_labels, config, CPU, torch.float32, rank, world)
            for rank in range(world)
        ]
        self.step = TrainingStep(network, config, self.batches[0].steps_per_epoch, self.add_the_other_shards)
        self.gradients: list[list[torch.Tensor]] = []
        self.others: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.loss = self.correct = 0.0

    def add_the_other_shards(self, _: torch.Tensor) -> None:
        parameters = list(self.step.network.parameters())
        for network, (x, labels) in zip(self.networks[1:], self.others, strict=True):
            for p, q in zip(network.parameters(), parameters, strict=True):
                p.data.copy_(q)
            logits = network(x)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            for q, g in zip(parameters, torch.autograd.grad(loss, list(network.parameters())), strict=True):
                q.grad += g
            self.loss += float(loss.detach())
            self.correct += int((logits.argmax(1) == labels).sum())
        self.gradients.append([p.grad.clone() for p in parameters])

    def train(self, epochs: int) -> None:
        for epoch in range(epochs):
            self.step.start_epoch()
            self.loss = self.correct = 0.0
            for mine, *others in zip(*(loaded(b, epoch) for b in self.batches), strict=True):
                self.others = others
                self.step(*mine)
        self.loss += float(self.step.loss_sum)
        self.correct += int(self.step.correct)

    def trainer(self, buffers: list[torch.Tensor]) -> Trainer:
        """The learned network, to be evaluated with these statistics."""
        config = self.batches[0].config
        whole = Batches(self.data.train_images, self.data.train_labels, config, CPU, torch.float32)
        trainer = Trainer(whole, self.data, Ranks())
        trainer.network.load_state_dict(self.step.network.state_dict())
        for target, source in zip(trainer.network.buffers(), buffers, strict=True):
            target.copy_(source)
        return trainer


def equal(a: object, b: object) -> bool:
    """Bit for bit, through lists and dictionaries."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@needs_gloo
def test_two_ranks_equal_one_process_on_ghost_batches(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks compute, so that sums have their order
    ghost = Ghosts(world=2)
    ghost.train(epochs=2)
    torch.set_num_threads(threads)
    in_ranks(2, "learn_twice", tmp_path)
    both = [torch.load(tmp_path / f"result-{rank}.pt", weights_only=True) for rank in range(2)]
    for result in both:
        assert equal(result["first"], result["again"])  # the same seed, the same bits
        assert not [name for name in result["threads"] if "gloo" in name]  # or one may abort the process as it ends
    ranks = [result["first"] for result in both]
    mean = [(a + b) / 2 for a, b in zip(ranks[0]["own"], ranks[1]["own"], strict=True)]
    alone = ghost.trainer(mean).evaluate()
    assert len(ghost.gradients) == 8
    assert not equal(ranks[0]["own"], ranks[1]["own"])
    for rank, ours in enumerate(ranks):
        assert equal(ours["gradients"], ghost.gradients)
        assert equal(ours["parameters"], list(ghost.step.network.parameters()))
        assert equal(ours["own"], list(ghost.networks[rank].buffers()))
        assert equal(ours["averaged"], mean)
        loss, accuracy, classes = ours["evaluation"]
        assert (accuracy, classes) == (alone.accuracy, alone.class_accuracy)
        assert loss == pytest.approx(alone.loss, rel=1e-6)
        assert ours["epoch"] == pytest.approx((ghost.loss / 65, ghost.correct / 65), rel=1e-5)
        assert [float(t) for t in ours["sums"]] == pytest.approx([ghost.loss, ghost.correct], rel=1e-5)


@needs_gloo
def test_ranks_agree_on_their_kernels_and_ask_once(tmp_path):
    pytest.importorskip("triton")
    in_ranks(2, "agree_on_kernels", tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    for rank in range(2):
        assert read_json(tmp_path / f"told-{rank}") == {"right": None, "wrong": "bad", "one": "no GPU"}
    assert [(tmp_path / name).read_text() for name in ("right", "wrong", "one")] == ["asked\n"] * 3


@needs_gloo
@pytest.mark.parametrize(
    ("world", "stops"),
    [
        pytest.param(2, [6, 12], id="two"),
        pytest.param(3, [1, 4, 6, 11, 12], id="three", marks=pytest.mark.slow),
    ],
)
def test_ranks_with_an_empty_shard_resume_bit_for_bit(tmp_path, world, stops):
    """The last rank gets nothing of an epoch's last batch."""
    in_ranks(world, "resume", tmp_path, stops)
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"whole-0", *(f"stopped{stop}-0" for stop in stops), "differ-0"}
    whole, log = final_tensors(tmp_path / "whole-0"), read_jsonl(tmp_path / "whole-0" / "log.jsonl")
    assert [row["step"] for row in log] == [4, 8, 12]
    for stop in stops:
        resumed = final_tensors(tmp_path / f"stopped{stop}-0")
        assert resumed.keys() == whole.keys()
        for name, tensor in whole.items():
            if name == "sums.loss":  # added up when the first part was saved
                assert float(resumed[name]) == pytest.approx(float(tensor), rel=1e-5)
            elif "running_" in name:  # averaged then, and at the end of an epoch: after its empty step
                close = 1e-5 if stop % 4 == 0 else 0.05
                assert float((resumed[name] - tensor).norm()) <= close * float(tensor.norm())
            else:
                assert torch.equal(resumed[name], tensor), (stop, name)
        for ours, expected in zip(read_jsonl(tmp_path / f"stopped{stop}-0" / "log.jsonl"), log, strict=True):
            assert ours["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
            assert ours["train_accuracy"] == expected["train_accuracy"]
            assert ours["test_accuracy"] == pytest.approx(expected["test_accuracy"], abs=1.5 / 31)
    for rank in range(world):
        assert "different checkpoints" in (tmp_path / f"differ-{rank}.txt").read_text()
    assert read_json(tmp_path / "differ-0" / "summary.json")["exit_code"] == 8
