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
    BN_NS,
    CAST_NS,
    CONV_NS,
    FLOPS,
    IDLE_NS,
    MS,
    STEP_NS,
    STEPS,
    TRAINING_NS,
    US,
    S,
    change,
    make_run,
    make_trace,
    sampled,
)

from profiling import ROOT
from profiling.output import errors, terminal
from profiling.output.files import write_json
from profiling.report import build
from profiling.report import command as report_command


@pytest.fixture
def run(tmp_path):
    """A run's folder, to be damaged."""
    return make_run(tmp_path / "run")


def ns(made) -> dict[str, int]:
    return {t["key"]: t["ns"] for t in made["terms"]}


def test_planted_times_are_recovered(whole):
    found = ns(whole)
    convolutions = found["ideal"] + found["ceiling_gap"] + found["conv_bytes"] + found["conv_inefficiency"]
    assert convolutions == pytest.approx(STEPS * CONV_NS, rel=0.01)
    assert found["batch norm"] == pytest.approx(STEPS * BN_NS, rel=0.01)
    assert found["layout and cast"] == pytest.approx(STEPS * CAST_NS, rel=0.01)  # its overlap is batch norm's time
    assert found["idle"] == pytest.approx(STEPS * IDLE_NS, rel=0.01)
    assert found["residual"] == TRAINING_NS - STEPS * STEP_NS
    assert sum(found.values()) == TRAINING_NS
    parts = {p["name"]: p["ns"] for t in whole["terms"] if t["key"] == "idle" for p in t["parts"]}
    assert parts["launching kernels"] + parts["in Python"] > 0.98 * sum(parts.values())
    assert whole["figures"]["step_s"]["value"] == STEP_NS / S
    assert whole["figures"]["step_s"]["spread"] == "nine in ten took 20 to 20 ms"
    (layer,) = whole["layers"]
    assert (layer["ns_per_step"], layer["bound"]) == (pytest.approx(CONV_NS), "compute")
    assert layer["roof_fraction"] == pytest.approx(layer["flops"] / 7e14 / (CONV_NS / 1e9))
    assert [(row["dram_bytes"], row["tensor_active"]) for row in whole["kernels"]] == [
        (210e6, 0.62),
        *[(None, None)] * 2,
    ]


def test_idle_is_of_the_unprofiled_run_and_not_of_the_trace(tmp_path):
    slower = ns(build.build(make_run(tmp_path / "slower", STEP_NS + MS)))
    assert slower["idle"] == pytest.approx(STEPS * (IDLE_NS + MS), rel=0.01)


def test_a_launched_kernel_that_leaves_the_device_empty_is_doubted(run):
    make_trace(run / "records" / "trace.json.gz", queued_ns=2 * MS)
    (doubt,) = (lack for lack in build.build(run)["lacks"] if "took more than 1 ms to begin on an empty device" in lack)
    assert doubt.startswith(f"{ACTIVE} ")


def test_rates_are_given_against_three_peaks_and_the_sampled_clock(whole):
    figures, rate = whole["figures"], STEPS * FLOPS / (TRAINING_NS / S)
    value = {key: figure["value"] for key, figure in figures.items()}
    assert value["achieved_flops_per_s"] == pytest.approx(rate)
    assert value["v100_normalised"] == pytest.approx(rate / 125e12)
    assert value["of_ceiling"] == pytest.approx(rate / 7e14)
    assert value["mfu"] == pytest.approx(rate / 989.5e12, rel=1e-3)
    assert value["perturbation"] == pytest.approx(1.05)
    assert value["sm_clock_hz"] == pytest.approx(1.464e9)
    assert value["mfu_at_clock"] == pytest.approx(value["mfu"] * 1830 / 1464)
    assert (figures["mfu_at_clock"]["status"], figures["mfu"]["status"]) == ("modelled", "measured")
    assert "1,464 MHz sampled / 1,830 MHz of the peak" in figures["mfu_at_clock"]["source"]
    assert "not MFU" in figures["v100_normalised"]["source"]


@pytest.mark.parametrize(
    ("damage", "key", "reason"),
    [
        (lambda run: None, "mfu_at_clock", "the sampler left no file"),
        (lambda run: sampled(run, 1464, count=12), "mfu_at_clock", "12 samples of the SM clock in training"),
        (lambda run: change(run / "summary.json", device="NVIDIA H200 Laptop GPU"), "mfu", "data sheet is not in the"),
        (
            lambda run: change(run / "summary.json", device="NVIDIA H200 Laptop GPU"),
            "mfu_at_clock",
            "data sheet is not",
        ),
        (lambda run: (run / "records/work.json").unlink(), "mfu", "the work of a step was not counted"),
        (lambda run: (run / "records/ceilings.json").unlink(), "of_ceiling", "the ceilings were not measured"),
        (lambda run: (run / "records/steps.json").unlink(), "step_s", "the timed run's steps are not known"),
        (lambda run: change(run / "summary.json", wall_s=None), "wall_s", "the run did not get that far"),
    ],
    ids=[
        "no_samples",
        "few_samples",
        "unknown_gpu",
        "unknown_clock",
        "no_work",
        "no_ceilings",
        "no_steps",
        "not_reached",
    ],
)
def test_an_unavailable_figure_has_its_reason(run, damage, key, reason):
    damage(run)
    made = build.build(run)
    found = made["figures"][key]
    assert (found["value"], found["status"]) == (None, "unavailable")
    assert reason in found["source"]
    if key == "mfu" and "data sheet" in reason:  # its ceiling stands
        assert made["figures"]["of_ceiling"]["status"] == "measured"
        assert "measured ceiling" in made["terms"][0]["name"]
        assert "ceiling_gap" not in ns(made)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"data_identity": "synthetic", "test_accuracy": 0.99}, "the images are synthetic"),
        ({"test_accuracy": 0.9399}, "it reached 93.99%"),
        ({"data_identity": "copy", "test_accuracy": None}, "no accuracy is known"),
        ({"train_plus_eval_s": None}, "its work, its time or this device's peak is not known"),
        ({"test_accuracy": 0.94}, ""),
    ],
)
def test_only_a_run_to_the_target_is_compared_with_the_article(run, changes, why):
    change(run / "summary.json", **changes)
    made = build.build(run)
    assert made["no_levers"].startswith(why)
    assert bool(made["levers"]) == (not why) == (not made["no_levers"])


def test_kernels_of_no_category_make_the_account_incomplete(run):
    trace = traces.HandMadeTrace()
    for number in range(ACTIVE):
        trace.step(number, number * STEP_NS, STEP_NS)
        trace.kernel("zzz", number * STEP_NS + 10 * US, number * STEP_NS + 20 * US, 10 * MS)
    trace.write(run / "records" / "trace.json.gz")
    made = build.build(run)
    assert made["status"] == "incomplete"
    assert any("no known category" in line for line in made["lacks"])


def replayed(folder, **changes):
    """The run of `make_run` with a profiled pass of graph replays."""
    folder = make_run(folder)
    _, profile = traces.profiled_pass(folder / "records" / "trace.json.gz", **changes)
    write_json(folder / "records" / "profile.json", profile)
    return folder


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


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """The report of replays of which none is refused."""
    return build.build(replayed(tmp_path_factory.mktemp("honest") / "run"))


def test_replayed_kernels_are_attributed_by_the_eager_step_among_them(honest, run):
    found = ns(honest)
    assert (found["batch norm"], found["idle"]) == (STEPS * BN_NS, STEPS * IDLE_NS)
    assert "unknown" not in found
    assert honest["layers"][0]["ns_per_step"] == pytest.approx(CONV_NS)
    assert honest["lacks"] == build.build(run)["lacks"]
    assert honest["profiled"]["refused"] == []
    assert "ProfilerStep#2 of the trace was run eagerly" in honest["assumption"]


def test_refused_steps_are_named_and_the_account_is_of_the_others(tmp_path, honest):
    folder = replayed(tmp_path / "run", lie=overlapping({4, 7, 20}))
    made = written(folder)
    assert ns(made) == ns(honest)
    said = "3 of 20 profiled steps refused: kernels overlap on one stream"
    assert [one["step"] for one in made["profiled"]["refused"]] == [4, 7, 20]
    assert all(said in (folder / f"report.{kind}").read_text() for kind in ("html", "md", "json"))
    assert "17 of its 20 steps" in next(t for t in made["terms"] if t["key"] == "batch norm")["source"]
    assert all("17 of its 20 steps" in row["source"] for row in (*made["kernels"], *made["layers"]))
    assert not any("refused" in lack for lack in made["lacks"])


def test_without_a_believed_replay_the_account_is_of_the_eager_step_and_marked(tmp_path, honest):
    folder = replayed(tmp_path / "run", lie=overlapping(set(range(21)) - {traces.EAGER}))
    made = written(folder)
    assert ns(made) == ns(honest)  # in whole nanoseconds
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


def test_without_any_believed_step_the_part_is_missing_and_says_so(tmp_path):
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
def test_a_recorded_trace_makes_a_report(run, name):
    """Whatever it lacks is said, and terms still sum to the phase."""
    folder = os.environ.get("GPU_TRACES_DIR")
    if not folder:
        pytest.skip("GPU_TRACES_DIR names no folder of recorded traces")
    (run / "records" / "trace.json.gz").write_bytes(Path(folder, f"{name}.json.gz").read_bytes())
    found, _ = build.write(run)
    assert sum(t["ns"] for t in found["terms"]) == TRAINING_NS


def test_a_run_that_was_not_profiled_is_one_line(run, tmp_path, capsys):
    (run / "records").rename(tmp_path / "elsewhere")
    with pytest.raises(errors.ReportError, match=r"run was not profiled, .*: python -m profiling collect .*run$"):
        report_command.run(run, False, terminal.Terminal())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("there_is", [True, False])
def test_the_command_says_where_the_trace_can_be_looked_at(run, capsys, there_is):
    trace = run / "records" / "trace.json.gz"
    if not there_is:
        trace.unlink()
    report_command.run(run, False, terminal.Terminal())
    said = capsys.readouterr().out.splitlines()
    assert (f"trace: {trace}, which opens in ui.perfetto.dev" in said) == there_is
    page = (run / "report.html").read_text()
    assert ("records/trace.json.gz, which opens in ui.perfetto.dev" in page) == there_is


def test_no_control_character_of_a_record_reaches_the_terminal(run, capsys):
    change(run / "summary.json", device="\x1b[31mred\x07")
    change(run / "records" / "profile.json", error="\x1b]0;title\x07")
    report_command.run(run, False, terminal.Terminal())
    said = "".join(capsys.readouterr())
    assert "title" in said
    assert not {"\x1b", "\x07"} & set(said)


def without_plotly(out: str, err: str, folder: Path, older: bool) -> None:
    """The files and words other than the page."""
    headline = json.loads((folder / "report.json").read_text())["headline"]
    assert headline in out
    assert headline.replace("\xa0", " ") in (folder / "report.md").read_text()
    assert str(folder / "report.md") in out
    (line,) = [line for line in err.splitlines() if "there is no page" in line]
    assert f"python -m profiling report {folder}" in line
    assert ("is an older one" in line) == (folder / "report.html").exists() == older


def test_without_plotly_there_is_a_report_and_no_page(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert report_command.run(run, False, terminal.Terminal()) == 0
    without_plotly(*capsys.readouterr(), run, older=False)


def test_a_machine_that_never_had_plotly_is_given_the_account(run):
    (run / "report.html").write_text("an older one")
    code = "import sys; sys.modules['plotly'] = None; from profiling.__main__ import app; app()"
    command = [sys.executable, "-c", code, "report", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    without_plotly(done.stdout, done.stderr, run, older=True)
