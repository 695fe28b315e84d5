import pytest

from profiling.run.repeats import AVERAGED, SAME, aggregate, claim, claim_in_words, t_quantile, unfit


@pytest.mark.parametrize(
    ("dof", "t"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272), (199, 1.971957)],
)
def test_student_s_quantiles_are_those_of_the_tables(dof, t):
    assert t_quantile(dof) == pytest.approx(t, abs=1e-6)


def test_a_claim():
    result = claim([0.938, 0.941, 0.942, 0.939], target=0.94)
    half = 3.182446 * 0.0018257 / 2
    assert (result.n, result.mean, result.share_at_target) == (4, pytest.approx(0.94), 0.5)
    assert result.sd == pytest.approx(0.0018257, abs=1e-6)
    assert result.interval == pytest.approx((0.94 - half, 0.94 + half), abs=1e-6)
    # two runs far apart say almost nothing, and not that the mean may be below 0 or above 1
    assert claim([0.1, 0.9], 0.94).interval == (0.0, 1.0)
    assert claim([0.5], 0.5) == (1, 0.5, None, None, 1.0), "one value has no spread"
    with pytest.raises(ValueError, match="at least one"):
        claim([], 0.9)


def summary(accuracy: float, seed: int = 0, **more) -> dict:
    about = {"epochs": 3, "world_size": 1, "seed": seed, "git_sha": None, "test_accuracy": accuracy}
    return {**dict.fromkeys(SAME, "x"), **dict.fromkeys(AVERAGED, 2.0 + seed), **about, **more}


def test_an_aggregate_and_its_sentence():
    runs = [summary(a, s, peak_memory_bytes=m) for a, s, m in ((0.93, 4, 5), (0.95, 5, 7), (0.94, 6, None))]
    result = aggregate(runs, 3, target=0.94, required=True, wall_s=9.0)
    assert (result["runs"], result["seeds"], result["share_at_target"]) == (3, [4, 5, 6], pytest.approx(2 / 3))
    assert (result["train_s"], result["status"], result["exit_code"]) == (7.0, "complete", 0)
    assert (result["peak_memory_bytes"], result["peak_reserved_bytes"]) == (7, None), "the largest"
    for words in ("n = 3", "94.00%", "67% of the runs"):
        assert words in claim_in_words(result)


@pytest.mark.parametrize(
    ("requested", "target", "required", "status", "code"),
    [
        (1, 0.94, True, "target missed", 7),
        (1, 0.94, False, "complete", 0),
        (2, 0.94, True, "unfinished", None),
        (1, None, False, "complete", 0),
    ],
    ids=["missed", "missed_but_not_required", "fewer_runs_than_asked_for", "no_target"],
)
def test_the_status_of_an_aggregate(requested, target, required, status, code):
    result = aggregate([summary(0.9)], requested, target, required, wall_s=1.0)
    assert (result["status"], result["exit_code"]) == (status, code)
    assert (result["runs"], result["runs_requested"]) == (1, requested)
    if target is None:
        assert result["share_at_target"] is result["target_accuracy"] is None
        assert claim_in_words(result) == "n = 1: mean test accuracy 90.00% (x data)"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ([], "summary is a list"),
        ({"test_accuracy": 1.5}, "summary.test_accuracy is 1.5, expected a number from 0 to 1"),
        ({"seed": True}, "summary.seed is true, expected a number"),
        ({"train_s": "x"}, "summary.train_s is 'x'"),
        ({"world_size": -1}, "summary.world_size is -1"),
        ({"peak_memory_bytes": 0.5}, "summary.peak_memory_bytes is 0.5"),
        ({"git_sha": []}, "summary.git_sha is a list"),
    ],
)
def test_why_a_summary_cannot_be_aggregated(damage, reason):
    assert unfit(summary(0.9)) is None
    assert unfit(damage if damage == [] else summary(0.9) | damage).startswith(reason)
