"""Checkpoints that survive a kill, a full disk and a flipped bit. No pickle anywhere, so loading one runs no code.

A checkpoint is a pair of files in the run's folder:

checkpoint-<step:08d>.safetensors   every tensor, in contiguous logical order (N, C, H, W; K, C, R, S)
checkpoint-<step:08d>.json          format, version, step, state, the sha256 of the tensors file, and the sha256 of
                                    its own content (canonical JSON: sorted keys, no spaces, ASCII) but for that field

It is valid when the JSON parses, its own checksum matches and the tensors file's matches, its name is its step, and its
state is one that a run can have: see `RunState`. The JSON is renamed into place last, so a writer killed at any point
leaves no half-checkpoint that reads as a whole one.

Memory format is not stored: safetensors keeps dense row-major data only. A channels_last tensor comes back contiguous
with the same values, shape and dtype, and copying it into a channels_last parameter restores the layout.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from model.errors import CheckpointError
from model.files import TEMPORARY, read_regular, write_files
from model.run_state import RunState

FORMAT = "cifar10-checkpoint"
VERSION = 1
NAME = re.compile(r"checkpoint-([0-9]{8}|[1-9][0-9]{8,})\.(?:json|safetensors)")
MOST_JSON_BYTES = 1 << 26  # of a history of 100,000 epochs
MOST_TENSORS_BYTES = 1 << 32  # of 500 million parameters and their momentum, 70 times the article's network
NAMED = 3
"""Damaged checkpoints that are passed over by name; more of them are counted."""
FAULTS = 20
"""Tensors that do not fit and are named; more of them are counted."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read and verified: `path` is its JSON file, `tensors` are contiguous and on the CPU."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: RunState


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: RunState, *, keep: int = 2) -> Path:
    """Write a checkpoint atomically and durably, then delete all but the `keep` newest valid ones; return its JSON.

    Tensors may have any strides and device and may share storage: each is stored as its own contiguous copy.
    One process at a time may write to a folder.

    Both files are complete on the disk before either gets its name, so a full disk costs nothing but this checkpoint.
    Saving a step again replaces its tensors before its JSON, unless the tensors are the same: only a kill just between
    two different ones costs that step, and the one before it stays.

    Raises OSError as the system gave it, or for tensors too large to be read back (older checkpoints intact, no
    temporaries left), and ValueError for a state that would not be read back.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    RunState.from_json(state.to_json(), step)
    folder = Path(folder)
    data = safetensors.torch.save({name: _contiguous_copy(tensor) for name, tensor in tensors.items()})
    if len(data) > MOST_TENSORS_BYTES:
        raise OSError(errno.EFBIG, f"tensors of {len(data):,} bytes, more than {MOST_TENSORS_BYTES:,}", str(folder))
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "state": state.to_json(),
    }
    text = json.dumps(content | {"sha256": _content_sha256(content)}, indent=2) + "\n"

    path = folder / f"checkpoint-{step:08d}.json"
    tensors_path = path.with_suffix(".safetensors")
    has_these_tensors = _file_sha256(tensors_path) == content["tensors_sha256"]
    try:
        write_files(({} if has_these_tensors else {tensors_path: data}) | {path: text.encode()})
    except BaseException:
        with contextlib.suppress(OSError):
            if not path.exists():
                tensors_path.unlink(missing_ok=True)
        raise
    _prune(path, keep)
    return path


def load(path: Path, warn: Callable[[str], Any] = warnings.warn) -> Checkpoint:
    """Read and verify one checkpoint: `path` is either of its files, or a run's folder for the newest valid one in it.

    Raises CheckpointError for a path that is missing, damaged, of another format (pickles and zip archives are refused
    unopened) or of a later version. A damaged one passed over in a folder is named to `warn`.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir, False where a parent folder is unreadable: reading then says why
        passed_over: list[str] = []
        found = newest(path, passed_over.append)
        if found is None:
            reason = "; ".join(passed_over) or "expected checkpoint-<step>.json and checkpoint-<step>.safetensors"
            raise CheckpointError(f"{path} holds no valid checkpoint: {reason}; start afresh or name another folder")
        for message in passed_over:
            warn(message)
        return found
    if path.suffix not in (".json", ".safetensors"):
        state = "is not a checkpoint of this program" if os.path.exists(path) else "does not exist"
        raise CheckpointError(
            f"{path} {state}: expected checkpoint-<step>.json or .safetensors, or a run's folder;"
            " pickles and archives (.pt, .pth, .pkl, .zip) are never opened, because loading one can run its code"
        )
    try:
        if path.suffix == ".safetensors":
            _refuse_pickle(path, _read_bytes(path, MOST_TENSORS_BYTES))
        return _read(path.with_suffix(".json"))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; name another checkpoint, or the run's folder for its newest valid one"
        ) from None


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint in `folder`, None without one; each newer one that is damaged is named to `warn`.

    Of many damaged ones a few are named and the rest counted. Raises CheckpointError where the folder cannot be listed.
    """
    folder = Path(folder)
    try:
        paths = _newest_first(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}; name a run's folder") from None
    found, damaged = None, 0
    for path in paths:
        try:
            found = _read(path)
            break
        except CheckpointError as error:
            damaged += 1
            if damaged <= NAMED:
                warn(f"passed over a checkpoint: {error}")
    if damaged > NAMED:
        warn(f"passed over {damaged - NAMED:,} checkpoints more, damaged too")
    return found


def clean(folder: Path) -> None:
    """Remove the temporaries that a killed writer left in `folder`, as far as the system lets us.

    Call it where no other process is writing there, before the first save.
    """
    for temporary in Path(folder).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            temporary.unlink()


def load_tensors_into(module_state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Copy `tensors[prefix + name]` into `module_state[name]` in place, whatever its device and memory format.

    Either every tensor is copied or none. Raises CheckpointError as `require_tensors` does.
    """
    require_tensors(module_state, tensors, prefix)
    with torch.no_grad():
        for name, target in module_state.items():
            target.copy_(tensors[prefix + name])


def require_tensors(module_state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Raise CheckpointError unless `tensors` are those of `module_state`, which may be on the meta device.

    It lists the names missing from the checkpoint, those under `prefix` that the network lacks, and those whose shape
    or dtype differs (a cast would not resume bit for bit).
    """
    faults = [f"{prefix}{name}: missing in the checkpoint" for name in module_state if prefix + name not in tensors]
    for name, source in tensors.items():
        if not name.startswith(prefix):
            continue
        target = module_state.get(name.removeprefix(prefix))
        if target is None:
            faults.append(f"{ascii(name)[1:-1][:100]}: in the checkpoint, unknown to the network")
        elif (source.shape, source.dtype) != (target.shape, target.dtype):
            faults.append(f"{name}: {_kind(source)} in the checkpoint, {_kind(target)} in the network")
    if faults:
        more = f"; and {len(faults) - FAULTS:,} more" if len(faults) > FAULTS else ""
        raise CheckpointError(
            f"the checkpoint does not fit the network: {'; '.join(faults[:FAULTS])}{more}; build the same network"
        )


def _contiguous_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU with row-major strides and storage of its own: safetensors takes no other."""
    return tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)


def _content_sha256(content: dict) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _file_sha256(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        return hashlib.sha256(read_regular(path, MOST_TENSORS_BYTES)).hexdigest()
    return None


def _newest_first(folder: Path) -> list[Path]:
    """The JSON path of every step of which at least one file exists, highest step first."""
    steps = {int(match[1]) for name in os.listdir(folder) if (match := NAME.fullmatch(name))}
    return [folder / f"checkpoint-{step:08d}.json" for step in sorted(steps, reverse=True)]


def _prune(written: Path, keep: int) -> None:
    """Delete what is older than the `keep` newest valid checkpoints, of which `written` is one.

    A damaged one does not count, or it would push out the one to fall back on. The JSON goes first: without it the
    rest is no checkpoint. What cannot be deleted now is tried again at the next save.
    """
    kept = 1
    with contextlib.suppress(OSError):
        for path in _newest_first(written.parent):
            if path == written:
                continue
            if kept == keep:
                path.unlink(missing_ok=True)
                path.with_suffix(".safetensors").unlink(missing_ok=True)
            else:
                with contextlib.suppress(CheckpointError):
                    _verify(path)
                    kept += 1


def _read(path: Path) -> Checkpoint:
    step, state, data = _verify(path)
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the parser has a different exception for each way in which bytes can be hostile
        reason = ascii(str(error))[1:200]
        raise CheckpointError(f"{path.with_suffix('.safetensors')} is not a safetensors file: {reason}") from None
    return Checkpoint(path=path, step=step, tensors=tensors, state=state)


def _verify(path: Path) -> tuple[int, RunState, bytes]:
    """(step, state, bytes of the tensors file) of the checkpoint at `path`, checked but for what the bytes hold."""
    text = _read_bytes(path, MOST_JSON_BYTES)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f'{path} is not a checkpoint of this program: expected "format": "{FORMAT}"')
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(f"{path} has a later version than this program's {VERSION}: update the program")
    expected = content.pop("sha256", None)
    try:
        got = _content_sha256(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    _require_sha256(path, expected, got)
    step = content.get("step")
    try:
        state = RunState.from_json(content.get("state"), step)
    except ValueError as error:
        raise CheckpointError(f"{path} is not a checkpoint of this program: {error}") from None
    if path.stem != f"checkpoint-{step:08d}":
        raise CheckpointError(f"{path} is of step {step} and has been renamed: expected checkpoint-{step:08d}.json")
    tensors_path = path.with_suffix(".safetensors")
    data = _read_bytes(tensors_path, MOST_TENSORS_BYTES)
    _require_sha256(tensors_path, content.get("tensors_sha256"), hashlib.sha256(data).hexdigest())
    return step, state, data


def _require_sha256(path: Path, expected: object, got: str) -> None:
    if got != expected:
        shown = ascii(expected).strip("'")[: len(got)]  # anything may stand in its place
        raise CheckpointError(f"{path} is damaged: sha256 expected {shown}, got {got}")


def _read_bytes(path: Path, most_bytes: int) -> bytes:
    try:
        return read_regular(path, most_bytes)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: a checkpoint is a .json and a .safetensors of one name") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _refuse_pickle(path: Path, data: bytes) -> None:
    """Say plainly that a pickle or a zip archive was renamed; safetensors has its JSON header's brace at byte 8."""
    if data[8:9] != b"{" and (data.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", data)):
        raise CheckpointError(f"{path} is a pickle or a zip archive, not a safetensors file: refused unopened")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
