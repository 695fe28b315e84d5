"""Checkpoints that survive a kill, a full disk and a flipped bit. No pickle anywhere, so loading one runs no code.

A checkpoint is a pair of files in the run's folder:

checkpoint-<step:08d>.safetensors   every tensor, in contiguous logical order (N, C, H, W; K, C, R, S)
checkpoint-<step:08d>.json          format, version, step, state, the sha256 of the tensors file, and the sha256 of
                                    its own content (canonical JSON: sorted keys, no spaces, ASCII) but for that field

It is valid when the JSON parses, its own checksum matches and the tensors file's matches: the JSON is renamed into
place last, so a writer killed at any point leaves no half-checkpoint that reads as a whole one.

Memory format is not stored: safetensors keeps dense row-major data only. A channels_last tensor comes back contiguous
with the same values, shape and dtype, and copying it into a channels_last parameter restores the layout.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from model.errors import CheckpointError

FORMAT = "cifar10-checkpoint"
VERSION = 1
TEMPORARY = ".tmp-"
NAME = re.compile(r"checkpoint-([0-9]{8}|[1-9][0-9]{8,})\.(?:json|safetensors)")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read and verified: `path` is its JSON file, `tensors` are contiguous and on the CPU."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write a checkpoint atomically and durably, then delete all but the `keep` newest valid ones; return its JSON.

    Tensors may have any strides and device and may share storage: each is stored as its own contiguous copy.
    `state` holds JSON values under string keys; tuples come back as lists. One process at a time may write to a folder.

    Both files are complete on the disk before either gets its name, so a full disk costs nothing but this checkpoint.
    Saving a step again replaces its tensors before its JSON, unless the tensors are the same: only a kill just between
    two different ones costs that step, and the one before it stays.

    Raises OSError as the system gave it (older checkpoints intact, no temporaries left) and ValueError for a state that
    JSON cannot hold.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"step must be at least 0 and keep at least 1, got step={step} and keep={keep}")
    folder = Path(folder)
    data = safetensors.torch.save({name: _contiguous_copy(tensor) for name, tensor in tensors.items()})
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
        "state": _as_json(state),
    }
    text = json.dumps(content | {"sha256": _content_sha256(content)}, indent=2) + "\n"

    path = folder / f"checkpoint-{step:08d}.json"
    tensors_path = path.with_suffix(".safetensors")
    # The name is unique, not mkstemp's, whose files only their owner may read.
    temporary = folder / f"{TEMPORARY}{secrets.token_hex(4)}.json"
    tensors_temporary = temporary.with_suffix(".safetensors")
    try:
        _write_and_sync(tensors_temporary, data)
        _write_and_sync(temporary, text.encode())
        if _file_sha256(tensors_path) == content["tensors_sha256"]:
            tensors_temporary.unlink()
        else:
            os.replace(tensors_temporary, tensors_path)
            _sync_folder(folder)
        os.replace(temporary, path)
        _sync_folder(folder)
    except BaseException:
        with contextlib.suppress(OSError):
            tensors_temporary.unlink(missing_ok=True)
            temporary.unlink(missing_ok=True)
            if not path.exists():
                tensors_path.unlink(missing_ok=True)
        raise
    _prune(path, keep)
    return path


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint: `path` is either of its files, or a run's folder for the newest valid one in it.

    Raises CheckpointError for a path that is missing, damaged, of another format (pickles and zip archives are refused
    unopened) or of a later version. A damaged one passed over in a folder is named through `warnings.warn`.
    """
    path = Path(path)
    if os.path.isdir(path):  # unlike Path.is_dir, False where a parent folder is unreadable: reading then says why
        passed_over: list[str] = []
        found = newest(path, passed_over.append)
        if found is None:
            reason = "; ".join(passed_over) or "expected checkpoint-<step>.json and checkpoint-<step>.safetensors"
            raise CheckpointError(f"{path} holds no valid checkpoint: {reason}; start afresh or name another folder")
        for message in passed_over:
            warnings.warn(message, stacklevel=2)
        return found
    if path.suffix not in (".json", ".safetensors"):
        state = "is not a checkpoint of this program" if os.path.exists(path) else "does not exist"
        raise CheckpointError(
            f"{path} {state}: expected checkpoint-<step>.json or .safetensors, or a run's folder;"
            " pickles and archives (.pt, .pth, .pkl, .zip) are never opened, because loading one can run its code"
        )
    try:
        if path.suffix == ".safetensors":
            _refuse_pickle(path, _read_bytes(path))
        return _read(path.with_suffix(".json"))
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; name another checkpoint, or the run's folder for its newest valid one"
        ) from None


def newest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest valid checkpoint in `folder`, None without one; each newer one that is damaged is named to `warn`.

    Raises CheckpointError where the folder cannot be listed.
    """
    folder = Path(folder)
    try:
        paths = _newest_first(folder)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}; name a run's folder") from None
    for path in paths:
        try:
            return _read(path)
        except CheckpointError as error:
            warn(f"passed over a checkpoint: {error}")
    return None


def clean(folder: Path) -> None:
    """Remove the temporaries that a killed writer left in `folder`, as far as the system lets us.

    Call it where no other process is writing there, before the first save.
    """
    for temporary in Path(folder).glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            temporary.unlink()


def require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], what: str) -> None:
    """Raise CheckpointError naming each key whose value differs between the checkpoint and the request.

    found    what the checkpoint's state says of `what` (say, "configuration")
    wanted   the same, as this run asks for it; nested keys are joined by dots, and tuples equal lists
    """
    in_checkpoint, asked_for = dict(_leaves(_as_json(found))), dict(_leaves(_as_json(wanted)))
    differences = []
    for key in sorted(in_checkpoint.keys() | asked_for.keys()):
        if key not in in_checkpoint:
            differences.append(f"{key}: missing in the checkpoint, {json.dumps(asked_for[key])} asked for")
        elif key not in asked_for:
            differences.append(f"{key}: {json.dumps(in_checkpoint[key])} in the checkpoint, not asked for")
        elif in_checkpoint[key] != asked_for[key]:
            differences.append(
                f"{key}: {json.dumps(in_checkpoint[key])} in the checkpoint, {json.dumps(asked_for[key])} asked for"
            )
    if differences:
        raise CheckpointError(
            f"the checkpoint is of another {what}: {'; '.join(differences)};"
            " ask for the same, or start afresh in another folder"
        )


def load_tensors_into(module_state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Copy `tensors[prefix + name]` into `module_state[name]` in place, whatever its device and memory format.

    Either every tensor is copied or none. Raises CheckpointError listing the names missing from the checkpoint, those
    under `prefix` that the network lacks, and those whose shape or dtype differs (a cast would not resume bit for bit).
    """
    faults = [f"{prefix}{name}: missing in the checkpoint" for name in module_state if prefix + name not in tensors]
    for name, source in tensors.items():
        if not name.startswith(prefix):
            continue
        target = module_state.get(name.removeprefix(prefix))
        if target is None:
            faults.append(f"{name}: in the checkpoint, unknown to the network")
        elif (source.shape, source.dtype) != (target.shape, target.dtype):
            faults.append(f"{name}: {_kind(source)} in the checkpoint, {_kind(target)} in the network")
    if faults:
        raise CheckpointError(f"the checkpoint does not fit the network: {'; '.join(faults)}; build the same network")
    with torch.no_grad():
        for name, target in module_state.items():
            target.copy_(tensors[prefix + name])


def _contiguous_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU with row-major strides and storage of its own: safetensors takes no other."""
    return tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)


def _as_json(value: Mapping[str, Any]) -> dict:
    """`value` as JSON gives it back, so that what is checksummed and compared is what a reader will see."""
    result = {}
    for key, item in value.items():
        try:
            result[str(key)] = json.loads(json.dumps(item, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{key!r} cannot be written as JSON: {error}") from None
    return result


def _content_sha256(content: dict) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _file_sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _write_and_sync(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows can neither open nor sync a folder."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    content, data = _verify(path)
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # the parser has a different exception for each way in which bytes can be hostile
        raise CheckpointError(f"{path.with_suffix('.safetensors')} is not a safetensors file: {error}") from None
    return Checkpoint(path=path, step=content["step"], tensors=tensors, state=content["state"])


def _verify(path: Path) -> tuple[dict, bytes]:
    """The JSON content at `path` and the bytes of its tensors file, both checked against their checksums."""
    text = _read_bytes(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f'{path} is not a checkpoint of this program: expected "format": "{FORMAT}"')
    version = content.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(f"{path} has version {version} and this program reads {VERSION}: update the program")
    expected = content.pop("sha256", None)
    try:
        got = _content_sha256(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    _require_sha256(path, expected, got)
    match content:
        case {"step": int(), "tensors_sha256": str(), "state": dict()}:
            pass
        case _:
            raise CheckpointError(
                f"{path} is not a checkpoint of this program: step, tensors_sha256 or state is missing"
            )
    tensors_path = path.with_suffix(".safetensors")
    data = _read_bytes(tensors_path)
    _require_sha256(tensors_path, content["tensors_sha256"], hashlib.sha256(data).hexdigest())
    return content, data


def _require_sha256(path: Path, expected: object, got: str) -> None:
    if got != expected:
        raise CheckpointError(f"{path} is damaged: sha256 expected {expected}, got {got}")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: a checkpoint is a .json and a .safetensors of one name") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def _refuse_pickle(path: Path, data: bytes) -> None:
    """Say plainly that a pickle or a zip archive was renamed; safetensors has its JSON header's brace at byte 8."""
    if data[8:9] != b"{" and (data.startswith(b"PK\x03\x04") or re.match(rb"\x80[\x02-\x05]", data)):
        raise CheckpointError(f"{path} is a pickle or a zip archive, not a safetensors file: refused unopened")


def _leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """(dotted key, value) of everything in a nested dict that is not itself a dict with entries."""
    if isinstance(value, dict) and (value or not key):
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else name)
    else:
        yield key, value


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
