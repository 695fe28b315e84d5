"""CIFAR-10 as tensors: from a folder of the official binary files, from a download, or generated.

A file is 10,000 records, each a label byte and 3,072 pixel bytes: three planes, red, green, blue, of 32 rows of
32 (https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version"). The planes are interleaved once, here: images
are NHWC from this door on. The Python version of the data is pickles and is never read.
"""

import functools
import hashlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model.data import archive
from model.data import download as mirrors
from model.data import synthetic as shapes
from model.errors import DataError

MEAN = (125.31, 122.95, 113.87)
"""Mean of each channel over the official training images, in units of 0 to 255 (the article's values)."""

STD = (62.99, 62.09, 66.70)
"""Standard deviation of each channel over the official training images, in units of 0 to 255 (the article's)."""

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Names of the labels 0 to 9, in the order of the archive's batches.meta.txt."""

RECORD_BYTES = 1 + 3 * 32 * 32
REMEDY = "fetch the official files with --download, or name another folder with --data-dir"


class _AbsentError(DataError):
    """There is nothing of the data set in the folder, so there is nothing wrong with it either."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images uint8 [N, 32, 32, 3] (NHWC, contiguous) and labels int64 [N], on the CPU.

    identity  "official" (the six files of the archive, by their hashes), "copy" (any other valid folder) or "synthetic"
    source    the folder, or how the images were generated: one line for people
    reason    why synthetic images are used although nobody asked for them; None otherwise
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    identity: str
    source: str
    reason: str | None = None

    @functools.cache  # noqa: B019 (one data set lives as long as the process)
    def fingerprint(self) -> str:
        """sha256 of all images and labels: what a run must find again to be resumed."""
        digest = hashlib.sha256()
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(tensor.numpy())
        return digest.hexdigest()


def load(
    data_dir: Path | None = None,
    *,
    download: bool = False,
    synthetic: bool = False,
    default_dir: Path = Path("data"),
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None,
) -> Dataset:
    """The data set from `data_dir`, which is the folder of the six .bin files or its parent.

    With `download` the official archive is fetched into `data_dir` first, unless it holds valid data already;
    without, `data_dir` is only read. Raises DataError if it does not hold CIFAR-10, DownloadError (a DataError) if
    the download fails.

    Without `data_dir`: `default_dir`, else a download into it, else synthetic images with the reason; raises
    nothing. With `synthetic`: generated images, and nothing else is looked at.

    say(line) is told what happens, progress(done_bytes, total_bytes) follows a download.
    """
    if synthetic:
        return _synthetic(None)
    folder = default_dir if data_dir is None else data_dir
    if data_dir is not None and not download:
        return _read(folder)
    reasons = []
    try:
        return _read(folder)
    except _AbsentError:
        pass
    except DataError as error:
        reasons.append(str(error))
        say(reasons[0])
    try:
        mirrors.fetch(folder, say=say, progress=progress)
        return _read(folder)
    except DataError as error:
        if data_dir is not None:
            raise
        reasons.append(str(error))
    return _synthetic("; ".join(reasons))


def _synthetic(reason: str | None) -> Dataset:
    tensors = [torch.from_numpy(array) for array in shapes.generate()]
    source = f"generated: {len(tensors[0]):,} training and {len(tensors[2]):,} test images of ten shapes"
    return Dataset(*tensors, identity="synthetic", source=source, reason=reason)


def _read(data_dir: Path) -> Dataset:
    """The data set in `data_dir` or in its folder cifar-10-batches-bin. Raises DataError, _AbsentError among them."""
    try:
        folder = _locate(data_dir)
        for name in archive.FILES:
            _check_size(folder / name)
        return _read_files(folder)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{error.filename or data_dir}: expected to read it, got: {reason}; {REMEDY}") from error


def _locate(data_dir: Path) -> Path:
    where = f"{', '.join(archive.FILES)} in it or in its folder {archive.FOLDER}"
    try:
        names = set(os.listdir(data_dir))
    except FileNotFoundError:
        raise _AbsentError(f"{data_dir}: expected a folder with {where}, got nothing of that name; {REMEDY}") from None
    except NotADirectoryError:
        raise DataError(f"{data_dir}: expected a folder with {where}, got a file; {REMEDY}") from None
    if archive.FOLDER in names:
        return data_dir / archive.FOLDER
    if names.intersection(archive.FILES):
        return data_dir
    if archive.NAME in names:
        got, remedy = f"the archive {archive.NAME}", "add --download to check and unpack it"
    elif names.intersection(("cifar-10-batches-py", "cifar-10-python.tar.gz", "data_batch_1")):
        got, remedy = "the Python version, which is pickles and is never read", REMEDY
    else:
        got, remedy = f"{len(names)} other files and folders", REMEDY
    raise _AbsentError(f"{data_dir}: expected {where}, got {got}; {remedy}")


def _check_size(path: Path) -> None:
    expected = f"{path}: expected a file of {archive.FILE_BYTES:,} bytes"
    try:
        status = path.stat()
    except FileNotFoundError:
        raise DataError(f"{expected}, got no such file; {REMEDY}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, pipe or socket"
        raise DataError(f"{expected}, got {kind}; {REMEDY}")
    if status.st_size != archive.FILE_BYTES:
        raise DataError(f"{expected}, got {status.st_size:,}; {REMEDY}")


def _read_files(folder: Path) -> Dataset:
    """Read and check the contents, with one file in memory besides the tensors."""
    records = archive.FILE_BYTES // RECORD_BYTES
    images = torch.empty(len(archive.FILES) * records, 32, 32, 3, dtype=torch.uint8)
    labels = torch.empty(len(images), dtype=torch.int64)
    buffer = np.empty((records, RECORD_BYTES), np.uint8)
    official = {sha1: name for name, sha1 in archive.BLOBS.items()}
    names = {}  # by hash
    for index, name in enumerate(archive.FILES):
        path, here = folder / name, slice(index * records, (index + 1) * records)
        with path.open("rb") as file:
            got = file.readinto(buffer)
        if got != archive.FILE_BYTES:
            raise DataError(f"{path}: expected {archive.FILE_BYTES:,} bytes, got {got:,}: it is being changed")
        sha1 = archive.blob_sha1(buffer)
        if sha1 in names:
            raise DataError(f"{path}: expected other images than in {names[sha1]}, got the same bytes; {REMEDY}")
        names[sha1] = name
        wrong = np.flatnonzero(buffer[:, 0] > 9)
        if len(wrong):
            label = buffer[wrong[0], 0]
            raise DataError(f"{path}: expected labels 0 to 9, got {label} in record {wrong[0]:,}; {REMEDY}")
        planes = torch.from_numpy(buffer)[:, 1:].unflatten(1, (3, 32, 32))
        images[here].copy_(planes.permute(0, 2, 3, 1))
        labels[here].copy_(torch.from_numpy(buffer[:, 0]))
    changed = [name for sha1, name in names.items() if official.get(sha1) != name]
    if changed and official.keys() & names.keys():
        raise DataError(
            f"{folder / changed[0]}: expected the official file of that name, as others in {folder} are official, got "
            f"other content: changed since; remove {folder} and download again with --download"
        )
    train = slice(0, (len(archive.FILES) - 1) * records)
    test = slice(train.stop, None)
    _check_balance(labels[train], f"{folder / archive.FILES[0]} to {archive.FILES[-2]}")
    _check_balance(labels[test], f"{folder / archive.FILES[-1]}")
    identity = "copy" if changed else "official"
    return Dataset(images[train], labels[train], images[test], labels[test], identity=identity, source=str(folder))


def _check_balance(labels: Tensor, where: str) -> None:
    expected = len(labels) // len(CLASSES)
    for label, got in enumerate(torch.bincount(labels, minlength=len(CLASSES)).tolist()):
        if got != expected:
            raise DataError(
                f"{where}: expected {expected:,} images of each class, got {got:,} of class {label} "
                f"({CLASSES[label]}); {REMEDY}"
            )
