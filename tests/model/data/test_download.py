"""The download against a server on this machine: every way it can fail, resume, wait, and refuse."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from small_archive import BODY, CONTENTS, FILE_BYTES, SMALL, Heard, assert_complete, assert_nothing_usable

from model.data import archive, download
from model.data.archive import FOLDER, NAME
from model.data.download import DownloadError
from profiling import ROOT

PART = f"{NAME}.part"


pytestmark = pytest.mark.usefixtures("small_archive")


@pytest.fixture
def mirrors(server, monkeypatch):
    """`mirrors(*names)` lets a download find these."""
    return lambda *names: monkeypatch.setenv("CIFAR10_MIRRORS", server.urls(*names))


def test_constants_of_the_official_archive(monkeypatch):
    monkeypatch.undo()
    assert archive.BYTES == 170_052_171
    assert archive.SHA256 == "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    assert all(url.endswith(f"/{NAME}") for url in download.MIRRORS)


def linked(part: Path) -> None:
    (part.parent.parent / "victim").write_bytes(b"mine")
    part.symlink_to(part.parent.parent / "victim")


def killed_while_extracting(part: Path) -> None:
    part.write_bytes(BODY)
    part.with_name(f"{FOLDER}.part").mkdir()
    for name, content in CONTENTS.items():
        (part.with_name(f"{FOLDER}.part") / name).write_bytes(content)


@pytest.mark.parametrize(
    ("mirror", "part", "ranges"),
    [
        pytest.param("whole", None, [None], id="nothing_there"),
        pytest.param("truncated_twice", None, [None, "bytes=50000-", "bytes=55000-"], id="truncated_twice"),
        pytest.param("whole", BODY[:70_000], ["bytes=70000-"], id="of_an_earlier_run"),
        pytest.param("no_range", b"\x1f\x8b" + bytes(70_000), ["bytes=70002-"], id="server_without_ranges"),
        pytest.param("chunked", b"\x1f\x8b" + bytes(70_000), ["bytes=70002-"], id="chunked"),
        pytest.param("whole", b"\x1f\x8b" + bytes(70_000), ["bytes=70002-", None], id="wrong_start"),
        pytest.param("whole", BODY[:-1] + b"?", [None], id="complete_but_wrong"),
        pytest.param("whole", BODY + b"?", [None], id="too_long"),
        pytest.param(None, BODY, [], id="complete"),
        pytest.param(None, killed_while_extracting, [], id="killed_while_extracting"),
        pytest.param("whole", linked, [None], id="a_link"),
        pytest.param("whole", os.mkfifo, [None], id="a_pipe"),
    ],
)
def test_a_download_goes_on_with_the_part_that_is_there(server, tmp_path, mirrors, mirror, part, ranges):
    data_dir, heard = tmp_path / "new" / "data", Heard()
    if part:
        data_dir.mkdir(parents=True)
        part(data_dir / PART) if callable(part) else (data_dir / PART).write_bytes(part)
    if mirror:
        mirrors(mirror)
    heard.fetch(data_dir)
    assert_complete(data_dir)
    assert server.downloads() == ranges
    assert ("ended after 50,000 of" in " ".join(heard)) == (mirror == "truncated_twice")
    if ranges:
        assert heard.progress[-1] == (len(BODY), len(BODY))
        assert mirror != "truncated_twice" or heard.progress == sorted(heard.progress)
    if part is linked:
        assert (data_dir.parent / "victim").read_bytes() == b"mine"
    heard.fetch(data_dir)  # finds the finished data
    assert server.downloads() == ranges


@pytest.mark.parametrize(
    ("mirror", "words"),
    [
        ("missing", "HTTP 404"),
        ("vanishes", "HTTP 503"),
        ("html", "not a gzip archive (its Content-Type is text/html)"),
        ("other_length", f"got {len(BODY) + 1}"),
        ("wrong_bytes", "wrong sha256"),
        ("always_truncated", "ended after 1,000 of"),
        ("hangs", "timed out"),
        ("trickles", "too slow: "),
        ("trickles_a_header", "too slow: 0 bytes in 0.3 s"),
        ("to_ftp", "not an http or https address"),
        ("to_itself", "a redirect error that would lead to an infinite loop. The last"),
        ("escapes", "HTTP 404 ?[2J gone"),
    ],
)
def test_a_bad_mirror_is_named_and_the_next_one_used(server, tmp_path, monkeypatch, mirrors, mirror, words):
    changes = {"SAMPLE_S": 0.1, "SLOW_S": 0.3, "SLOW_BYTES": 1_000} | (
        {"READ_TIMEOUT_S": 0.2} if mirror == "hangs" else {}
    )
    for name, value in changes.items():
        monkeypatch.setattr(download, name, value)
    speeds, measure = {"whole": 1.0}, download._bytes_per_s
    monkeypatch.setattr(download, "_bytes_per_s", lambda url: measure(url) and speeds.get(urlsplit(url).path[1:], 2.0))
    mirrors(mirror)
    with pytest.raises(DownloadError) as caught:
        Heard().fetch(tmp_path)
    assert all(word in str(caught.value) for word in (words, "Offline", NAME, str(tmp_path), "CIFAR10_MIRRORS"))
    assert caught.value.exit_code == 3
    assert_nothing_usable(tmp_path)
    assert mirror != "vanishes" or len(server.downloads()) == download.ATTEMPTS

    server.requests.clear()
    mirrors(mirror, "whole")
    Heard().fetch(tmp_path)
    assert_complete(tmp_path)


@pytest.mark.parametrize(
    ("mirror", "environment", "words"),
    [
        pytest.param("http://127.0.0.1:1/x", {}, "refused", id="nothing_listens"),
        pytest.param(
            "http://127.0.0.1:1/x", {"http_proxy": "http://127.0.0.1:1", "no_proxy": ""}, "refused", id="proxy"
        ),
        pytest.param("https://{server}/whole", {}, "SSL", id="tls"),
        pytest.param("file:///etc/passwd", {}, "not an http", id="file_scheme"),
        pytest.param("http://[::1", {}, "Invalid", id="not_an_address"),
        pytest.param("http://127.0.0.1:x/", {}, "nonnumeric port", id="bad_port"),
    ],
)
def test_a_mirror_that_cannot_be_reached(server, tmp_path, monkeypatch, mirror, environment, words):
    environment = environment | {"CIFAR10_MIRRORS": mirror.format(server=f"127.0.0.1:{server.server_port}")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DownloadError, match=words):
        Heard().fetch(tmp_path)
    assert_nothing_usable(tmp_path)


def test_a_download_has_a_deadline_and_keeps_what_has_come(tmp_path, monkeypatch, mirrors):
    mirrors("gated_half")
    monkeypatch.setattr(download, "DEADLINE_S", 1.0)
    with pytest.raises(DownloadError, match="the download took more than 1 s"):
        Heard().fetch(tmp_path)
    assert (tmp_path / PART).read_bytes() == BODY[:50_000]


def test_faster_mirrors_come_first_and_no_name_lookup_holds_them_up(monkeypatch):
    speeds, release, reasons = {"http://a/": 1.0, "http://b/": 3.0, "http://c/": 2.0}, threading.Event(), {}
    monkeypatch.setattr(download, "PROBE_S", 0.3)
    monkeypatch.setattr(download, "_bytes_per_s", lambda url: speeds.get(url) or release.wait(20) or 1.0)
    try:
        assert download._probe(["http://hangs/", *speeds], reasons) == ["http://b/", "http://c/", "http://a/"]
    finally:
        release.set()
    assert reasons == {"http://hangs/": "no answer within 0.3 s"}


def run_elsewhere(data_dir: Path, urls: str, prelude: str = "") -> subprocess.Popen:
    """fetch in a process of its own, with the small archive."""
    code = (
        "import pathlib\nfrom model.data import archive, download\n"
        f"for name, value in {SMALL!r}.items(): setattr(archive if hasattr(archive, name) else download, name, value)\n"
        f"{prelude}\n"
        f"download.fetch(pathlib.Path({str(data_dir)!r}), say=lambda s: print(s, flush=True), progress=lambda *_: None)"
    )
    environment = os.environ | {"CIFAR10_MIRRORS": urls, "PYTHONPATH": str(ROOT)}
    environment.pop("HOME", None)
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_name_lookup_that_hangs_does_not_hold_up_the_end_of_the_process(tmp_path):
    prelude = "import time; download.PROBE_S = 0.1; download._bytes_per_s = lambda url: time.sleep(60)"
    with run_elsewhere(tmp_path, "http://hangs/", prelude) as process:
        assert "no answer within 0.1 s" in process.communicate(timeout=20)[0]


def test_two_processes_download_once(server, tmp_path):
    with run_elsewhere(tmp_path, server.urls("gated_half")) as first:
        assert server.gated.wait(20)
        with run_elsewhere(tmp_path, server.urls("gated_half")) as second:
            assert "another process is downloading" in second.stdout.readline()
            server.gate.set()
            assert (first.wait(20), second.wait(20)) == (0, 0)
    assert_complete(tmp_path)
    assert len(server.downloads()) == 1


def test_killed_while_downloading_then_resumed(server, tmp_path, mirrors):
    with run_elsewhere(tmp_path, server.urls("gated_half"), "download.CHUNK_BYTES = 10_000") as process:
        assert server.gated.wait(20)
        part, deadline = tmp_path / PART, time.monotonic() + 20
        while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert_nothing_usable(tmp_path)
    mirrors("whole")
    server.requests.clear()
    Heard().fetch(tmp_path)
    assert_complete(tmp_path)
    assert server.downloads()[0] is not None  # a range


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_folders_place(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match=r"cannot be stored in .*file.*--data-dir"):
        Heard().fetch(tmp_path / place)


def test_too_little_room_is_said_before_the_download(server, tmp_path, monkeypatch, mirrors):
    mirrors("whole")
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(DownloadError, match=r"MB are needed and 0 MB are free"):
        Heard().fetch(tmp_path)
    assert not server.requests


@pytest.mark.parametrize("limit", [50_000, FILE_BYTES - 1], ids=["while_downloading", "while_extracting"])
def test_a_disk_that_fills_up_is_one_clear_line(server, tmp_path, limit):
    if limit < FILE_BYTES:
        (tmp_path / NAME).write_bytes(BODY)
    prelude = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    with run_elsewhere(tmp_path, server.urls("whole"), prelude) as process:
        last = process.communicate(timeout=30)[0].splitlines()[-1]
    assert process.returncode == 1
    assert "DownloadError: CIFAR-10 cannot be stored" in last
    assert "File too large" in last
    assert_nothing_usable(tmp_path)
