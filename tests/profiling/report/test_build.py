"""The account of a GPU run whose trace, steps and ceilings were made by hand: what was planted comes out again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import traces
from made_run import (
    ACTIVE,
    BATCH,
    BN_NS,
    CAST_NS,
    CONV_NS,
    IDLE_NS,
    MS,
    STEP_NS,
    STEPS,
    TRAINING_NS,
    US,
    S,
    make_run,
    make_trace,
    sampled,
)

from profiling import ROOT
from profiling.output import errors, terminal
from profiling.output.files import write_json
from profiling.report import build
from profiling.report import command as report_command


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module")
def made(run):
    return build.build(run)


def test_without_plotly_there_is_a_report_and_no_page(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run")
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    made, reason = build.write(folder)
    assert "there is no page" in reason
    assert made == json.loads((folder / "report.json").read_text())
    assert made["headline"] in (folder / "report.md").read_text()


@pytest.mark.parametrize("older", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_machine_without_plotly_is_given_the_account_all_the_same(tmp_path, older):
    """Where it is missing from the start, as on the machine that trained: what is written and said but for the page."""
    folder = make_run(tmp_path / "run")
    if older:
        (folder / "report.html").write_text("an older one")
    code = "import sys; sys.modules['plotly'] = None; from profiling.__main__ import app; app()"
    command = [sys.executable, "-c", code, "report", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "report.json").read_text())["headline"] in done.stdout
    assert str(folder / "report.md") in done.stdout
    (line,) = [line for line in done.stderr.splitlines() if "there is no page" in line]
    assert f"python -m profiling report {folder}" in line
    assert ("is an older one" in line) == (folder / "report.html").exists() == older


def ns(made) -> dict[str, int]:
    return {t["key"]: t["ns"] for t in made["terms"]}


def test_what_was_planted_is_recovered(made):
    found = ns(made)
    convolutions = found["ideal"] + found["ceiling_gap"] + found["conv_bytes"] + found["conv_inefficiency"]
    assert convolutions == pytest.approx(STEPS * CONV_NS, rel=0.01)
    assert found["batch norm"] == pytest.approx(STEPS * BN_NS, rel=0.01)
    assert found["layout and cast"] == pytest.approx(STEPS * CAST_NS, rel=0.01)  # its overlap is batch norm's time
    assert found["idle"] == pytest.approx(STEPS * IDLE_NS, rel=0.01)
    assert found["residual"] == TRAINING_NS - STEPS * STEP_NS
    assert sum(found.values()) == TRAINING_NS


def test_idle_is_of_the_unprofiled_run_and_not_of_the_trace(tmp_path):
    slower = ns(build.build(make_run(tmp_path / "slower", STEP_NS + MS)))
    assert slower["idle"] == pytest.approx(STEPS * (IDLE_NS + MS), rel=0.01)


def test_all_gaps_are_the_hosts_when_the_next_kernel_was_not_launched(made):
    parts = {p["name"]: p["ns"] for t in made["terms"] if t["key"] == "idle" for p in t["parts"]}
    assert parts["launching kernels"] + parts["in Python"] > 0.98 * sum(parts.values())


def test_a_launched_kernel_that_leaves_the_device_empty_for_long_is_doubted(tmp_path, made):
    folder = make_run(tmp_path / "run")
    make_trace(folder / "records" / "trace.json.gz", queued_ns=2 * MS)
    doubts = [
        lack for lack in build.build(folder)["lacks"] if "took more than 1 ms to begin on an empty device" in lack
    ]
    assert [doubt.partition(" ")[0] for doubt in doubts] == [str(ACTIVE)]
    assert not any("empty device" in lack for lack in made["lacks"])


def test_against_three_peaks(made):
    figures = made["figures"]
    rate = STEPS * 2 * BATCH * 64 * 64 * 9 * 32 * 32 / (TRAINING_NS / S)
    assert figures["achieved_flops_per_s"]["value"] == pytest.approx(rate)
    assert figures["v100_normalised"]["value"] == pytest.approx(rate / 125e12)
    assert figures["of_ceiling"]["value"] == pytest.approx(rate / 7e14)
    assert figures["mfu"]["value"] == pytest.approx(rate / 989.5e12, rel=1e-3)
    assert "not MFU" in figures["v100_normalised"]["source"]
    assert figures["perturbation"]["value"] == pytest.approx(1.05)


def test_the_share_of_the_peak_is_given_at_the_clock_that_was_sampled_too(tmp_path):
    found = build.build(sampled(make_run(tmp_path / "run"), 1464))["figures"]
    assert found["sm_clock_hz"]["value"] == pytest.approx(1.464e9)
    assert found["mfu_at_clock"]["value"] == pytest.approx(found["mfu"]["value"] * 1830 / 1464)
    assert (found["mfu_at_clock"]["status"], found["mfu"]["status"]) == ("modelled", "measured")
    assert "1,464 MHz sampled / 1,830 MHz of the peak" in found["mfu_at_clock"]["source"]


def test_without_samples_there_is_no_share_at_their_clock(tmp_path, made):
    assert (made["figures"]["mfu_at_clock"]["value"], made["figures"]["mfu_at_clock"]["status"]) == (
        None,
        "unavailable",
    )
    assert "the sampler left no file" in made["figures"]["mfu_at_clock"]["source"]
    few = build.build(sampled(make_run(tmp_path / "run"), 1464, count=12))["figures"]
    assert "12 samples of the SM clock in training" in few["mfu_at_clock"]["source"]


def test_a_layer_has_its_place_under_the_roofs(made):
    (layer,) = made["layers"]
    assert layer["ns_per_step"] == pytest.approx(CONV_NS)
    assert layer["bound"] == "compute"
    assert layer["roof_fraction"] == pytest.approx(layer["flops"] / 7e14 / (CONV_NS / 1e9))


def test_an_unknown_gpu_has_no_peak_but_its_ceiling_stands(tmp_path):
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    write_json(folder / "summary.json", summary | {"device": "NVIDIA H200 Laptop GPU"})
    made = build.build(folder)
    assert made["figures"]["mfu"]["status"] == "unavailable"
    assert made["figures"]["of_ceiling"]["status"] == "measured"
    assert "measured ceiling" in made["terms"][0]["name"]
    assert "ceiling_gap" not in ns(made)


@pytest.mark.parametrize(
    ("identity", "accuracy", "why"),
    [
        ("synthetic", 0.99, "the images are synthetic"),
        ("official", 0.9399, "it reached 93.99%"),
        ("copy", None, "no accuracy is known"),
        ("official", 0.94, ""),
    ],
)
def test_only_a_run_to_the_target_is_compared_with_the_article(tmp_path, identity, accuracy, why):
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    write_json(folder / "summary.json", summary | {"data_identity": identity, "test_accuracy": accuracy})
    made = build.build(folder)
    assert made["no_levers"].startswith(why)
    assert bool(made["levers"]) == (not why) == (not made["no_levers"])


def test_the_median_step_comes_with_its_spread(made):
    assert made["figures"]["step_s"]["value"] == STEP_NS / S
    assert made["figures"]["step_s"]["spread"] == "nine in ten took 20 to 20 ms"


def test_a_run_that_was_not_profiled_is_one_line(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    (folder / "records").rename(tmp_path / "elsewhere")
    with pytest.raises(errors.ReportError, match=r"run was not profiled, .*: python -m profiling collect .*run$"):
        report_command.run(folder, False, terminal.Terminal())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("there_is", [True, False])
def test_where_the_trace_can_be_looked_at_is_said(tmp_path, capsys, there_is):
    folder = make_run(tmp_path / "run")
    trace = folder / "records" / "trace.json.gz"
    if not there_is:
        trace.unlink()
    report_command.run(folder, False, terminal.Terminal())
    said = capsys.readouterr().out.splitlines()
    assert (f"trace: {trace}, which opens in ui.perfetto.dev" in said) == there_is
    page = (folder / "report.html").read_text()
    assert ("records/trace.json.gz, which opens in ui.perfetto.dev" in page) == there_is


def test_no_control_character_of_a_record_reaches_the_terminal(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    write_json(folder / "summary.json", summary | {"device": "\x1b[31mred\x07"})
    profile = json.loads((folder / "records" / "profile.json").read_text())
    write_json(folder / "records" / "profile.json", profile | {"error": "\x1b]0;title\x07"})
    report_command.run(folder, False, terminal.Terminal())
    said = "".join(capsys.readouterr())
    assert "title" in said
    assert not {"\x1b", "\x07"} & set(said)


def test_kernels_of_no_category_make_the_account_incomplete(tmp_path):
    folder = make_run(tmp_path / "run")
    trace = traces.HandMadeTrace()
    for number in range(ACTIVE):
        trace.step(number, number * STEP_NS, STEP_NS)
        trace.kernel("zzz", number * STEP_NS + 10 * US, number * STEP_NS + 20 * US, 10 * MS)
    trace.write(folder / "records" / "trace.json.gz")
    made = build.build(folder)
    assert made["status"] == "incomplete"
    assert any("no known category" in line for line in made["lacks"])


def test_the_column_of_counters_comes_from_ncu(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = [
        '"ID","Kernel Name","dram__bytes.sum","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"',
        '"","","byte","%"',
        '"0","nchwToNhwcKernel","1000","0"',
        '"1","nchwToNhwcKernel","3000","0"',
    ]
    (folder / "records" / "ncu.csv").write_text("\n".join(rows))
    rows = {row["name"]: row for row in build.build(folder)["kernels"]}
    assert rows["nchwToNhwcKernel"]["dram_bytes"] == 2000
    assert rows["cudnn::bn_fw_tr_1C11"]["dram_bytes"] is None


def replayed(folder, **changes):
    """The run of `make_run` with a profiled pass of graph replays."""
    folder = make_run(folder)
    _, profile = traces.profiled_pass(folder / "records" / "trace.json.gz", **changes)
    write_json(folder / "records" / "profile.json", profile)
    return folder


def test_replayed_kernels_are_attributed_by_the_eager_step_among_them(tmp_path):
    made = build.build(replayed(tmp_path / "run"))
    found = ns(made)
    assert found["batch norm"] == STEPS * BN_NS
    assert found["idle"] == STEPS * IDLE_NS
    assert "unknown" not in found
    assert made["layers"][0]["ns_per_step"] == pytest.approx(CONV_NS)
    assert made["lacks"] == build.build(make_run(tmp_path / "other"))["lacks"]
    assert made["profiled"]["refused"] == []
    assert "ProfilerStep#2 of the trace was run eagerly" in made["assumption"]


def written(folder) -> dict:
    """The report in all its forms, and report.json as it is read."""
    build.write(folder)
    return json.loads((folder / "report.json").read_text())


def overlapping(steps):
    """Batch norm begins a millisecond before the convolution has ended, in those steps."""

    def lie(number, kernels):
        name, start, *rest = kernels[1]
        return [kernels[0], (name, start - MS, *rest), kernels[2]] if number in steps else kernels

    return lie


def test_refused_steps_are_named_and_the_account_is_of_the_others(tmp_path):
    folder = replayed(tmp_path / "run", lie=overlapping({4, 7, 20}))
    made = written(folder)
    assert ns(made) == ns(build.build(replayed(tmp_path / "honest")))
    said = "3 of 20 profiled steps refused: kernels overlap on one stream"
    assert [one["step"] for one in made["profiled"]["refused"]] == [4, 7, 20]
    assert all(said in (folder / f"report.{kind}").read_text() for kind in ("html", "md", "json"))
    assert "17 of its 20 steps" in next(t for t in made["terms"] if t["key"] == "batch norm")["source"]
    assert all("17 of its 20 steps" in row["source"] for row in (*made["kernels"], *made["layers"]))
    assert not any("refused" in lack for lack in made["lacks"])


def test_where_no_replay_stands_the_account_is_of_the_eager_step_and_marked(tmp_path):
    folder = replayed(tmp_path / "run", lie=overlapping(set(range(21)) - {traces.EAGER}))
    made = written(folder)
    assert ns(made) == ns(build.build(replayed(tmp_path / "honest")))  # in whole nanoseconds
    assert sum(ns(made).values()) == TRAINING_NS
    mark = "the kernel times are those of the one step that was run eagerly"
    assert [mark in lack for lack in made["lacks"]].count(True) == 1
    of_kernels = [t for t in made["terms"] if t["key"] in ("conv_inefficiency", "batch norm", "layout and cast")]
    assert [t["note"] for t in of_kernels] == ["of one step run eagerly"] * 3
    (idle,) = (t for t in made["terms"] if t["key"] == "idle")
    assert (idle["parts"], idle["note"]) == ([], "less kernel times of one step run eagerly")
    assert all("run eagerly" in row["source"] for row in (*made["kernels"], *made["layers"], *of_kernels, idle))
    assert all(mark in (folder / f"report.{kind}").read_text() for kind in ("html", "md", "json"))
    with pytest.raises(errors.InconsistentError, match="incomplete"):
        report_command.run(folder, True, terminal.Terminal(speaks=False))


def test_where_nothing_stands_the_part_is_missing_and_says_so(tmp_path):
    made = build.build(replayed(tmp_path / "run", lie=overlapping(set(range(21)))))
    assert set(ns(made)) == {"ideal", "ceiling_gap", "conv_bytes", "unattributed"}
    assert sum(ns(made).values()) == TRAINING_NS
    assert (made["kernels"], made["layers"], made["status"]) == ([], [], "incomplete")
    (lack,) = (lack for lack in made["lacks"] if "refused" in lack)
    assert lack == (
        "20 of 20 profiled steps refused: kernels overlap on one stream (step 0: for 0.999 ms of 14 ms); the eager one "
        "too: kernels overlap on one stream, for 0.9 ms of 14 ms. What the device's time was made of is not known."
    )


@pytest.mark.parametrize("name", ["two_streams", "alexnet", "h100_vit_inference", "graph_replay", "compiled_triton"])
def test_a_recorded_trace_makes_a_report(tmp_path, name):
    """Whatever it lacks is said, and terms still sum to the phase."""
    folder = os.environ.get("GPU_TRACES_DIR")
    if not folder:
        pytest.skip("GPU_TRACES_DIR names no folder of recorded traces")
    made_by_hand = make_run(tmp_path / "run")
    (made_by_hand / "records" / "trace.json.gz").write_bytes(Path(folder, f"{name}.json.gz").read_bytes())
    found, _ = build.write(made_by_hand)
    assert sum(t["ns"] for t in found["terms"]) == TRAINING_NS
