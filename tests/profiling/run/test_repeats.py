import pytest

from profiling.run.repeats import aggregate, claim, claim_in_words, t_quantile


@pytest.mark.parametrize(
    ("dof", "t"),
    [(1, 12.706205), (2, 4.302653), (3, 3.182446), (4, 2.776445), (9, 2.262157), (30, 2.042272), (199, 1.971957)],
)
def test_student_s_quantiles_are_those_of_the_tables(dof, t):
    assert t_quantile(dof) == pytest.approx(t, abs=1e-6)


def test_a_claim():
    result = claim([0.938, 0.941, 0.942, 0.939], target=0.94)
    assert result.n == 4
    assert result.mean == pytest.approx(0.94)
    assert result.sd == pytest.approx(0.0018257, abs=1e-6)
    assert result.interval == pytest.approx(
        (0.94 - 3.182446 * 0.0018257 / 2, 0.94 + 3.182446 * 0.0018257 / 2), abs=1e-6
    )
    assert result.share_at_target == 0.5


def test_an_interval_holds_no_accuracy_that_cannot_be():
    """Two runs far apart say almost nothing, and not that the mean may be below 0 or above 1."""
    assert claim([0.1, 0.9], 0.94).interval == (0.0, 1.0)


def test_one_value_has_no_spread():
    assert claim([0.5], 0.5) == (1, 0.5, None, None, 1.0)


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        claim([], 0.9)


def summary(accuracy: float, seed: int) -> dict:
    same = dict.fromkeys(("preset", "data_identity", "data_source", "device", "world_size", "dtype", "ops"), "x")
    times = dict.fromkeys(("train_s", "eval_s", "train_plus_eval_s", "warmup_s", "images_per_s"), 2.0 + seed)
    return {
        **same,
        **times,
        "ops_requested": "x",
        "epochs": 3,
        "seed": seed,
        "git_sha": None,
        "test_accuracy": accuracy,
    }


def test_an_aggregate_and_its_sentence():
    result = aggregate([summary(0.93, 4), summary(0.95, 5)], 2, target=0.94, required=True, wall_s=9.0)
    assert (result["runs"], result["seeds"], result["share_at_target"]) == (2, [4, 5], 0.5)
    assert result["train_s"] == 6.5
    assert (result["status"], result["exit_code"]) == ("complete", 0)
    words = claim_in_words(result)
    assert "n = 2" in words
    assert "94.00%" in words
    assert "50% of the runs" in words


def test_a_missed_target_counts_only_when_required():
    assert aggregate([summary(0.9, 0)], 1, 0.94, required=True, wall_s=1.0)["exit_code"] == 7
    assert aggregate([summary(0.9, 0)], 1, 0.94, required=False, wall_s=1.0)["exit_code"] == 0


def test_fewer_runs_than_were_asked_for_are_unfinished():
    result = aggregate([summary(0.93, 4)], 2, target=0.94, required=True, wall_s=9.0)
    assert (result["status"], result["exit_code"], result["runs"], result["runs_requested"]) == (
        "unfinished",
        None,
        1,
        2,
    )


def test_without_a_target_none_is_counted():
    result = aggregate([summary(0.9, 0)], 1, None, required=False, wall_s=1.0)
    assert result["share_at_target"] is result["target_accuracy"] is None
    assert claim_in_words(result) == "n = 1: mean test accuracy 90.00% (x data)"


def test_memory_is_the_largest_of_the_runs():
    runs = [summary(0.9, 0) | {"peak_memory_bytes": n, "peak_reserved_bytes": None} for n in (5, 7, None)]
    result = aggregate(runs, 3, None, required=False, wall_s=1.0)
    assert (result["peak_memory_bytes"], result["peak_reserved_bytes"]) == (7, None)
