"""An archive like the official one but for its sizes, and what a download of it is told and leaves."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np

from model.data import archive, download
from model.data.archive import FILES, FOLDER, NAME, OTHER_MEMBERS

FILE_BYTES = 30_730
rng = np.random.default_rng(0)
CONTENTS = {name: rng.integers(0, 256, FILE_BYTES, np.uint8).tobytes() for name in FILES}


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0, **fields) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, target, size
    for field, value in fields.items():
        setattr(made, field, value)
    return made


def make_archive(*extra: tuple[tarfile.TarInfo, bytes], without: tuple[str, ...] = ()) -> bytes:
    """The archive without some of its files, followed by the members `extra` and their content."""
    raw = io.BytesIO()
    files = CONTENTS | dict.fromkeys(OTHER_MEMBERS, b"text\n")
    members = [(member(f"{FOLDER}/{n}", size=len(data)), data) for n, data in files.items() if n not in without]
    with tarfile.open(fileobj=raw, mode="w:gz", compresslevel=1) as tar:
        tar.addfile(member(FOLDER, tarfile.DIRTYPE))
        for each, data in [*members, *extra]:
            tar.addfile(each, io.BytesIO(data))
    return raw.getvalue()


BODY = make_archive()
SMALL = {
    "BYTES": len(BODY),
    "SHA256": hashlib.sha256(BODY).hexdigest(),
    "FILE_BYTES": FILE_BYTES,
    "BLOBS": {name: archive.blob_sha1(content) for name, content in CONTENTS.items()},
    "PROGRESS_BYTES": 1_000,
    "BACKOFF_S": 0.001,
    "ATTEMPTS": 3,
    "READ_TIMEOUT_S": 10.0,
}


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
    """The six files, and beside them nothing but the lock's."""
    assert archive.is_official(data_dir / FOLDER)
    assert {path.name: path.read_bytes() for path in (data_dir / FOLDER).iterdir()} == CONTENTS
    assert {path.name for path in data_dir.iterdir()} <= {FOLDER, f"{NAME}.lock"}


def assert_nothing_usable(data_dir: Path) -> None:
    assert not (data_dir / FOLDER).exists()
    assert not (data_dir / f"{FOLDER}.part").exists()
