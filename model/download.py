"""The official binary archive of CIFAR-10: find a mirror, download, verify, extract.

Only the archive whose sha256 is written below is ever unpacked, so any mirror is as good as the first. What stays
in a folder, besides a lock file, is `cifar-10-batches-bin/` with the six .bin files and a record of their hashes.
A download in progress is `cifar-10-binary.tar.gz.part`, an extraction in progress `cifar-10-batches-bin.part/`: a
later call resumes the former and removes the latter.
"""

import gzip
import hashlib
import http.client
import itertools
import json
import os
import queue
import shutil
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from model.errors import DataError

ARCHIVE = "cifar-10-binary.tar.gz"
ARCHIVE_BYTES = 170_052_171
ARCHIVE_SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
MIRRORS = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/cifar-10-binary.tar.gz",
    "https://mindspore-website.obs.cn-north-4.myhuaweicloud.com/notebook/datasets/cifar-10-binary.tar.gz",
)
MIRRORS_VARIABLE = "CIFAR10_MIRRORS"  # addresses separated by spaces, instead of the list above

FOLDER = "cifar-10-batches-bin"
FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
FILE_BYTES = 30_730_000  # 10,000 records of one label byte and 3,072 pixel bytes
OTHER_MEMBERS = ("batches.meta.txt", "readme.html")  # in the archive too; not needed, not extracted
OTHER_BYTES = 1 << 20  # more than those two and the tar format itself take
RECORD = "sha256.json"

PROBE_S = 10.0  # for all mirrors together
SAMPLE_S, SAMPLE_BYTES = 2.0, 1 << 18  # a mirror's speed is that of this much of the body, whichever comes first
READ_TIMEOUT_S = 30.0
ATTEMPTS = 6  # in a row without progress, over all mirrors
PROGRESS_BYTES = 1 << 20  # an attempt that got this much further than any before it counts as progress
BACKOFF_S = 1.0  # doubles with each attempt without progress
CHUNK_BYTES = 1 << 18

NETWORK_ERRORS = (OSError, http.client.HTTPException, ValueError)  # ValueError: not an address at all
ARCHIVE_ERRORS = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, RecursionError)


class DownloadError(DataError):
    """The official archive could not be fetched, unpacked or stored: why, and what to do about it."""


class _MirrorError(Exception):
    """What is wrong with one mirror."""


def fetch(data_dir: Path, *, say: Callable[[str], None], progress: Callable[[int, int], None]) -> None:
    """Leave the official files in `data_dir/cifar-10-batches-bin`, downloading at most what is missing.

    An archive placed by hand in `data_dir` is used instead of the network once its sha256 is checked, and stays
    where it is. A `cifar-10-batches-bin` with other content is renamed, never deleted. Of several processes that
    call this for one folder one downloads; the others wait for it, however long it takes.

    say(line) is told what happens, progress(done_bytes, total_bytes) follows the download. Raises DownloadError.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(data_dir / f"{ARCHIVE}.lock")
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


def is_as_recorded(folder: Path) -> bool:
    """Whether `folder` holds the six files with the hashes that were recorded when they were extracted."""
    try:
        recorded = read_record(folder)
        return recorded is not None and all(
            (folder / name).is_file() and _sha256(folder / name) == recorded[name] for name in FILES
        )
    except (OSError, DataError):
        return False


def read_record(folder: Path) -> dict[str, str] | None:
    """sha256 of each of the six files as extracted from the official archive; None if `folder` has no record.

    Raises DataError if there is a record but it cannot be read or is of another archive.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["archive"] != ARCHIVE_SHA256:
            raise ValueError("the sha256 of another archive")
        return {name: str(record["files"][name]) for name in FILES}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected the hashes recorded when the official archive was extracted, got {_reason(error)}; "
            f"remove {folder} and download again with --download"
        ) from error


def _fetch_locked(data_dir: Path, say: Callable[[str], None], progress: Callable[[int, int], None]) -> None:
    folder, by_hand, part = data_dir / FOLDER, data_dir / ARCHIVE, data_dir / f"{ARCHIVE}.part"
    if is_as_recorded(folder):
        return
    shutil.rmtree(folder.with_name(f"{FOLDER}.part"), ignore_errors=True)
    archive = next((path for path in (by_hand, part) if _is_official(path)), None)
    done = part.stat().st_size if part.exists() else 0
    if archive is None and done >= ARCHIVE_BYTES:
        part.unlink()
        done = 0
    needed = len(FILES) * FILE_BYTES + OTHER_BYTES + (ARCHIVE_BYTES - done if archive is None else 0)
    free = shutil.disk_usage(data_dir).free
    if free < needed:
        raise OSError(f"{needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free")
    if archive is None:
        reasons = {}
        if by_hand.exists():
            reasons[str(by_hand)] = "not the official archive"
            say(f"{by_hand}: not the official archive")
        _download(part, reasons, say, progress)
        archive = part
    _extract(archive, folder, say)
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
                raise _MirrorError(f"not a gzip archive (its Content-Type is {response.headers['Content-Type']})")
            while chunk:
                if position + len(chunk) > ARCHIVE_BYTES:
                    raise _MirrorError(f"sends more than the archive's {ARCHIVE_BYTES:,} bytes")
                yield position, chunk
                position += len(chunk)
                chunk = response.read1(CHUNK_BYTES)
    except NETWORK_ERRORS as error:
        raise _MirrorError(_reason(error)) from error


def _open(url: str, offset: int) -> http.client.HTTPResponse:
    if urlsplit(url).scheme not in ("http", "https"):
        raise _MirrorError("not an http or https address")
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    response = urllib.request.urlopen(request, timeout=READ_TIMEOUT_S)
    if response.status == 206:
        expected, got = f"bytes {offset}-{ARCHIVE_BYTES - 1}/{ARCHIVE_BYTES}", response.headers["Content-Range"]
    else:
        expected = str(ARCHIVE_BYTES)
        got = response.headers.get("Content-Length", expected)  # a chunked body names no length
    if got != expected:
        response.close()
        raise _MirrorError(f"expected {expected}, got {got} as the body's extent in bytes")
    return response


def _download(
    part: Path, reasons: dict[str, str], say: Callable[[str], None], progress: Callable[[int, int], None]
) -> None:
    """Complete `part` from the mirrors in turn. Raises DownloadError after ATTEMPTS in a row without progress."""
    mirrors = _probe(os.environ.get(MIRRORS_VARIABLE, "").split() or list(MIRRORS), reasons)
    failures = longest = 0
    while mirrors and failures < ATTEMPTS:
        if failures:
            time.sleep(BACKOFF_S * 2 ** (failures - 1))
        say(f"downloading CIFAR-10 ({ARCHIVE_BYTES / 1e6:.0f} MB) from {_host(mirrors[0])}")
        try:
            _download_from(mirrors[0], part, progress)
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
        f"CIFAR-10 could not be downloaded: {details}. Offline: put {ARCHIVE} "
        f"({ARCHIVE_BYTES:,} bytes, from {MIRRORS[0]}) into {part.parent.absolute()} and run the same command again; "
        f"or set {MIRRORS_VARIABLE} to addresses that this machine can reach"
    )


def _download_from(url: str, part: Path, progress: Callable[[int, int], None]) -> None:
    """Append to `part` what it lacks, then check its sha256; a complete but wrong `part` is removed."""
    with part.open("ab+") as out:  # appends: after a truncation to 0 it writes at 0
        out.seek(0)
        digest = hashlib.file_digest(out, "sha256")
        done = out.tell()
        for position, chunk in _body(url, done):
            if position == 0:
                out.truncate(0)
                digest = hashlib.sha256()
            out.write(chunk)
            digest.update(chunk)
            done = position + len(chunk)
            progress(done, ARCHIVE_BYTES)
    if done < ARCHIVE_BYTES:
        raise _MirrorError(f"the connection ended after {done:,} of {ARCHIVE_BYTES:,} bytes")
    if digest.hexdigest() != ARCHIVE_SHA256:
        part.unlink()
        raise _MirrorError(f"wrong sha256: expected {ARCHIVE_SHA256[:16]}..., got {digest.hexdigest()[:16]}...")


class _Bounded:
    """A stream that refuses to be read past `limit` bytes, so that no archive can expand without end."""

    def __init__(self, stream: BinaryIO, limit: int) -> None:
        self.stream, self.limit, self.left = stream, limit, limit

    def read(self, size: int) -> bytes:
        data = self.stream.read(min(size, self.left + 1))
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it expands to more than {self.limit:,} bytes")
        return data


def _extract(archive: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Extract the six files into `folder`, which appears at once, complete and with its record, or not at all."""
    say(f"extracting {archive.name} into {folder}")
    partial = folder.with_name(f"{FOLDER}.part")
    partial.mkdir()
    try:
        record = {"archive": ARCHIVE_SHA256, "files": _extract_files(archive, partial)}
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if os.path.lexists(folder):
            names = (folder.with_name(f"{FOLDER}.rejected-{i}") for i in itertools.count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            folder.rename(aside)
            say(f"{folder} was not the official data; it is now {aside}")
        partial.rename(folder)
    except ARCHIVE_ERRORS as error:
        raise DownloadError(f"{archive}: refused: {_reason(error)}; remove it and run again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _extract_files(archive: Path, partial: Path) -> dict[str, str]:
    """Write the six .bin files to `partial`; their sha256. Nothing in the archive chooses a path, type or mode.

    Raises ValueError naming the first member that the official archive does not have.
    """
    kinds = {FOLDER: "folder"} | {f"{FOLDER}/{name}": "file" for name in (*FILES, *OTHER_MEMBERS)}
    hashes = {}
    with (
        gzip.open(archive) as stream,
        tarfile.open(fileobj=_Bounded(stream, len(FILES) * FILE_BYTES + OTHER_BYTES), mode="r|") as tar,
    ):
        for member in tar:
            path = member.name.removeprefix("./")
            regular = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
            kind = "folder" if member.isdir() else "file" if regular else "special file or link"
            if kinds.pop(path, "not a member, or there twice") != kind:
                raise ValueError(f"unexpected {kind} {path[:80]!r}")
            name = path.removeprefix(f"{FOLDER}/")
            if name in FILES:
                if member.size != FILE_BYTES:
                    raise ValueError(f"{name}: expected {FILE_BYTES:,} bytes, got {member.size:,}")
                with (partial / name).open("xb") as out:
                    shutil.copyfileobj(tar.extractfile(member), out, CHUNK_BYTES)
                hashes[name] = _sha256(partial / name)
    missing = [name for name in FILES if name not in hashes]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    return hashes


def _is_official(archive: Path) -> bool:
    return archive.is_file() and archive.stat().st_size == ARCHIVE_BYTES and _sha256(archive) == ARCHIVE_SHA256


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc.rpartition("@")[2] or url
    except ValueError:
        return url


def _reason(error: BaseException) -> str:
    """One line for an exception, without urllib's wrapping."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return _reason(error.reason)
    text = " ".join(str(error).split())
    return text if text and not isinstance(error, KeyError) else f"{type(error).__name__} {text}".rstrip()
