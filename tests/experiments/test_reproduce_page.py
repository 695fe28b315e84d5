import pytest

from experiments import reproduce_page
from experiments.reproduce_page import clipped, last_line, markdown, text
from profiling.output.files import append_jsonl, write_json

ENVIRONMENT = {
    "cores": 16,
    "python": "3.12.3",
    "packages": {"torch": "2.11.0", "numpy": None},
    "git_sha": "0123456789abcdef",
    "git_dirty": True,
    "gpu": {"driver": "580.95"},
}


def document(*steps: dict, small: bool = False) -> dict:
    settings = {"small": small, "device_name": "NVIDIA H100"}
    return {"settings": settings, "environment": ENVIRONMENT, "steps": list(steps)}


def step(name: str, status: str, seconds: float | None = None, why: str = "") -> dict:
    return {"name": name, "status": status, "seconds": seconds, "why": why}


def test_the_head_says_what_it_was_measured_on(tmp_path):
    lines = text(tmp_path, document()).split("\n")
    assert lines[0] == "reproduce on NVIDIA H100, driver 580.95; data: none so far"
    assert lines[1].startswith("16 cores, Python 3.12.3, torch 2.11.0; commit 0123456789ab with changes; measured here")
    assert lines[-1] == "everything is done"
    for name, sha in (("ours", "a" * 40), ("reference", "b" * 40)):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "summary.json", {"data_identity": "copy", "git_sha": sha})
    (tmp_path / "doctor.log").write_text("ok      rich     15\nmissing C compiler   no gcc\nwarning clocks  low\n")
    head = text(tmp_path, document(small=True)).split("\n")
    assert head[0].endswith("data: copy")
    assert f"commit {'a' * 12}, {'b' * 12} with changes" in head[1]
    assert head[2].startswith("SMALL: ")
    assert head[3:5] == [
        "MIND: the runs are from different commits",
        "doctor: missing C compiler no gcc; warning clocks low",
    ]


def test_the_steps_are_told_by_what_became_of_them(tmp_path):
    told = text(
        tmp_path,
        document(
            step("a", "done", 1.2),
            step("b", "done", 20.0),
            step("c", "failed", 3.0, "exit code 3: it broke"),
            step("d", "out of time", 40.0, "killed by SIGKILL: no word"),
            step("e", "left"),
            step("f", "left", None, "it needs g"),
            step("h", "unavailable", None, "it needs a CUDA GPU"),
            step("i", "unavailable", None, "it needs a CUDA GPU"),
        ),
    )
    assert told.split("\n")[-6:] == [
        "== done, s: a 1, b 20",
        "== failed after 3 s: c: exit code 3: it broke",
        "== out of time after 40 s: d: killed by SIGKILL: no word",
        "== left: f: it needs g",
        "== unavailable, it needs a CUDA GPU: h, i",
        f"left: c, d, e, f; the same command with --out {tmp_path} goes on",
    ]


def test_kernels_that_are_wrong_are_named(tmp_path):
    for case, status, error in (("a", "right", None), ("b", "wrong", "off by 3"), ("c", "failed", "no registers")):
        append_jsonl(
            tmp_path / "check.jsonl", {"op": "conv_fprop", "case": case, "batch": 2, "status": status, "error": error}
        )
    told = text(tmp_path, document())
    assert "== kernels against float64: 3 checks of 1 ops, 1 right, 1 wrong, 1 failed" in told
    assert "  wrong: b, 2 images: off by 3\n  failed: c, 2 images: no registers" in told


def test_the_longest_kernels_are_not_to_be_trusted_where_the_profile_lacks_something(tmp_path):
    kernels = [{"name": "conv_fprop_kernel", "us": 250.0, "calls": 9.0}]
    found = {
        "sum_ms": 0.5,
        "timed_ms": 0.51,
        "kernels_a_step": 47.0,
        "source": "a pass",
        "lacks": [],
        "kernels": kernels,
    }
    for name, lacks in (("ours", []), ("reference", ["it sums to twice the step"])):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "kernels.json", found | {"lacks": lacks})
    told = text(tmp_path, document()).split("\n")
    assert (
        "== longest kernels of ours: 0.500 ms a step in 47 kernels; timed step 0.510 ms, filled to 98%; a pass" in told
    )
    assert "      250.0 us  50.0% x  9.0  conv_fprop_kernel" in told
    assert any(line.endswith("a pass; NOT TO BE TRUSTED: it sums to twice the step") for line in told)


def test_the_account_the_ceilings_and_the_tests_are_told(tmp_path):
    (tmp_path / "fused-0").mkdir()
    report = {"headline": "10 s of training", "sentences": ["So it is."], "lacks": ["the counters"]}
    write_json(tmp_path / "fused-0" / "report.json", report)
    one = {"name": "matrix product", "shape": "8192^3", "value": 7.9e14}
    ceilings = {"gemm": [one], "convolutions": [one | {"name": "fprop", "value": 6e14}], "reasons": ["power cap"]}
    write_json(tmp_path / "ceilings.json", ceilings | {"copy": {"value": 3e12}, "launch": {"value": 2e-6}})
    (tmp_path / "tests.log").write_text("....F\nFAILED tests/test_x.py::test_y - off\n1 failed, 4 passed in 3 s\n")
    (tmp_path / "memcheck.log").write_text("===== ERROR SUMMARY: 0 errors\n")
    told = text(tmp_path, document(step("memcheck", "done", 3.0)))
    assert "== account of fused-0: 10 s of training\n  So it is.\n  lacks: the counters" in told
    assert "790.0 TFLOP/s (matrix product 8192^3), copy 3,000 GB/s, 2.00 us a launch; held back by power cap" in told
    assert "== tests: 1 failed, 4 passed in 3 s\n  FAILED tests/test_x.py::test_y - off" in told
    assert "== memcheck: ===== ERROR SUMMARY: 0 errors" in told


def test_the_benchmarks_verdicts_are_counted(tmp_path):
    def row(case: str, verdict: str | None, mode: str = "cold", provider: str = "ours", wrong: bool = False) -> None:
        row = {"case": case, "provider": provider, "mode": mode, "verdict": verdict, "wrong": wrong}
        row |= {"us": {"value": None if wrong else 10.0, "source": "not finite"}, "best_alternative": "torch.compile"}
        append_jsonl(tmp_path / "bench.jsonl", row | {"speedup": {"value": 1.5} if verdict else None})

    append_jsonl(tmp_path / "bench.jsonl", {"kind": "facts"})
    for case, verdict in (("a", "FAST"), ("b", "SLOW"), ("c", "FAST")):
        row(case, verdict)
    row("d", "SLOW", mode="hot")
    row("e", "SLOW", provider="torch.compile")
    row("f", None, wrong=True)
    told = text(tmp_path, document())
    assert "== bench, our kernels, caches cold: 2 FAST, 1 SLOW; 1 WRONG" in told
    assert "  a: 10.0 us, 1.50 x torch.compile: FAST" in told
    assert "  f: unavailable: not finite" in told


def test_modes_of_a_step_are_a_line(tmp_path):
    rows = [{"batch": 512, "step": "eager", "reason": None, "images_per_s": 1e5}]
    write_json(tmp_path / "steps.json", {"rows": [*rows, {"batch": 512, "step": "compiled", "reason": "no"}]})
    assert "by batch: 512 eager 100,000 images/s; 512 compiled unavailable (no)" in text(tmp_path, document())


@pytest.mark.parametrize("name", ["check.jsonl", "ceilings.json", "ours/kernels.json", "fused-0/report.json"])
def test_a_damaged_file_costs_its_section_alone(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"version": 1}\n')
    told = text(tmp_path, document(step("a", "done", 1.0)))
    assert "cannot be read (" in told
    assert told.startswith("reproduce on NVIDIA H100")
    assert told.endswith("== done, s: a 1\neverything is done")


def test_a_long_text_keeps_its_beginning_and_its_end():
    whole = "\n".join([f"{number:04d} {'x' * 95}" for number in range(200)] + ["left: none"])
    short = clipped(whole)
    assert len(short) <= reproduce_page.LONGEST
    assert short.startswith("0000 x")
    assert short.endswith("xxx\n... the rest is in reproduce.md\nleft: none")
    assert clipped(short) == short


def test_the_page_is_the_text_under_its_head():
    assert markdown("head\nfirst\nsecond") == "# head\n\n```\nfirst\nsecond\n```\n"


def test_a_logs_last_word(tmp_path):
    assert last_line(tmp_path / "none.log") == "no word"
    (tmp_path / "a.log").write_bytes(b"first\n  last \xff word \n\n")
    assert last_line(tmp_path / "a.log") == "last \ufffd word"
