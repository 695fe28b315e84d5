"""Loading a folder: what is accepted, what is refused and with which words, and what happens without one."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from model.data import archive, cifar10, download
from model.errors import DataError

RECORDS = 50  # in a file, instead of 10,000


@pytest.fixture(autouse=True)
def small_and_offline(monkeypatch):
    monkeypatch.setattr(archive, "FILE_BYTES", RECORDS * cifar10.RECORD_BYTES)
    monkeypatch.setenv("CIFAR10_MIRRORS", "off")


@pytest.fixture
def arrays():
    """Records of each of the six files, uint8 [50, 3073]."""
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (6, RECORDS, cifar10.RECORD_BYTES), np.uint8)
    arrays[:, :, 0] = np.arange(RECORDS) % 10
    return arrays


@pytest.fixture
def folder(tmp_path, arrays):
    folder = tmp_path / "images" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    for name, records in zip(archive.FILES, arrays, strict=True):
        (folder / name).write_bytes(records.tobytes())
    return folder


@pytest.fixture
def official(folder, monkeypatch):
    """A folder whose six files are the official ones of these tests."""
    blobs = {name: archive.blob_sha1((folder / name).read_bytes()) for name in archive.FILES}
    monkeypatch.setattr(archive, "BLOBS", blobs)
    return folder


def test_layout_of_the_official_files():
    assert cifar10.RECORD_BYTES * 10_000 == 30_730_000
    assert len(archive.FILES) == len(set(archive.BLOBS.values())) == 6
    assert (
        archive.blob_sha1(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    )  # echo hello | git hash-object --stdin


@pytest.mark.parametrize("parent", [False, True], ids=["the_folder", "its_parent"])
def test_images_are_nhwc_and_labels_int64(folder, arrays, parent):
    dataset = cifar10.load(folder.parent if parent else folder)
    assert (dataset.identity, dataset.source, dataset.reason) == ("copy", str(folder), None)
    planes = arrays[:, :, 1:].reshape(6, RECORDS, 3, 32, 32)
    for images, labels, files in [
        (dataset.train_images, dataset.train_labels, slice(0, 5)),
        (dataset.test_images, dataset.test_labels, slice(5, 6)),
    ]:
        expected = planes[files].reshape(-1, 3, 32, 32)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        assert labels.dtype == torch.int64
        assert images.shape == (len(expected), 32, 32, 3)
        for channel in range(3):
            assert np.array_equal(images[..., channel].numpy(), expected[:, channel])
        assert np.array_equal(labels.numpy(), arrays[files, :, 0].reshape(-1))


def test_symbolic_links_are_followed(folder, tmp_path):
    (tmp_path / "linked").mkdir()
    for name in archive.FILES:
        (tmp_path / "linked" / name).symlink_to(folder / name)
    assert cifar10.load(tmp_path / "linked").identity == "copy"


def edit(change):
    """`change(content)` is the file's, or alters it."""

    def inject(path: Path) -> None:
        content = bytearray(path.read_bytes())
        path.write_bytes(change(content) or content)

    return inject


def set_byte(index: int, value: int):
    return edit(lambda content: content.__setitem__(index, value))


def instead(make):
    return lambda path: (path.unlink(), make(path))


def copy_of_2(path: Path) -> None:
    shutil.copy(path.with_name("data_batch_2.bin"), path)


swap_labels = set_byte(3 * cifar10.RECORD_BYTES, 4)
FAULTS = {  # name: file, what happens to it, words of the message besides the file's name
    "missing": ("test_batch.bin", Path.unlink, ["expected a file of 153,650 bytes", "no such file"]),
    "empty": ("data_batch_1.bin", edit(lambda content: content.clear()), ["153,650", "got 0;"]),
    "one_byte_short": ("data_batch_2.bin", edit(lambda content: content[:-1]), ["153,650", "got 153,649"]),
    "extra_bytes": ("data_batch_3.bin", edit(lambda content: content + b"xy"), ["153,650", "got 153,652"]),
    "a_folder": ("data_batch_4.bin", instead(Path.mkdir), ["expected a file", "got a folder"]),
    "a_pipe": ("data_batch_4.bin", instead(os.mkfifo), ["expected a file", "pipe"]),
    "label_10": ("data_batch_5.bin", set_byte(7 * cifar10.RECORD_BYTES, 10), ["labels 0 to 9, got 10 in record 7"]),
    "a_batch_twice": ("data_batch_4.bin", copy_of_2, ["same bytes", "data_batch_2.bin"]),
    "test_images_as_training": ("test_batch.bin", copy_of_2, ["same bytes", "data_batch_2.bin"]),
    "training_class_counts": ("data_batch_1.bin", swap_labels, ["expected 25 images", "got 24 of class 3 (cat)"]),
    "test_class_counts": ("test_batch.bin", swap_labels, ["expected 5 images", "got 4 of class 3 (cat)"]),
}


@pytest.mark.parametrize(("name", "inject", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_wrong_content_is_named(folder, name, inject, words):
    inject(folder / name)
    before = sorted(os.listdir(folder)), sorted(os.listdir(folder.parent))
    with pytest.raises(DataError) as caught:
        cifar10.load(folder.parent)
    message = str(caught.value)
    for word in [str(folder / name), "--download", *words]:
        assert word in message
    assert "\n" not in message
    assert caught.value.exit_code == 3
    assert before == (sorted(os.listdir(folder)), sorted(os.listdir(folder.parent)))  # only read


def test_a_file_cut_short_between_check_and_read(folder, monkeypatch):
    monkeypatch.setattr(cifar10, "_check_size", lambda path: None)
    edit(lambda content: content[:-1])(folder / archive.FILES[2])
    with pytest.raises(DataError, match=r"data_batch_3\.bin: expected 153,650 bytes, got 153,649"):
        cifar10.load(folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda path: None, ["nothing of that name"], id="absent"),
        pytest.param(Path.mkdir, ["got 0 other files"], id="empty"),
        pytest.param(Path.touch, ["got a file"], id="a_file"),
        pytest.param(lambda path: (path / "cifar-10-batches-py").mkdir(parents=True), ["Python version"], id="pickles"),
        pytest.param(
            lambda path: (path.mkdir(), (path / archive.NAME).touch()),
            ["add --download"],
            id="archive_not_unpacked",
        ),
        pytest.param(
            lambda path: (path.mkdir(), (path / archive.FOLDER).touch()),
            ["Not a directory"],
            id="file_as_inner_folder",
        ),
    ],
)
def test_a_named_folder_never_falls_back(tmp_path, make, words):
    make(tmp_path / "named")
    with pytest.raises(DataError) as caught:
        cifar10.load(tmp_path / "named")
    assert all(word in str(caught.value) for word in [str(tmp_path / "named"), *words])


def test_official_are_the_files_with_the_known_hashes(official):
    assert cifar10.load(official).identity == "official"


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text(json.dumps({"archive": archive.SHA256, "files": dict(archive.BLOBS)})),
        lambda path: path.write_text("[" * 200_000),
        os.mkfifo,
    ],
    ids=["claims_to_be_official", "nested", "pipe"],
)
def test_no_record_makes_files_official(folder, write):
    write(folder / "sha256.json")
    assert cifar10.load(folder).identity == "copy"


@pytest.mark.parametrize(
    "inject",
    [
        lambda folder: set_byte(100, 0)(folder / "data_batch_3.bin"),
        lambda folder: [swap_labels(folder / name) for name in archive.FILES[2:]],
        lambda folder: (
            (folder / "data_batch_4.bin").rename(folder / "x")
            and (folder / "data_batch_3.bin").rename(folder / "data_batch_4.bin")
            and (folder / "x").rename(folder / "data_batch_3.bin")
        ),
    ],
    ids=["one_pixel", "all_but_two_files", "two_files_changed_places"],
)
def test_official_files_beside_others_are_an_error(official, inject):
    inject(official)
    with pytest.raises(DataError, match=r"data_batch_3\.bin: expected the official file .* changed since; remove"):
        cifar10.load(official)


@pytest.fixture
def few_shapes(monkeypatch):
    generate = cifar10.shapes.generate
    monkeypatch.setattr(cifar10.shapes, "generate", lambda: generate(20, 10))


def test_present_images_are_not_downloaded(folder, few_shapes, monkeypatch):
    monkeypatch.setattr(download, "fetch", None)
    for given in ({"default_dir": folder.parent}, {"data_dir": folder.parent, "download": True}):
        dataset = cifar10.load(**given)
        assert (dataset.identity, dataset.reason) == ("copy", None)
    dataset = cifar10.load(synthetic=True, default_dir=folder.parent)
    assert (dataset.identity, dataset.reason) == ("synthetic", None)
    assert dataset.train_images.shape == (20, 32, 32, 3)
    assert dataset.train_images.dtype == torch.uint8
    assert dataset.test_labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda path: None, ["not an http or https address", "Offline"], id="no_network"),
        pytest.param(Path.touch, ["got a file", "cannot be stored"], id="a_file_in_its_place"),
        pytest.param(lambda path: path.parent.rmdir() or path.parent.touch(), ["cannot be stored"], id="unwritable"),
        pytest.param(
            lambda path: (path / archive.FOLDER).mkdir(parents=True), ["no such file", "Offline"], id="wrong_content"
        ),
    ],
)
def test_without_any_data_synthetic_images_with_the_reason(tmp_path, few_shapes, monkeypatch, make, words):
    monkeypatch.delenv("HOME", raising=False)
    (tmp_path / "home").mkdir()
    make(tmp_path / "home" / "data")
    said = []
    dataset = cifar10.load(default_dir=tmp_path / "home" / "data", say=said.append)
    assert dataset.identity == "synthetic"
    assert all(word in dataset.reason for word in words)
    assert "\n" not in dataset.reason
    if "no such file" in words:
        assert "no such file" in said[0]


def test_download_into_the_default_folder(tmp_path, official, monkeypatch):
    def fetch(data_dir, *, say, progress):
        shutil.copytree(official, data_dir / archive.FOLDER)

    monkeypatch.setattr(download, "fetch", fetch)
    assert cifar10.load(default_dir=tmp_path / "data").identity == "official"


def test_failed_download_into_a_named_folder_is_an_error(tmp_path):
    with pytest.raises(download.DownloadError) as caught:
        cifar10.load(tmp_path / "named", download=True)
    assert caught.value.exit_code == 3


@pytest.mark.skipif("CIFAR10_DIR" not in os.environ, reason="needs real images: set CIFAR10_DIR")
def test_real_images_have_the_articles_statistics(monkeypatch):
    monkeypatch.setattr(archive, "FILE_BYTES", 30_730_000)
    dataset = cifar10.load(Path(os.environ["CIFAR10_DIR"]))
    assert len(dataset.train_images) == 50_000
    assert len(dataset.test_images) == 10_000
    pixels = dataset.train_images[::10].reshape(-1, 3).double()
    assert pixels.mean(0).tolist() == pytest.approx(cifar10.MEAN, abs=1.5)
    assert pixels.std(0).tolist() == pytest.approx(cifar10.STD, abs=1.5)
