"""The ladder's conclusions, from rows as `ladder.Measurement` returns them."""

import dataclasses

import pytest
import rung_processes
from pictures import axes_of, named

from experiments import ladder_report
from experiments.ladder_rungs import RUNGS
from profiling.output.units import MISSING as MISSING_CELL

NAMED = {rung.name: rung for rung in RUNGS}


def row(name: str, times: list[float], **more) -> dict:
    """The row of a rung with these seconds of training in its turns."""
    rung = NAMED[name]
    facts = {**rung_processes.FACTS, "config": rung.config().to_json(), "dtype": "float16", "step": "captured"}
    facts |= {"images": 50_000, "test_images": 10_000, "input_s": 0.5}
    turns = [{"train_s": t, "eval_s": 0.5} for t in times]
    return {**dataclasses.asdict(rung), "reason": None, **facts, "turns": turns, **more}


MISSING = {**dataclasses.asdict(NAMED["eager"]), "reason": "no GPU", "turns": []}


def test_an_unfinished_ladder_says_what_it_has():
    """Rungs with fewer turns are compared by those that both have, and not at all by fewer than three."""
    rows = [row("article-341", [10.0] * 4), row("article-323", [9.0] * 3), row("article-308", [8.0, 8.0])]
    found = ladder_report.analyse([*rows, row("article-301", [])], "a CPU")
    assert [(step["to"], step["seconds"]["n"]) for step in found["steps"]] == [("article-323", 3)]
    assert found["rungs"][2]["percent_of_first"]["low"] is None
    said = ladder_report.sentences(found)
    assert "Not measured, article-301: none of its turns has been timed yet." in said
    assert ladder_report.tables(found)[0].rows[2][:3] == ["article-308", "captured", "8"]
    assert not ladder_report.sentences(ladder_report.analyse([row("article-341", [])], "a CPU"))[0].startswith("On a")


def test_the_hosts_share_is_said_beside_the_ladder():
    rows = [row("article-256", [2.0] * 4), row("fused", [1.0] * 4), row("eager", [3.0] * 4)]
    found = ladder_report.analyse(rows, "an H100")
    assert [step["to"] for step in found["steps"]] == ["fused"]
    assert [found["host"][key] for key in ("from", "to")] == ["fused", "eager"]
    assert found["host"]["seconds"]["median"] == pytest.approx(35 * 2)
    said = ladder_report.sentences(found)
    assert "with fused it is" in said[0]
    assert any(f"Without its CUDA graph fused takes {100 * 70 / (1 + 35 * 1.5):+.1f} %" in text for text in said)
    assert ladder_report.tables(found)[1].rows[-1][0] == "eager"
    alone = ladder_report.analyse([rows[0], rows[2]], "an H100")
    assert (alone["host"], alone["steps"]) == (None, [])


def test_a_step_is_faster_slower_or_noise_by_the_interval_of_its_turns():
    rows = [
        row("article-341", [10.0, 10.1, 9.9, 10.0]),
        row("article-323", [9.0, 9.1, 8.9, 9.0]),
        row("article-308", [9.6, 8.5, 9.4, 8.6]),
        row("article-301", [12.0, 12.1, 11.9, 12.0]),
    ]
    found = ladder_report.analyse([*rows, MISSING], "a CPU of 1 GHz")
    assert [step["verdict"] for step in found["steps"]] == ["faster", "within noise", "slower"]
    first = found["steps"][0]
    assert first["seconds"]["median"] == pytest.approx(-35)
    assert first["percent"]["median"] == pytest.approx(100 * -35 / (1 + 35 * 10.5), rel=1e-2)
    assert (first["article_s"], first["article_percent"]) == (-18, pytest.approx(-18 / 341 * 100))
    said = " ".join(ladder_report.sentences(found))
    for words in (
        "Steps that save time (a negative change is faster): article-323",
        "Steps whose change is within noise: article-308",
        "Steps that cost time: article-301",
        "Not measured, eager: no GPU.",
        "on the article's V100 12 % shorter",
    ):
        assert words in said
    drift = [row(name, [s * d for d in (1, 2, 3, 4)]) for name, s in (("article-341", 10.0), ("article-323", 9.0))]
    assert ladder_report.analyse(drift, "a CPU")["steps"][0]["verdict"] == "faster"  # all rungs share it

    # A picture is read alone, without the page around it.
    plots = ladder_report.plots(found)
    times, changes = map(axes_of, plots)
    for axes in (times, changes):
        assert sorted(named(axes)) == ["a CPU of 1 GHz (measured)", "the article's V100 (quoted)"]
    assert not any("here" in plot.caption.split() for plot in plots)
    assert changes.get_xlabel().endswith("% (negative is faster)")
    assert [text.get_text() for text in changes.texts] == ["faster", "within noise", "slower"]
    assert [label.get_text() for label in changes.get_yticklabels()] == [step["to"] for step in found["steps"]]
    assert changes.yaxis_inverted()
    assert [bar.get_width() for bar in changes.patches] == [step["percent"]["median"] for step in found["steps"]]


def test_figures_of_a_rung():
    rows = [row("article-256", [2.0] * 4), row("fused", [0.2] * 4, images=5_000, test_images=1_000)]
    found, fewer = ladder_report.analyse(rows, "NVIDIA H200")["rungs"]
    assert found["images_per_s"] == 25_000
    assert found["v100_normalised"] == pytest.approx(25_000 * 2.5e9 / 125e12)
    assert found["mfu"] == pytest.approx(25_000 * 2.5e9 / 989.5e12)
    assert found["seconds_35_epochs"]["median"] == pytest.approx(1 + 35 * 2.5)
    assert fewer["seconds_35_epochs"]["median"] == pytest.approx(10 * 1 + 35 * (10 * 0.2 + 10 * 0.5))
    assert ladder_report.analyse(rows, "no such GPU")["rungs"][0]["mfu"] is None


def test_the_order_of_the_input_pipeline_is_said_with_its_doubt():
    names, quick = ("article-323", "article-308", "article-301", "article-297"), [7.1, 6.9, 7.1, 6.9]
    for times, expected in (
        ([[9.0] * 4, [8.0] * 4, [7.0, 7.2, 6.8, 7.0], quick], "not to be told apart: article-301 and article-297."),
        ([[9.0] * 4, [8.0] * 4, [7.5] * 4, quick], "article-297, which is the article's order. Making"),
        ([[6.0] * 4, [8.0] * 4, [7.5] * 4, quick], f"not the article's ({', '.join(names)}). Making"),
    ):
        rows = [row(name, seconds) for name, seconds in zip(names, times, strict=True)]
        said = ladder_report.sentences(ladder_report.analyse(rows, "a CPU"))
        assert expected in next(text for text in said if "input pipeline" in text)


def test_a_ladder_that_cannot_run_is_a_result_too():
    found = ladder_report.analyse([MISSING], "a CPU")
    assert ladder_report.caveats(found, True) == ["No rung can run here."]
    assert [plot.reason for plot in ladder_report.plots(found)] == [
        "no rung can run here",
        "there are no two rungs to compare",
    ]
    assert ladder_report.tables(found)[0].rows[0][2] == "unavailable"
    assert ladder_report.sentences(found)[-1] == "Not measured, eager: no GPU."


def test_whole_runs_and_missing_cores_are_said():
    ended = {"status": "non-finite", "test_accuracy": None, "train_plus_eval_s": 1.0}
    done = {"status": "complete", "test_accuracy": 0.94, "train_plus_eval_s": 256.0}
    rows = [row(f"article-{n}", [2.0] * 4, full=full) for n, full in ((341, done), (323, ended), (308, None))]
    found = ladder_report.analyse(rows, "a CPU")
    said = ladder_report.sentences(found)
    assert said[-1] == (
        "Trained to the end, n = 1 each: article-341 94.00% in 256.0 s; article-323 ended as non-finite."
    )
    cells = [cells[-2:] for cells in ladder_report.tables(found)[0].rows]
    assert cells == [["256.0", "94.00%"], ["non-finite", MISSING_CELL], [MISSING_CELL] * 2]
    limits = " ".join(ladder_report.caveats(found, False))
    assert "fewer cores than some rungs want workers: article-341 0 of 16, article-323 0 of 16" in limits
