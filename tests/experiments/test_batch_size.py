import json

import pytest
from pictures import axes_of, named
from runs import final_tensors, tiny_session

import train
from experiments import batch_size, forgetting_rules
from experiments.study import training
from experiments.study.folder import Request
from model.errors import UsageError
from profiling.output.terminal import Terminal

SETTINGS = ("widths=8,8,16,16", "dtype=float32", "device=cpu", "epochs=2", "checkpoint_s=0")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(train, "open_session", lambda *args, **kwargs: tiny_session())
    monkeypatch.setattr(batch_size, "CASES", {"8": (8, 1.0), "16": (16, 1.0), "16 at rate + 10 %": (16, 1.1)})


def experiment(folder, evidence=None, settings=SETTINGS):
    request = Request(small=True, out=folder, synthetic=True, settings=settings)
    return batch_size.run(request, Terminal(speaks=False), tiny_session().interrupts, evidence)


def config():
    return training.recipe(Request(settings=SETTINGS), tiny_session())


def evidence(folder, rises=2.0, blows_up=8.0, **recipe):
    """Evidence of runs like those above: base rate 0.3 at batch 128."""
    folder.mkdir()
    rows = [forgetting_rules.Limits(n, 1.0, 0.5, rises, blows_up)._asdict() for n in (10, 20)]
    result = {"limits": rows, "base_rate": 0.3, "recipe": {**config().learned(), **recipe}}
    (folder / "forgetting.json").write_text(json.dumps({"result": result, "settings": {"small": True}}))
    return folder


def test_each_batch_is_a_run_and_a_killed_experiment_goes_on_within_one(monkeypatch, tmp_path):
    found = evidence(tmp_path / "e")
    whole = experiment(tmp_path / "whole", found)
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
            experiment(tmp_path / "killed", found)
    steps = []

    def counted(session, config, out, checkpoint=None):
        return run(session, config, out, checkpoint, on_step=lambda number: steps.append((out.name, number)))

    monkeypatch.setattr(train, "run", counted)
    resumed = experiment(tmp_path / "killed", found)
    assert steps[0] == ("batch-16", 6)
    cases = whole["result"]["cases"]
    for name, row in cases.items():
        for key in ("test_accuracy", "test_loss", "train_loss", "steps"):
            assert resumed["result"]["cases"][name][key] == row[key]
    ours, theirs = (final_tensors(tmp_path / folder / "batch-16") for folder in ("killed", "whole"))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)

    assert {name: (row["batch"], row["steps"]) for name, row in cases.items()} == {
        "8": (8, 18),
        "16": (16, 10),
        "16 at rate + 10 %": (16, 10),
    }
    assert [row["rate"] for row in cases.values()] == pytest.approx([0.3 / 16, 0.3 / 8, 1.1 * 0.3 / 8])
    kept = json.loads((tmp_path / "whole" / "batch-16-plus-10" / "config.json").read_text())
    assert kept["lr_values"] == pytest.approx([0, 1.1 * 0.3 / 8, 0])
    assert all(0 <= row["test_accuracy"] <= 1 and row["train_s"] > 0 for row in cases.values())
    assert "forgetting" in (tmp_path / "whole" / "accuracy.svg").read_text()
    assert (tmp_path / "whole" / "batch-size.html").exists()
    assert "By the evidence of 20 images" in " ".join(whole["sentences"])
    assert any("forgetting --small" in caveat for caveat in whole["caveats"])


def test_a_run_that_blows_up_is_a_result(tmp_path):
    document = experiment(tmp_path / "a", settings=(*SETTINGS, "lr_values=1e38,1e38,1e38"))
    assert {row["test_accuracy"] for row in document["result"]["cases"].values()} == {None}
    assert "a gradient was not finite" in document["sentences"][0]
    assert "unavailable: no run came to its end" in (tmp_path / "a" / "batch-size.html").read_text()
    json.dumps(document, allow_nan=False)


def test_limits_follow_from_the_evidence(tmp_path):
    """Rate x 2 is forgetting's at batch 128 and any other; x 8 curvature's, which a batch meets as it grows."""
    found = forgetting_rules.read_evidence(evidence(tmp_path / "e"))
    rows = {str(b): {"batch": b, "rate": 0.3 * b / 128} for b in (128, 256, 1024)}
    limited, said = batch_size.limits(found, config(), rows)
    assert [row["forgetting"] for row in limited.values()] == pytest.approx([2, 2, 2])
    assert [row["curvature"] for row in limited.values()] == pytest.approx([8, 4, 1])
    assert [row["by"] for row in limited.values()] == ["forgetting", "forgetting", "curvature"]
    assert "forgetting-limited: batch 128, 256; curvature-limited: batch 1024; the two limits meet at" in said[0]
    assert "meet at batch 512. " in said[0]
    assert "(quoted)" in said[1]
    for factor, expected in ((0.5, "None is past it."), (3, "Past the nearer: batch 128, 256, 1024.")):
        taken = {name: {**row, "rate": factor * row["rate"]} for name, row in rows.items()}
        assert batch_size.limits(found, config(), taken)[1][0].endswith(expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (None, "give --evidence the folder of a finished forgetting"),
        ({"widths": [1, 2, 3, 4]}, "the evidence does not fit, it is of another widths"),
        ({"blows_up": None}, "the evidence has no curvature limit"),
        ({"rises": None}, "the evidence has no forgetting limit"),
        ({"rises": None, "blows_up": None}, "no forgetting and no curvature limit"),
    ],
    ids=["none", "another_network", "no_curvature", "no_forgetting", "neither"],
)
def test_limits_that_are_not_known_are_said_to_be(tmp_path, changes, expected):
    found = None if changes is None else forgetting_rules.read_evidence(evidence(tmp_path / "e", **changes))
    limited, said = batch_size.limits(found, config(), {"8": {"batch": 8, "rate": 0.1}})
    assert said == [f"What limits each batch is not known: {said[0].partition(': ')[2]}"]
    assert expected in said[0]
    assert {row["by"] for row in limited.values()} <= {None}


@pytest.mark.parametrize(
    ("folder", "settings", "expected"),
    [("nowhere", (), "has no finished forgetting"), (None, ("batch-size=64",), "is what this experiment varies")],
    ids=["no_evidence", "a_batch_of_ones_own"],
)
def test_options_are_refused(tmp_path, folder, settings, expected):
    with pytest.raises(UsageError, match=expected):
        batch_size.check(Request(settings=settings), folder and tmp_path / folder)


def row(accuracy: float, seconds: float, batch: int = 8) -> dict:
    return {"batch": batch, "test_accuracy": accuracy, "test_loss": 1.0, "train_loss": 2.0, "train_s": seconds}


@pytest.mark.parametrize(
    ("last", "expected"),
    [(0.902, "within what two runs"), (0.85, "beyond what two runs"), (0.95, "beyond what two runs")],
)
def test_sentences_follow_the_data(last, expected):
    said = batch_size.sentences({"128": row(0.9, 20.0), "512": row(0.8, 15.0), "1024": row(last, 10.0)})
    assert "2.00 times as fast" in said[0]
    assert expected in said[0]
    assert said[1] == f"The most accurate was batch {'128' if last < 0.9 else '1024'}, the fastest batch 1024."
    two = batch_size.sentences({"512": row(0.8, 15.0), "512 at rate + 10 %": row(last, 15.0)})
    assert f"a rate 10 % higher changed test accuracy by {100 * (last - 0.8):+.2f} points" in two[2]


def test_pictures_show_each_batch_the_higher_rate_apart_and_the_nearer_limit():
    rows = {name: row(0.8, 3.0, batch) for name, (batch, _) in batch_size.CASES.items()}
    rows["16 at rate + 10 %"]["test_accuracy"] = 0.7
    limited = {"8": {"by": "forgetting"}, "16": {"by": "curvature"}, "16 at rate + 10 %": {"by": "curvature"}}
    plots = batch_size.plots(rows, limited)
    assert all("one run each" in plot.title for plot in plots)
    assert "standard deviation of 0.15 points (quoted)" in plots[0].caption
    accuracy, loss, time = map(axes_of, plots)
    line, higher = accuracy.lines  # the higher rate is no part of the line, and no batch of its own
    assert (line.get_xydata().tolist(), higher.get_xydata().tolist()) == ([[0, 0.8], [1, 0.8]], [[1, 0.7]])
    assert (line.get_linestyle(), higher.get_linestyle()) == ("-", "None")
    assert named(accuracy) == ["rate scaled linearly", "rate 10 % higher"]
    assert named(loss)[1:3] == ["test loss, rate 10 % higher", "train loss, rate scaled linearly"]
    assert [axes.get_ylabel().endswith("(axis not from 0)") for axes in (accuracy, loss, time)] == [True, True, False]
    assert time.get_ylim()[0] == 0
    without = axes_of(batch_size.plots(rows, {})[0])
    for axes, ticks, label in (
        (accuracy, ["8\nforgetting", "16\ncurvature"], "batch size, and what limits its rate"),
        (without, ["8", "16"], "batch size"),
    ):
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ticks
        assert axes.get_xlabel() == label


def test_small_trains_as_many_epochs_as_there_is_time_for(monkeypatch):
    session, six = tiny_session(), config().with_epochs(6)
    for speed, small, epochs in ((1e9, True, 6), (2.0, True, 4), (2.0, False, 6)):
        monkeypatch.setattr(training, "images_per_s", lambda *arguments, speed=speed: speed)
        assert batch_size.plan(Request(small=small), session, six) == {"epochs": epochs}
