import json
import subprocess
import sys

import pytest
import torch
from runs import tiny_config, tiny_dataset

from experiments import step_speeds, steps
from experiments.study.folder import Request
from model.errors import RunError
from model.network import ResNet
from profiling import ROOT
from profiling.account.work import flops_per_image
from profiling.bench.timing import QUICK
from profiling.output.terminal import Terminal

CPU = torch.device("cpu")
SETTINGS = ("widths=8,8,8,8", "device=cpu", "dtype=float32")


@pytest.fixture(autouse=True)
def few_images(monkeypatch, request):
    monkeypatch.setattr("model.data.cifar10.load", lambda *args, **kwargs: tiny_dataset())
    if "as_many" not in request.node.name:
        monkeypatch.setattr(step_speeds, "as_many_as_cifar10", lambda dataset: dataset)


def measured(modes, batches=(20,), out=None) -> dict:
    request, options = Request(out=out, settings=SETTINGS), {"trained": "laptop", "steps": 2, "quick": True}
    return steps.run(request, Terminal(), None, batches=batches, modes=modes, **options)


def test_plain_loop_trains_the_article_s_network():
    assert flops_per_image(step_speeds.PlainResNet) == flops_per_image(ResNet)
    assert sum(p.numel() for p in step_speeds.PlainResNet().parameters()) == 5_205_834


def test_modes_take_turns_on_whole_batches(monkeypatch):
    """On a CPU nothing is captured, and the row says so."""
    monkeypatch.setattr("model.step.COMPILER", "eager")
    rows = step_speeds.measure(tiny_config(), tiny_dataset(), CPU, steps.MODES, 3, QUICK)
    assert [row["step"] for row in rows] == list(steps.MODES)
    able, captured = [rows[0], rows[1]], rows[2]
    for row in able:
        assert row["reason"] is None
        assert 0 < row["low"] <= row["images_per_s"] <= row["high"]
        assert (row["idle_share"], row["against"]) == (None, "eager")
    assert "needs a CUDA GPU" in captured["reason"]
    assert "images_per_s" not in captured
    assert "unavailable: a CUDA graph" in steps.cells(captured)[2]
    json.dumps(rows)


@pytest.mark.parametrize(("network", "able"), [("resnet", True), ("resnet9", False)])
def test_plain_loop_is_a_mode_of_the_article_s_network(network, able):
    config = tiny_config(network=network, prep_bn_relu=False)
    (row,) = step_speeds.measure(config, tiny_dataset(), CPU, ("plain",), 1, QUICK)
    assert row["images_per_s"] > 0 if able else "not network=resnet9" in row["reason"]


def test_a_batch_of_more_images_than_there_are_is_refused():
    with pytest.raises(RunError, match="batch 99 is more than the 70 images"):
        step_speeds.measure(tiny_config(batch_size=99), tiny_dataset(), CPU, ("eager",), 1, QUICK)


def test_training_goes_on_without_an_end():
    trainer, reason = step_speeds.prepare(tiny_config(epochs=1, lr_epochs=(0, 0.5, 1)), tiny_dataset(60), CPU)
    assert reason is None
    stream = step_speeds.endless(trainer)
    assert [next(stream) for _ in range(7)] == [20] * 7
    assert trainer.step.number == 7


def test_command_prints_a_table_and_writes_each_batch(tmp_path, capsys):
    document = measured(("eager", "plain"), (20, 35), tmp_path / "out")
    assert "eager" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert written == document
    assert [(row["batch"], row["step"]) for row in written["rows"]] == [
        *((20, "eager"), (20, "plain"), (35, "eager"), (35, "plain"))
    ]
    assert written["environment"]["packages"]["torch"]
    assert written["peak_memory_bytes"] > 2**20


def test_a_batch_that_fails_leaves_what_was_measured(monkeypatch, tmp_path):
    """One mode that runs out of memory is a row with its reason; an error that nobody expects comes after the rows."""
    original, batches = step_speeds.prepare, []

    def prepare(config, *rest):
        batches.append(config.batch_size)
        if len(batches) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(config, *rest)

    def breaks(stream, wall_us, device):
        if len(batches) > 2:
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(step_speeds, "prepare", prepare)
    monkeypatch.setattr(step_speeds, "idle_share", breaks)
    with pytest.raises(RuntimeError, match="illegal"):
        measured(("eager", "captured"), (20, 35), tmp_path)
    eager, captured = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert (eager["batch"], eager["reason"]) == (20, None)
    assert "out of memory at batch_size=20" in captured["reason"]


def test_apart_takes_turns_of_processes_and_prints_ratio_and_peak(monkeypatch, capsys, tmp_path):
    asked = []

    def process(words):
        mode = words[-1]
        asked.append(words)
        row = {"batch": 20, "step": mode, "reason": None, "images_per_s": 300.0 if mode == "eager" else 100.0}
        row["reason"] = "no GPU" if mode == "captured" else None
        return {"environment": {}, "rows": [row], "peak_memory_bytes": 2**30}

    monkeypatch.setattr(steps, "measure_apart", process)
    monkeypatch.setenv("COLUMNS", "200")
    request = Request(out=tmp_path, settings=SETTINGS)
    found = steps.run(request, Terminal(), None, "laptop", (20,), ("plain", "eager", "captured"), 2, True, True)
    assert [words[-1] for words in asked] == ["plain", "eager", "captured", "captured", "eager", "plain"]
    assert [words[:2] for words in asked] == [["--preset", "laptop"]] * 6
    assert {"--quick", "--set", *SETTINGS, "--steps", "--batch"} <= set(asked[0])
    out = capsys.readouterr().out
    assert "3.00 times (3.00, 3.00)" in out
    assert "1,074 MB" in out
    assert "unavailable: no GPU" in out
    assert json.loads((tmp_path / "steps.json").read_text()) == found


WORDS = ["--preset", "article-256", "--quick", "--steps", "1", "--batch", "16", "--mode"]


@pytest.mark.slow
def test_a_process_apart_measures():
    found = steps.measure_apart([*WORDS, "plain", *(word for setting in SETTINGS for word in ("--set", setting))])
    assert found["rows"][0]["images_per_s"] > 0


def test_a_process_apart_that_fails_says_why():
    with pytest.raises(RunError, match=r"the process of --batch 16 --mode slow failed: error: --mode slow is unknown"):
        steps.measure_apart([*WORDS, "slow"])


def test_synthetic_images_are_as_many_as_cifar_10_s():
    data = step_speeds.as_many_as_cifar10(tiny_dataset())
    assert len(data.train_images) == len(data.train_labels) == 50_000
    assert torch.equal(data.train_images[140:210], tiny_dataset().train_images)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("collection-overhead --pairs 1", "'--pairs'"),
        ("longest-kernels", "RUN"),
        ("steps --batch 128 --batch 0", "'--batch'"),
        ("steps --batch 99999999999999999999", "batch_size=99999999999999999999 is too large"),
        ("steps --steps 0", "'--steps'"),
        ("steps --steps x", "'--steps'"),
        ("steps --step 3", "--step"),
        ("steps --mode slow", "--mode slow is unknown; expected eager, compiled, captured, plain"),
        ("steps --preset lapto", "did you mean 'laptop'?"),
        ("steps --set widhts=8,8,8,8", "did you mean 'widths'?"),
        ("steps --set batch-size=8", "--set batch_size is what this measures several of; give --batch instead"),
        ("steps --out README.md", "README.md is not a folder"),
    ],
)
def test_a_slip_of_the_finger_is_a_line_and_exit_code_2_before_torch_is_loaded(words, expected):
    """torch takes a second to load, and cannot here."""
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:];"
        "runpy.run_module(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, "experiments", *words.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
