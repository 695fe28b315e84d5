"""May a run use its kernels? Asked of `model.probe` in a process of its own, and remembered.

A fault in a kernel ends a CUDA context for good, and a loop without an end cannot be left: in a process of its own
either costs a line and not the run.
"""

import contextlib
import datetime
import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kernels.contract import dtype_name
from kernels.jit import INTERPRETED, PDL, triton, unavailable
from model import ROOT
from model.config import Config
from model.distributed import Ranks
from model.files import read_regular, write_files

COMMAND = [sys.executable, "-m", "model.probe"]

LIMIT_S = 300
"""Limit for a probe. From a cold cache it needs some 100 s of compiling, spread over the cores, 10 s to start and 10 s
to compare: a single core makes it with a factor of two to spare. Ranks wait twice as long for each other."""

ASKED = (
    *("network", "widths", "prep_bn_relu", "uniform_gamma", "pool_first"),
    *("batch_size", "momentum", "label_smoothing", "crop_pad", "cutout", "ops", "conv"),
)
"""The settings that decide which kernels run, and on what."""

_known: dict[str, str | None] = {}
"""This process's verdicts: a probe that failed is not asked again, though the next process may."""


def refusal(
    config: Config, device: torch.device, dtype: torch.dtype, ranks: Ranks, say: Callable[[str], Any]
) -> str | None:
    """Why the kernels of `config` are not to run on `device` in `dtype`; None if they may. The same on every rank.

    The first rank asks before the others, who need not where they have the same GPU; and what one is refused, all are.
    """
    asked = Config(**{name: getattr(config, name) for name in ASKED}, device=str(device), dtype=dtype_name(dtype))
    asked = replace(asked, batch_size=-(-config.batch_size // ranks.world))
    reason = unavailable(device)
    key = None if reason else _key(asked, device)
    if ranks.is_first and not reason:
        reason = _ask(asked, key, say)
    first_key, first_reason = ranks.gather((key, reason))[0]
    if not (ranks.is_first or reason or first_reason or key == first_key):
        reason = _ask(asked, key, say)
    return next((r for r in ranks.gather(first_reason or reason) if r), None)


def _key(asked: Config, device: torch.device) -> dict[str, Any]:
    """All that a verdict depends on."""
    cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "capability": torch.cuda.get_device_capability(device) if cuda else None,
        "driver": _driver() if cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "interpreted": INTERPRETED,
        "dependent_launch": PDL,
        "sources": _sources(ROOT),
        "config": asked.to_json() | {"device": device.type},
    }


def _driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # no library, or another one than the driver's: each its own exception class
        return None


@functools.cache
def _sources(root: Path) -> str:
    """sha256 of what is compiled, of what calls it and of what judges it."""
    digest = hashlib.sha256()
    for path in sorted([*root.glob("kernels/*.py"), *root.glob("kernels/*.json"), *root.glob("model/**/*.py")]):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def _ask(asked: Config, key: dict[str, Any], say: Callable[[str], Any]) -> str | None:
    """The verdict that is remembered, or else a probe's; only what was compared is remembered on the disk.

    A crash or a time-out may be another program's doing, and what it compiled makes the next attempt shorter.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    # Beside the kernels that Triton keeps: who deletes these has them compiled, in parallel, by the next probe.
    path = Path(triton.knobs.cache.dir) / "verdicts" / f"{name}.json"
    if name not in _known:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            record = json.loads(read_regular(path, 1 << 20))
            seen = f" (found on {record['date']}; to ask again delete {path})"
            _known[name] = None if record["reason"] is None else record["reason"] + seen
    if name not in _known:
        say(f"compiling the kernels of ops={asked.ops}, and comparing a step with the reference ops ...")
        verdict = _probe(asked)
        _known[name] = reason = verdict["reason"]
        for line in verdict.get("unchecked", ()):
            say(f"not compared with float64: {line}")
        if verdict.get("compared"):
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
            with contextlib.suppress(OSError):  # a folder that cannot be written to only means to ask again
                path.parent.mkdir(parents=True, exist_ok=True)
                write_files({path: json.dumps({"key": key, "reason": reason, "date": date}).encode()})
    return _known[name]


def _probe(asked: Config) -> dict[str, Any]:
    """The answer of `model.probe` within `LIMIT_S`; otherwise {"reason": how it ended, and at what}."""
    pipe = subprocess.PIPE
    try:  # in a process group: its compilers end with it, and Ctrl-C is not for it to answer
        process = subprocess.Popen(COMMAND, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, process_group=0)
    except OSError as error:
        return {"reason": f"the probe could not be started: {error}"}
    ended = None
    try:
        out, err = process.communicate(json.dumps(asked.to_json()).encode(), timeout=LIMIT_S)
    except subprocess.TimeoutExpired as expired:
        out, err, ended = expired.stdout or b"", b"", f"did not end within {LIMIT_S} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold back a process that is killed
            process.wait(timeout=5)
    last = _last(out)
    if "reason" not in last:
        last["reason"] = f"{last.get('running', 'the probe')}, {ended or _end(process, err)}"
    return last


def _last(out: bytes) -> dict[str, Any]:
    """The last whole line of JSON."""
    for line in reversed(out.decode(errors="replace").splitlines()):
        with contextlib.suppress(ValueError):
            return dict(json.loads(line))
    return {}


def _end(process: subprocess.Popen, err: bytes) -> str:
    """The end of a process without a verdict, in words."""
    code, lines = process.returncode, err.decode(errors="replace").strip().splitlines()
    if code == -signal.SIGALRM:
        return "did not end within the time limit of one op"
    how = f"by {signal.Signals(-code).name}" if code and code < 0 else f"with exit code {code}"
    return f"ended the probe's process {how}" + (f" ({lines[-1]})" if lines else "")
