import json
import os
import re
import subprocess
import sys

import pytest

from experiments.study.folder import Plot, Request, Study, Table, render
from model.errors import UsageError
from profiling import ROOT
from profiling.output.terminal import Terminal
from profiling.report.plot import Chart, axis, layout, trace

SETTINGS = {"small": True, "rungs": ("a", "b"), "device": "cpu", "data_identity": "synthetic"}


def chart(key: str = "line") -> Chart:
    data = [trace("scatter", x=[1, 2, 3], y=[3.0, 1.0, 2.0], mode="lines", line={"color": "var(--series-1)"})]
    return Chart(key, "a line", 280, data, layout(xaxis=axis("x"), yaxis=axis("y")))


def study(folder, **changes) -> Study:
    return Study("sample", folder, {**SETTINGS, **changes}, Terminal(speaks=False))


def finish(one: Study) -> dict:
    table = Table("Turns", ["rung", "s"], [["</script><b>", "1.5"]])
    result = {key: one.once(key, lambda key=key: {"seconds": len(key)}) for key in ("a", "bb", "ccc")}
    return one.finish(
        result, [Plot("line", "A line", chart())], ["It takes 1.5 s & <no> more."], [table], ["It is small."]
    )


def test_a_killed_experiment_goes_on_and_ends_the_same(tmp_path):
    whole = finish(study(tmp_path / "whole"))
    half, computed = study(tmp_path / "half"), []

    def dies() -> dict:
        raise KeyboardInterrupt

    half.once("a", lambda: {"seconds": 1})
    with pytest.raises(KeyboardInterrupt):
        half.once("bb", dies)
    again = study(tmp_path / "half")
    again.once("a", lambda: computed.append("a") or {})
    assert not computed
    resumed = finish(again)
    assert resumed["result"] == whole["result"]
    assert resumed["sentences"] == whole["sentences"]


def test_what_is_known_until_now_is_a_document_too(tmp_path):
    one = study(tmp_path)
    one.save({"seconds": 1}, ["It takes 1 s so far."], [Table("Turns", ["rung"], [["a"]])])
    before = json.loads((tmp_path / "sample.json").read_text())
    assert (before["complete"], before["result"], before["data_identity"]) == (False, {"seconds": 1}, "synthetic")
    after = finish(one)
    assert after["complete"]
    assert set(after) == set(before)
    assert json.loads((tmp_path / "sample.json").read_text()) == after


def test_a_row_torn_by_a_kill_is_computed_again(tmp_path):
    one = study(tmp_path)
    one.once("a", lambda: {"v": 1})
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"key": "b", "res')
    again = study(tmp_path)
    assert again.once("b", lambda: {"v": 2}) == {"v": 2}
    assert study(tmp_path).results == {"a": {"v": 1}, "b": {"v": 2}}


def test_a_result_is_the_same_computed_or_kept(tmp_path):
    computed = study(tmp_path).once("a", lambda: {"pair": (1, 0.1), 3: None})
    assert computed == study(tmp_path).once("a", dict) == {"pair": [1, 0.1], "3": None}


def test_a_number_that_is_none_is_refused_and_not_kept(tmp_path):
    one = study(tmp_path)
    with pytest.raises(ValueError, match="nan"):
        one.once("a", lambda: {"loss": float("nan")})
    assert study(tmp_path).results == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"small": False}, "small: True, now False"), ({"cutout": 8}, "cutout: None, now 8")],
    ids=["another_value", "another_key"],
)
def test_the_folder_of_other_settings_is_refused(tmp_path, changes, message):
    study(tmp_path)
    with pytest.raises(UsageError, match=message):
        study(tmp_path, **changes)


@pytest.mark.parametrize("kept", ["[1]", '"x"', "7"])
def test_settings_of_another_form_are_refused_in_one_line(tmp_path, kept):
    (tmp_path / "study.json").write_text(f'{{"experiment": "sample", "settings": {kept}}}')
    with pytest.raises(UsageError, match="begun with other settings"):
        study(tmp_path)


def test_the_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="not empty"):
        study(tmp_path)
    study(tmp_path / "a")
    with pytest.raises(UsageError, match="experiment: sample, now other"):
        Study("other", tmp_path / "a", SETTINGS, Terminal(speaks=False))


def test_a_folder_that_another_process_works_in_is_refused(tmp_path):
    code = (
        "import sys; from pathlib import Path; from model.folder import hold\n"
        "with hold(Path(sys.argv[1]), print): print('held', flush=True); sys.stdin.read()"
    )
    study(tmp_path / "a")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, tmp_path / "a"], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=f"is in use by process {other.pid} "):
            study(tmp_path / "a")
        other.stdin.close()
        other.wait(timeout=60)
    study(tmp_path / "a")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("nonsense", "not JSON"),
        ("NaN", "not JSON"),
        ('{"key": "a", "result": 1e999}', "not JSON"),
        ("[" * 10**5, "not JSON"),
        ('{"key": "a"}', "no key and result"),
        ('{"key": "a", "result": "ab"}', "no key and result"),
        ("[1, 2]", "no key and result"),
        ("3", "no key and result"),
    ],
)
def test_a_damaged_record_is_said_in_one_line(tmp_path, damage, reason):
    study(tmp_path)
    (tmp_path / "results.jsonl").write_text(damage + "\n")
    with pytest.raises(UsageError, match=rf"damaged record: [^\n]*{reason}[^\n]*$"):
        study(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and devices")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_record_that_is_no_file_is_said_in_one_line(tmp_path, kind):
    study(tmp_path)
    path = tmp_path / "results.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/full")
    else:
        path.mkdir()
    with pytest.raises(UsageError, match=r"damaged record: .*results.jsonl is not a regular file"):
        study(tmp_path)


def test_the_folder_holds_document_pictures_and_page(tmp_path):
    pytest.importorskip("matplotlib")
    finish(study(tmp_path))
    names = {path.name for path in tmp_path.glob("[!.]*")}
    assert names == {"study.json", "results.jsonl", "sample.json", "sample.html", "line.svg", "line.png"}
    document = json.loads((tmp_path / "sample.json").read_text())
    assert document["version"] == 1
    assert document["settings"]["rungs"] == ["a", "b"]
    assert document["environment"]["packages"]["torch"]
    assert document["tables"][0]["statuses"] == ["", "measured"]
    assert document["caveats"] == ["It is small."]


def test_the_page_asks_for_nothing_and_lets_no_text_become_markup(tmp_path):
    finish(study(tmp_path))
    page = (tmp_path / "sample.html").read_text()
    assert "&lt;/script&gt;&lt;b&gt;" in page
    assert "It takes 1.5 s &amp; &lt;no&gt; more." in page
    assert "SYNTHETIC IMAGES." in page
    assert "It is small." in page
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", markup)
    assert "default-src &#39;none&#39;" in page


def test_without_matplotlib_the_page_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "experiments.study.picture", raising=False)
    finish(study(tmp_path))
    assert (tmp_path / "sample.html").exists()
    assert not (tmp_path / "line.svg").exists()
    assert "pip install -e '.[experiments]'" in capsys.readouterr().err


def test_without_plotly_the_document_and_the_sentences_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    document = finish(study(tmp_path))
    assert json.loads((tmp_path / "sample.json").read_text()) == document
    assert not (tmp_path / "sample.html").exists()
    assert "there is no page" in capsys.readouterr().err


def test_a_page_without_anything_says_so():
    document = {"experiment": "x", "settings": {}, "environment": {}, "sentences": [], "caveats": []}
    page = render(
        {**document, "data_identity": "official"}, [Plot("a", "A", Chart("a", "A", reason="no rung ran"))], []
    )
    assert "No conclusion can be drawn." in page
    assert "unavailable: no rung ran" in page


@pytest.mark.parametrize(
    ("rows", "statuses", "message"),
    [([["a"]], (), "a row has not 2 cells"), ([], ("", "guessed"), "statuses")],
    ids=["short_row", "unknown_status"],
)
def test_a_table_that_does_not_add_up_is_refused(rows, statuses, message):
    with pytest.raises(ValueError, match=message):
        Table("T", ["a", "b"], rows, statuses)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"synthetic": True, "data_dir": "x"}, "contradict"),
        ({"settings": ("widhts=1",)}, "widths"),
        ({"seed": -1}, "seed"),
    ],
    ids=["two_sources", "unknown_setting", "negative_seed"],
)
def test_the_command_line_is_checked_without_torch(given, message):
    with pytest.raises(UsageError, match=message):
        Request(**given)
