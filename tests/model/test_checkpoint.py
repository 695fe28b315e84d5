"""Checkpoints written and read: round trips, kills, full disks, and another run's (faults 1, 4 and 5 of training)."""

import dataclasses
import errno
import io
import itertools
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from checkpoint_files import SECONDS, STATE, after, assert_loads, assert_same_tensors, names, pairs, tensors_at, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model import checkpoint, files
from model.checkpoint import clean, load, load_tensors_into, newest, save
from model.errors import CheckpointError
from model.run_state import require_same


@pytest.fixture
def folder(tmp_path):
    """A run's folder with two checkpoints, of steps 100 and 200."""
    return write(tmp_path, 100, 200)


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


@pytest.mark.parametrize("step", [20, 25, 30], ids=["end_of_an_epoch", "in_an_epoch", "not_yet_evaluated"])
def test_state_comes_back(tmp_path, step):
    state = after(2)
    state.history[1]["test_loss"] = 1e300  # of a run that blows up, which is to be told and not to be lost
    assert load(save(tmp_path, step, {}, state)).state == state
    state.require_step(step, 10)
    with pytest.raises(ValueError, match="history does not have every epoch after 11 steps more"):
        state.require_step(step, 11)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({"state": value}, "seconds.training is not a number") for value in (float("nan"), torch.zeros(1), None)),
        ({"step": -1}, "step is not"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"tensors": {"w": torch.zeros(1_000)}}, "tensors of 4,"),
    ],
    ids=["nan", "tensor", "none", "negative_step", "keep_none", "too_large"],
)
def test_unreadable_state_is_not_written(tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(checkpoint, "MOST_TENSORS_BYTES", 2_000)
    if "state" in changes:
        changes = {"state": dataclasses.replace(STATE, seconds=SECONDS | {"training": changes["state"]})}
    with pytest.raises((ValueError, OSError), match=words):
        save(tmp_path, **{"step": 1, "tensors": {}, "state": STATE} | changes)
    assert names(tmp_path) == set()


def test_either_file_or_the_folder_names_the_checkpoint(folder):
    assert_loads(folder / "checkpoint-00000100.json", 100)
    assert_loads(folder / "checkpoint-00000100.safetensors", 100)
    assert_loads(folder, 200)
    found = load(folder)
    assert found.path == folder / "checkpoint-00000200.json"
    (folder / "checkpoint-00000200.safetensors").unlink()
    found.tensors["network.conv.weight"].add_(1)  # independent of its file, and writable


@pytest.mark.parametrize(
    ("step", "kept"),
    [(300, (200, 300)), (50, (50, 200)), (10**8, (200, 10**8))],
    ids=["two_newest", "the_one_just_written", "nine_digits_are_newer_than_eight"],
)
def test_two_checkpoints_are_kept(folder, step, kept):
    (folder / "config.json").touch()
    path = save(folder, step, tensors_at(step), STATE)
    assert path == folder / f"checkpoint-{step:08d}.json"
    assert names(folder) == pairs(*kept) | {"config.json"}
    assert_loads(path, step)
    assert load(folder).step == max(kept)


def test_a_damaged_checkpoint_does_not_push_out_the_one_to_fall_back_on(folder):
    (folder / "checkpoint-00000200.safetensors").write_bytes(b"")
    write(folder, 150)
    assert names(folder) == pairs(100, 150, 200)


def test_data_is_durable_before_its_rename_and_each_rename_before_the_next(folder, monkeypatch):
    order = []
    for function in ("fsync", "replace", "unlink"):
        real = getattr(os, function)
        monkeypatch.setattr(os, function, lambda *a, name=function, real=real: (order.append(name), real(*a)))
    write(folder, 300)
    assert order == ["fsync", "fsync", "replace", "fsync", "replace", "fsync", "unlink", "unlink"]


def test_saving_the_same_step_again_cannot_lose_it(folder, monkeypatch):
    """With the same tensors there is no moment between the renames at which the pair does not match."""
    replaced, real = [], os.replace

    def replace(source, target):
        real(source, target)
        replaced.append(Path(target).name)
        assert_loads(folder / "checkpoint-00000200.json", 200)

    monkeypatch.setattr(os, "replace", replace)
    write(folder, 200)
    assert replaced == ["checkpoint-00000200.json"]
    assert names(folder) == pairs(100, 200)


def test_clean_leaves_everything_but_temporaries(folder):
    (folder / ".tmp-dead").write_bytes(b"half")
    (folder / ".tmp-folder").mkdir()
    (folder / ".gitignore").touch()
    clean(folder)
    assert names(folder) == pairs(100, 200) | {".gitignore", ".tmp-folder"}
    clean(folder / "absent")


# Killed while writing, and failing to write (faults 1 and 5)

PLACES = {  # name: (function that is called, for the n-th time, the newest step that is whole then)
    "opening_tensors": ("open", 1, 200),
    "half_of_tensors": ("write", 1, 200),
    "before_tensors_fsync": ("fsync", 1, 200),
    "opening_json": ("open", 2, 200),
    "half_of_json": ("write", 2, 200),
    "before_json_fsync": ("fsync", 2, 200),
    "before_tensors_rename": ("replace", 1, 200),
    "after_tensors_rename_before_folder_fsync": ("fsync", 3, 200),
    "after_tensors_rename_before_json_rename": ("replace", 2, 200),
    "after_json_rename_before_folder_fsync": ("fsync", 4, 300),
    "before_deleting_the_oldest": ("unlink", 1, 300),
    "halfway_deleting_the_oldest": ("unlink", 2, 300),
}


def at_call(patch: pytest.MonkeyPatch, function: str, nth: int, act) -> None:
    """From its `nth` call on `act()` comes before open, os.fsync and the like, and in the middle of a file's write."""
    calls = itertools.count(1)

    def counted(real):
        def replacement(*arguments, **options):
            if next(calls) >= nth:
                if function == "write":
                    file, data = arguments
                    real(file, data[: len(data) // 2])
                act()
            return real(*arguments, **options)

        return replacement

    class Unbuffered(io.FileIO):
        write = counted(io.FileIO.write)

    if function in ("open", "write"):
        patch.setattr(files, "open", counted(open) if function == "open" else Unbuffered, raising=False)
    else:
        patch.setattr(os, function, counted(getattr(os, function)))


def in_a_fork(function) -> int:
    """The exit status of a process that runs it, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


posix = pytest.mark.skipif(os.name != "posix", reason="needs fork, SIGKILL and RLIMIT_FSIZE")


@posix
@pytest.mark.parametrize("place", PLACES)
def test_killed_while_writing(folder, monkeypatch, place):
    """The newest whole step loads; an incomplete newer one is named; the next save is whole."""
    function, nth, step = PLACES[place]
    with monkeypatch.context() as patch:
        at_call(patch, function, nth, lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert in_a_fork(lambda: write(folder, 300)) == -signal.SIGKILL
    assert any(file.startswith(".tmp-") for file in names(folder)) == (step == 200 and place != "opening_tensors")
    assert all(path.with_suffix(".safetensors").exists() for path in folder.glob("checkpoint-*.json"))
    warned: list[str] = []
    found = newest(folder, warned.append)
    assert found.step == step
    assert_same_tensors(found.tensors, tensors_at(step))
    assert len(warned) == (step == 200 and bool(names(folder) & pairs(300)))
    assert all("checkpoint-00000300.json is missing" in line for line in warned)
    clean(folder)
    assert not any(file.startswith(".") for file in names(folder))
    write(folder, 300)
    assert names(folder) == pairs(200, 300)
    assert_loads(folder, 300)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "interrupted"])
@pytest.mark.parametrize("place", [place for place in PLACES if "deleting" not in place])
def test_a_failed_save_raises_as_is_and_leaves_the_older_checkpoints(folder, monkeypatch, place, error):
    """After the last rename the new one is whole too, but perhaps not durable."""
    function, nth, step = PLACES[place]
    with monkeypatch.context() as patch:
        at_call(patch, function, nth, failing_with(error))
        with pytest.raises(type(error)) as raised:
            write(folder, 300)
    assert raised.value is error
    assert names(folder) == pairs(100, 200, step)
    assert_loads(folder, step)


def failing_with(error: BaseException):
    def fail(*arguments):
        raise error

    return fail


def test_failing_to_delete_an_old_checkpoint_does_not_fail_the_save(folder, monkeypatch):
    at_call(monkeypatch, "unlink", 1, failing_with(PermissionError(errno.EACCES, "denied")))
    assert_loads(write(folder, 300), 300)


@posix
def test_a_file_size_limit_fails_one_save_and_not_the_next(folder):
    import resource

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            save(folder, 300, {"momentum": torch.ones(100_000)}, STATE)
        write(folder, 400)

    assert in_a_fork(limited) == 0
    assert names(folder) == pairs(200, 400)
    assert_loads(folder, 400)


def test_windows_has_no_folder_to_sync(folder, monkeypatch):
    sync = files.sync_folder

    def sync_as_on_windows(path):  # only the guard sees the other system's name: pathlib would refuse to work under it
        name, os.name = os.name, "nt"
        try:
            sync(path)
        finally:
            os.name = name

    monkeypatch.setattr(os, "open", failing_with(PermissionError("a folder cannot be opened")))
    sync_as_on_windows(folder)


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


def test_tensors_are_copied_in_place_and_keep_the_networks_layout():
    conv = torch.nn.Conv2d(3, 8, 3, bias=False).to(memory_format=torch.channels_last)
    pointer, want = conv.weight.data_ptr(), tensors_at(200)["network.conv.weight"]
    load_tensors_into(conv.state_dict(), {"p.weight": want.contiguous(), "momentum.x": torch.zeros(1)}, "p.")
    assert conv.weight.data_ptr() == pointer
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(conv.weight, want)


def test_tensors_that_do_not_fit_are_all_named_and_none_is_copied():
    state = {"same": torch.zeros(2), "shape": torch.zeros(2, 3), "dtype": torch.zeros(1), "absent": torch.zeros(1)}
    tensors = {"same": torch.ones(2), "shape": torch.ones(3, 2), "dtype": torch.ones(1).half(), "extra": torch.ones(1)}
    tensors = {f"n.{name}": x for name, x in tensors.items()} | {"other.extra": torch.ones(1)}
    with pytest.raises(CheckpointError) as error:
        load_tensors_into(state, tensors, "n.")
    assert re.search(
        r"n\.absent: missing in the checkpoint; "
        r"n\.shape: float32 \[3, 2\] in the checkpoint, float32 \[2, 3\] in the network; "
        r"n\.dtype: float16 \[1\] in the checkpoint, float32 \[1\] in the network; "
        r"n\.extra: in the checkpoint, unknown to the network; build",
        str(error.value),
    )
    assert state["same"].sum() == 0
