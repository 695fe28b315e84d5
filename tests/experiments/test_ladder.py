import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rung_processes
import torch
from runs import tiny_dataset, tiny_session

from experiments import ladder, ladder_chart, ladder_report, stand
from experiments.ladder_rungs import HOST, RUNGS, WITHOUT_HOST, Rung, require_own
from experiments.study.folder import Request, Study
from model.config import Config
from model.errors import UsageError
from model.presets import PRESETS
from profiling.output.terminal import Terminal

QUIET = Terminal(speaks=False)
TINY = ("widths=8,8,8,8", "dtype=float32", "device=cpu", "epochs=2")
FEW = tuple(rung for rung in RUNGS if rung.name in ("article-297", "article-256", "on-device", "eager"))


class Killed(BaseException):
    pass


def study(folder) -> Study:
    return Study("ladder", folder, {"device": "cpu", "device_name": "a CPU", "data_identity": "synthetic"}, QUIET)


def measured(one: Study, rungs=FEW, turns=4, **more) -> list[dict]:
    return ladder.Measurement(one, tiny_session(), rungs, lambda rung: rung.config(0, TINY), turns, **more).run()


def row(name: str, times: list[float], **more) -> dict:
    """What `Measurement` returns of a rung with these seconds of training in its turns."""
    rung = next(rung for rung in RUNGS if rung.name == name)
    turns = [{"train_s": t, "eval_s": 0.5} for t in times]
    facts = {"config": rung.config().to_json(), "dtype": "float16", "step": "captured", "workers": 0}
    facts |= {"preprocessing_s": 1.0, "images": 50_000, "test_images": 10_000, "flops_per_image": 2.5e9}
    facts |= {"input_s": 0.5, "epoch_s": 1.0, "set_up_s": 1.0}
    return {**dataclasses.asdict(rung), "reason": None, **facts, "turns": turns, **more}


def missing(name: str) -> dict:
    rung = next(rung for rung in RUNGS if rung.name == name)
    return {**dataclasses.asdict(rung), "reason": "no GPU", "turns": []}


def test_the_article_s_rungs_are_its_presets_with_its_seconds():
    article = [rung for rung in RUNGS if rung.article_s]
    assert [rung.article_s for rung in article] == [341, 323, 308, 301, 297, 256]
    assert [rung.credited_s for rung in article] == [None, -18, -15, -7, -4, -41]
    for rung in article:
        assert rung.config() == PRESETS[rung.name]()
    for before, after in itertools.pairwise(article):
        assert after.article_s - before.article_s == after.credited_s


def test_rungs_step_as_they_train_and_one_shows_what_the_host_costs():
    assert [rung.config().step for rung in RUNGS] == ["auto"] * (len(RUNGS) - 1) + ["eager"]
    captured, eager = (next(rung for rung in RUNGS if rung.name == name) for name in (WITHOUT_HOST, HOST))
    assert dataclasses.replace(eager.config(), step="auto") == captured.config()


def test_each_rung_differs_from_the_one_before_and_cutout_is_an_option_of_all():
    for before, after in itertools.pairwise(RUNGS):
        assert dataclasses.replace(before.config(), preset="") != dataclasses.replace(after.config(), preset="")
    assert {rung.config(cutout=8).cutout for rung in RUNGS} == {8}


@pytest.mark.parametrize(
    ("request_", "options", "message"),
    [
        (Request(settings=("workers=2",)), {}, "would make rungs alike"),
        (Request(settings=("cutout=8",)), {}, "use --cutout"),
        (Request(), {"epochs_per_rung": 3}, "an even number"),
        (Request(), {"epochs_per_rung": 2}, "at least 4"),
        (Request(), {"cutout": 33}, "cutout=33"),
    ],
    ids=["varied_setting", "cutout_setting", "odd_turns", "too_few_turns", "too_large_cutout"],
)
def test_what_cannot_be_asked_is_said_before_torch_is_needed(request_, options, message):
    with pytest.raises(UsageError, match=message):
        ladder.check(request_, **options)
    require_own(["widths=8,8,8,8"])


def test_turns_go_there_and_back_and_a_rung_without_its_gpu_is_unavailable(tmp_path):
    one = study(tmp_path)
    rows = measured(one, target=rung_processes.healthy)
    turns = [key for key in one.results if key.startswith("turn")]
    names = ["article-297", "article-256", "on-device"]
    there = [key.partition("/")[2] for key in turns]
    assert there == [*names, *names[::-1]] * 2
    assert [len(r["turns"]) for r in rows] == [4, 4, 4, 0]
    assert rows[-1]["reason"] == "kernels and CUDA graphs need a CUDA GPU"
    json.dumps(rows, allow_nan=False)
    assert measured(study(tmp_path), target=None) == rows  # a finished ladder starts nothing


@pytest.mark.parametrize(("seconds", "turns"), [(0.0, 4), (0.2, 6), (1e9, 32)], ids=["slow", "some", "fast"])
def test_a_small_ladder_has_as_many_turns_as_there_is_time_for_and_keeps_to_them(tmp_path, monkeypatch, seconds, turns):
    """Three rungs, whose uncounted epochs took 10 ms each."""
    monkeypatch.setattr(ladder, "SMALL_S", seconds)
    rows = measured(study(tmp_path), turns=None, target=rung_processes.healthy)
    assert [len(r["turns"]) for r in rows] == [turns, turns, turns, 0]
    monkeypatch.setattr(ladder, "SMALL_S", 60.0)
    assert measured(study(tmp_path), turns=None, target=None) == rows


def test_what_breaks_one_rung_leaves_the_others_alone(tmp_path, monkeypatch):
    """Each says why it is missing; the next call tries again those that may yet run."""
    monkeypatch.setattr(ladder, "TURN_S", 1.0)
    one, seen = study(tmp_path), []
    rungs = (*RUNGS[:7], *FEW[-1:])
    rows = measured(one, rungs, target=rung_processes.troubled, on_result=seen.append)
    reasons = {row["name"]: row["reason"] for row in rows}
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
    assert [len(row["turns"]) for row in rows] == [1, 0, 0, 0, 0, 4, 4, 0]
    assert seen[-1] == rows
    assert [sum(len(row["turns"]) for row in found) for found in seen] == sorted(
        sum(len(row["turns"]) for row in found) for found in seen
    )
    again = study(tmp_path)
    rows = measured(again, rungs, target=rung_processes.healthy)
    assert [len(row["turns"]) for row in rows] == [4, 4, 4, 0, 4, 4, 4, 0]
    assert {row["name"] for row in rows if row["reason"]} == {"article-301", "eager"}
    assert {key: again.results[key] for key in one.results} == one.results


def test_a_rung_s_process_ends_in_silence_when_the_ladder_is_over_before_it_has_started(tmp_path, capfd):
    """torch takes seconds to import: an interruption in between finds nobody to answer to."""
    worker = stand.Worker(stand.Assignment("eager", FEW[1].config(0, TINY), "cpu", tmp_path), QUIET.say)
    worker.hang_up()
    worker._process.join()
    assert worker._process.exitcode == 0
    assert capfd.readouterr() == ("", "")


def test_a_rung_says_what_went_wrong_in_its_own_process(tmp_path):
    """A gradient that is not finite, and a step that a CPU cannot capture."""
    rate = ",".join(["1e38"] * len(FEW[1].config().lr_values))
    configs = {
        "blows-up": FEW[1].config(0, [*TINY, f"lr_values={rate}", "batch_size=20"]),
        "captured": dataclasses.replace(FEW[2].config(0, TINY), step="captured"),
    }
    rungs = [Rung(name, "", "article-256") for name in configs]
    failed, refused = ladder.Measurement(
        study(tmp_path), tiny_session(), rungs, lambda rung: configs[rung.name], 4
    ).run()
    assert failed["reason"].startswith("NonFiniteError: the gradient at step")
    assert refused["reason"].startswith("the step cannot be captured: ")


def test_a_killed_ladder_leaves_a_whole_document_and_nobody_behind(tmp_path, monkeypatch):
    """SIGKILL cannot be answered: what was measured is on the disk, and the rungs' processes end by themselves."""
    out, pids = tmp_path / "out", tmp_path / "pids"
    command = [sys.executable, rung_processes.__file__, str(out)]
    environment = {**os.environ, "PIDS": str(pids)}
    kept = out / "results.jsonl"
    process = subprocess.Popen(command, env=environment)
    while not (kept.exists() and kept.read_text().count("turn-") >= 3):
        assert process.poll() is None, "the ladder ended too early"
        time.sleep(0.05)
    process.kill()
    process.wait()
    document = json.loads((out / "ladder.json").read_text())
    assert not document["complete"]
    assert sum(rung["epoch_train_s"]["n"] for rung in document["result"]["rungs"]) >= 2
    left = {int(pid) for pid in pids.read_text().split()}
    assert len(left) == 2
    while any(Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) for pid in left):
        time.sleep(0.05)
    before = study_of(out)
    done = subprocess.run(command, env=environment, check=False)
    assert done.returncode == 0
    after = study_of(out)
    assert after[: len(before)] == before
    assert sum("turn" in row["key"] for row in after) == 2 * 8
    assert json.loads((out / "ladder.json").read_text())["complete"]


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def study_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_an_unfinished_ladder_says_what_it_has():
    """Rungs with fewer turns are compared by those that both have, and not at all by fewer than three."""
    rows = [row("article-341", [10.0] * 4), row("article-323", [9.0] * 3), row("article-308", [8.0, 8.0])]
    rows += [row("article-301", [])]
    found = ladder_report.analyse(rows, "a CPU")
    assert [(step["to"], step["seconds"]["n"]) for step in found["steps"]] == [("article-323", 3)]
    assert found["rungs"][2]["percent_of_first"]["low"] is None
    said = ladder_report.sentences(found)
    assert "Not measured, article-301: none of its turns has been timed yet." in said
    cells = ladder_report.tables(found)[0].rows[2]
    assert cells[:3] == ["article-308", "captured", "8"]
    assert not ladder_report.sentences(ladder_report.analyse([row("article-341", [])], "a CPU"))[0].startswith("On a")


def test_the_hosts_share_is_said_beside_the_ladder():
    rows = [row("article-256", [2.0] * 4), row("fused", [1.0] * 4), row("eager", [3.0] * 4)]
    found = ladder_report.analyse(rows, "an H100")
    assert [step["to"] for step in found["steps"]] == ["fused"]
    host = found["host"]
    assert (host["from"], host["to"]) == ("fused", "eager")
    assert host["seconds"]["median"] == pytest.approx(35 * 2)
    said = ladder_report.sentences(found)
    assert "with fused it is" in said[0]
    share = 100 * 70 / (1 + 35 * 1.5)
    assert any(f"Without its CUDA graph fused takes {share:+.1f} %" in sentence for sentence in said)
    alone = ladder_report.analyse([rows[0], rows[2]], "an H100")
    assert alone["host"] is None
    assert alone["steps"] == []


def test_a_step_is_faster_slower_or_noise_by_the_interval_of_its_turns():
    rows = [
        row("article-341", [10.0, 10.1, 9.9, 10.0]),
        row("article-323", [9.0, 9.1, 8.9, 9.0]),
        row("article-308", [9.6, 8.5, 9.4, 8.6]),
        row("article-301", [12.0, 12.1, 11.9, 12.0]),
        missing("eager"),
    ]
    found = ladder_report.analyse(rows, "a CPU")
    assert [step["verdict"] for step in found["steps"]] == ["faster", "within noise", "slower"]
    first = found["steps"][0]
    assert first["seconds"]["median"] == pytest.approx(-35)
    assert first["percent"]["median"] == pytest.approx(100 * -35 / (1 + 35 * 10.5), rel=1e-2)
    assert first["article_s"] == -18
    assert first["article_percent"] == pytest.approx(-18 / 341 * 100)
    said = " ".join(ladder_report.sentences(found))
    assert "Steps that save time (a negative change is faster): article-323" in said
    assert "Steps whose change is within noise: article-308" in said
    assert "Steps that cost time: article-301" in said
    assert "Not measured, eager: no GPU." in said
    assert "not the article's" in said


def test_drift_that_all_rungs_share_is_no_difference():
    """A machine that gets slower and slower: each turn's rungs are compared with each other."""
    drift = [1.0, 2.0, 3.0, 4.0]
    rows = [row("article-341", [10 * d for d in drift]), row("article-323", [9 * d for d in drift])]
    step = ladder_report.analyse(rows, "a CPU")["steps"][0]
    assert step["verdict"] == "faster"


def test_a_chart_says_which_direction_is_faster_and_whose_times_it_shows():
    """Read alone, without the page around it."""
    rows = [row("article-341", [10.0] * 4), row("article-323", [9.0] * 4), row("article-308", [12.0] * 4)]
    for plot in ladder_chart.plots(ladder_report.analyse(rows, "a CPU of 1 GHz")):
        bars, article, words = plot.chart.data
        assert bars["name"] == "a CPU of 1 GHz (measured)"
        assert article["name"] == "the article's V100 (quoted)"
        assert "here" not in plot.caption.split()
    assert plot.chart.layout["xaxis"]["title"]["text"].endswith("% (negative is faster)")
    assert [text.strip() for text in words["text"]] == ["faster", "slower"]


def test_the_last_rung_of_a_captured_step_is_the_preset_of_its_name():
    """People know it as `fused`, and look for this name among the sentences."""
    fused = next(rung for rung in RUNGS if rung.name == WITHOUT_HOST)
    assert dataclasses.replace(fused.config(), preset="fused") == PRESETS[fused.name]()


def test_figures_of_a_rung():
    found = ladder_report.analyse([row("article-256", [2.0] * 4)], "NVIDIA H200")["rungs"][0]
    assert found["images_per_s"] == 25_000
    assert found["v100_normalised"] == pytest.approx(25_000 * 2.5e9 / 125e12)
    assert found["mfu"] == pytest.approx(25_000 * 2.5e9 / 989.5e12)
    assert found["seconds_35_epochs"]["median"] == pytest.approx(1 + 35 * 2.5)
    assert ladder_report.analyse([row("article-256", [2.0] * 4)], "no such GPU")["rungs"][0]["mfu"] is None


def test_fewer_images_are_scaled_to_the_article_s():
    fewer = row("article-256", [0.2] * 4, images=5_000, test_images=1_000)
    total = ladder_report.analyse([fewer], "a CPU")["rungs"][0]["seconds_35_epochs"]["median"]
    assert total == pytest.approx(10 * 1 + 35 * (10 * 0.2 + 10 * 0.5))


def test_the_order_of_the_input_pipeline_is_said_with_its_doubt():
    names = ("article-323", "article-308", "article-301", "article-297")
    times = ([9.0] * 4, [8.0] * 4, [7.0, 7.2, 6.8, 7.0], [7.1, 6.9, 7.1, 6.9])
    rows = [row(name, list(t)) for name, t in zip(names, times, strict=True)]
    said = next(s for s in ladder_report.sentences(ladder_report.analyse(rows, "a CPU")) if "input pipeline" in s)
    assert "not to be told apart: article-301 and article-297" in said


def test_nothing_that_can_run_is_a_result_too(tmp_path):
    found = ladder_report.analyse([missing("eager")], "a CPU")
    one = study(tmp_path)
    one.finish(
        found,
        ladder_chart.plots(found),
        ladder_report.sentences(found),
        ladder_report.tables(found),
        ladder_report.caveats(found, True, None),
    )
    assert "no rung can run here" in (tmp_path / "ladder.html").read_text()


def test_the_command_measures_draws_and_trains_to_the_end(tmp_path, monkeypatch):
    import train

    monkeypatch.setattr(train, "open_session", lambda *args, **kwargs: tiny_session())
    out = tmp_path / "out"
    request = Request(small=True, out=out, synthetic=True, settings=TINY)
    rungs = FEW[1:3]
    options = {"epochs_per_rung": 4, "full": True, "rungs": rungs}
    document = ladder.run(request, QUIET, None, **options)
    assert {"ladder.json", "ladder.html", "article-256", "on-device"} <= {path.name for path in out.iterdir()}
    facts, *_ = (row["result"] for row in study_of(out) if row["key"].startswith("set-up"))
    assert 0 < facts["input_s"] < facts["epoch_s"] < facts["set_up_s"]
    assert (facts["images"], facts["test_images"], facts["step"]) == (70, 30, "eager")
    for row in study_of(out):
        assert not row["key"].startswith("turn") or row["result"]["train_s"] > 0 < row["result"]["eval_s"]
    whole = document["result"]["rungs"][0]["full"]
    assert whole["epochs"] == 2
    assert 0 <= whole["test_accuracy"] <= 1
    assert any("n = 1 each" in sentence for sentence in document["sentences"])
    assert any("--small" in caveat for caveat in document["caveats"])
    assert ladder.run(request, QUIET, None, **options)["result"] == document["result"]


def test_a_whole_run_that_was_killed_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    import train

    config = Rung("x", "", "article-256").config(0, [*TINY[:3], "batch_size=20", "checkpoint_s=0", "epochs=3"])
    whole = ladder.train_whole(study(tmp_path / "a"), tiny_session(), config, "x")
    original = train.run

    def dies(session, config, folder, found, require_ops):
        def on_step(number: int) -> None:
            if number == 6:
                raise Killed

        return original(session, config, folder, found, on_step=on_step)

    monkeypatch.setattr(train, "run", dies)
    with pytest.raises(Killed):
        ladder.train_whole(study(tmp_path / "b"), tiny_session(), config, "x")
    monkeypatch.setattr(train, "run", original)
    resumed = ladder.train_whole(study(tmp_path / "b"), tiny_session(), config, "x")
    assert resumed["test_accuracy"] == whole["test_accuracy"]
    assert resumed["epochs"] == 3


def test_a_whole_run_that_blows_up_is_a_result_and_leaves_signals_as_they_were(tmp_path):
    """The next rung's epochs are not looked between for a signal that was put off."""
    config = Rung("x", "", "article-256").config(0, [*TINY[:3], "batch_size=20", "epochs=3"])
    config, session = dataclasses.replace(config, lr_values=(1e38,) * len(config.lr_values)), tiny_session()
    assert ladder.train_whole(study(tmp_path), session, config, "x")["status"] == "non-finite"
    assert not session.interrupts.deferred


def test_small_is_of_the_first_images_only():
    cut = ladder._cut(tiny_session(tiny_dataset(70, 30)), ladder.Sizes(4, None, 20, 10)).dataset
    assert len(cut.train_images) == len(cut.train_labels) == 20
    assert len(cut.test_images) == 10
    assert torch.equal(cut.train_images, tiny_dataset(70, 30).train_images[:20])
    assert Config.from_json(RUNGS[0].config().to_json()) == RUNGS[0].config()
