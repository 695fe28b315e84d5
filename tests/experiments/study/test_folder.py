import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.study.drawing import Plot
from experiments.study.folder import Request, Study
from experiments.study.page import Table, render
from model.errors import UsageError
from profiling import ROOT
from profiling.output.terminal import Terminal

SETTINGS = {"small": True, "rungs": ("a", "b"), "device": "cpu", "data_identity": "synthetic"}


def study(folder, name: str = "sample", **changes) -> Study:
    return Study(name, folder, {**SETTINGS, **changes}, Terminal(speaks=False))


def finish(one: Study) -> dict:
    plots = [
        Plot("line", "A line", lambda axes: axes.plot([1, 2, 3], label="</svg><i>"), "Its caption."),
        Plot("none", "Nothing", lambda axes: None, reason="no rung ran"),
    ]
    result = {key: one.once(key, lambda key=key: {"seconds": len(key)}) for key in ("a", "bb", "ccc")}
    table = Table("Turns", ["rung", "s"], [["</script><b>", "1.5"]])
    return one.finish(result, plots, ["It takes 1.5 s & <no> more.", "So."], [table], ["It is small."])


def test_a_killed_experiment_goes_on_and_ends_the_same(tmp_path):
    """With what is whole on the disk; a row that was torn by the kill, or never became JSON, is computed again."""
    one, computed = study(tmp_path / "a"), []
    first = one.once("a", lambda: {"seconds": (1, 0.1), 3: None})
    with pytest.raises(ValueError, match="nan"):
        one.once("bb", lambda: {"loss": float("nan")})
    before = one.save({"seconds": 1}, ["It takes 1 s so far."], [Table("Turns", ["rung"], [["a"]])])
    assert before == json.loads((tmp_path / "a" / "sample.json").read_text())
    assert (before["complete"], before["result"], before["data_identity"]) == (False, {"seconds": 1}, "synthetic")
    with open(tmp_path / "a" / "results.jsonl", "a") as file:
        file.write('{"key": "bb", "res')
    again = study(tmp_path / "a")
    assert first == again.once("a", lambda: computed.append("a") or {}) == {"seconds": [1, 0.1], "3": None}
    assert not computed
    after = finish(again)
    assert after["complete"]
    assert set(after) == set(before)
    assert after["result"] == {"a": first, "bb": {"seconds": 2}, "ccc": {"seconds": 3}} == study(tmp_path / "a").results


def kept(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


REFUSALS = {
    "another_value": (lambda folder: study(folder, small=False), "begun with other settings .small: False, now True"),
    "another_key": (lambda folder: study(folder, cutout=8), "cutout: 8, now None"),
    "another_experiment": (lambda folder: study(folder, "other"), "experiment: other, now sample"),
    "settings_of_another_form": (kept("study.json", '{"experiment": "sample", "settings": [1]}'), "other settings"),
    "no_settings": (kept("study.json", "[1]"), "other settings"),
    "torn": (kept("study.json", "{"), "cannot be used: .*not JSON"),
    "something_else": (kept("thesis.tex", "years of work"), "is not empty and no experiment's"),
}


@pytest.mark.parametrize(("prepare", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_folder_of_something_else_is_refused_in_one_line(tmp_path, prepare, message):
    prepare(tmp_path)
    with pytest.raises(UsageError, match=rf"--out [^\n]*{message}[^\n]*$"):
        study(tmp_path)


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


def row(text: str):
    return lambda path: path.write_text(text + "\n")


DAMAGES = {
    "nonsense": (row("nonsense"), "not JSON"),
    "nan": (row("NaN"), "not JSON"),
    "infinite": (row('{"key": "a", "result": 1e999}'), "not JSON"),
    "deep": (row("[" * 10**5), "not JSON"),
    "no_result": (row('{"key": "a"}'), "no key and result"),
    "a_text": (row('{"key": "a", "result": "ab"}'), "no key and result"),
    "a_list": (row("[1, 2]"), "no key and result"),
    "a_number": (row("3"), "no key and result"),
    "a_pipe": (os.mkfifo, "results.jsonl is not a regular file"),
    "a_device": (lambda path: path.symlink_to("/dev/full"), "results.jsonl is not a regular file"),
    "a_folder": (Path.mkdir, "results.jsonl is not a regular file"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_record_is_refused_in_one_line(tmp_path, damage, reason):
    study(tmp_path)
    damage(tmp_path / "results.jsonl")
    with pytest.raises(UsageError, match=rf"damaged record: [^\n]*{reason}[^\n]*$"):
        study(tmp_path)


def test_the_folder_holds_document_pictures_and_a_page_that_asks_for_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    document = finish(study(tmp_path))
    names = {path.name for path in tmp_path.glob("[!.]*")}
    assert names == {"study.json", "results.jsonl", "sample.json", "sample.html", "line.svg", "line.png"}
    assert document == json.loads((tmp_path / "sample.json").read_text())
    assert (document["version"], document["settings"]["rungs"]) == (1, ["a", "b"])
    assert document["environment"]["packages"]["torch"]
    assert document["tables"][0]["statuses"] == ["", "measured"]
    assert document["caveats"] == ["It is small."]
    page = (tmp_path / "sample.html").read_text()
    assert (tmp_path / "line.svg").read_text() in page
    for said in (
        *("&lt;/script&gt;&lt;b&gt;", "&lt;/svg&gt;&lt;i&gt;", "<h1>It takes 1.5 s &amp; &lt;no&gt; more.</h1>"),
        *("SYNTHETIC IMAGES.", "<li>It is small.</li>", "<figcaption>Its caption.", "unavailable: no rung ran"),
        *("default-src 'none'", "<dt>small</dt><dd>yes</dd>"),
    ):
        assert said in page
    assert "<script" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)


def test_without_matplotlib_the_page_has_no_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    finish(study(tmp_path))
    assert "unavailable: matplotlib, which draws it, is not installed" in (tmp_path / "sample.html").read_text()
    assert not (tmp_path / "line.svg").exists()
    assert "pip install -e '.[experiments]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("identity", "expected"),
    [("official", None), ("copy", "A COPY OF CIFAR-10, not the official files"), ("?", "IMAGES OF UNKNOWN ORIGIN")],
)
def test_a_page_names_its_images_and_says_that_there_is_no_conclusion(identity, expected):
    document = {"experiment": "x", "settings": {}, "environment": {}, "sentences": [], "caveats": []}
    page = render({**document, "data_identity": identity}, [], [Table("Turns", ["rung"], [])], {})
    assert "No conclusion can be drawn." in page
    assert "unavailable: nothing was measured" in page
    assert expected in page if expected else 'class="banner"' not in page


@pytest.mark.parametrize(
    ("rows", "statuses", "message"),
    [
        ([["a"]], (), "T: a row does not have 2 cells"),
        ([], ("", "guessed"), r"T: .*not \('', 'guessed'\)"),
        ([], ("",), "one of .* for each column"),
    ],
    ids=["short_row", "unknown_status", "too_few_statuses"],
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
        ({"out": ROOT / "README.md"}, "README.md is not a folder"),
    ],
    ids=["two_sources", "unknown_setting", "negative_seed", "a_file"],
)
def test_the_command_line_is_checked_without_torch(given, message):
    with pytest.raises(UsageError, match=message):
        Request(**given)
