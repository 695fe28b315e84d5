import json

import pytest
from runs import tiny_dataset, tiny_session

import train
from experiments import forgetting, retention
from experiments.study import training
from experiments.study.folder import Request
from profiling.output.terminal import Terminal

PLAN = {"images": 64, "epochs": 1, "constant": 1, "last": 2}
SETTINGS = ("widths=8,8,16,16", "batch_size=4", "dtype=float32", "device=cpu", "lr_values=0,0.1,0")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(train, "open_session", lambda *args, **kwargs: tiny_session(tiny_dataset(80)))
    monkeypatch.setattr(forgetting, "plan", lambda *args: PLAN)
    monkeypatch.setattr(forgetting, "MULTIPLES", (0.125, 1.0, 16.0))
    monkeypatch.setattr(retention, "RAMP", 2)


def experiment(folder, **changes):
    request = Request(small=True, out=folder, synthetic=True, settings=SETTINGS, **changes)
    return forgetting.run(request, Terminal(speaks=False), tiny_session().interrupts)


def results(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kept", [1, 7, 13], ids=["among_the_rates", "further_on", "among_the_memories"])
def test_a_killed_experiment_goes_on_and_ends_with_the_same_numbers(monkeypatch, tmp_path, kept):
    whole = experiment(tmp_path / "whole")
    fit, calls = training.fit, []

    def killed(*arguments):
        if len(calls) == kept:
            raise KeyboardInterrupt
        calls.append(1)
        return fit(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(training, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            experiment(tmp_path / "killed")
    assert len(results(tmp_path / "killed")) == 1 + kept
    assert not (tmp_path / "killed" / "forgetting.json").exists()

    counted = []
    monkeypatch.setattr(training, "fit", lambda *arguments: counted.append(1) or fit(*arguments))
    resumed = experiment(tmp_path / "killed")
    assert len(counted) == 16 - kept
    assert resumed["result"] == whole["result"]
    assert resumed["sentences"] == whole["sentences"]
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_the_folder_holds_document_page_and_evidence(tmp_path):
    from experiments.forgetting_rules import read_evidence

    document = experiment(tmp_path / "a")
    result = document["result"]
    assert list(result["curves"]) == ["8", "16", "32", "64"]
    assert all(len(curve) == 3 for curve in result["curves"].values())
    assert list(result["memory"]) == list(retention.RUNS)
    assert set(result["climbs"]) == {"half, high", "all, high", "half, low", "all, low"}
    assert any("--small" in caveat for caveat in document["caveats"])
    assert read_evidence(tmp_path / "a").images == 64
    page = (tmp_path / "a" / "forgetting.html").read_text()
    for key in ("limits", "memory-high", "memory-low"):
        assert f'id="chart-{key}"' in page


def test_a_rate_at_which_training_blows_up_is_a_point_of_the_curve(monkeypatch, tmp_path):
    monkeypatch.setattr(forgetting, "MULTIPLES", (0.125, 1.0, 1e39))
    document = experiment(tmp_path / "a")
    assert all(curve[-1] is None and curve[0] is not None for curve in document["result"]["curves"].values())
    chart = forgetting.limits_chart(document["result"])
    assert all(None not in curve["y"] for curve in chart.data)
    assert "blew up" in chart.data[0]["hovertext"][-1]


def test_a_set_on_which_every_rate_blows_up_is_named(monkeypatch, tmp_path):
    """It has no curve, and must not be missing without a word from those that are compared."""
    monkeypatch.setattr(forgetting, "MULTIPLES", (1e38, 1e39))
    document = experiment(tmp_path / "a")
    assert document["result"]["limits"] == []
    named = [text for text in document["sentences"] if "every rate blew up" in text]
    assert len(named) == len(document["result"]["curves"])


def chosen(monkeypatch, speed: float, small: bool) -> dict[str, int]:
    monkeypatch.undo()
    monkeypatch.setattr(training, "images_per_s", lambda *arguments: speed)
    monkeypatch.setattr(training, "SMALL_S", 480.0)
    session = tiny_session(tiny_dataset(1600))
    return forgetting.plan(Request(small=small), session, training.recipe(Request(small=small), session))


def test_small_takes_what_the_machine_leaves_time_for(monkeypatch):
    fast, slow = chosen(monkeypatch, 1e6, True), chosen(monkeypatch, 300, True)
    assert (fast["images"], fast["epochs"]) == (1600, 10)
    assert forgetting.work(slow) / 300 <= 480
    assert slow["images"] < 1600
    larger = {**slow, "epochs": slow["epochs"] + 1}
    assert slow["epochs"] == 10 or forgetting.work(larger) / 300 > 480


def test_without_small_the_sizes_are_the_articles(monkeypatch):
    plan = chosen(monkeypatch, 1.0, False)
    assert forgetting.sizes({**plan, "images": 50_000}) == [6_250, 12_500, 25_000, 50_000]
    assert (plan["images"], retention.RAMP + plan["constant"]) == (1600, 30)


def test_work_is_what_is_trained_and_looked_back_on():
    assert forgetting.work(PLAN) == 120 * 3 + 96 * 2 * 3 + 96 * 2 * 2 // 3
