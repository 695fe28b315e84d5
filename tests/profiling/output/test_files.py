"""Records are written whole or not at all, and a killed writer costs at most the row it was writing."""

import errno
import os
import pathlib
import signal
import subprocess
import sys

import pytest

from profiling import ROOT
from profiling.output import files
from profiling.output.files import append_jsonl, read_json, read_jsonl, write_json
from profiling.run import telemetry

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def document(tmp_path):
    """An old document, alone in its folder."""
    path = tmp_path / "report.json"
    write_json(path, {"old": True})
    return path


def assert_old(path, *more):
    assert read_json(path) == {"old": True}
    assert sorted(os.listdir(path.parent)) == sorted([path.name, *more])


@pytest.mark.parametrize(
    "value",
    [{"mfu": None, "name": "é\n\ud800", "seconds": 0.1, "steps": 2**70, "rows": [{"x": -0.0}]}, [], None, "text"],
    ids=["nested", "empty_list", "null", "bare_text"],
)
def test_json_round_trip(document, value):
    write_json(document, value)
    assert read_json(document) == value
    assert document.read_bytes().endswith(b"\n")
    assert os.listdir(document.parent) == [document.name]


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        ({"mfu": NAN}, ValueError, "mfu is nan"),
        ({"ops": [{}, {"time_ns": INF}]}, ValueError, r"ops\[1\]\.time_ns is inf"),
        ({"range": (0.0, -INF)}, ValueError, r"range\[1\] is -inf"),
        (NAN, ValueError, "the value is nan"),
        ({"x": object()}, TypeError, "object"),
    ],
    ids=["top_level", "in_a_list", "in_a_tuple", "bare", "an_object"],
)
def test_a_value_that_json_lacks_is_named_and_the_old_file_stays(document, value, error, words):
    rows = document.with_name("a.jsonl")
    append_jsonl(rows, {"row": 1})
    for write, path in ((write_json, document), (append_jsonl, rows)):
        with pytest.raises(error, match=words):
            write(path, value)
    assert read_jsonl(rows) == [{"row": 1}]
    assert_old(document, "a.jsonl")


@pytest.mark.parametrize(("owner", "function"), [(pathlib.Path, "write_bytes"), (os, "fsync"), (os, "replace")])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()], ids=["full", "interrupt"])
def test_a_failed_write_leaves_the_old_document_and_no_temporary(document, monkeypatch, owner, function, error):
    def fails(*arguments, **keywords):
        raise error

    monkeypatch.setattr(owner, function, fails)
    with pytest.raises(type(error)):
        write_json(document, {"new": True})
    monkeypatch.undo()
    assert_old(document)


KILLED = """
import os, signal, sys
from profiling.output.files import write_json

setattr(os, sys.argv[2], lambda *arguments: os.kill(os.getpid(), signal.SIGKILL))
write_json(sys.argv[1], {"new": True})
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.parametrize("function", ["fsync", "replace"], ids=["before_data_is_durable", "before_the_rename"])
def test_a_killed_writer_leaves_the_old_document(document, function):
    command = [sys.executable, "-c", KILLED, str(document), function]
    result = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60)
    assert result.returncode == -signal.SIGKILL
    (left,) = (name for name in os.listdir(document.parent) if name.startswith(".tmp-"))
    assert_old(document, left)


def test_data_is_durable_before_the_rename_and_the_rename_before_the_return(document, monkeypatch):
    order = []
    for function in ("fsync", "replace"):
        real = getattr(os, function)
        monkeypatch.setattr(os, function, lambda *a, name=function, real=real: (order.append(name), real(*a)))
    write_json(document, 1)
    assert order == ["fsync", "replace", "fsync"]
    assert document.stat().st_mode & 0o777 == 0o666 & ~mask(), "others may read it as any file"


def mask() -> int:
    os.umask(now := os.umask(0))
    return now


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


@pytest.mark.parametrize("room", [0, 5], ids=["nothing_written", "half_written"])
def test_a_failed_append_leaves_no_partial_row(tmp_path, monkeypatch, room):
    """On a disk that takes `room` more bytes."""

    class FullDisk:
        left = room

        def __init__(self, path, mode, buffering):
            self.file = open(path, mode, buffering)  # noqa: SIM115 (closed by __exit__)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

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


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(files.LARGEST_BYTES + 1)


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and devices")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (os.mkdir, "not a regular file"),
        (sparse, "268,435,457 bytes, expected at most"),
        (lambda path: None, "No such file"),
    ],
    ids=["pipe", "device", "folder", "sparse", "missing"],
)
def test_only_regular_files_of_a_size_are_read(tmp_path, make, words):
    """A pipe would be waited for, and a device read until memory ends."""
    path = tmp_path / "a.json"
    make(path)
    for read in (read_json, read_jsonl):
        with pytest.raises(FileNotFoundError if not os.path.lexists(path) else ValueError, match=words):
            read(path)
    if os.path.lexists(path):
        assert words in telemetry.read(path).reason
