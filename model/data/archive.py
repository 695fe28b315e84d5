"""The official binary archive of CIFAR-10, the files in it, and how these come out of it.

Only the archive whose sha256 is written below is ever unpacked, and even of that nothing but six files of a known size.
"""

import gzip
import hashlib
import itertools
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from model.files import read_regular

NAME = "cifar-10-binary.tar.gz"  # https://www.cs.toronto.edu/~kriz/cifar.html
BYTES = 170_052_171
SHA256 = "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
FOLDER = "cifar-10-batches-bin"
BLOBS = {
    "data_batch_1.bin": "da09f891072747be90e69e4f00ba7cba870dc87e",
    "data_batch_2.bin": "7e958840b7a55df3353574298ebc9ca0e4bba48e",
    "data_batch_3.bin": "5259a3e9674ffdf2d5c33a1067f7192ff06c9e2f",
    "data_batch_4.bin": "301e7d16d78428f13262e87a5bc78ed45b8224aa",
    "data_batch_5.bin": "51fe428dfbdd065852912743ae8b7b63bb1e9d8d",
    "test_batch.bin": "e3f3b4653f18f27ada1558cabc3352a3ed1b25cc",
}
"""The official files and their hashes, see `blob_sha1`.

Two repositories of different people hold the files under these very hashes, which `git ls-tree` shows:
github.com/JanHalozan/ConvolutionalNeuralNetwork, fixture/cifar-10-batches-bin, and
github.com/NTU-ALComLab/IWLS2021, data/raw_bin.
"""
FILES = tuple(BLOBS)
FILE_BYTES = 30_730_000  # 10,000 records of one label byte and 3,072 pixel bytes
OTHER_MEMBERS = ("batches.meta.txt", "readme.html")  # in the archive too; not needed, not extracted
OTHER_BYTES = 1 << 20  # more than those two and the tar format itself take

ERRORS = (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, RecursionError)
"""Errors of an archive that is not the official one."""


def is_archive(archive: Path) -> bool:
    """Whether `archive` is the official one."""
    return archive.is_file() and archive.stat().st_size == BYTES and sha256(archive) == SHA256


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_official(folder: Path) -> bool:
    """Whether `folder` holds the six official files, as they are in the archive."""
    try:
        return all(blob_sha1(read_regular(folder / name, FILE_BYTES)) == sha1 for name, sha1 in BLOBS.items())
    except OSError:
        return False


def blob_sha1(data: bytes | memoryview) -> str:
    """The hash that git knows a file of this content by: SHA-1 of "blob", its length and itself.

    Somebody who chooses two contents can give them one SHA-1; nobody can make a second content for these older ones'.
    """
    digest = hashlib.sha1(b"blob %d\0" % memoryview(data).nbytes, usedforsecurity=False)
    digest.update(data)
    return digest.hexdigest()


def extract(archive: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Extract the six files into `folder`, which appears at once and complete, or not at all.

    Whatever has its name is renamed, never deleted. say(line) is told what happens. Raises one of ERRORS for an archive
    that is not the official one, and OSError.
    """
    say(f"extracting {archive.name} into {folder}")
    partial = folder.with_name(f"{FOLDER}.part")
    partial.mkdir()
    try:
        _extract_files(archive, partial)
        if os.path.lexists(folder):
            names = (folder.with_name(f"{FOLDER}.rejected-{i}") for i in itertools.count(1))
            aside = next(name for name in names if not os.path.lexists(name))
            folder.rename(aside)
            say(f"{folder} was not the official data; it is now {aside}")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _extract_files(archive: Path, partial: Path) -> None:
    """Write the six .bin files to `partial`. Nothing in the archive chooses a path, type or mode.

    Raises ValueError naming the first member that the official archive does not have.
    """
    kinds = {FOLDER: "folder"} | {f"{FOLDER}/{name}": "file" for name in (*FILES, *OTHER_MEMBERS)}
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
                    shutil.copyfileobj(tar.extractfile(member), out, 1 << 18)
    missing = [name for name in FILES if f"{FOLDER}/{name}" in kinds]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")


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
