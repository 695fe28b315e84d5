"""Machine code of the kernels by other versions of Triton: each torch pins one on a GPU machine, and compilers differ.

    python -m experiments tritons 3.6.0 3.7.1 3.8.0 3.9.0    # from the package index, into results/tritons/
    python -m experiments tritons FOLDER                     # one that pip install --no-deps --target FOLDER has made

With each, in an environment of its own, every kernel of a training step and of an evaluation of both networks is
compiled for each architecture, and its machine code is held against what the tests ask of it; a step of a tiny network
is run in its interpreter and held against the reference. Rows are on the disk as they are made: a command that was
ended goes on there, and what was made of other kernels is made anew.
"""

import ast
import datetime
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.study.folder import Request
from experiments.tritons_table import ARCHITECTURES, found, known, markdown, summary
from model.config import Config
from model.errors import RunError, UsageError
from model.presets import preset
from profiling import ROOT
from profiling.bench import ahead_of_time
from profiling.device.specifications import LIMITS, MATRIX_INSTRUCTION
from profiling.output.files import append_jsonl, read_jsonl, write_text

if TYPE_CHECKING:
    from model.interrupts import Interrupts
    from profiling.account.work import Work
    from profiling.bench.ahead_of_time import Build, Facts
    from profiling.output.terminal import Terminal

OUT = ROOT / "results" / "tritons"
IMAGES = 4
"""Images of a recorded step: the code does not depend on their number."""
TOGETHER = 48
"""Kernels that are compiled between two looks at the disk: some two minutes of a core."""
PROBE_LIMIT_S = 900
VERSION = re.compile(r"\d+(\.\d+)+((a|b|rc)\d+)?")
INSTALLED = """
import json, subprocess, sys
import triton
from triton.backends.nvidia import compiler
own = [m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "triton" and getattr(m, "__file__", None)]
tools = {str(a): subprocess.check_output([compiler.get_ptxas(a).path, "--version"], text=True) for a in %s}
print(json.dumps({"version": triton.__version__, "files": own, "ptxas": tools,
                  "paths": [compiler.get_ptxas(int(a)).path for a in tools]}))
"""


class Named(NamedTuple):
    """A kernel to compile: the op that launches it, and the layer."""

    op: str
    layer: str
    build: "Build"


class Environment(NamedTuple):
    """A Triton in a folder of its own: its version, ptxas by architecture, and the environment of processes with it."""

    version: str
    ptxas: dict[str, str]
    variables: dict[str, str]


def check(request: Request, tritons: Sequence[str], architectures: Sequence[int] = (), out: Path | None = None) -> None:
    """Raise UsageError for a word that is neither a version nor a folder with a Triton; for an unknown architecture."""
    for arch in architectures:
        if arch not in ARCHITECTURES:
            raise UsageError(f"--arch {arch} is none of {', '.join(map(str, ARCHITECTURES))}")
    for word in tritons:
        if not VERSION.fullmatch(word) and not (Path(word) / "triton").is_dir():
            raise UsageError(
                f"{word} is neither a version, as 3.6.0, nor a folder that "
                f"`pip install --no-deps --target {word} triton==VERSION` has made"
            )
    if out is not None and out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is not a folder")


def run(
    request: Request,
    terminal: "Terminal",
    interrupts: "Interrupts",
    tritons: Sequence[str],
    architectures: Sequence[int] = (),
    out: Path | None = None,
) -> dict[str, Any]:
    """Write VERSION.jsonl for each Triton, and tritons.md of all there are, into `out`. Returns a summary by version.

    Raises RunError where one cannot be had or a process with it fails; those before it are kept.
    """
    if importlib.util.find_spec("triton") is None:
        raise RunError("kernels are recorded with Triton, which is not installed (it has wheels for Linux only)")
    out = out or OUT
    try:
        out.mkdir(parents=True, exist_ok=True)
        sources = fingerprint()
        wanted = {arch: recorded(arch) for arch in architectures or ARCHITECTURES}
        for word in tritons:
            with tempfile.TemporaryDirectory() as folder:
                _one(word, Path(folder), wanted, sources, out, terminal)
            write_text(out / "tritons.md", markdown(found(out, sources)))
        terminal.say(f"the table is {out / 'tritons.md'}")
        return {version: summary(rows) for version, rows in found(out, sources).items()}
    except OSError as error:
        raise RunError(f"{out}: {error}") from None


def fingerprint() -> str:
    """A hash of all that decides a kernel's machine code and its row. What is launched is in the rows' keys."""
    files = [*(ROOT / "kernels").glob("*.py"), Path(__file__), ROOT / "profiling" / "device" / "specifications.py"]
    files += [ROOT / "profiling" / "bench" / f"{name}.py" for name in ("ahead_of_time", "machine_code")]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.name}\n{code(path.read_text())}\n".encode())
    return digest.hexdigest()[:16]


def code(source: str) -> str:
    """A module's source without comments, layout, and strings that stand alone, as docstrings do: words may change."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [one for one in node.body if not isinstance(one, ast.Expr) or not _is_text(one.value)]
    return ast.unparse(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def recorded(arch: int) -> list[Named]:
    """Every different kernel that a training step and an evaluation of each network launch on `arch`."""
    from profiling.bench.kernel_facts import Gpu

    gpu, kernels = Gpu(f"sm_{arch}", (arch // 10, arch % 10)), []
    for name in ("fused", "resnet9"):
        config = preset(name).with_settings(["ops=fused", "conv=ours", "cutout=8", f"batch_size={IMAGES}"])
        with ahead_of_time.launches(gpu) as builds:
            kernels += _of_a_step(config, builds)
        with ahead_of_time.launches(gpu) as builds:
            _evaluate(config)
        kernels += [Named(f"evaluation of {name}", "", one) for one in builds]
    return list({one.build.key(): one for one in reversed(kernels)}.values())[::-1]


def _of_a_step(config: Config, builds: "list[Build]") -> list[Named]:
    """The kernels of a training step, each with its op; `builds` is the list in which launches are recorded."""
    import torch

    from model.trainer import modelled_step
    from profiling.account.work import work_of

    kernels: list[Named] = []

    def on_op(rows: "list[Work]") -> None:
        kernels.extend(Named(rows[0].family, rows[0].layer, one) for one in builds[len(kernels) :])

    *_, update = work_of(*modelled_step(config, torch.float16, "cpu"), on_op)
    on_op([update])
    return kernels


def _evaluate(config: Config) -> None:
    import torch

    from model.trainer import build_network

    images = torch.empty(IMAGES, 3, 32, 32, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        build_network(config).to(memory_format=torch.channels_last).eval()(images)


def _one(
    word: str, folder: Path, wanted: dict[int, list[Named]], sources: str, out: Path, terminal: "Terminal"
) -> None:
    """Make the rows of one Triton that are not there yet, and drop those of kernels that are launched no more."""
    place = Path(word)
    if VERSION.fullmatch(word):
        terminal.say(f"triton {word}: installing")
        place = folder / "triton"
        install(word, place)
    own = environment(place.resolve(), folder)
    header = {"kind": "triton", "version": own.version, "ptxas": own.ptxas, "sources": sources}
    path = out / f"{own.version}.jsonl"
    keys = {arch: {_key(one.build) for one in kernels} for arch, kernels in wanted.items()}
    rows = known(path, header) or [header | {"date": datetime.datetime.now(datetime.UTC).date().isoformat()}]
    rows = [row for row in rows if row["kind"] != "kernel" or row["key"] in keys.get(row["arch"], (row["key"],))]
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    done = {row["key"] for row in rows if row["kind"] == "kernel"}
    for arch, kernels in wanted.items():
        left, start_s = [one for one in kernels if _key(one.build) not in done], time.monotonic()
        for i in range(0, len(left), TOGETHER):
            for row in compiled(left[i : i + TOGETHER], own):
                append_jsonl(path, row)
        faulty = sum(bool(row["faults"]) for row in read_jsonl(path) if row.get("arch") == arch)
        seconds = f" in {time.monotonic() - start_s:.0f} s" if left else ", as they were"
        terminal.say(f"triton {own.version}, sm_{arch}: {len(kernels)} kernels, {faulty} with faults{seconds}")
    if not any(row["kind"] == "interpreter" for row in rows):
        reason = interpreted(own)
        append_jsonl(path, {"kind": "interpreter", "reason": reason})
        terminal.say(f"triton {own.version}, interpreter: {reason or 'right'}")


def install(version: str, folder: Path) -> None:
    """Install that Triton alone into `folder`. Raises RunError with what pip says."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command = [*pip, "--only-binary", ":all:", "--target", str(folder), f"triton=={version}"]
    variables = {k: v for k, v in os.environ.items() if k != "PIP_CONSTRAINT"}  # which may pin another
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if not line.lower().startswith("warning")]
        why = said[-1].strip() if said else f"pip ended with {done.returncode}"
        raise RunError(f"triton {version} cannot be installed: {why}; a folder that holds it can be named instead")


def environment(place: Path, scratch: Path) -> Environment:
    """The environment of processes that run the Triton in `place`, and no other. Raises RunError where they do not."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "PTXAS_"))}
    first = os.pathsep.join(filter(None, [str(place), kept.get("PYTHONPATH", "")]))
    variables = kept | {"PYTHONPATH": first, "TRITON_CACHE_DIR": str(scratch / "cache")}
    command = [sys.executable, "-c", INSTALLED % (ARCHITECTURES,)]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    try:
        about = json.loads(done.stdout.splitlines()[-1])
        foreign = [
            file for file in [*about["files"], *about["paths"]] if not Path(file).resolve().is_relative_to(place)
        ]
        ptxas = {arch: re.search(r"release \S+ V(\S+)", text)[1] for arch, text in about["ptxas"].items()}
    except (ValueError, LookupError, TypeError):
        last = (done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"])[-1]
        raise RunError(f"{place} holds no Triton that this Python can run: {last}") from None
    if foreign:
        raise RunError(f"with {place} first on the path {foreign[0]} is used: another Triton leaks in")
    return Environment(about["version"], ptxas, variables)


def compiled(kernels: list[Named], own: Environment) -> list[dict[str, Any]]:
    """The rows of these kernels. Raises RunError where a compiling process fails.

    `loop` are the instructions of the main loop, `matrix` those of them that multiply; `faults` are of FAULTS.
    """
    try:
        results = ahead_of_time.compile_all([one.build for one in kernels], own.variables)
    except (RuntimeError, ValueError, TypeError) as error:
        raise RunError(f"triton {own.version}: {str(error).strip().splitlines()[-1]}") from None
    rows = []
    for (op, layer, build), facts in zip(kernels, results, strict=True):
        about = {"op": op, "layer": layer, "kernel": build.kernel, "arch": facts.arch, "tile": tile(build)}
        counted = ("registers", "spill_bytes", "local_bytes", "shared_bytes", "overwritten", "notes")
        # The first loop that multiplies, however little.
        bodies = ((body, _matrices(body, facts.arch)) for body in facts.loops)
        loop, matrix = next(((sum(body.values()), n) for body, n in bodies if n), (0, 0))
        error = (facts.error.strip().splitlines() or [""])[-1][:200]
        row = {"kind": "kernel", "key": _key(build), **about, **{name: getattr(facts, name) for name in counted}}
        row |= {"blocks_per_sm": facts.blocks_per_sm(), "loop": loop, "matrix": matrix}
        rows.append({**row, "error": error, "faults": faults(build, facts)})
    return rows


def _matrices(body: dict[str, int], arch: int) -> int:
    return sum(n for name, n in body.items() if name.startswith(MATRIX_INSTRUCTION[arch]))


def _key(build: "Build") -> str:
    return hashlib.sha256(build.key().encode()).hexdigest()[:12]


def faults(build: "Build", facts: "Facts") -> list[str]:
    """The faults of a kernel's machine code, by their names in `tritons_table.FAULTS`."""
    if facts.error:
        return ["error"]
    multiplies = "BLOCK_K" in build.constexprs
    has = {
        "spills": facts.spill_bytes,
        "local": facts.local_bytes,
        "remarks": facts.notes,
        "shared": facts.shared_bytes > LIMITS[facts.arch].block_shared_bytes,
        "matrix": multiplies and not facts.count(MATRIX_INSTRUCTION[facts.arch]),
        "TMA": build.constexprs.get("DESCRIPTORS") and not facts.count("UTMALDG"),
        "overwritten": facts.overwritten,
    }
    return [name for name, found in has.items() if found]


def tile(build: "Build") -> str:
    """All that decides the code but the operands, such as "128x64x64 4 warps 3 stages H=32 ..."."""
    blocks = [name for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if name in build.constexprs]
    words = ["x".join(str(build.constexprs[name]) for name in blocks)] if blocks else []
    words += [f"{build.options[name]} {name[4:]}" for name in ("num_warps", "num_stages") if name in build.options]
    rest = ((name, value) for name, value in build.constexprs.items() if name not in blocks and value is not None)
    return " ".join([*words, *(f"{name}={value}" for name, value in rest)])


def interpreted(own: Environment) -> str | None:
    """The fault of a step of a tiny network in this Triton's interpreter, None for none."""
    settings = ["widths=16,16,16,16", "conv=ours", "device=cpu", "dtype=float32", "batch_size=2", "cutout=8"]
    asked = json.dumps(preset("fused").with_settings(settings).to_json())
    command = [sys.executable, "-m", "model.probe"]
    variables = own.variables | {"TRITON_INTERPRET": "1"}
    pipes = {"input": asked, "capture_output": True, "text": True, "timeout": PROBE_LIMIT_S}
    try:
        done = subprocess.run(command, env=variables, cwd=ROOT, **pipes)
        verdict = json.loads(done.stdout.splitlines()[-1])
        return verdict["reason"] or ("; ".join(verdict["unchecked"]) or None)
    except subprocess.TimeoutExpired:
        return f"no answer within {PROBE_LIMIT_S} s"
    except (ValueError, LookupError, TypeError):
        return f"its process ended with {done.returncode}"
