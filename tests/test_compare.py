import copy
import json
import subprocess
import sys

import pytest
import report_sample

from profiling.compare import compare, lines, load
from profiling.errors import RefusedError, ReportError


@pytest.fixture
def pair():
    """A report, and the same with a second less in its batch norm and half a second more of idle."""
    a = report_sample.gpu()
    a["run"].update(status="complete", on_gpu=True)
    b = copy.deepcopy(a)
    for key, ns in (("batch norm", -1_000_000_000), ("idle", 500_000_000)):
        next(t for t in b["terms"] if t["key"] == key)["ns"] += ns
    return a, b


def test_differences_of_terms_sum_to_that_of_the_stopwatch(pair):
    c = compare(*pair)
    assert c["difference_ns"] == -500_000_000 == sum(t["difference_ns"] for t in c["terms"])
    assert [t["key"] for t in c["terms"][:2]] == ["batch norm", "idle"]
    assert "0.5 s faster" in c["sentence"]
    assert "-1 s" in c["sentence"]
    assert "against" in c["sentence"]
    assert c["differs"] == []


def test_a_term_that_only_one_has_is_compared_with_nothing(pair):
    a, b = pair
    gone = next(t for t in b["terms"] if t["key"] == "idle")
    b["terms"].remove(gone)
    row = next(t for t in compare(a, b)["terms"] if t["key"] == "idle")
    assert (row["b_ns"], row["difference_ns"]) == (0, -row["a_ns"])


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("run", "device", "NVIDIA B200"),
        ("run", "data_identity", "copy"),
        ("run", "ops", "reference"),
        ("environment", "torch", "2.99"),
    ],
)
def test_what_differs_is_named(pair, where, key, value):
    a, b = pair
    b[where][key] = value
    assert any(str(value) in line for line in compare(a, b)["differs"])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda r: r["run"].update(status="interrupted"), "complete"),
        (lambda r: r["run"].update(images=7), "different work"),
        (lambda r: r["run"].update(data_identity="synthetic"), "synthetic"),
        (lambda r: r.update(terms=[t for t in r["terms"] if t["key"] != "residual"]), "no whole account"),
        (lambda r: r["run"].update(on_gpu=False), "GPU"),
    ],
    ids=["interrupted", "other_epochs", "other_kind_of_data", "no_account", "gpu_and_cpu"],
)
def test_what_would_mislead_is_refused(pair, change, why):
    change(pair[1])
    for a, b in (pair, pair[::-1]):
        with pytest.raises(RefusedError, match=why):
            compare(a, b)


def test_the_text_shows_every_term_and_the_sentence(pair):
    text = lines(compare(*pair))
    assert all(any(t["name"][:41] in line for line in text) for t in pair[0]["terms"])
    longest = max(text, key=lambda line: line.count("-") if line.startswith("  ") else 0)
    assert "batch norm" in longest
    assert "faster" in text[-1]


def test_a_report_file_or_its_folder_is_taken(pair, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(pair[0]))
    assert load(path) == load(tmp_path) == pair[0]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 99, "terms": [], "run": {}}', "\x00"])
def test_what_is_no_report_is_said(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ReportError, match=r"report"):
        load(tmp_path)


def test_the_commands_exit_codes(pair, tmp_path):
    def command(*arguments) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "profiling", *map(str, arguments)], capture_output=True, text=True)

    for name, report in zip("ab", pair, strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    done = command("compare", a, b, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["difference_ns"] == -500_000_000
    pair[1]["run"]["images"] = 1
    b.write_text(json.dumps(pair[1]))
    refused = command("compare", a, b)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: the runs trained on 1,750,000 and 1 images")
    unreadable = command("report", tmp_path)
    assert unreadable.returncode == 3
    assert len(unreadable.stderr.splitlines()) == 1
