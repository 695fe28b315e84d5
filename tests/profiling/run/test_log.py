import json

import pytest

from profiling.output.files import read_json, read_jsonl
from profiling.run.clock import Clock
from profiling.run.log import COLUMNS, RunLog, cells, closing_lines


class Run:
    """A log in `out` on a clock that `spend` moves, and its warnings."""

    def __init__(self, out, kept=None, writes=True, **facts):
        self.ns, self.warnings = 0, []
        facts = {"preset": "tiny", "data_identity": "copy", "seed": 0} | facts
        clock = Clock("set-up", now=lambda: self.ns)
        self.log = RunLog(out, clock, facts, 10**9, kept or {}, writes, self.warnings.append)

    def spend(self, phase, seconds):
        self.log.clock.switch(phase)
        self.ns += int(seconds * 1e9)

    def epoch(self):
        self.spend("training", 4)
        self.spend("evaluation", 1)
        return self.log.add_epoch(50, 0.1, 1000, (1.5, 0.4), (1.2, 0.5))


def test_times_add_up_by_dawnbench_s_rule(tmp_path):
    run = Run(tmp_path)
    run.spend("set-up", 7)
    run.spend("preprocessing", 2)
    row, second = run.epoch(), run.epoch()
    assert (row["epoch_train_s"], row["epoch_eval_s"], row["train_s"]) == (4, 1, 6)
    assert (second["epoch_train_s"], second["train_s"], second["eval_s"]) == (4, 10, 2)
    assert (second["images_per_s"], len(cells(second))) == (250, len(COLUMNS))
    s = run.log.finish("complete", 0, 100, 2000, 123 * 10**6, 456 * 10**6)
    assert (s["train_s"], s["eval_s"], s["train_plus_eval_s"], s["wall_s"]) == (10, 2, 12, 19)
    assert (s["images_per_s"], s["flops"], s["mfu"]) == (200, 2000 * 10**9, None)
    assert s["v100_normalised"] == pytest.approx(2e12 / 10 / 125e12)
    assert read_json(tmp_path / "summary.json") == s
    text = "\n".join(closing_lines(s))
    for words in ("50.00% after 2 epochs (copy data, n = 1)", "training 10.00 s", "123 MB in tensors, 456 MB reserved"):
        assert words in text
    made = s | {"data_identity": "synthetic", "epochs": 1, "peak_memory_bytes": None, "peak_reserved_bytes": None}
    text = "\n".join(closing_lines(made))
    for words in ("after 1 epoch (synthetic images, not CIFAR-10", "peak memory unknown"):
        assert words in text


def test_a_later_session_continues_the_figures(tmp_path):
    """A link in a file's place leads nowhere."""
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "dawnbench.tsv").symlink_to(tmp_path / "victim")
    run = Run(tmp_path)
    run.log.begin({}, {})
    run.epoch()
    resumed = Run(tmp_path, json.loads(json.dumps(run.log.state())))
    resumed.log.begin({}, {})
    assert len(read_jsonl(tmp_path / "log.jsonl")) == 1
    row = resumed.epoch()
    assert (row["epoch"], row["epoch_train_s"], row["train_s"], row["eval_s"]) == (2, 4, 8, 2)
    assert [r["epoch"] for r in read_jsonl(tmp_path / "log.jsonl")] == [1, 2]
    rows = ["epoch\thours\ttop1Accuracy", "1\t0.00111111\t50.00", "2\t0.00222222\t50.00"]
    assert (tmp_path / "dawnbench.tsv").read_text().splitlines() == rows
    assert (tmp_path / "victim").read_text() == "mine"


def test_a_run_that_did_nothing_reports_nothing(tmp_path):
    s = Run(tmp_path).log.finish("failed", 1, 0, 0, None)
    assert s["images_per_s"] is s["v100_normalised"] is s["test_accuracy"] is None
    assert s["epochs"] == 0


def test_a_failed_write_is_a_warning_and_a_process_that_does_not_write_writes_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    failing, silent = Run(tmp_path / "file"), Run(tmp_path, writes=False)
    for run in (failing, silent):
        run.log.begin({}, {})
        run.epoch()
        run.log.finish("complete", 0, 1, 1, None)
    assert len(failing.warnings) == 4
    assert all("the run goes on" in w for w in failing.warnings)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


PEAKS = {
    "its_own_peak": ("NVIDIA H200", "float16", 989.5e12),
    "fp32_runs_as_tf32": ("NVIDIA A100-SXM4-80GB", "float32", 156e12),
    "no_data_sheet": ("AMD EPYC", "bfloat16", None),
}


@pytest.mark.parametrize(("device", "dtype", "peak"), PEAKS.values(), ids=PEAKS)
def test_mfu_is_against_the_devices_own_data_sheet(tmp_path, device, dtype, peak):
    run = Run(tmp_path, device=device, dtype=dtype)
    run.epoch()
    s = run.log.finish("complete", 0, 50, 1000, None)
    assert s["mfu"] == (pytest.approx(s["flops"] / s["train_s"] / peak, rel=1e-3) if peak else None)
