"""What `reproduce` does on a device, and in what order."""

import collections
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.study import Request
from model.config import preset as presets
from model.errors import RunError
from profiling.records import read_json, read_jsonl
from profiling.specifications import MACHINES, machine

ROOT = Path(__file__).resolve().parent.parent
TILES = ROOT / "kernels" / "tiles.json"


@dataclass(frozen=True)
class Step:
    """`command`'s exit codes in `accepts` mean that it is done; `weight` is its share of the budget.

    `found(OUT)` says in a line what it found, and raises an OSError, ValueError, KeyError or IndexError where it did
    not. `fresh` names a folder in OUT that an unfinished attempt leaves behind and a new one cannot use. `after(OUT,
    done)` is called after each attempt. `environment` is added to this process's own, and the words that `given()` then
    returns to the command. One that `repeats` reads what the others left, and is done anew by every call. With a
    `reason` it cannot run here.
    """

    name: str
    command: tuple[str, ...]
    weight: float
    found: Callable[[Path], str] | None = None
    accepts: tuple[int, ...] = (0,)
    fresh: str | None = None
    after: Callable[[Path, bool], None] | None = None
    reason: str | None = None
    environment: tuple[tuple[str, str], ...] = ()
    given: Callable[[], tuple[str, ...]] = tuple
    further: bool = False
    repeats: bool = False

    def words(self) -> list[str]:
        """The command as it is now."""
        return [*self.command, *self.given()]


SMALL_CASES = (
    "3x32x32",
    "64x32x32-128x1x1-s2",
    "256x8x8-256x3x3-s2",
    "256x4x4-256x3x3-s1",
    "512x4x4-512x3x3-s1",
    "256x4x4",
    "512x4x4",
    "512x8x8",
)
"""Layers by which every op of the benchmark runs at least once, with everything that can be fused into it."""


def plan(out: Path, request: Request, small: bool, gpu: str | None) -> list[Step]:
    """The steps in order of value, in small or whole, for the absolute folder `out`; the further ones come last.

    `gpu` is the GPU's name, None where there is none.
    """
    python, data = sys.executable, ["--synthetic"] if request.synthetic else []
    if request.data_dir:
        data = ["--data-dir", str(request.data_dir.absolute())]
    settings = [f"--set={setting}" for setting in request.settings]
    settings += [] if request.seed is None else ["--seed", str(request.seed)]
    no_gpu = None if gpu else "it needs a CUDA GPU"

    def module(*words: str) -> tuple[str, ...]:
        return python, "-m", *words

    def suite(name: str, **more: Any) -> Step:
        tests = ["tests/test_config.py", "tests/test_schedule.py", "tests/test_timing.py"] if small else _gpu_tests()
        spread = [] if small else _spread()
        command = module("pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out / name}.xml", *spread, *tests)
        return Step(name, command, 150, last_line(name), accepts=(0, 1), **more)

    def trained(name: str, preset: str, weight: float, *more: str, **options: Any) -> Step:
        network = ["--preset", "laptop", "--epochs", "1"] if small else ["--preset", preset]
        command = (python, "train.py", *data, *settings, *network, *more, "--out", str(out / name))
        return Step(name, command, weight, after=_drop_checkpoints(name), **options)

    def profiled(name: str, preset: str, **more: Any) -> Step:
        measured = out / "ceilings.json"

        def given() -> tuple[str, ...]:
            fit = _ceilings_fit(measured, request, "laptop" if small else preset)
            return ("--ceilings", str(measured)) if fit else ()

        return trained(name, preset, 120, "--profile", found=_headline(name), fresh=name, given=given, **more)

    def accuracy(name: str, preset: str, runs: int, **more: Any) -> Step:
        target = () if small else ("--target-accuracy", "0.94")
        several = ("--runs", "2" if small else str(runs), "--resume", "auto")
        return trained(name, preset, 80, *target, *several, found=_claim(name), accepts=(0, 7), **more)

    def held(name: str, **more: Any) -> Step:
        command = module("experiments", "predictions", "--against", str(out))
        another = None if machine(gpu) else f"the predictions are for {' and '.join(one.name for one in MACHINES)}"
        return Step(name, command, 10, last_line(name), reason=no_gpu or another, repeats=True, **more)

    def sanitized(tool: str) -> Step:
        """Our kernels under a checker; without the caching allocator an access outside of a tensor is one of memory."""
        shapes, checked = [f"--shape={shape}" for shape in SMALL_CASES], module("profiling", "bench", "--check")
        found = shutil.which("compute-sanitizer")
        absent = None if found else "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
        return Step(
            tool,
            ("compute-sanitizer", f"--tool={tool}", "--error-exitcode=1", *checked, *shapes),
            120,
            last_line(tool),
            reason=no_gpu or absent,
            environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
            further=True,
        )

    ladder = module("experiments", "ladder", *data, *settings, "--out", str(out / "ladder"), "--epochs-per-rung", "4")
    ceilings = module("profiling", "device", "--out", str(out / "ceilings.json"), "--seconds", "0.1" if small else "1")
    bench = module("profiling", "bench", "--out", str(out / "bench.jsonl"), "--resume")
    tune = module("profiling", "bench", "--tune", *(["--quick"] if small else []))
    quick = ("bn_finalize", "--quick") if small else ()
    return [
        suite("suite"),
        Step("doctor", module("profiling", "doctor"), 20, _doctor_says),
        Step("ceilings", ceilings, 90, _ceilings_say),
        Step("tiles", tune, 90, after=_keep_tiles, reason=no_gpu),
        Step("bench", (*bench, *quick), 90, _bench_says, accepts=(0, 1)),
        Step("ladder", (*ladder, *(["--small"] if small else [])), 120, _ladder_says),
        profiled("profiled", "fused"),
        accuracy("accuracy", "fused", 5),
        held("predictions"),
        suite("suite-again", further=True),
        sanitized("memcheck"),
        sanitized("racecheck"),
        profiled("profiled-article", "article-256", further=True),
        accuracy("accuracy-article", "article-256", 3, further=True),
        accuracy("accuracy-resnet9", "resnet9", 3, further=True),
        Step(
            "step-modes",
            module("experiments.step_modes", "--out", str(out)),
            80,
            last_line("step-modes"),
            further=True,
            reason=no_gpu,
        ),
        held("predictions-again", further=True),
    ]


def _spread() -> list[str]:
    """What makes pytest use several processes, where its plugin is installed: most of the time the compiler works."""
    processes = min(8, (os.cpu_count() or 1) // 2)
    return ["-n", str(processes)] if processes > 1 and importlib.util.find_spec("xdist") else []


def _gpu_tests() -> list[str]:
    """The test files of which a GPU computes something: those marked for one, and those that ask for the device."""
    asks = re.compile(r"mark\.gpu|def test\w*\([^)]*\bdevice\b")
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if asks.search(path.read_text(encoding="utf-8"))]


def last_line(name: str) -> Callable[[Path], str]:
    """The last line of a step's log."""

    def read(out: Path) -> str:
        lines = (out / f"{name}.log").read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")

    return read


def _keep_tiles(out: Path, done: bool) -> None:
    """What was tuned before time ran out is in the table too."""
    shutil.copyfile(TILES, out / "tiles.json")


def take_tiles(out: Path) -> bool:
    """Make the table of `out` this checkout's again; whether it was another.

    What an earlier call tuned may have been in another copy of the checkout, and all of a folder's results are to be
    measured with the same tiles.
    """
    kept = out / "tiles.json"
    other = kept.exists() and kept.read_bytes() != TILES.read_bytes()
    if other:
        shutil.copyfile(kept, TILES)
    return other


def _drop_checkpoints(folder: str) -> Callable[[Path, bool], None]:
    """Weights of finished runs are not results: a folder without them is small enough to be committed."""

    def drop(out: Path, done: bool) -> None:
        for path in (out / folder).rglob("checkpoint-*") if done else ():
            path.unlink()

    return drop


def _doctor_says(out: Path) -> str:
    lines = (out / "doctor.log").read_text(encoding="utf-8").splitlines()
    missing = [re.split(r"\s{2,}", line.removeprefix("missing "))[0] for line in lines if line.startswith("missing ")]
    return f"missing: {', '.join(missing)}" if missing else "nothing is missing"


def _ceilings_fit(path: Path, request: Request, preset: str) -> bool:
    """Whether they were measured on this machine in this run's dtype: a folder may have been begun on another."""
    from model.trainer import choose_device, choose_dtype
    from profiling.ceilings import reread

    try:
        config = request.configure(presets(preset))
        device = choose_device(config.device)
        reread(path, device, choose_dtype(config.dtype, device, config.ops))
    except (OSError, ValueError, RunError):
        return False
    return True


def _ceilings_say(out: Path) -> str:
    from profiling.ceilings import Ceilings, in_words

    found = Ceilings.from_json(read_json(out / "ceilings.json"))
    return f"{in_words(found.flops_per_s, 'FLOP/s')}, {in_words(found.bytes_per_s, 'B/s')} read plus written"


def _bench_says(out: Path) -> str:
    """How our kernels compare with the best alternative, caches cold."""
    rows = [row for row in read_jsonl(out / "bench.jsonl") if row.get("provider") == "ours" and row["mode"] == "cold"]
    words = collections.Counter(row["verdict"] for row in rows if row["verdict"])
    wrong = sum(row["wrong"] for row in rows)
    counted = ", ".join(f"{count} {word}" for word, count in words.most_common()) or "none timed beside another"
    return f"our kernels: {counted}" + (f"; {wrong} WRONG" if wrong else "")


def _ladder_says(out: Path) -> str:
    return str(read_json(out / "ladder" / "ladder.json")["sentences"][0])


def _headline(folder: str) -> Callable[[Path], str]:
    """What the report of a profiled run says first."""
    return lambda out: str(read_json(out / folder / "report.json")["headline"])


def _claim(folder: str) -> Callable[[Path], str]:
    """What several runs reached."""

    def read(out: Path) -> str:
        from profiling.statistics import claim_in_words

        return claim_in_words(read_json(out / folder / "summary.json"))

    return read
