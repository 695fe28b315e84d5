"""Archives placed by hand, and hostile ones."""

import gzip
import hashlib
import tarfile
from pathlib import Path

import pytest
from small_archive import (
    BODY,
    CONTENTS,
    FILE_BYTES,
    Heard,
    assert_complete,
    assert_nothing_usable,
    make_archive,
    member,
)

from model.data import archive
from model.data.archive import FILES, FOLDER, NAME, OTHER_MEMBERS
from model.data.download import DownloadError

pytestmark = pytest.mark.usefixtures("small_archive")


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_an_archive_placed_by_hand_is_used_and_kept(tmp_path, monkeypatch):
    """An interrupted extraction leaves nothing; a folder with other content is kept aside."""
    (tmp_path / NAME).write_bytes(BODY)
    with monkeypatch.context() as patch:
        patch.setattr(archive.shutil, "copyfileobj", interrupt)
        with pytest.raises(KeyboardInterrupt):
            Heard().fetch(tmp_path)
    assert_nothing_usable(tmp_path)
    Heard().fetch(tmp_path)
    (tmp_path / FOLDER / FILES[0]).write_bytes(b"mine")
    heard = Heard()
    heard.fetch(tmp_path)
    aside = tmp_path / f"{FOLDER}.rejected-1"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == CONTENTS | {FILES[0]: b"mine"}
    assert any("rejected-1" in line for line in heard)
    assert (tmp_path / NAME).read_bytes() == BODY
    (tmp_path / NAME).unlink()
    aside.rename(tmp_path.parent / f"{tmp_path.name}-aside")
    assert_complete(tmp_path)


@pytest.mark.parametrize("body", [BODY[:-1], BODY[:-1] + b"?"], ids=["cut_short", "same_length"])
def test_a_wrong_archive_placed_by_hand_is_named(tmp_path, body):
    (tmp_path / NAME).write_bytes(body)
    heard = Heard()
    with pytest.raises(DownloadError, match="not the official archive"):
        heard.fetch(tmp_path)
    assert any("not the official archive" in line for line in heard)
    assert (tmp_path / NAME).exists()


TEST, ZEROS = f"{FOLDER}/test_batch.bin", bytes(3 << 20)


def instead_of_the_last(made: tarfile.TarInfo, data: bytes = b"") -> bytes:
    return make_archive((made, data), without=FILES[5:])


HOSTILE = {
    "parent_folder": make_archive((member("../outside", size=1), b"x")),
    "parent_folder_below_ours": make_archive((member(f"{FOLDER}/../../outside", size=1), b"x")),
    "absolute": make_archive((member("/tmp/outside", size=1), b"x")),
    "unknown_file": make_archive((member(f"{FOLDER}/data_batch_6.bin", size=1), b"x")),
    "symlink": instead_of_the_last(member(TEST, tarfile.SYMTYPE, "/etc/passwd")),
    "symlinked_folder": gzip.compress(member(FOLDER, tarfile.SYMTYPE, "/tmp").tobuf() + bytes(1024)),
    "hardlink": instead_of_the_last(member(TEST, tarfile.LNKTYPE, f"{FOLDER}/{FILES[0]}")),
    "device": instead_of_the_last(member(TEST, tarfile.CHRTYPE, devmajor=1, devminor=5)),
    "fifo": instead_of_the_last(member(TEST, tarfile.FIFOTYPE)),
    "sparse": instead_of_the_last(
        member(
            TEST,
            size=FILE_BYTES,
            pax_headers={"GNU.sparse.size": f"{FILE_BYTES}", "GNU.sparse.map": f"0,{FILE_BYTES}"},
        ),
        bytes(FILE_BYTES),
    ),
    "twice": make_archive((member(f"{FOLDER}/{FILES[0]}", size=FILE_BYTES), bytes(FILE_BYTES))),
    "file_too_long": instead_of_the_last(member(TEST, size=FILE_BYTES + 1), bytes(FILE_BYTES + 1)),
    "file_missing": make_archive(without=FILES[5:]),
    "bomb_in_a_file_we_skip": make_archive(
        (member(f"{FOLDER}/{OTHER_MEMBERS[0]}", size=len(ZEROS)), ZEROS), without=OTHER_MEMBERS
    ),
    "bomb_in_a_header": make_archive((member(FOLDER, pax_headers={"comment": "0" * len(ZEROS)}), b"")),
    "a_hundred_thousand_members": gzip.compress(
        member(f"{FOLDER}/x", tarfile.DIRTYPE).tobuf() * 100_000 + bytes(1024), 1
    ),
    "a_thousand_headers_of_nothing": gzip.compress(member("x", tarfile.XGLTYPE).tobuf() * 2_000 + bytes(1024), 1),
    "cut_short": BODY[: len(BODY) // 2],
    "bytes_changed": BODY[:90_000] + bytes(100) + BODY[90_100:],
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
    (data_dir / NAME).write_bytes(body)
    with pytest.raises(DownloadError, match=r": refused: [^\n]{1,900}\Z"):
        Heard().fetch(data_dir)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {NAME, f"{NAME}.lock"}
    assert_nothing_usable(data_dir)
    assert not Path("/tmp/outside").exists()
