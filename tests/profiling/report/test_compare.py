import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
import report_sample

from profiling.output.errors import CommandError, RefusedError, ReportError
from profiling.output.terminal import Terminal
from profiling.report import compare as compare_module
from profiling.report.build import build
from profiling.report.compare import compare, lines, load
from profiling.report.html import render_comparison


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
    assert c["sentence"] == (
        "B is 0.5 s faster than A: 9.732 to 9.232 s, 1.05 times faster; the largest part is batch norm and fused "
        "epilogues (-1.000 s, 200%), against idle (+0.500 s)."
    )
    assert c["uncertainty"] == (
        "Unexplained are +0.037 s of A (0.4%) and +0.037 s of B (0.4%): a term may be wrong by 0.074 s."
    )
    assert (c["differs"], c["doubts"]) == ([], [])


def test_what_is_slower_is_said_to_be_slower():
    a, b = report_sample.gpu(), report_sample.gpu()
    b["terms"][0]["ns"] *= 4
    assert "times slower" in compare(a, b)["sentence"]
    assert "as fast" not in compare(a, b)["sentence"]


def test_a_difference_that_rounds_to_nothing_has_no_factor(pair):
    a, b = pair
    b["terms"] = copy.deepcopy(a["terms"])
    b["terms"][0]["ns"] += 1_000_000
    assert compare(a, b)["sentence"].startswith("B is 0.001 s slower than A: 9.732 to 9.733 s; ")


def test_a_data_sheets_ideal_is_not_compared_with_a_measured_one(pair):
    """Ideal and gap of the one are together what the other calls ideal; without a gap the two are rows of their own."""
    a, b = pair
    b["terms"] = [t for t in b["terms"] if t["key"] != "ceiling_gap"]
    b["terms"][0]["name"] = "ideal at the measured ceiling"
    rows = {row["name"]: row for row in compare(a, b)["terms"]}
    assert rows["ideal at the measured ceiling"]["a_ns"] == 4_870_000_000 + 1_231_000_000
    assert "ideal at the data sheet's peak" not in rows
    a["terms"] = [t for t in a["terms"] if t["key"] != "ceiling_gap"]
    found = compare(a, b)
    rows = {row["name"]: (row["a_ns"], row["b_ns"]) for row in found["terms"]}
    assert rows["ideal at the data sheet's peak"] == (4_870_000_000, 0)
    assert rows["ideal at the measured ceiling"] == (0, 4_870_000_000)
    assert sum(t["difference_ns"] for t in found["terms"]) == found["difference_ns"]


def test_doubts_of_either_account_are_said_first(pair):
    pair[1]["doubts"] = ["Idle is -1 s."]
    c = compare(*pair, ("one", "two"))
    assert c["doubts"] == ["two: Idle is -1 s."]
    assert "IN DOUBT: two: Idle is -1 s." in lines(c)
    page = render_comparison(c)
    assert page.index("two: Idle is -1 s.") < page.index("<h1>")


def test_what_the_runs_reached_stands_below(pair):
    pair[1]["figures"]["test_accuracy"]["value"] = 0.9
    page, text = render_comparison(compare(*pair)), "\n".join(lines(compare(*pair)))
    for words in ("94.07", "90.00", "2.84"):
        assert words in page
        assert words in text


def test_nothing_is_no_difference(pair):
    text = "\n".join(lines(compare(*pair)))
    assert "-0.000" not in text
    assert "+0.000" not in text


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
    assert "faster" in text[-2]
    assert "Unexplained" in text[-1]
    assert "B - A" in render_comparison(compare(*pair)).split("<th ")[2], "in sight on a phone"


def test_it_can_be_drawn(pair, tmp_path):
    pair[1]["run"]["ops"] = "<script>alert(1)</script>"
    page = render_comparison(compare(*pair))
    chart = json.loads(page.split('id="charts">')[1].split("</script>")[0])[0]
    bars = next(trace for trace in chart["data"] if trace["type"] == "bar")
    assert bars["x"][0] == pytest.approx(sum(t["ns"] for t in pair[0]["terms"]) / 1e9)
    assert bars["x"][-1] == pytest.approx(sum(t["ns"] for t in pair[1]["terms"]) / 1e9)
    assert bars["x"][1:3] == [-1, 0.5]
    assert 'aria-label="Waterfall: B is 0.5 s faster than A: ' in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_the_page_leads_to_the_reports_that_there_are(pair, tmp_path):
    """From wherever it is, whatever the folders are called: a relative address, which a copy of them all keeps."""
    folders = [tmp_path / "runs" / name for name in ("javascript:a#b?c %20\"'><b>", "two")]
    for folder, report in zip(folders, pair, strict=True):
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(report))
    (folders[0] / "report.html").write_text("")
    out = tmp_path / "pages" / "c.html"
    out.parent.mkdir()
    for given in (folders, [folder / "report.json" for folder in folders]):
        compare_module.run(*given, out, False, Terminal(speaks=False))
        (href,) = re.findall(r'<a href="([^"]*)">', out.read_text())
        assert re.fullmatch(r"\.\./runs/[\w%.]+/report\.html", href)
        assert Path(out.parent, unquote(href)).resolve() == folders[0] / "report.html"


def test_a_report_file_or_its_folder_is_taken(pair, tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(pair[0]))
    assert compare(load(path), load(tmp_path)) == compare(pair[0], pair[0])


@pytest.mark.parametrize("name", ["none", "x" * 300, "none/report.json", "nul\0"], ids=lambda name: name[:16])
def test_a_folder_that_is_not_there_is_one_clear_line(tmp_path, name):
    for read in (load, build):
        with pytest.raises(ReportError, match="is not the folder of a run: it has no summary") as caught:
            read(tmp_path / name)
        assert not re.search(r"\n|Errno", str(caught.value))


@pytest.mark.parametrize("name", ["none/page.html", "x" * 300, "."], ids=lambda name: name[:16])
def test_a_page_that_cannot_be_written_is_one_clear_line(pair, tmp_path, name):
    (tmp_path / "report.json").write_text(json.dumps(pair[0]))
    with pytest.raises(CommandError, match="the page cannot be written to") as caught:
        compare_module.run(tmp_path, tmp_path, tmp_path / name, False, Terminal(speaks=False))
    assert not re.search(r"\n|Errno|\.tmp-", str(caught.value))


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": 99, "terms": [], "run": {}}', "\x00"])
def test_what_is_no_report_is_said(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(ReportError, match=r"report"):
        load(tmp_path)


@pytest.mark.parametrize("key", ["run", "environment", "phases", "terms", "figures", "lacks", "title", "status"])
def test_a_damaged_report_is_said_and_no_traceback(pair, tmp_path, key):
    for wrong in (None, 3, [3], {"value": {"a": {"b": {"c": 1}}}}):
        (tmp_path / "report.json").write_text(json.dumps(pair[0] | {key: wrong}))
        with pytest.raises(ReportError, match=f"report.json.{key}"):
            load(tmp_path)


def test_the_commands_exit_codes(pair, tmp_path):
    def command(*arguments) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "profiling", *map(str, arguments)], capture_output=True, text=True)

    for name, report in zip("ab", pair, strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    done = command("compare", a, b, "--json", "--out", tmp_path / "c.html")
    assert (tmp_path / "c.html").exists()
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
