import dataclasses
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rung_processes
import torch
from runs import tiny_dataset, tiny_session

import train
from experiments import ladder, stand
from experiments.ladder_rungs import HOST, RUNGS, WITHOUT_HOST, Rung
from experiments.study.folder import Request, Study
from model.errors import UsageError
from model.presets import PRESETS
from profiling.output.terminal import Terminal

QUIET = Terminal(speaks=False)
TINY = ("widths=8,8,8,8", "dtype=float32", "device=cpu", "epochs=2")
NAMED = {rung.name: rung for rung in RUNGS}
FEW = tuple(NAMED[name] for name in ("article-297", "article-256", "on-device", "eager"))


def study(folder) -> Study:
    return Study("ladder", folder, {"device": "cpu", "device_name": "a CPU", "data_identity": "synthetic"}, QUIET)


def measured(one: Study, rungs=FEW, turns=4, configure=lambda rung: rung.config(0, TINY), **more) -> list[dict]:
    return ladder.Measurement(one, tiny_session(), rungs, configure, turns, **more).run()


def test_the_rungs_are_the_articles_presets_and_each_makes_one_step():
    article = [rung for rung in RUNGS if rung.article_s]
    assert [rung.article_s for rung in article] == [341, 323, 308, 301, 297, 256]
    assert [rung.credited_s for rung in article] == [None, -18, -15, -7, -4, -41]
    assert all(rung.config() == PRESETS[rung.name]() for rung in article)
    assert all(b.article_s - a.article_s == b.credited_s for a, b in itertools.pairwise(article))
    alike = [dataclasses.replace(rung.config(), preset="") for rung in RUNGS]
    assert all(a != b for a, b in itertools.pairwise(alike))
    assert {rung.config(cutout=8).cutout for rung in RUNGS} == {8}
    assert [config.step for config in alike] == ["auto"] * (len(RUNGS) - 1) + ["eager"]
    captured = NAMED[WITHOUT_HOST].config()  # known by its preset's name
    assert dataclasses.replace(NAMED[HOST].config(), step="auto") == captured
    assert dataclasses.replace(captured, preset="fused") == PRESETS["fused"]()


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (["workers=2"], {}, "would make rungs alike"),
        (["cutout=8"], {}, "use --cutout"),
        ([], {"epochs_per_rung": 3}, "an even number"),
        ([], {"epochs_per_rung": 2}, "at least 4"),
        ([], {"cutout": 33}, "cutout=33"),
    ],
    ids=["varied_setting", "cutout_setting", "odd_turns", "too_few_turns", "too_large_cutout"],
)
def test_options_are_refused_before_torch_is_needed(settings, options, message):
    with pytest.raises(UsageError, match=message):
        ladder.check(Request(settings=tuple(settings)), **options)
    ladder.check(Request(settings=("widths=8,8,8,8",)), 4)


def test_turns_go_there_and_back_and_a_rung_without_its_gpu_is_unavailable(tmp_path):
    one = study(tmp_path)
    rows = measured(one, target=rung_processes.healthy)
    names = ["article-297", "article-256", "on-device"]
    turns = [key.partition("/")[2] for key in one.results if key.startswith("turn")]
    assert turns == [*names, *names[::-1]] * 2
    assert [len(row["turns"]) for row in rows] == [4, 4, 4, 0]
    assert rows[-1]["reason"] == "kernels and CUDA graphs need a CUDA GPU"
    json.dumps(rows, allow_nan=False)
    assert measured(study(tmp_path), target=None) == rows  # a finished ladder starts nothing


@pytest.mark.parametrize(("seconds", "turns"), [(0.0, 4), (0.22, 6), (1e9, 32)], ids=["slow", "some", "fast"])
def test_a_small_ladder_has_as_many_turns_as_there_is_time_for_and_keeps_to_them(tmp_path, monkeypatch, seconds, turns):
    """Three rungs, whose uncounted epochs took 10 ms each."""
    monkeypatch.setattr(ladder, "SMALL_S", seconds)
    rows = measured(study(tmp_path), turns=None, target=rung_processes.healthy)
    assert [len(row["turns"]) for row in rows] == [turns, turns, turns, 0]
    monkeypatch.setattr(ladder, "SMALL_S", 60.0)
    assert measured(study(tmp_path), turns=None, target=None) == rows


def test_a_rung_that_breaks_leaves_the_others_alone(tmp_path, monkeypatch):
    """Each says why it is missing; the next call tries again those that may yet run."""
    monkeypatch.setattr(ladder, "TURN_S", 1.0)

    def configure(rung: Rung):
        return rung.config(0, [*TINY, "network=none"] if rung.name == "batch-norm" else TINY)

    one, seen = study(tmp_path), []
    rungs = (*RUNGS[:7], dataclasses.replace(NAMED["batch-norm"], changes=()), FEW[-1])
    rows = measured(one, rungs, configure=configure, target=rung_processes.troubled, on_result=seen.append)
    reasons = {row["name"]: row["reason"] for row in rows}
    assert reasons.pop("batch-norm").startswith("network='none' is not one of")
    assert reasons == {
        "article-341": "its process ended by SIGSEGV",
        "article-323": "its process did not answer within 1 s",
        "article-308": "AcceleratorError: an illegal memory access",
        "article-301": "no such kernels here",
        "article-297": "its process ended by exit code 3",
        "article-256": None,
        "on-device": None,
        "eager": "kernels and CUDA graphs need a CUDA GPU",
    }
    assert [len(row["turns"]) for row in rows] == [1, 0, 0, 0, 0, 4, 4, 0, 0]
    assert seen[-1] == rows
    counts = [sum(len(row["turns"]) for row in found) for found in seen]
    assert counts == sorted(counts)
    again = study(tmp_path)
    rows = measured(again, rungs, configure=configure, target=rung_processes.healthy)
    assert [len(row["turns"]) for row in rows] == [4, 4, 4, 0, 4, 4, 4, 0, 0]
    assert {row["name"] for row in rows if row["reason"]} == {"article-301", "batch-norm", "eager"}
    assert {key: again.results[key] for key in one.results} == one.results


class Script:
    """The ladder's end of a rung's pipe: it asks these words, then hangs up; without any it has gone already."""

    def __init__(self, *words: str):
        self.words, self.answers = list(words), []

    def send(self, answer) -> None:
        if not self.words and not self.answers:
            raise BrokenPipeError
        self.answers.append(answer)

    def recv(self) -> str:
        if not self.words:
            raise EOFError
        return self.words.pop(0)


BLOWS_UP = [*TINY, f"lr_values={','.join(['1e38'] * len(FEW[1].config().lr_values))}", "batch_size=20"]


@pytest.mark.parametrize(
    ("config", "words", "expected"),
    [
        (FEW[1].config(0, TINY), ["set-up", "turn"], ["done", "done", "done"]),
        (FEW[1].config(0, BLOWS_UP), ["set-up", "turn"], ["done", "failed: NonFiniteError: the gradient at step"]),
        (
            dataclasses.replace(FEW[2].config(0, TINY), step="captured"),
            ["set-up"],
            ["done", "refused: the step cannot be captured: "],
        ),
        (FEW[1].config(0, TINY), [], []),
    ],
    ids=["healthy", "not_finite", "not_captured", "ladder_over_before_it_has_started"],
)
def test_a_rung_answers_or_says_what_went_wrong_and_ends(monkeypatch, capfd, config, words, expected):
    ignored = {}
    monkeypatch.setattr("signal.signal", lambda number, handler: ignored.setdefault(number.name, handler.name))
    with stand.Company(tiny_dataset(), QUIET.say) as company:
        pipe = Script(*words)
        stand.serve(pipe, stand.Assignment("x", config, "cpu", company.data, 1))
    said = [kind if kind == "done" else f"{kind}: {value}" for kind, value in pipe.answers]
    assert len(said) == len(expected)
    assert all(answer.startswith(start) for answer, start in zip(said, expected, strict=True))
    if expected == ["done", "done", "done"]:
        facts, seconds = (value for _, value in pipe.answers[1:])
        assert 0 < facts["input_s"] < facts["epoch_s"] < facts["set_up_s"]
        assert (facts["images"], facts["test_images"], facts["step"]) == (70, 30, "eager")
        assert seconds["train_s"] > 0 < seconds["eval_s"]
    assert ignored == {"SIGINT": "SIG_IGN", "SIGTERM": "SIG_IGN"}  # only the ladder's process decides
    assert capfd.readouterr() == ("", "")


def kept(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_ladder_leaves_a_whole_document_and_nobody_behind(tmp_path, monkeypatch):
    """SIGKILL cannot be answered: what was measured is on the disk, and the rungs' processes end by themselves."""
    out, pids = tmp_path / "out", tmp_path / "pids"
    monkeypatch.setenv("PIDS", str(pids))
    process = subprocess.Popen([sys.executable, rung_processes.__file__, str(out)])
    while not ((out / "results.jsonl").exists() and sum("turn" in row["key"] for row in kept(out)) >= 3):
        assert process.poll() is None, "the ladder ended too early"
        time.sleep(0.05)
    process.kill()
    process.wait()
    document = json.loads((out / "ladder.json").read_text())
    assert not document["complete"]
    assert sum(rung["epoch_train_s"]["n"] for rung in document["result"]["rungs"]) >= 2
    left = {int(pid) for pid in pids.read_text().split()}
    assert len(left) == 2
    while any(map(alive, left)):
        time.sleep(0.05)
    before = kept(out)
    monkeypatch.setattr(train, "open_session", lambda *args, **kwargs: tiny_session())
    assert rung_processes.ladder_of_two(out)["complete"]
    after = kept(out)
    assert after[: len(before)] == before
    assert sum("turn" in row["key"] for row in after) == 2 * 4


def test_the_command_measures_draws_and_trains_to_the_end(tmp_path, monkeypatch):
    """Each rung in a process of its own, which imports torch: this takes the seconds."""
    monkeypatch.setattr(train, "open_session", lambda *args, **kwargs: tiny_session())
    out, options = tmp_path / "out", {"epochs_per_rung": 4, "full": True, "rungs": FEW[1:3]}
    request = Request(small=True, out=out, synthetic=True, settings=TINY[1:], seed=3)
    document = ladder.run(request, QUIET, None, **options)
    names = {path.name for path in out.iterdir()}
    assert {"ladder.json", "ladder.html", "ladder.svg", "steps.png", "article-256", "on-device"} <= names
    facts, *_ = (row["result"] for row in kept(out) if row["key"].startswith("set-up"))
    assert (facts["config"]["widths"], facts["config"]["seed"]) == ([8, 8, 8, 8], 3)
    turns = [row["result"] for row in kept(out) if row["key"].startswith("turn")]
    assert all(turn["train_s"] > 0 < turn["eval_s"] for turn in turns)
    whole = document["result"]["rungs"][0]["full"]
    assert whole["epochs"] == 2
    assert 0 <= whole["test_accuracy"] <= 1
    assert document["tables"][0]["rows"][0][-1] == f"{whole['test_accuracy']:.2%}"
    assert any("n = 1 each" in sentence for sentence in document["sentences"])
    assert any("--small" in caveat for caveat in document["caveats"])
    assert ladder.run(request, QUIET, None, **options)["result"] == document["result"]


def test_a_killed_whole_run_goes_on_and_one_that_blows_up_is_a_result(tmp_path, monkeypatch):
    def whole(folder, **changes) -> dict:
        return ladder.train_whole(study(tmp_path / folder), session, {"name": "x", "config": {**config, **changes}})

    config = FEW[1].config(0, [*TINY[:3], "batch_size=20", "checkpoint_s=0", "epochs=3"]).to_json()
    session, original = tiny_session(), train.run
    undisturbed = whole("a")

    def dies(session, config, folder, found, require_ops):
        def on_step(number: int) -> None:
            if number == 6:
                raise KeyboardInterrupt

        return original(session, config, folder, found, on_step=on_step)

    monkeypatch.setattr(train, "run", dies)
    with pytest.raises(KeyboardInterrupt):
        whole("b")
    monkeypatch.setattr(train, "run", original)
    resumed = whole("b")
    assert (resumed["test_accuracy"], resumed["epochs"]) == (undisturbed["test_accuracy"], 3)
    assert whole("c", lr_values=[1e38] * len(config["lr_values"]))["status"] == "non-finite"
    assert not session.interrupts.deferred  # signals are no longer put off


def test_small_takes_the_first_images_only():
    cut = ladder.first_images(tiny_dataset(70, 30), 20, 10)
    assert (len(cut.train_images), len(cut.train_labels), len(cut.test_images), len(cut.test_labels)) == (
        20,
        20,
        10,
        10,
    )
    assert torch.equal(cut.train_images, tiny_dataset(70, 30).train_images[:20])
