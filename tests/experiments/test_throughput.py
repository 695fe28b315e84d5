import json
import subprocess
import sys

import torch

from experiments import loops, throughput
from model.network import ResNet
from profiling.account.work import flops_per_image


def test_the_plain_loop_trains_the_article_s_network():
    assert flops_per_image(loops.PlainResNet) == flops_per_image(ResNet)
    assert sum(p.numel() for p in loops.PlainResNet().parameters()) == 5_205_834


def test_a_measurement_is_steps_on_a_clock(monkeypatch, capsys):
    monkeypatch.setattr(loops, "BATCH", 4)
    monkeypatch.setattr(throughput, "BATCH", 4)
    monkeypatch.setattr(
        loops, "PlainResNet", lambda: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    )
    throughput.child("plain", 3)
    found = json.loads(capsys.readouterr().out)
    assert found["images_per_s"] > 0
    assert found["peak_memory_bytes"] > 2**20


def test_the_comparison_takes_turns_and_prints_its_ratio(monkeypatch, capsys):
    asked = []

    def measure(case: str, steps: int) -> dict[str, float]:
        asked.append(case)
        return {"images_per_s": 300.0 if case == "article-256" else 100.0, "peak_memory_bytes": 2**30}

    monkeypatch.setattr(throughput, "measure", measure)
    monkeypatch.setattr("sys.argv", ["throughput"])
    throughput.main()
    assert asked[:4] == ["article-256", "plain", "plain", "article-256"]
    out = capsys.readouterr().out
    assert "3.00 times" in out
    assert "1,074 MB" in out


def test_ours_is_timed_through_train(monkeypatch):
    done = subprocess.run(
        [
            sys.executable, "-c",
            "from experiments.loops import ours;"
            "print(len(ours(['laptop', 'widths=8,8,8,8', 'batch_size=64', 'dtype=float32'], 3)))",
        ],
        cwd=throughput.ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "3"
