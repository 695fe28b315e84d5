"""The page of a reproduction, section by section, from the files that the steps leave."""

import json

import pytest

from experiments import reproduce_page
from experiments.reproduce_page import clipped, last_line, markdown, text

ENVIRONMENT = {
    **{"cores": 16, "python": "3.12.3", "packages": {"torch": "2.11.0", "numpy": None}},
    **{"git_sha": "0123456789abcdef", "git_dirty": True, "gpu": {"driver": "580.95"}},
}
KERNELS = {
    **{"sum_ms": 0.5, "timed_ms": 0.51, "kernels_a_step": 47.0, "source": "a pass", "lacks": []},
    "kernels": [{"name": "conv_fprop_kernel", "us": 250.0, "calls": 9.0}],
}
ROOF = {"name": "matrix product", "shape": "8192^3", "value": 7.9e14}
CEILINGS = {"gemm": [ROOF], "convolutions": [ROOF | {"name": "fprop", "value": 6e14}], "reasons": ["power cap"]}
CHECK = {"op": "conv_fprop", "batch": 2, "status": "right", "error": None}
BENCH = {
    **{"provider": "ours", "mode": "cold", "verdict": "FAST", "wrong": False, "best_alternative": "torch.compile"},
    **{"us": {"value": 10.0, "source": ""}, "speedup": {"value": 1.5}},
}
WRONG = {"verdict": None, "wrong": True, "us": {"value": None, "source": "not finite"}, "speedup": None}
FILES = {  # path: (what is in it, lines that the page then has)
    "ours/kernels.json": (
        KERNELS,
        "== longest kernels of ours: 0.500 ms a step in 47 kernels; timed step 0.510 ms, filled to 98%; a pass\n"
        "      250.0 us  50.0% x  9.0  conv_fprop_kernel",
    ),
    "reference/kernels.json": (
        KERNELS | {"lacks": ["it sums to twice the step"], "timed_ms": None},
        "timed step unknown; a pass; NOT TO BE TRUSTED: it sums to twice the step\n",
    ),
    "fused-0/report.json": (
        {"headline": "10 s of training", "sentences": ["So it is."], "lacks": ["the counters"]},
        "== account of fused-0: 10 s of training\n  So it is.\n  lacks: the counters",
    ),
    "ceilings.json": (
        CEILINGS | {"copy": {"value": 3e12}, "launch": {"value": 2e-6}},
        "790.0 TFLOP/s (matrix product 8192^3), copy 3,000 GB/s, 2.00 us a launch; held back by power cap",
    ),
    "steps.json": (
        {"rows": [{"batch": 512, "step": "eager", "reason": None, "images_per_s": 1e5},
                  {"batch": 512, "step": "compiled", "reason": "no"}]},
        "by batch: 512 eager 100,000 images/s; 512 compiled unavailable (no)",
    ),
    "check.jsonl": (
        [CHECK | {"case": "a"}, CHECK | {"case": "b", "status": "wrong", "error": "off by 3"},
         *(CHECK | {"case": f"c{i}", "status": "failed", "error": "no registers"} for i in range(12))],
        "== kernels against float64: 14 checks of 1 ops, 12 failed, 1 right, 1 wrong\n"
        "  wrong: b, 2 images: off by 3\n  failed: c0, 2 images: no registers",
    ),
    "bench.jsonl": (
        [{"kind": "facts"}, BENCH | {"case": "a"}, BENCH | {"case": "b", "verdict": "SLOW"}, BENCH | {"case": "c"},
         BENCH | {"mode": "hot"}, BENCH | {"provider": "eager"}, BENCH | WRONG | {"case": "f"}],
        "== bench, our kernels, caches cold: 2 FAST, 1 SLOW; 1 WRONG\n  a: 10.0 us, 1.50 x torch.compile: FAST",
    ),
    "tests.log": (
        "....F\nFAILED tests/test_x.py::test_y - off\n1 failed, 4 passed in 3 s\n",
        "== tests: 1 failed, 4 passed in 3 s\n  FAILED tests/test_x.py::test_y - off",
    ),
    "memcheck.log": ("===== ERROR SUMMARY: 0 errors\n", "== memcheck: ===== ERROR SUMMARY: 0 errors"),
    "doctor.log": (
        "ok      rich     15\nmissing C compiler   no gcc\nwarning clocks  low\n",
        "\ndoctor: missing C compiler no gcc; warning clocks low\n",
    ),
}  # fmt: skip


def document(*steps: dict, small: bool = False) -> dict:
    settings = {"small": small, "device_name": "NVIDIA H100"}
    return {"settings": settings, "environment": ENVIRONMENT, "steps": list(steps)}


def step(name: str, status: str, seconds: float | None = None, why: str = "") -> dict:
    return {"name": name, "status": status, "seconds": seconds, "why": why}


def write(path, content) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = content if isinstance(content, list) else [content]
    path.write_text(content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in rows))


def test_sections_of_the_files_that_are_there(tmp_path):
    for name, (content, _) in FILES.items():
        write(tmp_path / name, content)
    told = text(tmp_path, document())
    for name, (_, said) in FILES.items():
        assert said in told, name
    assert ("  and 1 more in check.jsonl" in told, "failed: c11" in told) == (True, False)
    assert "  f: unavailable: not finite" in told


@pytest.mark.parametrize("name", ["check.jsonl", "ceilings.json", "ours/kernels.json", "fused-0/report.json"])
def test_damaged_file_costs_its_section_alone(tmp_path, name):
    write(tmp_path / name, {"version": 1})
    told = text(tmp_path, document(step("a", "done", 1.0)))
    assert "cannot be read (" in told
    assert told.startswith("reproduce on NVIDIA H100")
    assert told.endswith("== done, s: a 1\neverything is done")


def test_head_says_what_it_was_measured_on(tmp_path):
    lines = text(tmp_path, document()).split("\n")
    assert lines[0] == "reproduce on NVIDIA H100, driver 580.95; data: none so far"
    assert lines[1].startswith("16 cores, Python 3.12.3, torch 2.11.0; commit 0123456789ab with changes; measured here")
    assert lines[-1] == "everything is done"
    for name, sha in (("ours", "a" * 40), ("reference", "b" * 40)):
        write(tmp_path / name / "summary.json", {"data_identity": "copy", "git_sha": sha})
    head = text(tmp_path, document(small=True)).split("\n")
    assert head[0].endswith("data: copy")
    assert f"commit {'a' * 12}, {'b' * 12} with changes" in head[1]
    assert head[2].startswith("SMALL: ")
    assert head[3] == "MIND: the runs are from different commits"


def test_steps_are_told_by_their_ends(tmp_path):
    steps = (
        *(step("a", "done", 1.2), step("b", "done", 20.0), step("c", "failed", 3.0, "exit code 3: it broke")),
        *(step("d", "out of time", 40.0, "killed by SIGKILL: no word"), step("e", "left")),
        step("f", "left", None, "it needs g"),
        *(step(name, "unavailable", None, "it needs a CUDA GPU") for name in "hi"),
    )
    assert text(tmp_path, document(*steps)).split("\n")[-6:] == [
        "== done, s: a 1, b 20",
        "== failed after 3 s: c: exit code 3: it broke",
        "== out of time after 40 s: d: killed by SIGKILL: no word",
        "== left: f: it needs g",
        "== unavailable, it needs a CUDA GPU: h, i",
        f"left: c, d, e, f; the same command with --out {tmp_path} goes on",
    ]


def test_long_text_keeps_its_beginning_and_its_end():
    whole = "\n".join([f"{number:04d} {'x' * 95}" for number in range(200)] + ["left: none"])
    short = clipped(whole)
    assert reproduce_page.LONGEST - 101 < len(short) <= reproduce_page.LONGEST
    assert short.startswith("0000 x")
    assert short.endswith("xxx\n... the rest is in reproduce.md\nleft: none")
    assert clipped(short) == short
    assert markdown("head\nfirst\nsecond") == "# head\n\n```\nfirst\nsecond\n```\n"


def test_last_line_of_a_log(tmp_path):
    assert last_line(tmp_path / "none.log") == "no word"
    (tmp_path / "a.log").write_bytes(b"first\n  last \xff word \n\n")
    assert last_line(tmp_path / "a.log") == "last \ufffd word"
