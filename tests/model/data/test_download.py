"""The download against a server on this machine: every way it can fail, resume, wait, and refuse."""

import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import numpy as np
import pytest

from model.data import archive, download
from model.data.archive import FILES, FOLDER, OTHER_MEMBERS
from model.data.archive import NAME as ARCHIVE
from model.data.download import DownloadError
from profiling import ROOT

FILE_BYTES = 30_730
rng = np.random.default_rng(0)
CONTENTS = {name: rng.integers(0, 256, FILE_BYTES, np.uint8).tobytes() for name in FILES}


def make_archive(*extra: tuple[tarfile.TarInfo, bytes], without: tuple[str, ...] = ()) -> bytes:
    """An archive like the official one but for the sizes, followed by the members `extra`."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz", compresslevel=1) as tar:
        folder = tarfile.TarInfo(FOLDER)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        files = CONTENTS | dict.fromkeys(OTHER_MEMBERS, b"text\n")
        members = [(file(f"{FOLDER}/{name}", size=len(data)), data) for name, data in files.items()]
        for member, data in [*members, *extra]:
            if member.name.rpartition("/")[2] not in without or (member, data) in extra:
                tar.addfile(member, io.BytesIO(data))
    return raw.getvalue()


def file(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0, **fields) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, size
    for field, value in fields.items():
        setattr(member, field, value)
    return member


ARCHIVE_BODY = make_archive()


class Server(ThreadingHTTPServer):
    """Answers /NAME as the method NAME of `Answer` says; `requests` holds (path, Range header) of each request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.requests, self.gate, self.gated = [], threading.Event(), threading.Event()

    def handle_error(self, request, client_address):
        """A client that hangs up is part of several tests."""

    def urls(self, *names: str) -> str:
        return " ".join(f"http://127.0.0.1:{self.server_port}/{name}" for name in names)

    def downloads(self) -> list[tuple[str, str | None]]:
        """The requests after the mirrors were probed, given that there was one mirror."""
        return self.requests[1:]


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append((self.path, self.headers["Range"]))
        self.first = sum(path == self.path for path, _ in self.server.requests) == 1  # that is: the probe
        getattr(self, self.path[1:])()

    def send(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def whole(self, body: bytes = ARCHIVE_BODY) -> None:
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        if start:
            self.send(body[start:], 206, Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send(body)

    def no_range(self):
        self.send(ARCHIVE_BODY)

    def truncated_twice(self):
        if sum(path == self.path for path, _ in self.server.requests) > 3:
            return self.whole()
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        size = len(ARCHIVE_BODY)
        if start:
            body, headers = ARCHIVE_BODY[start : start + 5_000], {"Content_Range": f"bytes {start}-{size - 1}/{size}"}
        else:
            body, headers = ARCHIVE_BODY[:50_000], {}
        self.send(body, 206 if start else 200, Content_Length=str(size - start), **headers)

    def always_truncated(self):
        self.send(ARCHIVE_BODY[:1_000], Content_Length=str(len(ARCHIVE_BODY)))

    def chunked(self):
        self.protocol_version = "HTTP/1.1"
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.send_header("Connection", "close")
        self.end_headers()
        for start in range(0, len(ARCHIVE_BODY), 40_000):
            piece = ARCHIVE_BODY[start : start + 40_000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def missing(self):
        self.send_error(404)

    def vanishes(self):
        self.whole() if self.first else self.send_error(503)

    def html(self):
        body = b"<!DOCTYPE html><title>Log in</title>"
        self.send(body.ljust(len(ARCHIVE_BODY)), Content_Type="text/html")

    def other_length(self):
        self.send(ARCHIVE_BODY + b"x")

    def wrong_bytes(self):
        self.whole(ARCHIVE_BODY[:-1] + b"?")

    def hangs(self):
        if self.first:
            return self.whole()
        self.send(ARCHIVE_BODY[:1_000], Content_Length=str(len(ARCHIVE_BODY)))
        self.server.gate.wait(5)

    def trickles(self):
        self.trickle(ARCHIVE_BODY[:1_000])

    def trickles_a_header(self):
        self.whole() if self.first else self.trickle(b"HTTP/1.0 200 OK\r\n" + b"x" * 10_000)

    def trickle(self, data: bytes) -> None:
        """Something every so often, until the test ends."""
        if data is not None and data.startswith(b"\x1f"):
            self.send(b"", Content_Length=str(len(ARCHIVE_BODY)))
        for i in range(len(data)):
            self.wfile.write(data[i : i + 1])
            if self.server.gate.wait(0.02):
                break

    def to_ftp(self):
        self.send(b"", 302, Location=self.server.urls("whole").replace("http:", "ftp:"))

    def to_itself(self):
        self.send(b"", 302, Location="/to_itself")

    def escapes(self):
        self.send_response(404, "\x1b[2J gone")
        self.end_headers()

    def gated_half(self):
        if self.first:
            return self.whole()
        self.send(ARCHIVE_BODY[:50_000], Content_Length=str(len(ARCHIVE_BODY)))
        self.server.gated.set()
        self.server.gate.wait(20)
        self.wfile.write(ARCHIVE_BODY[50_000:])


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.gate.set()
    server.shutdown()
    thread.join()
    server.server_close()


SMALL = {
    "BYTES": len(ARCHIVE_BODY),
    "SHA256": hashlib.sha256(ARCHIVE_BODY).hexdigest(),
    "FILE_BYTES": FILE_BYTES,
    "BLOBS": {name: archive.blob_sha1(content) for name, content in CONTENTS.items()},
    "PROGRESS_BYTES": 1_000,
    "BACKOFF_S": 0.001,
    "ATTEMPTS": 3,
    "READ_TIMEOUT_S": 10.0,
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(archive if hasattr(archive, name) else download, name, value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("CIFAR10_MIRRORS", "off")


class Heard(list):
    """A `say` that remembers, and `progress` too."""

    def __init__(self):
        self.progress = []

    def __call__(self, line: str) -> None:
        assert "\n" not in line
        self.append(line)

    def fetch(self, data_dir: Path) -> None:
        download.fetch(data_dir, say=self, progress=lambda done, total: self.progress.append((done, total)))


def assert_complete(data_dir: Path) -> None:
    assert archive.is_official(data_dir / FOLDER)
    for name, content in CONTENTS.items():
        assert (data_dir / FOLDER / name).read_bytes() == content
    left = {path.name for path in data_dir.iterdir()}
    assert left <= {FOLDER, f"{ARCHIVE}.lock"}
    assert {path.name for path in (data_dir / FOLDER).iterdir()} == set(FILES)


def assert_nothing_usable(data_dir: Path) -> None:
    assert not (data_dir / FOLDER).exists()
    assert not (data_dir / f"{FOLDER}.part").exists()


def test_constants_of_the_official_archive(monkeypatch):
    monkeypatch.undo()
    assert archive.BYTES == 170_052_171
    assert archive.SHA256 == "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    assert all(url.endswith(f"/{ARCHIVE}") for url in download.MIRRORS)


def test_download_extracts_records_and_tidies_up(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_MIRRORS", server.urls("whole"))
    heard = Heard()
    heard.fetch(tmp_path / "new" / "data")
    assert_complete(tmp_path / "new" / "data")
    assert heard.progress[-1] == (len(ARCHIVE_BODY), len(ARCHIVE_BODY))
    assert [done for done, _ in heard.progress] == sorted(done for done, _ in heard.progress)
    assert len(server.downloads()) == 1

    heard.fetch(tmp_path / "new" / "data")  # finds the finished data
    assert len(server.downloads()) == 1


def test_a_changed_file_is_downloaded_again_and_kept_aside(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_MIRRORS", server.urls("whole"))
    Heard().fetch(tmp_path)
    (tmp_path / FOLDER / FILES[0]).write_bytes(b"mine")
    heard = Heard()
    heard.fetch(tmp_path)
    assert (tmp_path / f"{FOLDER}.rejected-1" / FILES[0]).read_bytes() == b"mine"
    assert archive.is_official(tmp_path / FOLDER)
    assert any("rejected-1" in line for line in heard)


def test_truncated_body_is_resumed(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_MIRRORS", server.urls("truncated_twice"))
    heard = Heard()
    heard.fetch(tmp_path)
    assert_complete(tmp_path)
    assert [wanted for _, wanted in server.downloads()] == [None, "bytes=50000-", "bytes=55000-"]
    assert any("ended after 50,000 of" in line for line in heard)


def test_partial_file_of_an_earlier_run_is_resumed(server, tmp_path, monkeypatch):
    (tmp_path / f"{ARCHIVE}.part").write_bytes(ARCHIVE_BODY[:70_000])
    monkeypatch.setenv("CIFAR10_MIRRORS", server.urls("whole"))
    Heard().fetch(tmp_path)
    assert_complete(tmp_path)
    assert [wanted for _, wanted in server.downloads()] == ["bytes=70000-"]


@pytest.mark.parametrize("mirror", ["no_range", "chunked"])
def test_server_without_ranges_starts_again(server, tmp_path, monkeypatch, mirror):
    (tmp_path / f"{ARCHIVE}.part").write_bytes(b"\x1f\x8b" + bytes(70_000))
    monkeypatch.setenv("CIFAR10_MIRRORS", server.urls(mirror))
    Heard().fetch(tmp_path)
    assert_complete(tmp_path)
    assert len(server.downloads()) == 1


@pytest.mark.parametrize(
    ("stale", "downloads"),
    [
        pytest.param(b"\x1f\x8b" + bytes(70_000), 2, id="wrong_start"),
        pytest.param(ARCHIVE_BODY[:-1] + b"?", 1, id="complete_but_wrong"),
        pytest.param(ARCHIVE_BODY + b"?", 1, id="too_long"),
    ],
)
def test_a_wrong_partial_file_is_removed(server, tmp_path, monkeypatch, stale, downloads):
    (tmp_path / f"{ARCHIVE}.part").write_bytes(stale)
    monkeypatch.setenv("CIFAR10_MIRRORS", server.urls("whole"))
    Heard().fetch(tmp_path)
    assert_complete(tmp_path)
    assert len(server.downloads()) == downloads


def test_a_complete_partial_file_needs_no_network(tmp_path):
    (tmp_path / f"{ARCHIVE}.part").write_bytes(ARCHIVE_BODY)
    Heard().fetch(tmp_path)
    assert_complete(tmp_path)


@pytest.mark.parametrize(
    ("mirror", "words"),
    [
        ("missing", "HTTP 404"),
        ("vanishes", "HTTP 503"),
        ("html", "not a gzip archive (its Content-Type is text/html)"),
        ("other_length", f"got {len(ARCHIVE_BODY) + 1}"),
        ("wrong_bytes", "wrong sha256"),
        ("always_truncated", "ended after 1,000 of"),
        ("hangs", "timed out"),
        ("trickles", "too slow: "),
        ("trickles_a_header", "too slow: 0 bytes in 0.5 s"),
        ("to_ftp", "not an http or https address"),
        (
            "to_itself",
            "a redirect error that would lead to an infinite loop. The last",
        ),
        ("escapes", "HTTP 404 ?[2J gone"),
    ],
)
def test_a_bad_mirror_is_named_and_the_next_one_used(server, tmp_path, monkeypatch, mirror, words):
    if mirror == "hangs":
        monkeypatch.setattr(download, "READ_TIMEOUT_S", 0.2)
    monkeypatch.setattr(download, "SAMPLE_S", 0.1)
    monkeypatch.setattr(download, "SLOW_S", 0.5)
    monkeypatch.setattr(download, "SLOW_BYTES", 1_000)
    speeds = {"whole": 1.0}
    measure = download._bytes_per_s
    monkeypatch.setattr(download, "_bytes_per_s", lambda url: measure(url) and speeds.get(urlsplit(url).path[1:], 2.0))
    monkeypatch.setenv("CIFAR10_MIRRORS", server.urls(mirror))
    heard = Heard()
    with pytest.raises(DownloadError) as caught:
        heard.fetch(tmp_path)
    message = str(caught.value)
    assert words in message
    for advice in ["Offline", ARCHIVE, str(tmp_path), "CIFAR10_MIRRORS"]:
        assert advice in message
    assert_nothing_usable(tmp_path)
    assert caught.value.exit_code == 3

    server.requests.clear()
    monkeypatch.setenv("CIFAR10_MIRRORS", server.urls(mirror, "whole"))
    heard.fetch(tmp_path)
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
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CIFAR10_MIRRORS", mirror.format(server=f"127.0.0.1:{server.server_port}"))
    with pytest.raises(DownloadError, match=words):
        Heard().fetch(tmp_path)
    assert_nothing_usable(tmp_path)


def test_attempts_are_bounded(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_MIRRORS", server.urls("vanishes"))
    with pytest.raises(DownloadError):
        Heard().fetch(tmp_path)
    assert len(server.downloads()) == download.ATTEMPTS


def test_a_download_has_a_deadline_and_keeps_what_has_come(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_MIRRORS", server.urls("gated_half"))
    monkeypatch.setattr(download, "DEADLINE_S", 1.0)
    with pytest.raises(DownloadError, match="the download took more than 1 s"):
        Heard().fetch(tmp_path)
    assert (tmp_path / f"{ARCHIVE}.part").read_bytes() == ARCHIVE_BODY[:50_000]


@pytest.mark.parametrize("make", [lambda part, victim: part.symlink_to(victim), lambda part, _: os.mkfifo(part)])
def test_a_part_that_is_a_link_or_a_pipe_is_replaced(server, tmp_path, monkeypatch, make):
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "data").mkdir()
    make(tmp_path / "data" / f"{ARCHIVE}.part", tmp_path / "victim")
    monkeypatch.setenv("CIFAR10_MIRRORS", server.urls("whole"))
    Heard().fetch(tmp_path / "data")
    assert (tmp_path / "victim").read_bytes() == b"mine"
    assert_complete(tmp_path / "data")


def test_faster_mirrors_first(monkeypatch):
    speeds = {"http://a/": 1.0, "http://b/": 3.0, "http://c/": 2.0}
    monkeypatch.setattr(download, "_bytes_per_s", speeds.__getitem__)
    assert download._probe(list(speeds), {}) == ["http://b/", "http://c/", "http://a/"]


def test_a_name_lookup_that_hangs_does_not_hold_up_the_others(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(download, "PROBE_S", 0.3)
    monkeypatch.setattr(download, "_bytes_per_s", lambda url: 1.0 if "good" in url else release.wait(20) or 1.0)
    reasons = {}
    try:
        assert download._probe(["http://hangs/", "http://good/"], reasons) == ["http://good/"]
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


def test_killed_while_downloading_then_resumed(server, tmp_path, monkeypatch):
    with run_elsewhere(tmp_path, server.urls("gated_half"), "download.CHUNK_BYTES = 10_000") as process:
        assert server.gated.wait(20)
        part, deadline = tmp_path / f"{ARCHIVE}.part", time.monotonic() + 20
        while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert_nothing_usable(tmp_path)
    monkeypatch.setenv("CIFAR10_MIRRORS", server.urls("whole"))
    server.requests.clear()
    Heard().fetch(tmp_path)
    assert_complete(tmp_path)
    assert server.downloads()[0][1] is not None  # a range


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_interrupted_extraction_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / f"{ARCHIVE}.part").write_bytes(ARCHIVE_BODY)
    with monkeypatch.context() as patch:
        patch.setattr(archive.shutil, "copyfileobj", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Heard().fetch(tmp_path)
    assert_nothing_usable(tmp_path)
    Heard().fetch(tmp_path)
    assert_complete(tmp_path)


def test_extraction_killed_half_way_is_cleaned_up(tmp_path):
    stale = tmp_path / f"{FOLDER}.part"
    stale.mkdir()
    for name in FILES:
        (stale / name).write_bytes(CONTENTS[name])
    (tmp_path / f"{ARCHIVE}.part").write_bytes(ARCHIVE_BODY)
    Heard().fetch(tmp_path)
    assert_complete(tmp_path)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_folders_place(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match=r"cannot be stored in .*file.*--data-dir"):
        Heard().fetch(tmp_path / place)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(DownloadError, match="cannot be stored"):
        Heard().fetch(tmp_path)
    tmp_path.chmod(0o755)


def test_too_little_room_is_said_before_the_download(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CIFAR10_MIRRORS", server.urls("whole"))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(DownloadError, match=r"MB are needed and 0 MB are free"):
        Heard().fetch(tmp_path)
    assert not server.requests


@pytest.mark.parametrize("limit", [50_000, FILE_BYTES - 1], ids=["while_downloading", "while_extracting"])
def test_a_disk_that_fills_up_is_one_clear_line(server, tmp_path, limit):
    if limit < FILE_BYTES:
        (tmp_path / ARCHIVE).write_bytes(ARCHIVE_BODY)
    prelude = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    with run_elsewhere(tmp_path, server.urls("whole"), prelude) as process:
        output = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert "DownloadError: CIFAR-10 cannot be stored" in output.splitlines()[-1]
    assert "File too large" in output.splitlines()[-1]
    assert_nothing_usable(tmp_path)


def test_archive_placed_by_hand_is_used_and_kept(tmp_path):
    (tmp_path / ARCHIVE).write_bytes(ARCHIVE_BODY)
    Heard().fetch(tmp_path)
    assert (tmp_path / ARCHIVE).read_bytes() == ARCHIVE_BODY
    (tmp_path / ARCHIVE).unlink()
    assert_complete(tmp_path)


@pytest.mark.parametrize("body", [ARCHIVE_BODY[:-1], ARCHIVE_BODY[:-1] + b"?"], ids=["cut_short", "same_length"])
def test_a_wrong_archive_placed_by_hand_is_named(tmp_path, body):
    (tmp_path / ARCHIVE).write_bytes(body)
    heard = Heard()
    with pytest.raises(DownloadError, match="not the official archive"):
        heard.fetch(tmp_path)
    assert any("not the official archive" in line for line in heard)
    assert (tmp_path / ARCHIVE).exists()


IN = f"{FOLDER}/"
ZEROS = bytes(3 << 20)
HOSTILE = {
    "parent_folder": make_archive((file("../outside", size=1), b"x")),
    "parent_folder_below_ours": make_archive((file(f"{IN}../../outside", size=1), b"x")),
    "absolute": make_archive((file("/tmp/outside", size=1), b"x")),
    "unknown_file": make_archive((file(f"{IN}data_batch_6.bin", size=1), b"x")),
    "symlink": make_archive((file(f"{IN}test_batch.bin", tarfile.SYMTYPE, "/etc/passwd"), b""), without=FILES[5:]),
    "symlinked_folder": gzip.compress(tarfile.TarInfo.tobuf(file(FOLDER, tarfile.SYMTYPE, "/tmp")) + bytes(1024)),
    "hardlink": make_archive((file(f"{IN}test_batch.bin", tarfile.LNKTYPE, f"{IN}{FILES[0]}"), b""), without=FILES[5:]),
    "device": make_archive(
        (file(f"{IN}test_batch.bin", tarfile.CHRTYPE, devmajor=1, devminor=5), b""), without=FILES[5:]
    ),
    "fifo": make_archive((file(f"{IN}test_batch.bin", tarfile.FIFOTYPE), b""), without=FILES[5:]),
    "sparse": make_archive(
        (
            file(
                f"{IN}test_batch.bin",
                size=FILE_BYTES,
                pax_headers={"GNU.sparse.size": f"{FILE_BYTES}", "GNU.sparse.map": f"0,{FILE_BYTES}"},
            ),
            bytes(FILE_BYTES),
        ),
        without=FILES[5:],
    ),
    "twice": make_archive((file(f"{IN}{FILES[0]}", size=FILE_BYTES), bytes(FILE_BYTES))),
    "file_too_long": make_archive(
        (file(f"{IN}{FILES[5]}", size=FILE_BYTES + 1), bytes(FILE_BYTES + 1)), without=FILES[5:]
    ),
    "file_missing": make_archive(without=FILES[5:]),
    "bomb_in_a_file_we_skip": make_archive(
        (file(f"{IN}{OTHER_MEMBERS[0]}", size=len(ZEROS)), ZEROS), without=OTHER_MEMBERS
    ),
    "bomb_in_a_header": make_archive((file(FOLDER, pax_headers={"comment": "0" * len(ZEROS)}), b"")),
    "a_hundred_thousand_members": gzip.compress(file(f"{IN}x", tarfile.DIRTYPE).tobuf() * 100_000 + bytes(1024), 1),
    "a_thousand_headers_of_nothing": gzip.compress(file("x", tarfile.XGLTYPE).tobuf() * 2_000 + bytes(1024), 1),
    "cut_short": ARCHIVE_BODY[: len(ARCHIVE_BODY) // 2],
    "bytes_changed": ARCHIVE_BODY[:90_000] + bytes(100) + ARCHIVE_BODY[90_100:],
    "gzip_of_something_else": gzip.compress(b"not a tar archive" * 100),
    "not_gzip": b"<html>",
    "empty": b"",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_archives_are_refused(tmp_path, monkeypatch, body):
    """Even one whose sha256 were the right one."""
    monkeypatch.setattr(archive, "OTHER_BYTES", 1 << 20)
    monkeypatch.setattr(archive, "BYTES", len(body))
    monkeypatch.setattr(archive, "SHA256", hashlib.sha256(body).hexdigest())
    data_dir = tmp_path / "inside" / "data"
    data_dir.mkdir(parents=True)
    (data_dir / ARCHIVE).write_bytes(body)
    with pytest.raises(DownloadError, match="refused") as caught:
        Heard().fetch(data_dir)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1_000
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == [
        f"inside/data/{ARCHIVE}",
        f"inside/data/{ARCHIVE}.lock",
    ]
    assert_nothing_usable(data_dir)
    assert not Path("/tmp/outside").exists()
