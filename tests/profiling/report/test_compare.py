import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner

from profiling import ROOT
from profiling.__main__ import app
from profiling.output.errors import CommandError, RefusedError, ReportError
from profiling.output.terminal import Terminal
from profiling.report import compare as compare_module
from profiling.report.build import build
from profiling.report.compare import compare, lines, load, render_comparison

MS = 10**6
QUIET = Terminal(speaks=False)


@pytest.fixture
def pair(whole):
    """A report, and the same with a fifth of a second less in its batch norm and 50 ms more of idle."""
    other = copy.deepcopy(whole)
    for key, ns in (("batch norm", -200 * MS), ("idle", 50 * MS)):
        next(t for t in other["terms"] if t["key"] == key)["ns"] += ns
    return whole, other


def term(report, key):
    return next(t for t in report["terms"] if t["key"] == key)


def said(compared, key="sentence"):
    return compared[key].replace("\xa0", " ")


def save(report, path):
    path.write_text(json.dumps(report))
    return path


def test_differences_of_terms_sum_to_that_of_the_stopwatch(pair):
    c = compare(*pair)
    assert c["difference_ns"] == -150 * MS == sum(t["difference_ns"] for t in c["terms"])
    assert [t["key"] for t in c["terms"][:2]] == ["batch norm", "idle"]
    assert said(c) == (
        "B is 150 ms faster than A: 2.020 s to 1.870 s, 1.08 times faster; the largest part is batch norm (-0.200 s, "
        "133%), against idle (+0.050 s)."
    )
    assert said(c, "uncertainty") == (
        "Unexplained are +0.020 s of A (1.0%) and +0.020 s of B (1.1%): a term may be wrong by 40.0 ms."
    )
    assert (c["differs"], c["doubts"]) == ([], [])
    back = said(compare(*pair[::-1]))
    assert back.startswith("B is 150 ms slower than A: 1.870 s to 2.020 s, 1.08 times slower; ")
    assert said(compare(pair[0], pair[0])) == "The two runs took the same time."
    pair[1]["terms"] = copy.deepcopy(pair[0]["terms"])
    pair[1]["terms"][0]["ns"] += MS  # which rounds to no factor
    assert said(compare(*pair)).startswith("B is 1.00 ms slower than A: 2.020 s to 2.021 s; ")


def test_a_data_sheets_ideal_is_not_compared_with_a_measured_one(pair):
    """Ideal and gap of the one are together what the other calls ideal; without a gap the two are rows of their own."""
    a, b = pair
    ideal, gap = term(a, "ideal")["ns"], term(a, "ceiling_gap")["ns"]
    b["terms"] = [t for t in b["terms"] if t["key"] != "ceiling_gap"]
    b["terms"][0]["name"] = "ideal at the measured ceiling"
    rows = {row["name"]: row for row in compare(a, b)["terms"]}
    assert rows["ideal at the measured ceiling"]["a_ns"] == ideal + gap
    assert "ideal at the data sheet's peak" not in rows
    a["terms"] = [t for t in a["terms"] if t["key"] != "ceiling_gap"]
    found = compare(a, b)
    rows = {row["name"]: (row["a_ns"], row["b_ns"]) for row in found["terms"]}
    assert rows["ideal at the data sheet's peak"] == (ideal, 0)
    assert rows["ideal at the measured ceiling"] == (0, ideal)
    assert sum(t["difference_ns"] for t in found["terms"]) == found["difference_ns"]


def test_a_term_that_only_one_has_is_compared_with_nothing(pair):
    pair[1]["terms"].remove(term(pair[1], "idle"))
    row = next(t for t in compare(*pair)["terms"] if t["key"] == "idle")
    assert (row["b_ns"], row["difference_ns"]) == (0, -row["a_ns"])


@pytest.mark.parametrize(
    ("where", "key", "value"),
    [
        ("run", "device", "NVIDIA B200"),
        ("run", "data_identity", "copy"),
        ("run", "ops", "fused"),
        ("environment", "packages torch", "2.99"),
    ],
)
def test_differences_besides_time_are_named(pair, where, key, value):
    pair[1][where][key] = value
    assert [str(value) in line for line in compare(*pair)["differs"]] == [True]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda r: r["run"].update(status="interrupted"), "complete"),
        (lambda r: r["run"].update(images=7), "different work"),
        (lambda r: r["run"].update(data_identity="synthetic"), "synthetic"),
        (lambda r: r["terms"].remove(term(r, "residual")), "no whole account"),
        (lambda r: r["run"].update(on_gpu=False), "GPU"),
    ],
    ids=["interrupted", "other_epochs", "other_kind_of_data", "no_account", "gpu_and_cpu"],
)
def test_a_misleading_comparison_is_refused(pair, change, why):
    change(pair[1])
    for a, b in (pair, pair[::-1]):
        with pytest.raises(RefusedError, match=why):
            compare(a, b)


def test_text_and_page_show_every_term_with_doubts_first(pair):
    pair[1]["doubts"] = ["Idle is -1 s."]
    pair[1]["figures"]["test_accuracy"]["value"] = 0.9
    pair[1]["run"]["ops"] = "<script>alert(1)</script>"
    pair[0]["figures"]["images_per_s"]["value"] = None
    c = compare(*pair, ("one", "two"))
    text, page = lines(c), render_comparison(c)
    assert c["doubts"] == ["two: Idle is -1 s."]
    assert "IN DOUBT: two: Idle is -1 s." in text[:5]
    assert page.index("two: Idle is -1 s.") < page.index("<h1>")
    assert all(any(t["name"][:41] in line for line in text) for t in pair[0]["terms"])
    longest = max(text, key=lambda line: line.count("-") if line.startswith("  ") else 0)
    assert "batch norm" in longest
    assert text[-2:] == [c["sentence"], c["uncertainty"]]
    for words in ("94.07", "90.00", "20.0"):
        assert words in page
        assert words in "\n".join(text)
    assert "throughput" not in page + "\n".join(text)
    assert not re.search(r"[-+]0\.000", "\n".join(text))
    assert "B - A" in page.split("<th ")[2], "in sight on a phone"
    chart = json.loads(page.split('id="charts">')[1].split("</script>")[0])[0]
    bars = next(trace for trace in chart["data"] if trace["type"] == "bar")
    assert (bars["x"][0], bars["x"][1:3], bars["x"][-1]) == (2.02, [-0.2, 0.05], 1.87)
    assert 'aria-label="Waterfall: two is 150\xa0ms faster than one: ' in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_the_page_leads_to_the_reports_that_there_are(pair, tmp_path):
    """From wherever it is, whatever the folders are called: a relative address, which a copy of them all keeps."""
    folders = [tmp_path / "runs" / name for name in ("javascript:a#b?c %20\"'><b>", "two")]
    for folder, report in zip(folders, pair, strict=True):
        folder.mkdir(parents=True)
        save(report, folder / "report.json")
    (folders[0] / "report.html").write_text("")
    out = tmp_path / "pages" / "c.html"
    out.parent.mkdir()
    for given in (folders, [folder / "report.json" for folder in folders]):
        compare_module.run(*given, out, False, QUIET)
        (href,) = re.findall(r'<a href="([^"]*)">', out.read_text())
        assert re.fullmatch(r"\.\./runs/[\w%.]+/report\.html", href)
        assert Path(out.parent, unquote(href)).resolve() == folders[0] / "report.html"


@pytest.mark.parametrize("name", ["none", "x" * 300, "none/report.json", "nul\0"], ids=lambda name: name[:16])
def test_a_folder_that_is_not_there_is_one_clear_line(tmp_path, name):
    for read in (load, build):
        with pytest.raises(ReportError, match="is not the folder of a run: it has no summary") as caught:
            read(tmp_path / name)
        assert not re.search(r"\n|Errno", str(caught.value))


@pytest.mark.parametrize("name", ["none/page.html", "x" * 300, "."], ids=lambda name: name[:16])
def test_a_page_that_cannot_be_written_is_one_clear_line(whole, tmp_path, name):
    save(whole, tmp_path / "report.json")
    with pytest.raises(CommandError, match="the page cannot be written to") as caught:
        compare_module.run(tmp_path, tmp_path, tmp_path / name, False, QUIET)
    assert not re.search(r"\n|Errno|\.tmp-", str(caught.value))


def test_a_damaged_report_is_one_line_that_names_the_place(whole, tmp_path):
    file = tmp_path / "report.json"
    for text in ("", "{}", "[]", '{"version": 99, "terms": [], "run": {}}', "\x00"):
        file.write_text(text)
        with pytest.raises(ReportError, match=r"report\.json is no report: "):
            load(tmp_path)
    for key in ("run", "environment", "phases", "terms", "figures", "lacks", "title", "status"):
        for wrong in (None, 3, [3], {"value": {"a": {"b": {"c": 1}}}}):
            save(whole | {key: wrong}, file)
            with pytest.raises(ReportError, match=f"report.json.{key}"):
                load(tmp_path)
    save(whole, file)
    assert compare(load(file), load(tmp_path)) == compare(whole, whole)


def test_the_commands_exit_codes(pair, tmp_path):
    a, b = (save(report, tmp_path / f"{name}.json") for name, report in zip("ab", pair, strict=True))
    words = [sys.executable, "-m", "profiling", "compare", a, b, "--json", "--out", tmp_path / "c.html"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, (tmp_path / "c.html").exists()) == (0, True)
    assert json.loads(done.stdout)["difference_ns"] == -150 * MS
    pair[1]["run"]["images"] = 1
    refused = CliRunner().invoke(app, ["compare", str(a), str(save(pair[1], b))])
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: the runs trained on 51,200 and 1 images")
    unreadable = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert (unreadable.exit_code, len(unreadable.stderr.splitlines())) == (3, 1)
