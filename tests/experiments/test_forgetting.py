import json
from contextlib import contextmanager

import pytest
from pictures import axes_of, named
from runs import tiny_dataset, tiny_session

import train
from experiments import forgetting, forgetting_rules, retention
from experiments.study import training
from experiments.study.folder import Request
from profiling.output.terminal import Terminal

PLAN = {"images": 64, "epochs": 1, "constant": 1, "last": 2}
SETTINGS = ("widths=8,8,16,16", "batch_size=4", "dtype=float32", "device=cpu", "lr_values=0,0.1,0")
MULTIPLES = (0.125, 1.0, 1e39)


@contextmanager
def tiny(**training_functions):
    """Sizes of a few seconds, and the last rate blows up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "open_session", lambda *args, **kwargs: tiny_session(tiny_dataset(80)))
        patch.setattr(forgetting, "plan", lambda *args: PLAN)
        patch.setattr(forgetting, "MULTIPLES", MULTIPLES)
        patch.setattr(retention, "RAMP", 2)
        for name, function in training_functions.items():
            patch.setattr(training, name, function)
        yield


def experiment(folder):
    request = Request(small=True, out=folder, synthetic=True, settings=SETTINGS)
    return forgetting.run(request, Terminal(speaks=False), tiny_session().interrupts)


def results(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forgetting") / "whole"
    with tiny():
        return folder, experiment(folder)


def test_a_killed_experiment_goes_on_and_ends_with_the_same_numbers(whole, tmp_path):
    """Killed among the rates, further on, and among the memories."""
    fit, calls = training.fit, []

    def counted(*arguments):
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(1)
        return fit(*arguments)

    with tiny(fit=counted):
        for limit in (1, 7, 13):
            with pytest.raises(KeyboardInterrupt):
                experiment(tmp_path)
            assert len(results(tmp_path)) == 1 + limit
            assert not (tmp_path / "forgetting.json").exists()
        limit = None
        resumed = experiment(tmp_path)
    assert len(calls) == 16
    folder, document = whole
    assert (resumed["result"], resumed["sentences"]) == (document["result"], document["sentences"])
    assert results(tmp_path) == results(folder)


def test_the_folder_holds_document_page_and_evidence(whole):
    folder, document = whole
    result = document["result"]
    assert list(result["curves"]) == ["8", "16", "32", "64"]
    assert all(len(curve) == 3 for curve in result["curves"].values())
    assert list(result["memory"]) == list(retention.RUNS)
    assert set(result["climbs"]) == {"half, high", "all, high", "half, low", "all, low"}
    assert any("--small" in caveat for caveat in document["caveats"])
    assert forgetting_rules.read_evidence(folder).images == 64
    page = (folder / "forgetting.html").read_text()
    assert all((folder / f"{key}.svg").read_text() in page for key in ("limits", "memory-high", "memory-low"))


def test_a_rate_at_which_training_blows_up_is_a_point_at_the_edge(whole):
    result = whole[1]["result"]
    assert all(curve[-1] is None and curve[0] is not None for curve in result["curves"].values())
    assert whole[1]["tables"][0]["rows"][0][-1] == "blew up"
    with tiny():
        axes = axes_of(forgetting.limits_plot(result))
    top = 1.15 * forgetting_rules.GUESSING
    assert all(line.get_ydata()[-1] == top for line in axes.lines[:4])
    assert named(axes)[:4] == ["8 images", "16 images", "32 images", "64 images"]


def test_a_picture_marks_where_curves_rise_and_where_all_blow_up():
    losses = [1.0, 0.8, 0.6, 0.5, 0.5, 0.6, 1.0, None]
    curves = {str(images): losses for images in forgetting.sizes(PLAN)}
    limits = [forgetting_rules.limits(int(n), forgetting.MULTIPLES, c)._asdict() for n, c in curves.items()]
    axes = axes_of(forgetting.limits_plot({"curves": curves, "limits": limits, "plan": PLAN}))
    rises, common = limits[0]["rises"], forgetting_rules.times(limits[0]["blows_up"])
    assert named(axes)[4:] == ["starts to rise", f"all blow up: {common}"]
    (x, y), *_ = axes.lines[4].get_xydata()
    assert (x, y) == (pytest.approx(rises), pytest.approx(0.5 + 0.1 * (forgetting_rules.GUESSING - 0.5)))
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1/8", "1/4", "1/2", "1", "2", "4", "8", "16"]


def test_a_set_on_which_every_rate_blows_up_is_named(tmp_path):
    """It has no curve, and must not be missing without a word from those that are compared."""
    with tiny(fit=lambda *arguments: {"losses": [None], "diverged_step": 1}):
        document = experiment(tmp_path / "a")
    assert document["result"]["limits"] == []
    assert sum("every rate blew up" in text for text in document["sentences"]) == 4


@pytest.mark.parametrize(("speed", "small"), [(1e6, True), (300, True), (1.0, False)], ids=["fast", "slow", "whole"])
def test_small_takes_what_the_machine_leaves_time_for(monkeypatch, speed, small):
    monkeypatch.setattr(training, "images_per_s", lambda *arguments: speed)
    session, request = tiny_session(tiny_dataset(1600)), Request(small=small)
    plan = forgetting.plan(request, session, training.recipe(request, session))
    if speed == 300:
        assert plan["images"] < 1600
        assert forgetting.work(plan) / 300 <= 480
        assert plan["epochs"] == 10 or forgetting.work({**plan, "epochs": plan["epochs"] + 1}) / 300 > 480
        return
    assert (plan["images"], plan["epochs"]) == (1600, 10)
    if not small:  # the article's sizes
        assert retention.RAMP + plan["constant"] == 30
        assert forgetting.sizes({**plan, "images": 50_000}) == [6_250, 12_500, 25_000, 50_000]


def test_work_is_what_is_trained_and_looked_back_on():
    assert forgetting.work(PLAN) == 120 * 8 + 96 * 2 * 6 + 96 * 2 * 2 // 3
