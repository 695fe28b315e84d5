import json

import pytest

from profiling.output.files import read_json, read_jsonl
from profiling.run.clock import Clock
from profiling.run.log import COLUMNS, RunLog, cells, closing_lines

FACTS = {"preset": "tiny", "data_identity": "copy", "seed": 0}


class Seconds:
    """A clock that is moved by hand."""

    def __init__(self):
        self.ns = 0

    def __call__(self) -> int:
        return self.ns


def make(out, kept=None, writes=True):
    now, warnings = Seconds(), []
    log = RunLog(out, Clock("set-up", now=now), FACTS, 10**9, kept or {}, writes, warnings.append)
    return log, now, warnings


def spend(log, now, phase, seconds):
    log.clock.switch(phase)
    now.ns += int(seconds * 1e9)


def an_epoch(log, now):
    spend(log, now, "training", 4)
    spend(log, now, "evaluation", 1)
    return log.add_epoch(50, 0.1, 1000, (1.5, 0.4), (1.2, 0.5))


def test_times_add_up_by_dawnbench_s_rule(tmp_path):
    log, now, _ = make(tmp_path)
    spend(log, now, "set-up", 7)
    spend(log, now, "preprocessing", 2)
    row = an_epoch(log, now)
    assert (row["epoch_train_s"], row["epoch_eval_s"], row["train_s"]) == (4, 1, 6)
    second = an_epoch(log, now)
    assert (second["epoch_train_s"], second["train_s"], second["eval_s"]) == (4, 10, 2)
    assert second["images_per_s"] == 250
    s = log.finish("complete", 0, 100, 2000, 123)
    assert (s["train_s"], s["eval_s"], s["train_plus_eval_s"], s["wall_s"]) == (10, 2, 12, 19)
    assert s["images_per_s"] == 200
    assert s["flops"] == 2000 * 10**9
    assert s["v100_normalised"] == pytest.approx(2e12 / 10 / 125e12)
    assert s["mfu"] is None
    assert read_json(tmp_path / "summary.json") == s


def test_a_later_session_continues_the_figures(tmp_path):
    log, now, _ = make(tmp_path)
    log.begin({}, {})
    an_epoch(log, now)
    kept = json.loads(json.dumps(log.state()))
    resumed, now, _ = make(tmp_path, kept)
    resumed.begin({}, {})
    assert len(read_jsonl(tmp_path / "log.jsonl")) == 1
    row = an_epoch(resumed, now)
    assert (row["epoch"], row["epoch_train_s"], row["train_s"], row["eval_s"]) == (2, 4, 8, 2)
    assert [r["epoch"] for r in read_jsonl(tmp_path / "log.jsonl")] == [1, 2]
    assert (tmp_path / "dawnbench.tsv").read_text().splitlines() == [
        "epoch\thours\ttop1Accuracy",
        "1\t0.00111111\t50.00",
        "2\t0.00222222\t50.00",
    ]


def test_a_link_in_the_table_s_place_leads_nowhere(tmp_path):
    log, now, _ = make(tmp_path)
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "dawnbench.tsv").symlink_to(tmp_path / "victim")
    log.begin({}, {})
    an_epoch(log, now)
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "dawnbench.tsv").read_text().count("\n") == 2


def test_a_run_that_did_nothing_reports_nothing(tmp_path):
    log, _, _ = make(tmp_path)
    s = log.finish("failed", 1, 0, 0, None)
    assert s["images_per_s"] is s["v100_normalised"] is s["test_accuracy"] is None
    assert s["epochs"] == 0


def test_a_failed_write_is_a_warning(tmp_path):
    log, now, warnings = make(tmp_path / "file")
    (tmp_path / "file").write_text("in the way")
    log.begin({}, {})
    an_epoch(log, now)
    log.finish("complete", 0, 1, 1, None)
    assert len(warnings) == 4
    assert all("the run goes on" in w for w in warnings)


def test_a_process_that_does_not_write_writes_nothing(tmp_path):
    log, now, _ = make(tmp_path, writes=False)
    log.begin({}, {})
    an_epoch(log, now)
    log.finish("complete", 0, 1, 1, None)
    assert not list(tmp_path.iterdir())


def test_what_people_read(tmp_path):
    log, now, _ = make(tmp_path)
    row = an_epoch(log, now)
    assert len(cells(row)) == len(COLUMNS)
    text = "\n".join(closing_lines(log.finish("complete", 0, 50, 1000, None)))
    assert "50.00% after 1 epoch (copy data, n = 1)" in text
    assert "training 4.00 s" in text
    assert "unknown" in text
    log.facts["data_identity"] = "synthetic"
    assert "not CIFAR-10" in closing_lines(log.finish("complete", 0, 50, 1000, 1))[0]


@pytest.mark.parametrize(
    ("device", "dtype", "peak"),
    [
        ("NVIDIA H200", "float16", 989.5e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 156e12),
        ("AMD EPYC", "bfloat16", None),
    ],
    ids=["its_own_peak", "fp32_runs_as_tf32", "no_data_sheet"],
)
def test_mfu_is_against_the_devices_own_data_sheet(tmp_path, device, dtype, peak):
    log, now, _ = make(tmp_path)
    log.facts |= {"device": device, "dtype": dtype}
    an_epoch(log, now)
    s = log.finish("complete", 0, 50, 1000, None)
    assert s["mfu"] == (pytest.approx(s["flops"] / s["train_s"] / peak, rel=1e-3) if peak else None)
