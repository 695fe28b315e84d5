"""The table of a reproduction's runs, and the verdicts on them."""

import pytest

from experiments.reproduce_runs import against, data_identity, not_as_asked, runs, target
from profiling.output.files import append_jsonl, write_json


def log(*losses: float, accuracy: float = 0.6) -> list[dict]:
    """The rows of a run's log, of 100 steps an epoch."""
    about = {"test_accuracy": accuracy}
    return [
        {"epoch": i, "step": 100 * i, "train_loss": loss, "epoch_train_s": 1 / i, "images_per_s": 1000.0 * i, **about}
        for i, loss in enumerate(losses, 1)
    ]


def trained(out, name: str, rows: list[dict], **summary) -> None:
    """A run's folder; without a status it has no summary."""
    (out / name).mkdir(parents=True)
    write_json(out / name / "config.json", {})
    for row in rows:
        append_jsonl(out / name / "log.jsonl", row)
    known = {"status": "complete", "ops": "fused", "step": "captured", "data_identity": "copy", "train_s": 3.0}
    known |= {"peak_memory_bytes": 300 * 10**6, "wall_s": 9.0}
    known |= {"test_accuracy": rows[-1]["test_accuracy"] if rows else None, **summary}
    known |= {f"{key}_requested": summary.get(f"{key}_requested", known[key]) for key in ("ops", "step")}
    if known["status"]:
        write_json(out / name / "summary.json", known)


def table(out, *names: str, small: bool = False) -> list[str]:
    return runs(out, {"steps": [{"name": name, "status": "failed"} for name in names], "settings": {"small": small}})


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        (log(1.09, 0.545), "right"),
        (log(1.11, 0.5), "WRONG: loss of epoch 1 +11.0% from the reference's"),
        (log(1.0, 0.445), "WRONG: loss of epoch 2 -11.0% from the reference's"),
        (log(1.0, float("nan")), "WRONG: loss of epoch 2 +nan% from the reference's"),
        (log(1.0, 0.5, accuracy=0.64), "right"),
        (log(1.0, 0.5, accuracy=0.655), "WRONG: accuracy +5.5 points from the reference's"),
        (log(1.0), "not held against the reference: too few epochs"),
    ],
)
def test_verdict_on_a_mode(rows, verdict):
    assert against(rows, log(1.0, 0.5)) == verdict
    assert against(rows, []) == "no reference to hold it against"


def test_run_is_held_against_what_was_asked():
    asked = {"ops": "fused", "ops_requested": "fused", "step": "captured", "step_requested": "captured"}
    fell = {"ops": "reference", "step": "eager"}
    assert not_as_asked(asked) == ""
    assert not_as_asked(asked | fell) == "RAN ops=reference, asked fused; RAN step=eager, asked captured"


def test_accuracy_that_counts():
    """The article's on the official files; else the reference's, within what test images can tell.

    The difference of two shares of 10,000 images, each 90 %, has a standard error of 0.42 points.
    """
    assert target("official", False, [0.9], 3) == (0.94, "94%, the article's, on the official files")
    assert target("official", True, [0.4], 1)[0] < 0.4, "not after two epochs of a small network"
    for identity in ("copy", "synthetic"):
        one, why = target(identity, False, [0.9], 1)
        assert one == pytest.approx(0.9 - 2 * 0.00424, abs=1e-4)
        assert f"on data that are {identity}" in why
        three, _ = target(identity, False, [0.89, 0.9, 0.91], 3)
        assert 0.9 - three == pytest.approx((0.9 - one) / 3**0.5, rel=1e-3)
        assert target(identity, False, [], 1) == (None, "no run of the reference to hold it against")


def test_every_run_is_a_line_with_its_figures_and_its_verdict(tmp_path):
    trained(tmp_path, "reference", log(1.0, 0.5), ops="reference")
    trained(tmp_path, "ours", log(1.01, 0.505, accuracy=0.61))
    trained(tmp_path, "batchnorm", log(1.2, 0.5), ops="batchnorm")
    trained(tmp_path, "composed", log(1.0, 0.5), step="eager", step_requested="captured")
    trained(tmp_path, "fused-0", log(1.0, 0.5, 0.2, 0.1), train_s=9.87)
    trained(tmp_path, "warm-ours", log(1.0))
    trained(tmp_path, "diverged", log(1.0), status="non-finite")
    trained(tmp_path, "cut", [], status=None)
    names = ("reference", "warm-ours", "ours", "batchnorm", "composed", "fused-0", "diverged", "cut", "reference-0")
    head, *lines = table(tmp_path, *names)
    cells = {line.split()[0]: line.split() for line in lines[:7]}
    assert head.split()[:4] == ["run", "ms/step", "images/s", "peak"]
    assert cells["ours"] == [
        *("ours", "5.000", "2,000", "300", "1.0100", "0.5050", "-", "61.00%", "captured/fused", "9.0", "right")
    ]
    assert cells["reference"][-2:] == ["the", "reference"]
    assert " ".join(cells["batchnorm"][10:]).startswith("WRONG: loss of epoch 1 +20.0%")
    assert " ".join(cells["composed"][10:]) == "RAN step=eager, asked captured; right"
    assert cells["fused-0"][1:3] == ["3.333", "3,000"], "medians of the epochs after the first"
    assert cells["fused-0"][6:] == ["0.1000", "60.00%", "captured/fused", "9.0", "4", "epochs", "in", "9.9", "s"]
    assert " ".join(cells["diverged"][10:]) == "non-finite; not held against the reference: too few epochs"
    assert cells["cut"] == ["cut", *"-" * 7, "-/-", "-", "failed"]
    assert not any(line.startswith(("warm-", "reference-0 ")) for line in lines)
    assert table(tmp_path / "empty", "ours") == ["no run has begun"]


def test_runs_to_the_end_are_held_against_the_accuracy_that_counts(tmp_path):
    trained(tmp_path, "fused-0", log(1.0, 0.5, accuracy=0.9))
    assert table(tmp_path, "fused-0")[-1].startswith("accuracy of fused: not judged; what counts is no run")
    trained(tmp_path, "fused-1", log(1.0, 0.5, accuracy=0.91))
    for number, accuracy in enumerate((0.902, 0.912)):
        trained(tmp_path, f"reference-{number}", log(1.0, 0.5, accuracy=accuracy))
    trained(tmp_path, "fused-2", log(1.0, accuracy=0.1), status="interrupted")
    names = [f"{kind}-{number}" for number in range(3) for kind in ("fused", "reference")]
    *_, ours, reference, verdict = table(tmp_path, *names)
    assert ours == "fused: n = 2, mean accuracy 90.50%, standard deviation 0.71 points, 0 at or above 94%"
    assert reference.startswith("reference: n = 2, mean accuracy 90.70%")
    assert verdict.startswith("accuracy of fused: REACHED; what counts is 90.12%, the reference's mean in this folder")
    trained(tmp_path, "fused-3", log(1.0, accuracy=0.8))
    assert table(tmp_path, "fused-3")[-1].startswith("accuracy of fused: BELOW; what counts is 90.")


def test_data_are_those_that_the_runs_say(tmp_path):
    assert data_identity(tmp_path) is None
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("{")
    assert data_identity(tmp_path) is None
    trained(tmp_path, "warm-ours", [], data_identity="synthetic")
    assert data_identity(tmp_path) == "synthetic"
