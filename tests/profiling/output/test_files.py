"""Records are written whole or not at all, and a killed writer costs at most the row it was writing."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from profiling import ROOT
from profiling.output import files
from profiling.output.files import append_jsonl, read_json, read_jsonl, write_json
from profiling.run import telemetry

NAN, INF = float("nan"), float("inf")


def names(folder) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize(
    "value",
    [{"mfu": None, "name": "é\n\ud800", "seconds": 0.1, "steps": 2**70, "rows": [{"x": -0.0}]}, [], None, "text"],
    ids=["nested", "empty_list", "null", "bare_text"],
)
def test_json_round_trip(tmp_path, value):
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_bytes().endswith(b"\n")
    assert names(tmp_path) == ["summary.json"]


@pytest.mark.parametrize(
    ("value", "key"),
    [
        ({"mfu": NAN}, "mfu is nan"),
        ({"ops": [{}, {"time_ns": INF}]}, r"ops\[1\]\.time_ns is inf"),
        ({"range": (0.0, -INF)}, r"range\[1\] is -inf"),
        (NAN, "the value is nan"),
    ],
    ids=["top_level", "in_a_list", "in_a_tuple", "bare"],
)
def test_a_number_that_json_lacks_is_named_and_the_old_file_stays(tmp_path, value, key):
    document, rows = tmp_path / "a.json", tmp_path / "a.jsonl"
    write_json(document, 1)
    append_jsonl(rows, {"row": 1})
    with pytest.raises(ValueError, match=key):
        write_json(document, value)
    with pytest.raises(ValueError, match=key):
        append_jsonl(rows, value)
    assert (read_json(document), read_jsonl(rows)) == (1, [{"row": 1}])
    assert names(tmp_path) == ["a.json", "a.jsonl"]


def test_an_object_that_json_lacks_is_refused_before_the_file_is_touched(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert names(tmp_path) == []


def write_a_text(path, value):
    files.write_text(path, json.dumps(value))


@pytest.mark.parametrize("write", [write_json, write_a_text])
@pytest.mark.parametrize(("owner", "function"), [(files, "open"), (os, "fsync"), (os, "replace")])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()], ids=["full", "interrupted"]
)
def test_a_failed_write_leaves_the_old_document_and_no_temporary(tmp_path, monkeypatch, owner, function, error, write):
    def fails(*arguments, **keywords):
        raise error

    path = tmp_path / "report.json"
    write_json(path, {"old": True})
    monkeypatch.setattr(owner, function, fails, raising=False)
    with pytest.raises(type(error)):
        write(path, {"new": True})
    monkeypatch.undo()
    assert read_json(path) == {"old": True}
    assert names(tmp_path) == ["report.json"]


KILLED = """
import os, signal, sys
from profiling.output.files import write_json

setattr(os, sys.argv[2], lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
write_json(sys.argv[1], {"new": True})
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("function", ["fsync", "replace"], ids=["before_data_is_durable", "before_the_rename"])
def test_a_killed_writer_leaves_the_old_document(tmp_path, function):
    path = tmp_path / "report.json"
    write_json(path, {"old": True})
    command = [sys.executable, "-c", KILLED, str(path), function]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert result.returncode == -signal.SIGKILL
    assert read_json(path) == {"old": True}
    assert [name[:5] for name in names(tmp_path)] == [".tmp-", "repor"]


@pytest.mark.parametrize("write", [write_json, write_a_text])
def test_the_data_is_durable_before_the_rename_and_the_rename_before_the_return(tmp_path, monkeypatch, write):
    order = []
    for function in ("fsync", "replace"):
        real = getattr(os, function)
        monkeypatch.setattr(os, function, lambda *a, name=function, real=real: (order.append(name), real(*a)))
    write(tmp_path / "a.json", 1)
    assert order == ["fsync", "replace", "fsync"]


def test_rows_are_appended_one_line_each(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"epoch": epoch, "text": "a\nb"} for epoch in range(3)]
    for count, row in enumerate(rows, start=1):
        append_jsonl(path, row)
        assert path.read_bytes().count(b"\n") == count
    assert read_jsonl(path) == rows


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        (b'{"a": 1}\n{"b": 2', [{"a": 1}]),
        (b'{"a": 1}\n{"b": 2}', [{"a": 1}]),
        (b'{"a": 1}\n\xc3', [{"a": 1}]),
        (b'{"a": 1}\n\0\0\0', [{"a": 1}]),
        (b'{"a"', []),
        (b"", []),
    ],
)
def test_a_torn_last_line_is_skipped_and_healed(tmp_path, before, kept):
    path = tmp_path / "log.jsonl"
    path.write_bytes(before)
    assert read_jsonl(path) == kept
    append_jsonl(path, {"c": 3})
    assert read_jsonl(path) == [*kept, {"c": 3}]


@pytest.mark.parametrize("written", [0, 5], ids=["nothing_written", "half_written"])
def test_a_failed_append_takes_back_what_it_wrote(tmp_path, monkeypatch, written):
    class FullDisk:
        """A file on a disk that takes `written` more bytes."""

        def __init__(self, path, mode, buffering):
            self.file = open(path, mode, buffering)  # noqa: SIM115 (closed by __exit__)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        left = written

        def write(self, data):
            if self.left == 0:
                raise OSError(errno.ENOSPC, "disk full")
            count, self.left = self.file.write(data[: self.left]), 0
            return count

    path = tmp_path / "log.jsonl"
    append_jsonl(path, {"a": 1})
    before = path.read_bytes()
    monkeypatch.setattr(files, "open", FullDisk, raising=False)
    with pytest.raises(OSError, match="disk full"):
        append_jsonl(path, {"b": 2})
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [b"{", b"[" * 200_000, b"\xff", b"", b"NaN", b"-Infinity", b"1e999", b"9" * 5000],
    ids=["torn", "nested", "not_text", "empty", "nan", "infinite", "too_large", "too_long"],
)
def test_damage_is_named_with_its_file_and_line(tmp_path, damage):
    document, rows = tmp_path / "a.json", tmp_path / "a.jsonl"
    document.write_bytes(damage)
    rows.write_bytes(b"{}\n" + damage + b"\n{}\n")
    with pytest.raises(ValueError, match=r"a\.json: not JSON"):
        read_json(document)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON"):
        read_jsonl(rows)


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and devices")
@pytest.mark.parametrize("read", [read_json, read_jsonl, telemetry.read])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "sparse"])
def test_only_regular_files_of_a_size_are_read(tmp_path, read, kind):
    """A pipe would be waited for, and a device read until memory ends."""
    path = tmp_path / "a.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with open(path, "wb") as file:
            file.truncate(files.LARGEST_BYTES + 1)
    said = "268,435,457 bytes, expected at most" if kind == "sparse" else "not a regular file"
    if read is telemetry.read:
        assert said in read(path).reason
    else:
        with pytest.raises(ValueError, match=said):
            read(path)


@pytest.mark.parametrize("read", [read_json, read_jsonl])
def test_a_missing_file_is_the_systems_own_error(tmp_path, read):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "absent")
