"""Images per second of a step in each mode: measured, kept, shown, and refused."""

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


def measured(modes, batches, out) -> dict:
    request, options = Request(out=out, settings=SETTINGS), {"trained": "laptop", "steps": 2, "quick": True}
    return steps.run(request, Terminal(), None, batches=batches, modes=modes, **options)


def test_plain_loop_trains_the_article_s_network():
    assert flops_per_image(step_speeds.PlainResNet) == flops_per_image(ResNet)
    assert sum(p.numel() for p in step_speeds.PlainResNet().parameters()) == 5_205_834


@pytest.mark.parametrize(
    "able", [("eager", "plain"), pytest.param(("eager", "compiled", "plain"), marks=pytest.mark.slow)]
)
def test_modes_take_turns_on_whole_batches(monkeypatch, able):
    """On a CPU nothing is captured, and the row says so."""
    monkeypatch.setattr("model.step.COMPILER", "eager")
    config = tiny_config(network="resnet", prep_bn_relu=False)
    *rows, captured = step_speeds.measure(config, tiny_dataset(), CPU, (*able, "captured"), 3, QUICK)
    assert [row["step"] for row in rows] == list(able)
    for row in rows:
        assert row["reason"] is None
        assert 0 < row["low"] <= row["images_per_s"] <= row["high"]
        assert (row["idle_share"], row["against"]) == (None, "eager")
    assert "needs a CUDA GPU" in captured["reason"]
    assert "images_per_s" not in captured
    assert "unavailable: a CUDA graph" in steps.cells(captured)[2]
    json.dumps([*rows, captured])


def test_batch_of_more_images_than_there_are_is_refused():
    with pytest.raises(RunError, match="batch 99 is more than the 70 images"):
        step_speeds.measure(tiny_config(batch_size=99), tiny_dataset(), CPU, ("eager",), 1, QUICK)


def test_training_goes_on_without_an_end():
    stream, reason = step_speeds.start("eager", tiny_config(epochs=1, lr_epochs=(0, 0.5, 1)), tiny_dataset(60), CPU)
    assert ([next(stream) for _ in range(7)], reason) == ([20] * 7, None)


def test_command_prints_a_table_and_writes_each_batch(tmp_path, capsys):
    document = measured(("eager", "plain"), (20, 35), tmp_path / "out")
    assert "eager" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "steps.json").read_text())
    assert written == document
    found = [(row["batch"], row["step"]) for row in written["rows"]]
    assert found == [(batch, mode) for batch in (20, 35) for mode in ("eager", "plain")]
    assert "the article's network only, not network=resnet9" in written["rows"][1]["reason"]
    assert written["environment"]["packages"]["torch"]
    assert written["peak_memory_bytes"] > 2**20


def test_batch_that_fails_leaves_what_was_measured(monkeypatch, tmp_path):
    """One mode that runs out of memory is a row with its reason; an error that nobody expects comes after the rows."""
    original, batches = step_speeds.start, []

    def start(mode, config, *rest):
        batches.append(config.batch_size)
        if len(batches) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(mode, config, *rest)

    def breaks(stream, wall_us, device):
        if len(batches) > 2:
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(step_speeds, "start", start)
    monkeypatch.setattr(step_speeds, "idle_share", breaks)
    with pytest.raises(RuntimeError, match="illegal"):
        measured(("eager", "captured"), (20, 35), tmp_path)
    eager, captured = json.loads((tmp_path / "steps.json").read_text())["rows"]
    assert (eager["batch"], eager["reason"]) == (20, None)
    assert "out of memory at batch_size=20" in captured["reason"]


def test_apart_takes_turns_of_processes_and_prints_ratio_and_peak(monkeypatch, capsys, tmp_path):
    asked = []

    def process(words):
        asked.append(words)
        row = {"batch": 20, "step": words[-1], "reason": "no GPU" if words[-1] == "captured" else None}
        row["images_per_s"] = 300.0 if words[-1] == "eager" else 100.0
        return {"environment": {}, "rows": [row], "peak_memory_bytes": 2**30}

    monkeypatch.setattr(steps, "measure_apart", process)
    monkeypatch.setenv("COLUMNS", "200")
    request = Request(out=tmp_path, settings=SETTINGS)
    found = steps.run(request, Terminal(), None, "laptop", (20,), ("plain", "eager", "captured"), 2, True, True)
    assert [words[-1] for words in asked] == ["plain", "eager", "captured", "captured", "eager", "plain"]
    assert {"laptop", "--quick", "--set", *SETTINGS, "--steps", "--batch"} <= set(asked[0])
    out = capsys.readouterr().out
    for said in ("3.00 times (3.00, 3.00)", "1,074 MB", "unavailable: no GPU"):
        assert said in out
    assert json.loads((tmp_path / "steps.json").read_text()) == found


WORDS = ["--preset", "article-256", "--quick", "--steps", "1", "--batch", "16", "--mode"]


@pytest.mark.slow
def test_process_apart_measures():
    found = steps.measure_apart([*WORDS, "plain", *(word for setting in SETTINGS for word in ("--set", setting))])
    assert found["rows"][0]["images_per_s"] > 0


def test_process_apart_that_fails_says_why():
    with pytest.raises(RunError, match=r"the process of --batch 16 --mode slow failed: error: --mode slow is unknown"):
        steps.measure_apart([*WORDS, "slow"])


def test_synthetic_images_are_as_many_as_cifar_10_s():
    data = step_speeds.as_many_as_cifar10(tiny_dataset())
    assert len(data.train_images) == len(data.train_labels) == 50_000
    assert torch.equal(data.train_images[140:210], tiny_dataset().train_images)


REFUSED = {
    "collection-overhead --pairs 1": "'--pairs'",
    "longest-kernels": "RUN",
    "steps --batch 128 --batch 0": "'--batch'",
    "steps --batch 99999999999999999999": "batch_size=99999999999999999999 is too large",
    "steps --steps 0": "'--steps'",
    "steps --steps x": "'--steps'",
    "steps --step 3": "--step",
    "steps --mode slow": "--mode slow is unknown; expected eager, compiled, captured, plain",
    "steps --preset lapto": "did you mean 'laptop'?",
    "steps --set widhts=8,8,8,8": "did you mean 'widths'?",
    "steps --set batch-size=8": "--set batch_size is what this measures several of; give --batch instead",
    "steps --out README.md": "README.md is not a folder",
}


def test_wrong_word_is_a_line_and_exit_code_2_before_torch_is_loaded():
    """torch takes a second to load, and cannot here."""
    code = (
        "import contextlib, io, json, sys; sys.modules['torch'] = None\n"
        "from experiments.__main__ import app; from profiling.output import command_line\n"
        "found = []\n"
        "for words in sys.argv[1:]:\n"
        "    sys.argv, said = ['experiments', *words.split()], io.StringIO()\n"
        "    with contextlib.redirect_stderr(said):\n"
        "        try:\n            command_line.run(app)\n"
        "        except SystemExit as end:\n            found.append((end.code, said.getvalue()))\n"
        "print(json.dumps(found))"
    )
    command = [sys.executable, "-c", code, *REFUSED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    for (words, said), (exit_code, line) in zip(REFUSED.items(), json.loads(done.stdout), strict=True):
        assert exit_code == 2, (words, line)
        assert line.startswith("error: "), words
        assert said in line
        assert line.count("\n") == 1
