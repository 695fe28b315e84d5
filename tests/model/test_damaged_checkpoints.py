"""Checkpoints that are damaged, hostile, or of no run that can have been (faults 2 and 3 of training)."""

import hashlib
import json
import os
import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from checkpoint_files import STATE, after, assert_loads, tensors_at, write

from model import checkpoint
from model.checkpoint import load, newest, save
from model.errors import CheckpointError

JSON, TENSORS = ".json", ".safetensors"


class Payload:
    """Unpickling it creates the file "executed" beside `path`."""

    def __init__(self, path: Path) -> None:
        self.target = path.with_name("executed")

    def __reduce__(self):
        return open, (str(self.target), "w")


def torch_zip(path: Path) -> None:
    torch.save({"state_dict": Payload(path)}, path)


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(path), protocol=4))


def flipped(offset: int | bytes, mask: int):
    """The bits of `mask` change in the byte at `offset`, or 13 bytes after the first place of these bytes."""

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[offset if isinstance(offset, int) else data.index(offset) + 13] ^= mask
        path.write_bytes(data)

    return flip


def cut(count: int):
    """The file keeps `count` bytes, or loses as many at its end."""
    return lambda path: path.write_bytes(path.read_bytes()[:count])


def instead(make):
    return lambda path: (path.unlink(), make(path))


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 << 30)


def text(written: str):
    return lambda path: path.write_text(written)


def forged(change):
    """`change` alters the content of the checkpoint's JSON, and its checksum is made right again."""

    def forge(path: Path) -> None:
        path = path.with_suffix(JSON)
        content = json.loads(path.read_text())
        del content["sha256"]
        change(content)
        path.write_text(json.dumps(content | {"sha256": checkpoint._content_sha256(content)}))

    return forge


LOST = object()


def put(where: str, value: object = LOST):
    """A forged `value` at "key.key.index" in the content, or none."""
    *outer, last = [int(key) if key.isdigit() else key for key in where.split(".")]

    def change(content):
        for key in outer:
            content = content[key]
        if value is LOST:
            del content[last]
        else:
            content[last] = value

    return forged(change)


OURS = "is not a checkpoint of this program: "
DAMAGES = [  # to which of step 25's files, what happens, and words of the message
    (TENSORS, flipped(0, 1), "is damaged: sha256 expected"),  # the length of the header
    (TENSORS, flipped(-1, 0x80), "is damaged: sha256 expected"),
    (TENSORS, cut(-1), "is damaged: sha256 expected"),
    (TENSORS, cut(0), "is damaged: sha256 expected"),
    (TENSORS, lambda path: path.write_bytes(path.read_bytes() + b"\0"), "is damaged: sha256 expected"),
    (TENSORS, torch_zip, "is a pickle or a zip archive, not a safetensors file: refused unopened"),
    (TENSORS, bare_pickle, "is a pickle or a zip archive, not a safetensors file: refused unopened"),
    (JSON, flipped(30, 0x80), "is damaged: not JSON"),
    (JSON, flipped(b"_sha256", 1), "is damaged: sha256 expected"),
    (JSON, flipped(b"batch_size", 1), "is damaged: sha256 expected"),
    (JSON, cut(0), "is damaged: not JSON"),
    (JSON, text("[" * 200_000), "is damaged: not JSON"),
    (JSON, text('{"status": "ok"}'), OURS),
    (JSON, text("[1]"), OURS),
    (JSON, text('{"format": "cifar10-checkpoint", "version": 1}'), "is damaged: sha256 expected None"),
    (JSON, text('{"format": "cifar10-checkpoint", "version": 2, "new": 1}'), "a later version than this program's 1"),
    (JSON, text('{"format": "cifar10-checkpoint", "version": NaN}'), "is damaged: Out of range"),
    (JSON, lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": "\x1b[2J" * 500_000})),
     "is damaged: sha256 expected"),
    *((suffix, damage, words) for suffix in (JSON, TENSORS) for damage, words in (
        (Path.unlink, "is missing"),
        (instead(Path.mkdir), "holds no valid checkpoint"),
        (instead(os.mkfifo), "cannot be read: a pipe"),
        (instead(lambda path: path.symlink_to("/dev/zero")), "cannot be read: a"),
        (instead(lambda path: path.symlink_to("nothing")), "is missing"),
        (instead(sparse), "cannot be read: 10,737,418,240"),
    )),
    # A state after 2 epochs of 10 steps, changed, with right checksums
    (TENSORS, put("tensors_sha256"), "is damaged: sha256 expected None"),
    (JSON, put("state"), OURS + "state is not a record"),
    (JSON, put("step"), OURS + "step is not a whole number"),
    (JSON, put("state.more", 1), "unknown 'more'"),
    *((JSON, put(f"state.{key}"), f"state lacks {key}")
      for key in ("config", "data", "world_size", "history", "seconds")),
    *((JSON, put(f"state.{key}", value), f"{key} is not a record")
      for key in ("config", "seconds") for value in ([], None, "words")),
    (JSON, put("state.config.momentum"), "config lacks momentum"),
    (JSON, put("state.config.colour", 1), "config has an unknown 'colour'"),
    *((JSON, put("state.config.epochs", value), "epochs is not a whole number") for value in ("words", True, 1e9)),
    (JSON, put("state.config.epochs", 10**30), "epochs=1000000000000000000000000000000 is too large"),
    (JSON, put("state.config.widths", "words"), "widths is not a list of a whole number"),
    (JSON, put("state.config.widths", [8, 8, 8, 10**9 * 8]), "up to 65536"),
    (JSON, put("state.config.momentum", "words"), "momentum is not a number"),
    (JSON, put("state.config.lr_epochs", [0, 10**400]), "lr_epochs is not a list of a number"),
    (JSON, put("state.config.flip", "sideways"), "flip='sideways'"),
    *((JSON, put("state.config.preset", value), "preset is not a short text") for value in ("\x1b[2J", "x" * 101)),
    *((JSON, put("state.data", value), "data is not a sha256") for value in (None, "\x1b" * 64)),
    *((JSON, put("state.world_size", value), "world_size is") for value in (0, True, 1.5, "1", None)),
    *((JSON, put("state.history", value), "history is not a list") for value in ("words", None, {})),
    *((JSON, put("state.history", [row]), "row 1 of history is not a record") for row in (1, None, "words", [])),
    (JSON, put("state.history", [{}]), "row 1 of history lacks epoch"),
    (JSON, put("state.history.0.train_loss", "words"), "train_loss in row 1 of history"),
    (JSON, put("state.history.1.test_accuracy", 1.01), "test_accuracy in row 2 of history"),
    *((JSON, put("state.history.1.train_s", value), "train_s in row 2 of history") for value in (-1, 10**400)),
    *((JSON, put(f"state.history.{where}", value), "history does not have every epoch")
      for where, value in (("0.step", 0), ("1.step", 19), ("1.epoch", 3))),
    *((JSON, put("state.history", after(epochs).history), words) for epochs, words in (
        (1, "step 25 contradicts its"),
        (35, "step 25 contradicts its history of 35 epochs"),
        (36, "of 36 epochs of 10 steps, in a run of 35"),
    )),
    (JSON, put("state.seconds.training"), "seconds lacks training"),
    (JSON, put("state.seconds.training", "words"), "seconds.training is not a number"),
    *((JSON, put("step", value), "step is not a whole number") for value in (-5, True, None, "25", 25.0, 10**30)),
    (JSON, put("step", 1_000_000), "step 1,000,000 contradicts its history"),
    (JSON, put("step", 31), "step 31 contradicts its history"),
    (JSON, put("step", 26), "has been renamed: expected checkpoint-00000026.json"),
]  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and devices")
@pytest.mark.parametrize(("suffix", "damage", "words"), DAMAGES)
def test_damage_is_named_and_the_older_checkpoint_taken(tmp_path, suffix, damage, words):
    """Either file names the pair; whichever is given, the message names the damaged one."""
    for epochs, step in ((1, 15), (2, 25)):
        save(tmp_path, step, tensors_at(step), after(epochs))
    path = tmp_path / f"checkpoint-00000025{suffix}"
    damage(path)
    for given in (JSON, TENSORS):
        with pytest.raises(CheckpointError) as error:
            load(path.with_suffix(given))
        assert str(error.value).startswith(f"{path} ")
        assert words in str(error.value) or given != suffix
        assert re.fullmatch("[ -~é]{1,1000}", str(error.value).replace(str(tmp_path), "")), "one line, nothing but text"
        assert error.value.exit_code == 8
    warned: list[str] = []
    assert newest(tmp_path, warned.append).step == 15
    assert [str(path) in line for line in warned] == [True]
    with pytest.warns(UserWarning, match=re.escape(str(path))):
        assert load(tmp_path).step == 15
    assert not (tmp_path / "executed").exists()
    assert load(save(tmp_path, 35, {}, after(3))).step == 35
    if not path.is_dir():
        assert load(save(tmp_path, 25, tensors_at(25), after(2))).step == 25


def test_damaged_tensors_report_both_checksums(tmp_path):
    path = write(tmp_path, 200) / "checkpoint-00000200.safetensors"
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    flipped(-1, 1)(path)
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match=f"sha256 expected {expected}, got {got}"):
        load(path)


def test_no_flipped_bit_of_the_json_changes_what_is_loaded(tmp_path):
    path = write(tmp_path, 200) / "checkpoint-00000200.json"
    original, refused = path.read_bytes(), 0
    for offset in range(len(original)):
        flipped(offset, (0x01, 0x20, 0x80)[offset % 3])(path)  # the lowest bit, a letter's case, the highest bit
        try:
            assert_loads(path, 200)
        except CheckpointError:
            refused += 1
        path.write_bytes(original)
    assert refused >= len(original) - 2  # the case of a hexadecimal digit in an escape changes nothing


def test_nothing_valid_is_one_error_that_names_every_reason(tmp_path):
    write(tmp_path, 100, 200)
    for step in (100, 200):
        cut(9)(tmp_path / f"checkpoint-{step:08d}.safetensors")
    with pytest.raises(CheckpointError, match=r"no valid checkpoint.*00000200.*is damaged.*00000100.*is damaged"):
        load(tmp_path)
    assert newest(tmp_path, lambda line: None) is None


def test_many_damaged_checkpoints_are_counted(tmp_path):
    write(tmp_path, 200)
    for step in range(1_000, 1_050):
        (tmp_path / f"checkpoint-{step:08d}.json").touch()
    warned: list[str] = []
    assert newest(tmp_path, warned.append).step == 200
    assert ["00001049" in warned[0], "00001048" in warned[1], len(warned)] == [True, True, 4]
    assert warned[3] == "passed over 47 checkpoints more, damaged too"


@pytest.mark.parametrize("pickled", [torch_zip, bare_pickle])
def test_a_pickle_is_refused_unopened(tmp_path, monkeypatch, pickled):
    """The checksums detect damage, not malice: with all of them right, the parser is what refuses."""
    for name in ("run.pt", "run.pth", "run.pkl", "run.zip", "run"):
        pickled(tmp_path / name)
        with pytest.raises(CheckpointError, match=rf"{name} is not a checkpoint.*never opened") as error:
            load(tmp_path / name)
        assert error.value.exit_code == 8
    data = (tmp_path / "run").read_bytes()
    monkeypatch.setattr(safetensors.torch, "save", lambda tensors: data)
    save(tmp_path, 1, {}, STATE)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load(tmp_path / "checkpoint-00000001.json")
    assert newest(tmp_path, lambda line: None) is None
    assert not (tmp_path / "executed").exists()


def test_a_safetensors_file_whose_length_looks_like_a_pickle_is_read(tmp_path):
    """Its first eight bytes are the header's length, and 80 02 (640 bytes) also opens a pickle of protocol 2."""
    for length in range(560, 640, 8):  # the header is padded to a multiple of eight bytes
        path = save(tmp_path, 1, {"x" * length: torch.zeros(1)}, STATE).with_suffix(TENSORS)
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no name gave a header of 640 bytes")
    assert load(path).step == 1


@pytest.mark.parametrize("name", ["absent", "absent.json", "absent.safetensors", "absent.pt", "x" * 300 + ".json"])
def test_a_path_that_does_not_exist_exits_8(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"does not exist|is missing|cannot be read") as error:
        load(tmp_path / name)
    assert error.value.exit_code == 8


def test_folders_without_checkpoints(tmp_path):
    (tmp_path / "file").touch()
    assert newest(tmp_path, pytest.fail) is None
    assert newest(tmp_path / "absent", pytest.fail) is None
    with pytest.raises(CheckpointError, match="holds no valid checkpoint: expected checkpoint-<step>"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be listed"):
        newest(tmp_path / "file", pytest.fail)
