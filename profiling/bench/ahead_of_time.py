"""Facts about the speed of kernels from their machine code, for GPUs that are not there.

`launches` runs an op and records its kernel launches instead of executing them: dtypes, tile sizes, warps, and the
arguments that 16 divides. `compile_all` compiles the records in child processes, since a process that interprets
kernels cannot compile them, and returns `Facts`.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from profiling import ROOT
from profiling.bench import machine_code
from profiling.device.specifications import LIMITS, MATRIX_INSTRUCTION, REGISTERS, RESERVED_SHARED_BYTES

if TYPE_CHECKING:
    from triton.compiler.compiler import ASTSource

    from kernels.tiles import Gpu


_TYPES = {
    "torch.float16": "fp16",
    "torch.bfloat16": "bf16",
    "torch.float32": "fp32",
    "torch.uint8": "u8",
    "torch.int32": "i32",
    "torch.int64": "i64",
}


@dataclass(frozen=True)
class Build:
    """One kernel to compile.

    `module` is an import name, or the path of a source file. `signature` names the type of every argument: "*fp16",
    "i32", "constexpr", "tensordesc<fp16[1, 8, 8, 64]>". A launch found 16 to divide the arguments in `divisible`, and
    not to divide those in `indivisible`.
    """

    module: str
    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, int | float | bool | str | None]
    divisible: tuple[str, ...] = ()
    indivisible: tuple[str, ...] = ()
    options: dict[str, int] = field(default_factory=dict)  # num_warps, num_stages, ...
    arch: int = 90
    label: str = ""
    inspect: bool = True  # False: only see whether it compiles, in a quarter of the time
    programs: int = 0  # of the recorded launch, else 0; the code does not depend on it
    integers: dict[str, int] = field(default_factory=dict)  # arguments that the code does not depend on

    def on(self, arch: int) -> "Build":
        """The same for another architecture: 80, 90, 100."""
        return dataclasses.replace(self, arch=arch)

    def key(self) -> str:
        """Equal for builds that compile to the same code, whatever their names."""
        bare = dataclasses.replace(self, label="", programs=0, integers={})
        return json.dumps(dataclasses.asdict(bare), sort_keys=True)


@dataclass(frozen=True)
class Facts:
    """The result of a build. `error` is the compiler's message after a failure; the rest is then zero or empty.

    `sass`, `loops`, `overwritten` are `machine_code.Sass`'s; `spill_bytes` are stored and loaded, None where only the
    driver was asked; `local_bytes` is a thread's stack and local memory, `tensor_columns` a block's part of Blackwell's
    tensor memory, `notes` are ptxas's warnings and C75xx remarks (serialised matrix instructions).
    """

    label: str
    arch: int
    registers: int = 0
    spill_bytes: int | None = 0
    local_bytes: int = 0
    shared_bytes: int = 0
    warps: int = 0
    tensor_columns: int = 0
    sass: dict[str, int] = field(default_factory=dict)
    loops: list[dict[str, int]] = field(default_factory=list)
    overwritten: int = 0
    notes: list[str] = field(default_factory=list)
    error: str = ""

    def count(self, prefix: str, suffix: str = "") -> int:
        """Instructions whose mnemonic begins with `prefix` and contains `suffix`: count("LDG", ".128")."""
        return sum(n for name, n in self.sass.items() if name.startswith(prefix) and suffix in name)

    def blocks_per_sm(self) -> int | None:
        """Blocks that one multiprocessor holds at once; 0 if not even one fits, None for an unknown architecture."""
        limits = LIMITS.get(self.arch)
        if limits is None or self.error:
            return None
        if self.shared_bytes > limits.block_shared_bytes:
            return 0
        registers = self.warps * -(-self.registers * 32 // 256) * 256
        bounds = [
            limits.blocks,
            limits.warps // self.warps,
            REGISTERS // max(registers, 1),
            limits.shared_bytes // (self.shared_bytes + RESERVED_SHARED_BYTES),
        ]
        if self.tensor_columns:
            bounds.append(limits.tensor_columns // self.tensor_columns)
        return min(bounds)

    def instructions_per_matrix_step(self) -> float | None:
        """A warp's instructions in the main loop for each matrix instruction; None without such a loop."""
        body, matrices = self.main_loop()
        return sum(body.values()) / sum(matrices.values()) if matrices else None

    def macs_per_matrix_step(self) -> int | None:
        """Multiply-adds of a matrix instruction of the main loop, by its name: 64 * 128 * 16 of "HGMMA.64x128x16.F32".

        The extents may be smaller than the block's: the compiler may split its columns over the warps.
        """
        _, matrices = self.main_loop()
        shape = re.search(r"\.(\d+)x(\d+)x(\d+)", next(iter(matrices), ""))
        return math.prod(map(int, shape.groups())) if shape else None

    def main_loop(self) -> tuple[dict[str, int], dict[str, int]]:
        """(the loop with most matrix instructions for its length, these), both empty where there is none.

        Other jumps backward may enclose a part of the main loop, or more than it.
        """
        matrix, best = MATRIX_INSTRUCTION.get(self.arch), ({}, {})
        for body in self.loops:
            matrices = {name: n for name, n in body.items() if matrix and name.startswith(matrix)}
            density = sum(matrices.values()) / sum(body.values())
            if density > sum(best[1].values()) / max(1, sum(best[0].values())):
                best = body, matrices
        return best


@contextlib.contextmanager
def launches(gpu: "Gpu | None" = None) -> Iterator[list[Build]]:
    """Record every kernel launch in the context as a Build instead of executing it; tensors may be on any device.

    With `gpu`, convolutions take their tile for that GPU, and the builds are for its architecture.
    """
    from triton.runtime import interpreter, jit

    from kernels import contract, tiles

    builds: list[Build] = []

    def record(self, *args, grid, warmup, **kwargs):
        build = dataclasses.replace(_build(self, args, kwargs), programs=math.prod(grid))
        builds.append(build if gpu is None else build.on(10 * gpu.capability[0] + gpu.capability[1]))

    with contextlib.ExitStack() as stack:
        for owner in (interpreter.InterpretedFunction, jit.JITFunction):
            stack.enter_context(replaced(owner, "run", record))
        stack.enter_context(replaced(contract, "unavailable", lambda device: None))
        if gpu is not None:
            stack.enter_context(tiles.as_on(gpu))
        yield builds


@contextlib.contextmanager
def replaced(owner: object, name: str, value: Callable) -> Iterator[None]:
    """Let `owner.name` be `value` in the context."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def unique(builds: list[Build]) -> list[Build]:
    """`builds` without duplicates, in order."""
    return list({build.key(): build for build in builds}.values())


def _build(kernel, args: tuple, kwargs: dict) -> Build:
    fn = kernel.fn
    options = getattr(kernel, "kwargs", {})  # an interpreted kernel keeps its decorator's options here
    general = options.get("do_not_specialize") or getattr(kernel, "do_not_specialize", None) or ()
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
    for name, default in zip(reversed(names), reversed(fn.__defaults__ or ()), strict=False):
        values.setdefault(name, default)
    signature, constexprs, integers = {}, {}, {}
    found: dict[bool, list[str]] = {True: [], False: []}  # divisible by 16?
    for name in names:
        value, annotation = values[name], str(fn.__annotations__.get(name, ""))
        if "constexpr" in annotation or value is None or (type(value) is int and value == 1 and name not in general):
            signature[name], constexprs[name] = "constexpr", value
        elif hasattr(value, "block_shape"):
            block = ", ".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{_TYPES[str(value.base.dtype)]}[{block}]>"
        elif hasattr(value, "data_ptr"):
            signature[name] = "*" + _TYPES[str(value.dtype)]
            found[value.data_ptr() % 16 == 0].append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name], integers[name] = "i32" if -(2**31) <= value < 2**31 else "i64", value
            if name not in general:
                found[value % 16 == 0].append(name)
    module = fn.__module__ if fn.__module__.startswith("kernels") else fn.__code__.co_filename
    options = {k: v for k, v in kwargs.items() if k not in names}
    label = " ".join([fn.__name__, *(f"{name}={value}" for name, value in constexprs.items())])
    known = tuple(found[True]), tuple(found[False])
    return Build(module, fn.__name__, signature, constexprs, *known, options, label=label, integers=integers)


def compile_all(builds: list[Build], environment: Mapping[str, str] = os.environ) -> list[Facts]:
    """Compile `builds` in as many child processes as there are processors; Facts in the same order.

    The processes get `environment` without the interpreter. A kernel that does not compile gives Facts with an `error`.
    Raises RuntimeError if a child process itself fails.
    """
    workers = max(1, min(os.cpu_count() or 1, 8, len(builds)))
    environment = {k: v for k, v in environment.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    facts: list[Facts] = [Facts("", 0)] * len(builds)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{i}.json") for i in range(workers)]
        children = []
        try:
            for i, file in enumerate(files):
                file.write_text(json.dumps([dataclasses.asdict(build) for build in builds[i::workers]]))
                command = [sys.executable, "-m", "profiling.bench.ahead_of_time", str(file)]
                children.append(subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
            errors = [child.communicate()[1] for child in children]
        finally:
            for child in children:
                child.kill()  # unless it has ended
        for i, (child, file) in enumerate(zip(children, files, strict=True)):
            if child.returncode != 0:
                raise RuntimeError(f"the compiling process ended with {child.returncode}: {errors[i][-2000:]}")
            facts[i::workers] = [Facts(**one) for one in json.loads(file.read_text())]
    return facts


def _compile(build: Build) -> Facts:
    """The facts of a build. A failure counts only if it repeats with an empty cache: Triton's may hold torn files."""
    from triton import knobs

    try:
        return _facts(build)
    except Exception:
        with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
            knobs.cache.dir = folder
            try:
                return _facts(build)
            except Exception as error:  # whatever the compiler raises is the finding
                return Facts(build.label, build.arch, error=f"{type(error).__name__}: {error}")


def source(build: Build) -> "ASTSource":
    """Triton's input: with the options it is the key of Triton's cache, where a launch finds the same code."""
    from triton.compiler.compiler import ASTSource

    kernel = getattr(_load(build.module), build.kernel)
    known = {name: [["tt.divisibility", 16]] for name in build.divisible} | {name: [] for name in build.indivisible}
    attributes = {(i,): known[name] for i, name in enumerate(kernel.arg_names) if name in known}
    return ASTSource(kernel, build.signature, constexprs=build.constexprs, attrs=attributes)


def _facts(build: Build) -> Facts:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    target, options = GPUTarget("cuda", build.arch, 32), dict(build.options)
    # ptxas -v, as Triton calls it, is what reports spills and serialised matrix instructions without a driver.
    with knobs.nvidia.scope(), contextlib.redirect_stdout(io.StringIO()) as said:
        knobs.nvidia.dump_ptxas_log = build.inspect
        compiled = triton.compile(source(build), target=target, options=options)
        if not build.inspect:
            return Facts(build.label, build.arch)
        if "registers" not in said.getvalue():  # it came out of the cache
            backend = make_backend(target)
            backend.make_cubin(compiled.asm["ptx"], {}, backend.parse_options(options), build.arch)
    log = said.getvalue()
    sass = machine_code.read(compiled.asm["cubin"])
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return Facts(
        label=build.label,
        arch=build.arch,
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spill_bytes=int(spills[2]) + int(spills[3]),
        local_bytes=int(spills[1]),
        shared_bytes=compiled.metadata.shared,
        warps=compiled.metadata.num_warps,
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        sass=sass.counts,
        loops=sass.loops,
        overwritten=sass.overwritten,
        notes=[line.strip() for line in log.splitlines() if "warning" in line or re.search(r"C75\d\d", line)],
    )


def _load(module: str):
    if not module.endswith(".py"):
        return importlib.import_module(module)
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


if __name__ == "__main__":
    exchange = Path(sys.argv[1])  # holds the builds, and afterwards their facts
    requests = [Build(**one) for one in json.loads(exchange.read_text())]
    exchange.write_text(json.dumps([dataclasses.asdict(_compile(build)) for build in requests]))
