import json

import pytest
from runs import final_tensors, tiny_session

import train
from experiments import batch_size, forgetting_rules
from experiments.study.folder import Request
from model.errors import UsageError
from profiling.output.terminal import Terminal

SETTINGS = ("widths=8,8,16,16", "dtype=float32", "device=cpu", "epochs=1", "checkpoint_s=0")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(train, "open_session", lambda *args, **kwargs: tiny_session())
    monkeypatch.setattr(batch_size, "CASES", {"8": (8, 1.0), "16": (16, 1.0), "16 at rate + 10 %": (16, 1.1)})


def experiment(folder, evidence=None, settings=SETTINGS):
    request = Request(small=True, out=folder, synthetic=True, settings=settings)
    return batch_size.run(request, Terminal(speaks=False), tiny_session().interrupts, evidence)


def evidence(folder, rises=2.0, blows_up=8.0, **recipe):
    """Of runs like those above: base rate 0.3 at batch 128."""
    folder.mkdir()
    rows = [forgetting_rules.Limits(n, 1.0, 0.5, rises, blows_up)._asdict() for n in (10, 20)]
    from experiments.study import training

    here = training.recipe(Request(settings=SETTINGS), tiny_session()).learned()
    result = {"limits": rows, "base_rate": 0.3, "recipe": {**here, **recipe}}
    (folder / "forgetting.json").write_text(json.dumps({"result": result, "settings": {"small": True}}))
    return folder


def test_each_batch_is_a_run_with_its_rate_scaled_linearly(tmp_path):
    document = experiment(tmp_path / "a")
    cases = document["result"]["cases"]
    assert {name: row["batch"] for name, row in cases.items()} == {"8": 8, "16": 16, "16 at rate + 10 %": 16}
    rates = [row["rate"] for row in cases.values()]
    assert rates == pytest.approx([0.3 / 16, 0.3 / 8, 1.1 * 0.3 / 8])
    assert [row["steps"] for row in cases.values()] == [9, 5, 5]
    config = json.loads((tmp_path / "a" / "batch-16-plus-10" / "config.json").read_text())
    assert config["lr_values"] == pytest.approx([0, 1.1 * 0.3 / 8, 0])
    assert all(0 <= row["test_accuracy"] <= 1 and row["train_s"] > 0 for row in cases.values())
    assert (tmp_path / "a" / "batch-size.html").exists()
    assert "What limits each batch is not known: give --evidence" in document["sentences"][-1]


def test_a_killed_experiment_goes_on_within_a_run(monkeypatch, tmp_path):
    whole = experiment(tmp_path / "whole", settings=(*SETTINGS[:3], "epochs=2", "checkpoint_s=0"))
    run, runs = train.run, []

    def killed(session, config, out, checkpoint=None):
        runs.append(out.name)

        def on_step(number):
            if len(runs) == 2 and number == 7:  # of ten steps, in the second epoch
                raise KeyboardInterrupt

        return run(session, config, out, checkpoint, on_step=on_step)

    with monkeypatch.context() as patched:
        patched.setattr(train, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            experiment(tmp_path / "killed", settings=(*SETTINGS[:3], "epochs=2", "checkpoint_s=0"))
    steps = []

    def counted(session, config, out, checkpoint=None):
        return run(session, config, out, checkpoint, on_step=lambda number: steps.append((out.name, number)))

    monkeypatch.setattr(train, "run", counted)
    resumed = experiment(tmp_path / "killed", settings=(*SETTINGS[:3], "epochs=2", "checkpoint_s=0"))
    assert steps[0] == ("batch-16", 6)
    for name, row in whole["result"]["cases"].items():
        for key in ("test_accuracy", "test_loss", "train_loss", "steps"):
            assert resumed["result"]["cases"][name][key] == row[key]
    ours, theirs = (final_tensors(tmp_path / folder / "batch-16") for folder in ("killed", "whole"))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


def test_a_run_that_blows_up_is_a_result(tmp_path):
    document = experiment(tmp_path / "a", settings=(*SETTINGS, "lr_values=1e38,1e38,1e38"))
    assert {row["test_accuracy"] for row in document["result"]["cases"].values()} == {None}
    assert "a gradient was not finite" in document["sentences"][0]
    json.dumps(document, allow_nan=False)


def test_limits_follow_from_the_evidence(tmp_path):
    """Rate x 2 is forgetting's at batch 128 and any other; x 8 curvature's, which a batch meets as it grows."""
    found = forgetting_rules.read_evidence(evidence(tmp_path / "e"))
    rows = {str(b): {"batch": b, "rate": 0.3 * b / 128} for b in (128, 256, 1024)}
    limited = {name: batch_size.limit(found, row) for name, row in rows.items()}
    assert [row["forgetting"] for row in limited.values()] == pytest.approx([2, 2, 2])
    assert [row["curvature"] for row in limited.values()] == pytest.approx([8, 4, 1])
    assert limited["128"]["by"] == "forgetting"
    assert limited["1024"]["by"] == "curvature"
    said = batch_size.limit_sentences(found, None, limited)
    assert "forgetting-limited: batch 128, 256; curvature-limited: batch 1024" in said[0]
    assert "meet at batch 512" in said[0]
    assert "(quoted)" in said[1]


def test_evidence_is_a_part_of_the_conclusions(tmp_path):
    document = experiment(tmp_path / "a", evidence(tmp_path / "e"))
    assert "By the evidence of 20 images" in " ".join(document["sentences"])
    assert any("forgetting --small" in caveat for caveat in document["caveats"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"widths": [1, 2, 3, 4]}, "it is of another widths"),
        ({"blows_up": None}, "the evidence has no curvature limit"),
        ({"rises": None}, "the evidence has no forgetting limit"),
    ],
    ids=["another_network", "no_curvature", "no_forgetting"],
)
def test_evidence_that_says_nothing_is_said_to(tmp_path, changes, expected):
    document = experiment(tmp_path / "a", evidence(tmp_path / "e", **changes))
    assert expected in document["sentences"][-1]
    assert {row["by"] for row in document["result"]["limits"].values()} <= {None}


@pytest.mark.parametrize(
    ("arguments", "settings", "expected"),
    [(("nowhere",), (), "has no finished forgetting"), ((None,), ("batch_size=64",), "is what this experiment varies")],
    ids=["no_evidence", "a_batch_of_ones_own"],
)
def test_what_contradicts_itself_is_refused(tmp_path, arguments, settings, expected):
    folder = arguments[0] and tmp_path / arguments[0]
    with pytest.raises(UsageError, match=expected):
        batch_size.check(Request(settings=settings), folder)


def row(accuracy: float, seconds: float) -> dict:
    return {"test_accuracy": accuracy, "train_s": seconds}


@pytest.mark.parametrize(
    ("last", "expected"),
    [(0.902, "within what two runs"), (0.85, "beyond what two runs"), (0.95, "beyond what two runs")],
)
def test_sentences_follow_the_data(last, expected):
    said = batch_size.sentences({"128": row(0.9, 20.0), "1024": row(last, 10.0)})
    assert "2.00 times as fast" in said[0]
    assert expected in said[0]
    assert f"most accurate was batch {'128' if last < 0.9 else '1024'}" in said[1]


@pytest.fixture
def three(monkeypatch):
    """Cases 8, 16 and 16 at a higher rate, the last of which blew up."""
    rows = {name: {"batch": batch, **row(0.8, 3.0)} for name, (batch, _) in batch_size.CASES.items()}
    rows["16 at rate + 10 %"]["test_accuracy"] = 0.7
    return rows


def test_a_picture_says_which_limit_binds_each_batch(three):
    limited = {"8": {"by": "forgetting"}, "16": {"by": "curvature"}, "16 at rate + 10 %": {"by": "curvature"}}
    axes = [batch_size.chart(three, known, "test_accuracy", "accuracy").layout["xaxis"] for known in (limited, {})]
    assert [one["ticktext"] for one in axes] == [["8<br>forgetting", "16<br>curvature"], ["8", "16"]]
    assert [one["title"]["text"] for one in axes] == ["batch size, and what limits its rate", "batch size"]


def test_a_higher_rate_is_a_point_of_its_own_at_its_batch_with_a_name(three):
    """Not a batch size between two others, and no part of their line."""
    line, higher = batch_size.chart(three, {}, "test_accuracy", "accuracy").data
    assert (line["x"], line["y"], line["mode"]) == ([0, 1], [0.8, 0.8], "lines+markers")
    assert (higher["x"], higher["y"], higher["mode"]) == ([1], [0.7], "markers")
    assert [one["name"] for one in (line, higher)] == ["rate scaled linearly", "rate 10 % higher"]
    both = batch_size.chart(three, {}, "test_accuracy", "accuracy", "train_s").data
    assert both[-1]["name"] == "seconds, rate 10 % higher"


def test_a_picture_says_how_many_runs_and_where_its_axis_begins(tmp_path):
    plots = batch_size.plots(
        {name: row(0.8, 3.0) | {"batch": 8, "test_loss": 1.0, "train_loss": 1.0} for name in "8"}, {}
    )
    titles = [plot.chart.layout["yaxis"]["title"]["text"] for plot in plots]
    assert [title.endswith("(axis not from 0)") for title in titles] == [True, True, False]
    assert plots[2].chart.layout["yaxis"]["range"][0] == 0
    assert all("one run each" in plot.title for plot in plots)
    assert "standard deviation of 0.15 points (quoted)" in plots[0].caption


def test_small_trains_as_many_epochs_as_there_is_time_for(monkeypatch):
    from experiments.study import training

    session, request = tiny_session(), Request(small=True)
    config = training.recipe(request, session)
    monkeypatch.setattr(training, "images_per_s", lambda *arguments: 1e9)
    assert batch_size.plan(request, session, config) == {"epochs": 6}
    monkeypatch.setattr(training, "images_per_s", lambda *arguments: 2.0)
    assert batch_size.plan(request, session, config) == {"epochs": 4}
    assert batch_size.plan(Request(), session, config) == {"epochs": 6}
