"""The official binary archive of CIFAR-10: find a mirror, download, verify, extract.

The archive's sha256 is known, so any mirror is as good as the first. What stays in a folder, besides a lock file, is
`cifar-10-batches-bin/` with the six .bin files, which are known by their hashes too. A download in progress is
`cifar-10-binary.tar.gz.part`, an extraction in progress `cifar-10-batches-bin.part/`: a later call resumes the former
and removes the latter.
"""

import hashlib
import http.client
import os
import queue
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from model.data import archive
from model.errors import DataError

MIRRORS = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz",
    "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/cifar-10-binary.tar.gz",
)
MIRRORS_VARIABLE = "CIFAR10_MIRRORS"  # addresses separated by spaces, instead of the list above

PROBE_S = 10.0  # for all mirrors together
SAMPLE_S, SAMPLE_BYTES = 2.0, 1 << 18  # a mirror's speed is that of this much of the body, whichever comes first
READ_TIMEOUT_S = 30.0
SLOW_S, SLOW_BYTES = 20.0, 400_000  # a mirror that sends less than so much in so long is given up: 20 kB/s
DEADLINE_S = 1800.0  # for the whole download; what has come by then stays, and the next run goes on from there
ATTEMPTS = 6  # in a row without progress, over all mirrors
PROGRESS_BYTES = 1 << 20  # an attempt that got this much further than any before it counts as progress
BACKOFF_S = 1.0  # doubles with each attempt without progress
CHUNK_BYTES = 1 << 18

NETWORK_ERRORS = (OSError, http.client.HTTPException, ValueError)  # ValueError: not an address at all


class DownloadError(DataError):
    """The official archive could not be fetched, unpacked or stored: why, and what to do about it."""


class _MirrorError(Exception):
    """A fault of one mirror."""


def fetch(data_dir: Path, *, say: Callable[[str], None], progress: Callable[[int, int], None]) -> None:
    """Leave the official files in `data_dir/cifar-10-batches-bin`, downloading at most what is missing.

    An archive placed by hand in `data_dir` is used instead of the network once its sha256 is checked, and stays
    where it is. A `cifar-10-batches-bin` with other content is renamed, never deleted. Of several processes that
    call this for one folder one downloads; the others wait for it, however long it takes.

    say(line) is told what happens, progress(done_bytes, total_bytes) follows the download. Raises DownloadError.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(data_dir / f"{archive.NAME}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"another process is downloading CIFAR-10 into {data_dir}; waiting for it to finish")
            lock.acquire()
        try:
            _fetch_locked(data_dir, say, progress)
        finally:
            lock.release()
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        raise DownloadError(
            f"CIFAR-10 cannot be stored in {data_dir}: {_reason(error)}; name a folder with room that can be written "
            f"to: --data-dir DIR --download"
        ) from error


def _fetch_locked(data_dir: Path, say: Callable[[str], None], progress: Callable[[int, int], None]) -> None:
    folder, by_hand, part = (data_dir / name for name in (archive.FOLDER, archive.NAME, f"{archive.NAME}.part"))
    if archive.is_official(folder):
        return
    shutil.rmtree(folder.with_name(f"{archive.FOLDER}.part"), ignore_errors=True)
    if part.is_symlink() or (part.exists() and not part.is_file()):  # not ours, whatever it leads to
        part.unlink()
    found = next((path for path in (by_hand, part) if archive.is_archive(path)), None)
    done = part.stat().st_size if part.exists() else 0
    if found is None and done >= archive.BYTES:
        part.unlink()
        done = 0
    needed = len(archive.FILES) * archive.FILE_BYTES + archive.OTHER_BYTES + (archive.BYTES - done if not found else 0)
    free = shutil.disk_usage(data_dir).free
    if free < needed:
        raise OSError(f"{needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free")
    if found is None:
        reasons = {}
        if by_hand.exists():
            reasons[str(by_hand)] = "not the official archive"
            say(f"{by_hand}: not the official archive")
        _download(part, reasons, say, progress)
        found = part
    try:
        archive.extract(found, folder, say)
    except archive.ERRORS as error:
        raise DownloadError(f"{found}: refused: {_reason(error)}; remove it and run again") from error
    part.unlink(missing_ok=True)


def _probe(urls: list[str], reasons: dict[str, str]) -> list[str]:
    """The usable mirrors, fastest first; why the others are not goes to `reasons`. Takes at most PROBE_S."""
    answers: queue.SimpleQueue[tuple[str, float, str]] = queue.SimpleQueue()

    def probe(url: str) -> None:
        try:
            answers.put((url, _bytes_per_s(url), ""))
        except _MirrorError as error:
            answers.put((url, 0.0, str(error)))

    # Daemon threads: a name lookup that hangs cannot be interrupted, and must not hold up the end of the process.
    for url in urls:
        threading.Thread(target=probe, args=(url,), daemon=True).start()
    reasons |= dict.fromkeys(urls, f"no answer within {PROBE_S:g} s")
    speeds = {}
    deadline = time.monotonic() + PROBE_S
    for _ in urls:
        try:
            url, speed, reason = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if reason:
            reasons[url] = reason
        else:
            speeds[url] = speed
            reasons.pop(url, None)
    return sorted(speeds, key=speeds.__getitem__, reverse=True)


def _bytes_per_s(url: str) -> float:
    """Speed of the start of the body, connection included: a slow server may be quick to answer."""
    start, received = time.monotonic(), 0
    for position, chunk in _body(url, 0):
        received = position + len(chunk)
        if received >= SAMPLE_BYTES or time.monotonic() - start >= SAMPLE_S:
            break
    return received / max(time.monotonic() - start, 1e-9)


def _body(url: str, offset: int) -> Iterator[tuple[int, bytes]]:
    """(position, chunk) of the archive from `offset` on, or from 0 if the server does not do ranges.

    Raises _MirrorError for whatever goes wrong, except a body that ends too soon: that is for the caller to see.
    """
    try:
        with _open(url, offset) as response:
            position = offset if response.status == 206 else 0
            chunk = response.read(2)
            if position == 0 and chunk != b"\x1f\x8b":  # gzip's magic number; a login or error page is HTML
                kind = _one_line(response.headers["Content-Type"])
                raise _MirrorError(f"not a gzip archive (its Content-Type is {kind})")
            while chunk:
                if position + len(chunk) > archive.BYTES:
                    raise _MirrorError(f"sends more than the archive's {archive.BYTES:,} bytes")
                yield position, chunk
                position += len(chunk)
                chunk = response.read1(CHUNK_BYTES)
    except NETWORK_ERRORS as error:
        raise _MirrorError(_reason(error)) from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """urllib follows a redirect to ftp too."""

    def redirect_request(self, request, response, code, message, headers, url):
        _require_http(url)
        return super().redirect_request(request, response, code, message, headers, url)


def _require_http(url: str) -> None:
    if urlsplit(url).scheme not in ("http", "https"):
        raise _MirrorError("not an http or https address")


def _open(url: str, offset: int) -> http.client.HTTPResponse:
    _require_http(url)
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    response = urllib.request.build_opener(_Redirects).open(request, timeout=READ_TIMEOUT_S)
    if response.status == 206:
        expected = f"bytes {offset}-{archive.BYTES - 1}/{archive.BYTES}"
        got = response.headers["Content-Range"]
    else:
        expected = str(archive.BYTES)
        got = response.headers.get("Content-Length", expected)  # a chunked body names no length
    if got != expected:
        response.close()
        raise _MirrorError(f"expected {expected}, got {_one_line(got)} as the body's extent in bytes")
    return response


def _download(
    part: Path, reasons: dict[str, str], say: Callable[[str], None], progress: Callable[[int, int], None]
) -> None:
    """Complete `part` from the mirrors in turn.

    Raises DownloadError after ATTEMPTS in a row without progress, and after DEADLINE_S.
    """
    deadline = time.monotonic() + DEADLINE_S
    mirrors = _probe(os.environ.get(MIRRORS_VARIABLE, "").split() or list(MIRRORS), reasons)
    failures = longest = 0
    while mirrors and failures < ATTEMPTS and time.monotonic() < deadline:
        if failures:
            time.sleep(BACKOFF_S * 2 ** (failures - 1))
        say(f"downloading CIFAR-10 ({archive.BYTES / 1e6:.0f} MB) from {_host(mirrors[0])}")
        try:
            _download_from(mirrors[0], part, progress, deadline)
            return
        except _MirrorError as error:
            reasons[mirrors[0]] = str(error)
            say(f"{_host(mirrors[0])}: {error}")
        size = part.stat().st_size if part.exists() else 0
        failures += 1
        if size >= longest + PROGRESS_BYTES:
            failures, longest = 0, size
        mirrors = mirrors[1:] + mirrors[:1]
    details = "; ".join(f"{_host(url)}: {reason}" for url, reason in reasons.items())
    raise DownloadError(
        f"CIFAR-10 could not be downloaded: {details}. Offline: put {archive.NAME} "
        f"({archive.BYTES:,} bytes, from {MIRRORS[0]}) into {part.parent.absolute()} and run the same command again; "
        f"or set {MIRRORS_VARIABLE} to addresses that this machine can reach"
    )


def _in_time(body: Iterator[tuple[int, bytes]], deadline: float) -> Iterator[tuple[int, bytes]]:
    """Yield from `body` as long as SLOW_BYTES come in each SLOW_S, until `deadline`; then raise _MirrorError.

    A thread reads it, since a name lookup, or a header sent letter by letter, cannot be interrupted. A thread that is
    given up ends with its next chunk, or with the process.
    """
    chunks: queue.SimpleQueue[tuple[int, bytes] | BaseException | None] = queue.SimpleQueue()
    given_up = threading.Event()

    def read() -> None:
        try:
            for chunk in body:
                if given_up.is_set():
                    return
                chunks.put(chunk)
            chunks.put(None)
        except BaseException as error:
            chunks.put(error)

    threading.Thread(target=read, daemon=True).start()
    started, received = time.monotonic(), 0
    try:
        while True:
            until = min(started + SLOW_S, deadline)
            try:
                chunk = chunks.get(timeout=max(until - time.monotonic(), 0))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    raise _MirrorError(
                        f"the download took more than {DEADLINE_S:g} s; run again to go on with it"
                    ) from None
                if received < SLOW_BYTES:
                    raise _MirrorError(f"too slow: {received:,} bytes in {SLOW_S:g} s") from None
                started, received = time.monotonic(), 0
                continue
            if isinstance(chunk, BaseException):
                raise chunk
            if chunk is None:
                return
            received += len(chunk[1])
            yield chunk
    finally:
        given_up.set()


def _download_from(url: str, part: Path, progress: Callable[[int, int], None], deadline: float) -> None:
    """Append to `part` what it lacks, then check its sha256; a complete but wrong `part` is removed."""
    with open(part, "ab+", opener=_without_links) as out:  # appends: after a truncation to 0 it writes at 0
        out.seek(0)
        digest = hashlib.file_digest(out, "sha256")
        done = out.tell()
        for position, chunk in _in_time(_body(url, done), deadline):
            if position == 0:
                out.truncate(0)
                digest = hashlib.sha256()
            out.write(chunk)
            digest.update(chunk)
            done = position + len(chunk)
            progress(done, archive.BYTES)
    if done < archive.BYTES:
        raise _MirrorError(f"the connection ended after {done:,} of {archive.BYTES:,} bytes")
    if digest.hexdigest() != archive.SHA256:
        part.unlink()
        raise _MirrorError(f"wrong sha256: expected {archive.SHA256[:16]}..., got {digest.hexdigest()[:16]}...")


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc.rpartition("@")[2] or url
    except ValueError:
        return url


def _reason(error: BaseException) -> str:
    """One line for an exception, without urllib's wrapping."""
    if isinstance(error, urllib.error.HTTPError):
        return _one_line(f"HTTP {error.code} {error.reason}")
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return _reason(error.reason)
    return _one_line(error) or type(error).__name__


def _one_line(text: object) -> str:
    """Text of the network's making, fit to be shown."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(text).split()))[:300]
