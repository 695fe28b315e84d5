"""Checkpoints under fire: kills, damage, hostile files, full disks (faults 1 to 5 of the training program)."""

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import checkpoint, files
from model.checkpoint import clean, load, load_tensors_into, newest, save
from model.config import Config
from model.errors import CheckpointError
from model.run_state import ROW, TIMED, RunState, require_same
from profiling import ROOT

SECONDS = dict.fromkeys(TIMED, 0.1)
STATE = RunState(Config(preset="é"), "0" * 64, 1, [], SECONDS)  # of a first epoch, so at any step


def tensors_at(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    w = torch.randn(8, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return {"network.conv.weight": w, "network.bn.num_batches_tracked": torch.tensor(step)}


def assert_same_tensors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert (got[name].dtype, got[name].shape) == (want[name].dtype, want[name].shape), name
        # Compared as bytes: NaNs have payloads, and zeros have signs.
        assert bits(got[name]) == bits(want[name]), name


def bits(tensor: torch.Tensor) -> bytes:
    # Filling a fresh tensor gives row-major strides always; contiguous() keeps odd ones where there is one element.
    # numpy has no bfloat16, hence the view, and a 0-dim tensor cannot be viewed, hence the reshape.
    fresh = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return fresh.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_loads(path: Path, step: int) -> None:
    found = load(path)
    assert (found.step, found.state) == (step, STATE)
    assert_same_tensors(found.tensors, tensors_at(step))


def names(folder: Path) -> set[str]:
    return set(os.listdir(folder))


def pair(step: int) -> set[str]:
    return {f"checkpoint-{step:08d}.json", f"checkpoint-{step:08d}.safetensors"}


@pytest.fixture
def folder(tmp_path):
    """A run's folder with two checkpoints, of steps 100 and 200."""
    for step in (100, 200):
        save(tmp_path, step, tensors_at(step), STATE)
    return tmp_path


# Round trips


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=5).map(tuple),
    layout=st.sampled_from(["contiguous", "channels_last", "transposed", "strided", "expanded", "offset"]),
    seed=st.integers(0, 2**31),
)
def test_round_trip_is_exact_for_any_dtype_shape_and_strides(tmp_path, dtype, shape, layout, seed):
    size = torch.Size(shape).numel() * dtype.itemsize
    random_bytes = torch.randint(0, 2 if dtype is torch.bool else 256, (size,), dtype=torch.uint8).view(dtype)
    x = random_bytes.reshape(shape)
    if layout == "channels_last" and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    elif layout == "transposed" and x.dim():
        x = x.permute(*reversed(range(x.dim())))
    elif layout == "strided" and x.dim():
        x = x[..., ::2]
    elif layout == "expanded":
        x = x.expand(3, *x.shape)
    elif layout == "offset" and x.dim():
        x = x[1:]
    tensors = {"x": x, "alias": x, "part_of_the_same_storage": x.diagonal() if x.dim() > 1 else x[None]}
    assert_same_tensors(load(save(tmp_path, seed, tensors, STATE, keep=1)).tensors, tensors)


def after(epochs: int, steps: int = 10, **changes) -> RunState:
    """The state of a run of 35 epochs after some of them."""
    rows = [dict.fromkeys(ROW, 0.5) | {"epoch": n, "step": n * steps} for n in range(1, epochs + 1)]
    return dataclasses.replace(STATE, history=rows, **changes)


@pytest.mark.parametrize("step", [20, 25, 30])
def test_state_comes_back(tmp_path, step):
    """In an epoch, at its end, and where it was not yet evaluated."""
    state = after(2)
    state.history[1]["test_loss"] = 1e300  # of a run that blows up, which is to be told and not to be lost
    assert load(save(tmp_path, step, {}, state)).state == state
    state.require_step(step, 10)
    with pytest.raises(ValueError, match="history does not have every epoch after 11 steps more"):
        state.require_step(step, 11)


@pytest.mark.parametrize("value", [float("nan"), torch.zeros(1), None], ids=["nan", "tensor", "none"])
def test_state_that_would_not_be_read_back_is_named_and_nothing_is_written(tmp_path, value):
    with pytest.raises(ValueError, match=r"seconds\.training is not a number"):
        save(tmp_path, 1, {}, dataclasses.replace(STATE, seconds=SECONDS | {"training": value}))
    assert names(tmp_path) == set()


@pytest.mark.parametrize("arguments", [{"step": -1}, {"step": 1, "keep": 0}], ids=["negative_step", "keep_none"])
def test_arguments_that_would_lose_the_checkpoint_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match=r"step is not|at least"):
        save(tmp_path, tensors={}, state=STATE, **arguments)


def test_tensors_too_large_to_be_read_back_are_not_written(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "MOST_TENSORS_BYTES", 2_000)
    with pytest.raises(OSError, match="tensors of 4,"):
        save(folder, 300, {"w": torch.zeros(1_000)}, STATE)
    assert names(folder) == pair(100) | pair(200)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_either_file_or_the_folder_names_the_checkpoint(folder, suffix):
    assert_loads(folder / f"checkpoint-00000100{suffix}", 100)
    assert_loads(folder, 200)


def test_a_loaded_checkpoint_is_independent_of_its_file_and_writable(folder):
    found = load(folder)
    (folder / "checkpoint-00000200.safetensors").unlink()
    found.tensors["network.conv.weight"].add_(1)
    assert found.path == folder / "checkpoint-00000200.json"
    assert dataclasses.is_dataclass(found)


# What is kept


def test_only_the_two_newest_are_kept(folder):
    (folder / "config.json").write_text("{}")
    assert save(folder, 300, tensors_at(300), STATE) == folder / "checkpoint-00000300.json"
    assert names(folder) == pair(200) | pair(300) | {"config.json"}


def test_steps_are_ordered_as_numbers_past_eight_digits(folder):
    save(folder, 10**8, tensors_at(10**8), STATE, keep=3)
    assert load(folder).step == 10**8


def test_a_damaged_checkpoint_does_not_push_out_the_one_to_fall_back_on(folder):
    (folder / "checkpoint-00000200.safetensors").write_bytes(b"")
    save(folder, 150, tensors_at(150), STATE)
    assert names(folder) == pair(100) | pair(150) | pair(200)


def test_the_checkpoint_just_written_is_kept_even_if_not_the_newest(folder):
    path = save(folder, 50, tensors_at(50), STATE)
    assert names(folder) == pair(50) | pair(200)
    assert_loads(path, 50)


def test_failing_to_delete_an_old_checkpoint_does_not_fail_the_save(folder, monkeypatch):
    monkeypatch.setattr(os, "unlink", raise_error(PermissionError(errno.EACCES, "denied")))
    assert_loads(save(folder, 300, tensors_at(300), STATE), 300)


# Killed while writing (fault 1)

KILLS = {
    # id: (function to die in, its n-th call, die before or halfway through it, the step that loads afterwards)
    "opening_tensors": ("open", 1, 100),
    "half_of_tensors": ("write", 1, 100),
    "before_tensors_fsync": ("fsync", 1, 100),
    "half_of_json": ("write", 2, 100),
    "before_json_fsync": ("fsync", 2, 100),
    "before_tensors_rename": ("replace", 1, 100),
    "after_tensors_rename_before_folder_fsync": ("fsync", 3, 100),
    "after_tensors_rename_before_json_rename": ("replace", 2, 100),
    "after_json_rename_before_folder_fsync": ("fsync", 4, 200),
    "before_deleting_the_oldest": ("unlink", 1, 200),
    "halfway_deleting_the_oldest": ("unlink", 2, 200),
}

# One child imports torch and forks once per kill: it has started no thread by then. It prints each fork's end signal.
KILLER = """
import builtins, os, signal, sys
import torch
torch.set_num_threads(1)
from model import checkpoint, files
from tests.model.test_checkpoint import KILLS, STATE, tensors_at

def die_at(function, nth):
    calls = 0
    def dies(real, finish=None):
        def replacement(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == nth:
                if finish:
                    finish(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **keywords)
        return replacement
    if function == "open":
        files.open = dies(open)
    elif function == "write":
        def opened(path, mode):
            file = open(path, mode, buffering=0)
            class Halved:
                __enter__ = lambda self: self
                __exit__ = lambda self, *exception: file.close()
                flush, fileno = file.flush, file.fileno
                write = staticmethod(dies(file.write, lambda data: file.write(data[: len(data) // 2])))
            return Halved()
        files.open = opened
    else:
        setattr(os, function, dies(getattr(os, function)))

for name, (function, nth, _) in KILLS.items():
    folder = os.path.join(sys.argv[1], name)
    os.mkdir(folder)
    for step in (50, 100):
        checkpoint.save(folder, step, tensors_at(step), STATE)
    child = os.fork()
    if child == 0:
        die_at(function, nth)
        try:
            checkpoint.save(folder, 200, tensors_at(200), STATE)
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(name, os.WTERMSIG(status) if os.WIFSIGNALED(status) else "survived")
"""


def python(program: str, *arguments: object) -> str:
    """Run `program` in a fresh interpreter that can import the project and this file; returns what it printed."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


posix = pytest.mark.skipif(os.name != "posix", reason="needs fork, SIGKILL and RLIMIT_FSIZE")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(folder, name -> the signal that ended its writer), for every kill of KILLS."""
    folder = tmp_path_factory.mktemp("killed")
    return folder, dict(line.split() for line in python(KILLER, folder).splitlines())


@posix
@pytest.mark.parametrize("name", KILLS)
def test_killed_while_writing(killed, name):
    folder, signals = killed[0] / name, killed[1]
    assert signals[name] == str(int(signal.SIGKILL))
    temporaries = {file for file in names(folder) if file.startswith(".tmp-")}
    *_, step = KILLS[name]
    assert bool(temporaries) == (step == 100 and name != "opening_tensors")
    assert all(path.with_suffix(".safetensors").exists() for path in folder.glob("checkpoint-*.json"))
    assert_newest(folder, step)
    clean(folder)
    assert {file for file in names(folder) if file.startswith(".")} == set()
    assert pair(100) <= names(folder)

    save(folder, 200, tensors_at(200), STATE)
    assert names(folder) == pair(100) | pair(200)
    assert_loads(folder, 200)


def assert_newest(folder: Path, step: int) -> None:
    """The checkpoint of `step` is the newest; whatever is newer and incomplete was named."""
    warned: list[str] = []
    found = newest(folder, warned.append)
    assert found.step == step
    assert_same_tensors(found.tensors, tensors_at(step))
    incomplete = {file for file in names(folder) if file.startswith("checkpoint-00000200")} if step == 100 else set()
    assert len(warned) == bool(incomplete)
    assert all("checkpoint-00000200.json is missing" in line for line in warned)


def test_data_is_durable_before_its_rename_and_each_rename_before_the_next(folder, monkeypatch):
    order = []
    for function in ("fsync", "replace", "unlink"):
        real = getattr(os, function)
        monkeypatch.setattr(os, function, lambda *a, name=function, real=real: (order.append(name), real(*a)))
    save(folder, 300, tensors_at(300), STATE)
    assert order == ["fsync", "fsync", "replace", "fsync", "replace", "fsync", "unlink", "unlink"]


def test_saving_the_same_step_again_cannot_lose_it(folder, monkeypatch):
    """With the same tensors there is no moment between the renames at which the pair does not match."""
    replaced = []
    real = os.replace

    def replace(source, target):
        real(source, target)
        replaced.append(Path(target).name)
        assert_loads(folder / "checkpoint-00000200.json", 200)

    monkeypatch.setattr(os, "replace", replace)
    save(folder, 200, tensors_at(200), STATE)
    assert replaced == ["checkpoint-00000200.json"]
    assert names(folder) == pair(100) | pair(200)


def test_clean_leaves_everything_but_temporaries(folder):
    (folder / ".tmp-dead").write_bytes(b"half")
    (folder / ".tmp-folder").mkdir()
    (folder / ".gitignore").touch()
    clean(folder)
    assert names(folder) == pair(100) | pair(200) | {".gitignore", ".tmp-folder"}
    clean(folder / "absent")


# Damage (fault 2)


def flip(path: Path, offset: int, mask: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def keep_bytes(path: Path, count: int) -> None:
    path.write_bytes(path.read_bytes()[:count])


DAMAGE = {
    "tensors_length_of_header": ("safetensors", lambda path: flip(path, 0, 1)),
    "tensors_header": ("safetensors", lambda path: flip(path, 20, 1)),
    "tensors_first_value": ("safetensors", lambda path: flip(path, -900, 1)),
    "tensors_last_byte": ("safetensors", lambda path: flip(path, -1, 0x80)),
    "tensors_truncated_in_header": ("safetensors", lambda path: keep_bytes(path, 20)),
    "tensors_truncated_by_one_byte": ("safetensors", lambda path: keep_bytes(path, -1)),
    "tensors_empty": ("safetensors", lambda path: keep_bytes(path, 0)),
    "tensors_longer": ("safetensors", lambda path: path.write_bytes(path.read_bytes() + b"\0")),
    "tensors_missing": ("safetensors", Path.unlink),
    "tensors_a_folder": ("safetensors", lambda path: (path.unlink(), path.mkdir())),
    "json_brace": ("json", lambda path: flip(path, 0, 1)),
    "json_not_text": ("json", lambda path: flip(path, 30, 0x80)),
    "json_digit_of_a_checksum": ("json", lambda path: flip(path, path.read_bytes().index(b"_sha256") + 12, 1)),
    "json_digit_in_state": ("json", lambda path: flip(path, path.read_bytes().index(b"512"), 1)),
    "json_truncated": ("json", lambda path: keep_bytes(path, -10)),
    "json_empty": ("json", lambda path: keep_bytes(path, 0)),
    "json_deeply_nested": ("json", lambda path: path.write_text("[" * 200_000)),
    "json_missing": ("json", Path.unlink),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_the_previous_one_taken(folder, kind):
    suffix, damage = DAMAGE[kind]
    path = folder / f"checkpoint-00000200.{suffix}"
    damage(path)
    # Either file names the pair; whichever is given, the message names the damaged one.
    given = folder / "checkpoint-00000200.json"
    with pytest.raises(
        CheckpointError, match=rf"^{re.escape(str(path))} (is damaged|is missing|cannot be read)"
    ) as error:
        load(given)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 8

    warned: list[str] = []
    assert newest(folder, warned.append).step == 100
    assert len(warned) == 1
    assert str(path) in warned[0]
    with pytest.warns(UserWarning, match=re.escape(str(path))):
        assert_loads(folder, 100)


def test_damaged_tensors_report_both_checksums(folder):
    path = folder / "checkpoint-00000200.safetensors"
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    flip(path, -1, 1)
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match=f"sha256 expected {expected}, got {got}"):
        load(path)


def test_no_flipped_bit_of_the_json_changes_what_is_loaded(folder):
    path = folder / "checkpoint-00000200.json"
    original, refused = path.read_bytes(), 0
    for offset in range(len(original)):
        flip(path, offset, (0x01, 0x20, 0x80)[offset % 3])  # the lowest bit, a letter's case, the highest bit
        try:
            assert_loads(path, 200)
        except CheckpointError:
            refused += 1
        path.write_bytes(original)
    assert refused >= len(original) - 2  # the case of a hexadecimal digit in an escape changes nothing


def test_nothing_valid_is_one_error_that_names_every_reason(folder):
    for step in (100, 200):
        keep_bytes(folder / f"checkpoint-{step:08d}.safetensors", 9)
    with pytest.raises(CheckpointError, match=r"no valid checkpoint.*00000200.*is damaged.*00000100.*is damaged"):
        load(folder)
    assert newest(folder, lambda line: None) is None


# Not a checkpoint of this program (fault 3)


class Payload:
    """Unpickling it creates the file at `target`."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def write_torch_zip(path: Path, payload: Payload) -> None:
    torch.save({"state_dict": payload}, path)


def write_bare_pickle(path: Path, payload: Payload) -> None:
    path.write_bytes(pickle.dumps(payload, protocol=4))


WRITERS = pytest.mark.parametrize("write", [write_torch_zip, write_bare_pickle], ids=["torch_zip", "bare_pickle"])


@WRITERS
@pytest.mark.parametrize("name", ["run.pt", "run.pth", "run.pkl", "run.zip", "run"])
def test_a_pickle_is_refused_unopened(tmp_path, write, name):
    write(tmp_path / name, Payload(tmp_path / "executed"))
    with pytest.raises(CheckpointError, match=rf"{name} is not a checkpoint.*never opened") as error:
        load(tmp_path / name)
    assert error.value.exit_code == 8
    assert not (tmp_path / "executed").exists()


@WRITERS
def test_a_pickle_renamed_to_safetensors_is_refused_unopened(folder, write):
    path = folder / "checkpoint-00000200.safetensors"
    write(path, Payload(folder / "executed"))
    with pytest.raises(CheckpointError, match=r"is a pickle or a zip archive.*refused"):
        load(path)
    with pytest.warns(UserWarning, match="is damaged"):
        assert_loads(folder, 100)
    assert not (folder / "executed").exists()


@WRITERS
def test_a_pickle_behind_a_forged_json_is_refused(tmp_path, monkeypatch, write):
    """The checksums detect damage, not malice: with all of them right, the parser is what refuses."""
    path = tmp_path / "checkpoint-00000001.safetensors"
    write(path, Payload(tmp_path / "executed"))
    pickled = path.read_bytes()
    monkeypatch.setattr(safetensors.torch, "save", lambda tensors: pickled)
    save(tmp_path, 1, {}, STATE)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        load(path.with_suffix(".json"))
    assert newest(tmp_path, lambda line: None) is None
    assert not (tmp_path / "executed").exists()


def test_a_safetensors_file_whose_length_looks_like_a_pickle_is_read(tmp_path):
    """Its first eight bytes are the header's length, and 80 02 (640 bytes) also opens a pickle of protocol 2."""
    for length in range(560, 640, 8):  # the header is padded to a multiple of eight bytes
        path = save(tmp_path, 1, {"x" * length: torch.zeros(1)}, STATE)
        if path.with_suffix(".safetensors").read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no name gave a header of 640 bytes")
    assert load(path.with_suffix(".safetensors")).step == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"status": "ok"}', "is not a checkpoint of this program"),
        ("[1]", "is not a checkpoint of this program"),
        ('{"format": "cifar10-checkpoint", "version": 1}', "is damaged: sha256 expected None"),
        (
            '{"format": "cifar10-checkpoint", "version": 2, "new": 1}',
            "has a later version than this program's 1",
        ),
        ('{"format": "cifar10-checkpoint", "version": NaN}', "is damaged: Out of range"),
    ],
    ids=["another_json", "a_list", "no_checksum", "from_the_future", "nan"],
)
def test_json_of_another_kind_is_refused(tmp_path, text, message):
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        load(path)


def forge(path: Path, change) -> None:
    """Let `change` alter the content of a checkpoint's JSON, and make its checksum right again."""
    content = json.loads(path.read_text())
    del content["sha256"]
    change(content)
    path.write_text(json.dumps(content | {"sha256": checkpoint._content_sha256(content)}))


def put(*keys, value):
    """A change of what lies at `keys` within the state."""

    def change(content):
        record = content["state"]
        for key in keys[:-1]:
            record = record[key]
        record[keys[-1]] = value

    return change


def lose(*keys):
    def change(content):
        record = content["state"]
        for key in keys[:-1]:
            record = record[key]
        del record[keys[-1]]

    return change


FORGED = [  # a change of a state after 2 epochs of 10 steps, and words of the message
    (lambda content: content.pop("state"), "state is not a record"),
    (lambda content: content.pop("tensors_sha256"), "sha256 expected None"),
    (lambda content: content.pop("step"), "step is not a whole number"),
    (put("more", value=1), "unknown 'more'"),
    *((lose(key), f"state lacks {key}") for key in ("config", "data", "world_size", "history", "seconds")),
    *((put("config", value=value), "config is not a record") for value in ([], None, "words")),
    (lose("config", "momentum"), "config lacks momentum"),
    (put("config", "colour", value=1), "config has an unknown 'colour'"),
    (put("config", "epochs", value="words"), "epochs is not a whole number"),
    (put("config", "epochs", value=True), "epochs is not a whole number"),
    (put("config", "epochs", value=1e9), "epochs is not a whole number"),
    (put("config", "epochs", value=10**30), "epochs=1000000000000000000000000000000 is too large"),
    (put("config", "widths", value="words"), "widths is not a list of a whole number"),
    (put("config", "widths", value=[8, 8, 8, 10**9 * 8]), "up to 65536"),
    (put("config", "momentum", value="words"), "momentum is not a number"),
    (put("config", "lr_epochs", value=[0, 10**400]), "lr_epochs is not a list of a number"),
    (put("config", "flip", value="sideways"), "flip='sideways'"),
    (put("config", "preset", value="\x1b[2J"), "preset is not a short text"),
    (put("config", "preset", value="x" * 101), "preset is not a short text"),
    (put("data", value=None), "data is not a sha256"),
    (put("data", value="\x1b" * 64), "data is not a sha256"),
    *((put("world_size", value=value), "world_size is") for value in (0, True, 1.5, "1", None)),
    *((put("history", value=value), "history is not a list") for value in ("words", None, {})),
    *((put("history", value=[value]), "row 1 of history is not a record") for value in (1, None, "words", [])),
    (put("history", value=[{}]), "row 1 of history lacks epoch"),
    (put("history", 0, "train_loss", value="words"), "train_loss in row 1 of history"),
    (put("history", 1, "test_accuracy", value=1.01), "test_accuracy in row 2 of history"),
    (put("history", 1, "train_s", value=-1), "train_s in row 2 of history"),
    (put("history", 1, "train_s", value=10**400), "train_s in row 2 of history"),
    (put("history", 0, "step", value=0), "history does not have every epoch"),
    (put("history", 1, "step", value=19), "history does not have every epoch"),
    (put("history", 1, "epoch", value=3), "history does not have every epoch"),
    (lambda content: content["state"].update(history=content["state"]["history"][:1]), "step 25 contradicts its"),
    (lambda content: content["state"].update(after(35).to_json()), "step 25 contradicts its history of 35 epochs"),
    (lambda content: content["state"].update(after(36).to_json()), "of 36 epochs of 10 steps, in a run of 35"),
    *((put("seconds", value=value), "seconds is not a record") for value in ([], None, "words")),
    (lose("seconds", "training"), "seconds lacks training"),
    (put("seconds", "training", value="words"), "seconds.training is not a number"),
    *(
        (lambda content, value=value: content.update(step=value), "step is not a whole number")
        for value in (-5, True, None, "25", 25.0, 10**30)
    ),
    (lambda content: content.update(step=1_000_000), "step 1,000,000 contradicts its history"),
    (lambda content: content.update(step=31), "step 31 contradicts its history"),
    (lambda content: content.update(step=26), "has been renamed: expected checkpoint-00000026.json"),
]


@pytest.mark.parametrize(("change", "words"), FORGED)
def test_a_state_that_no_run_can_have_is_refused_with_right_checksums_too(tmp_path, change, words):
    save(tmp_path, 15, {}, after(1))
    path = save(tmp_path, 25, {}, after(2))
    forge(path, change)
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert words in str(error.value)
    assert re.fullmatch("[ -~é]{1,1000}", str(error.value).replace(str(tmp_path), "")), "one line, nothing but text"
    warned: list[str] = []
    assert newest(tmp_path, warned.append).step == 15
    assert len(warned) == 1


def test_a_renamed_checkpoint_does_not_take_a_run_back(folder):
    for suffix in (".json", ".safetensors"):
        (folder / f"checkpoint-00000100{suffix}").rename(folder / f"checkpoint-00000999{suffix}")
    warned: list[str] = []
    assert newest(folder, warned.append).step == 200
    assert "is of step 100 and has been renamed: expected checkpoint-00000100.json" in warned[0]


def replaced(make):
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 << 30)


NOT_FILES = {
    "pipe": replaced(os.mkfifo),
    "link_to_a_device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "sparse": replaced(sparse),
    "link_to_nothing": replaced(lambda path: path.symlink_to("nothing")),
}


@pytest.mark.skipif(os.name != "posix", reason="needs pipes and devices")
@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("kind", NOT_FILES)
def test_only_regular_files_of_a_sensible_size_are_read(folder, kind, suffix):
    path = folder / f"checkpoint-00000200{suffix}"
    NOT_FILES[kind](path)
    with pytest.raises(CheckpointError, match=rf"200\{suffix} (cannot be read: (a pipe|10,737,418,240)|is missing)"):
        load(path)
    assert newest(folder, lambda line: None).step == 100
    save(folder, 300, tensors_at(300), STATE)
    assert_loads(save(folder, 200, tensors_at(200), STATE), 200)


def test_many_damaged_checkpoints_are_counted(folder):
    for step in range(1_000, 1_050):
        (folder / f"checkpoint-{step:08d}.json").touch()
    warned: list[str] = []
    assert newest(folder, warned.append).step == 200
    assert ["00001049" in warned[0], "00001048" in warned[1], len(warned)] == [True, True, 4]
    assert warned[3] == "passed over 47 checkpoints more, damaged too"


def test_a_checksum_s_place_may_hold_anything_and_is_not_printed(folder):
    path = folder / "checkpoint-00000200.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sha256": "\x1b[2J" * 500_000}))
    with pytest.raises(CheckpointError, match=r"^[ -~]{1,400}$"):
        load(path)


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


# Another run's checkpoint (fault 4)


def test_require_same_names_every_difference():
    found = {"batch_size": 512, "world_size": 1, "old": None, "lr": [0, 0.4], "widths": [64] * 1_000}
    wanted = {"batch_size": 128, "world_size": 1, "new": "a", "lr": [0.0, 0.4], "widths": [32]}
    with pytest.raises(CheckpointError) as error:
        require_same(found, wanted, "configuration")
    assert error.value.exit_code == 8
    assert str(error.value).startswith(
        "the checkpoint is of another configuration: batch_size: 512 in the checkpoint, 128 asked for; "
        'new: missing in the checkpoint, "a" asked for; '
        "old: null in the checkpoint, not asked for; widths: [64, 64,"
    )
    assert len(str(error.value)) < 600
    require_same(found, found, "configuration")


def test_tensors_are_copied_in_place_and_keep_the_networks_layout(folder):
    conv = torch.nn.Conv2d(3, 8, 3, bias=False).to(memory_format=torch.channels_last)
    pointer, want = conv.weight.data_ptr(), tensors_at(200)["network.conv.weight"]
    load_tensors_into(conv.state_dict(), {"p.weight": want.contiguous(), "momentum.x": torch.zeros(1)}, "p.")
    assert conv.weight.data_ptr() == pointer
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv.weight, want)


def test_tensors_that_do_not_fit_are_all_named_and_none_is_copied():
    state = {"same": torch.zeros(2), "shape": torch.zeros(2, 3), "dtype": torch.zeros(1), "absent": torch.zeros(1)}
    tensors = {
        "n.same": torch.ones(2),
        "n.shape": torch.ones(3, 2),
        "n.dtype": torch.ones(1, dtype=torch.float16),
        "n.extra": torch.ones(1),
        "other.extra": torch.ones(1),
    }
    with pytest.raises(CheckpointError) as error:
        load_tensors_into(state, tensors, "n.")
    for fault in (
        "n.absent: missing in the checkpoint",
        "n.shape: float32 [3, 2] in the checkpoint, float32 [2, 3] in the network",
        "n.dtype: float16 [1] in the checkpoint, float32 [1] in the network",
        "n.extra: in the checkpoint, unknown to the network",
    ):
        assert fault in str(error.value)
    assert "other.extra" not in str(error.value)
    assert state["same"].sum() == 0


# A disk that is full, or not ours to write (fault 5)


def raise_error(error: OSError, at_call: int = 1):
    """A function that raises `error` from its `at_call`-th call on."""
    calls = iter(range(1, 1000))

    def replacement(*arguments, real=None, **keywords):
        if next(calls) >= at_call:
            raise error
        return real(*arguments, **keywords)

    return replacement


FAILURES = {
    "read_only_folder": ("open", 1, errno.EROFS),
    "full_at_the_json": ("open", 2, errno.ENOSPC),
    "full_at_tensors_fsync": ("fsync", 1, errno.ENOSPC),
    "quota_at_json_fsync": ("fsync", 2, errno.EDQUOT),
    "tensors_rename": ("replace", 1, errno.EIO),
    "folder_fsync_between_renames": ("fsync", 3, errno.EIO),
    "json_rename": ("replace", 2, errno.EIO),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failed_save_raises_as_is_and_leaves_the_folder_as_it_was(folder, monkeypatch, name):
    function, nth, code = FAILURES[name]
    owner, real = (files, open) if function == "open" else (os, getattr(os, function))
    fails = raise_error(OSError(code, os.strerror(code)), nth)
    monkeypatch.setattr(owner, function, lambda *a, **k: fails(*a, real=real, **k), raising=False)
    with pytest.raises(OSError, match=re.escape(os.strerror(code))) as error:
        save(folder, 300, tensors_at(300), STATE)
    assert error.value.errno == code
    monkeypatch.undo()
    assert names(folder) == pair(100) | pair(200)
    assert_loads(folder, 200)


def test_a_folder_fsync_that_fails_last_loses_nothing(folder, monkeypatch):
    """The new checkpoint is whole but perhaps not durable, so the caller is told and the older ones stay."""
    real = os.fsync
    fails = raise_error(OSError(errno.EIO, "io"), 4)
    monkeypatch.setattr(os, "fsync", lambda descriptor: fails(descriptor, real=real))
    with pytest.raises(OSError, match="io"):
        save(folder, 300, tensors_at(300), STATE)
    assert names(folder) == pair(100) | pair(200) | pair(300)


def test_an_interrupted_save_leaves_no_temporaries(folder, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(folder, 300, tensors_at(300), STATE)
    assert names(folder) == pair(100) | pair(200)


def test_a_folder_that_is_gone_raises_as_is(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "absent", 1, {}, STATE)


LIMITED = """
import errno, os, resource, signal, sys
import torch
from model import checkpoint
from tests.model.test_checkpoint import STATE, tensors_at

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoint.save(sys.argv[1], 100, tensors_at(100), STATE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    checkpoint.save(sys.argv[1], 200, tensors_at(200) | {"momentum": torch.ones(100_000)}, STATE)
except OSError as error:
    print(error.errno == errno.EFBIG)
checkpoint.save(sys.argv[1], 300, tensors_at(300), STATE)
"""


@posix
def test_a_file_size_limit_fails_one_save_and_not_the_next(tmp_path):
    assert python(LIMITED, tmp_path).split() == ["True"]
    assert names(tmp_path) == pair(100) | pair(300)
    assert_loads(tmp_path, 300)


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_raises_and_still_loads(folder):
    folder.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            save(folder, 300, tensors_at(300), STATE)
        clean(folder)
        assert_loads(folder, 200)
    finally:
        folder.chmod(0o700)


def test_windows_has_no_folder_to_sync(folder, monkeypatch):
    opens, denied = os.open, raise_error(PermissionError("a folder cannot be opened"))
    monkeypatch.setattr(os, "open", lambda path, *a, **k: (denied if os.path.isdir(path) else opens)(path, *a, **k))
    with monkeypatch.context() as windows:
        windows.setattr(files, "sync_folder", sync_as_on_windows)
        assert_loads(save(folder, 300, tensors_at(300), STATE), 300)


def sync_as_on_windows(folder: Path, real=files.sync_folder) -> None:
    """Only the guard sees the other system's name: pathlib would refuse to work under it."""
    name, os.name = os.name, "nt"
    try:
        real(folder)
    finally:
        os.name = name
