"""What `reproduce` does on a device: three stages of bounded steps, each stage's most valuable evidence first.

`smoke` says whether anything works and how fast a step is, `numbers` is what can be quoted, `peers` is what the library
offers and what the checkers say. A limit is what the step needs on an H100 with some room, in seconds.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.reproduce_runs import FUSED, REFERENCE, WARM, WARM_UP, data_identity
from experiments.study.folder import Request
from profiling import ROOT
from profiling.device import ncu
from profiling.report.command import PROFILE_PASS

STAGES = {"smoke": 230.0, "numbers": 480.0, "peers": 560.0}
"""Seconds that a stage may take."""
TILES = ROOT / "kernels" / "tiles.json"
OURS = "ours"
MODES = {
    REFERENCE: ("article-256", {"preprocess": "on_device"}),
    OURS: ("fused", {"ops": "fused", "conv": "ours"}),
    "reference-eager": ("article-256", {"preprocess": "on_device", "step": "eager"}),
    "reference-compiled": ("article-256", {"preprocess": "on_device", "step": "compiled"}),
    "batchnorm": ("fused", {"ops": "batchnorm"}),
    "composed": ("fused", {"ops": "composed"}),
}
"""Preset and settings, in order of value. The preset's own input pipeline is one Python thread, seconds an epoch: peers
prepare their images on the device, as ours do, so that steps compare."""
WARMED = ("reference-compiled", "batchnorm", "composed", OURS)
"""Modes that compile for long: all at once, before any is timed."""
AUTOTUNED = "reference-max-autotune"
MAX_AUTOTUNE = {"TORCHINDUCTOR_" + name: "1" for name in ("MAX_AUTOTUNE", "COORDINATE_DESCENT_TUNING", "CUDAGRAPHS")}
"""What mode="max-autotune" sets, by the variables that torch._inductor.config reads (torch/_inductor/__init__.py)."""
VARIED = ("ops", "conv", "step", "preprocess", "epochs")
"""Settings in which the runs differ."""
SMALL = {"widths": "8,8,8,8"}
"""Of a look on a CPU; one on a GPU takes the preset `laptop` as it is."""
SEEDS = 10
"""Runs to the end of each kind, if there is time."""
TUNED = (
    "64x32x32-64x3x3-s1",
    "64x32x32-128x3x3-s2",
    "128x16x16-128x3x3-s1",
    "128x16x16-256x3x3-s2",
    "256x8x8-256x3x3-s1",
    "256x8x8-256x3x3-s2",
    "256x4x4-256x3x3-s1",
)
"""The 3x3 layers of the article's network: three quarters of a step's time on an H200."""
CHECKED = (
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


@dataclass(frozen=True)
class Step:
    """`command`'s exit codes in `accepts` mean that it is done; `limit_s` is the most that it may take.

    It is not begun with less than `least_s`. Consecutive steps `together` run at once. `fresh` names a folder in OUT
    that an attempt leaves behind and a new one cannot use. It `needs` a file in OUT that an earlier step leaves.
    `given()` returns more words when it begins, and `after(OUT)` is called when it has ended. `environment` is added
    to this process's own. One that `repeats` reads what the others left, and is done anew by every call, at its end.
    With a `reason` it cannot run here.
    """

    name: str
    stage: str
    command: tuple[str, ...]
    limit_s: float
    least_s: float = 5.0
    accepts: tuple[int, ...] = (0,)
    together: bool = False
    fresh: str | None = None
    needs: str | None = None
    given: Callable[[], Sequence[str]] = tuple
    after: Callable[[Path], None] | None = None
    environment: tuple[tuple[str, str], ...] = ()
    repeats: bool = False
    reason: str | None = None

    def words(self) -> list[str]:
        """The command as it is now."""
        return [*self.command, *self.given()]


def plan(out: Path, request: Request, small: bool, gpu: str | None) -> list[Step]:
    """The steps of all stages, in order, for the absolute folder `out`; `gpu` is its name, None where there is none."""
    return _Plan(out, request, small, gpu).steps()


class _Plan:
    def __init__(self, out: Path, request: Request, small: bool, gpu: str | None):
        self.out, self.request, self.small, self.gpu = out, request, small, gpu
        self.no_gpu = None if gpu else "it needs a CUDA GPU"

    def steps(self) -> list[Step]:
        return [*self.smoke(), *self.numbers(), *self.peers()]

    def smoke(self) -> list[Step]:
        """Facts, every kernel against float64 and compilers' caches at once; then what is timed, one by one."""
        stage, steps = "smoke", []
        absent = None if shutil.which("nvidia-smi") else "it is not on the PATH"
        steps.append(Step("nvidia-smi", stage, ("nvidia-smi",), 20, together=True, reason=absent))
        steps.append(Step("doctor", stage, _module("profiling", "doctor"), 60, together=True))
        steps.append(self.check())
        for mode in WARMED:
            steps.append(self.train(f"{WARM}{mode}", stage, 120, *MODES[mode], epochs=1, together=True))
        for mode, (preset, settings) in MODES.items():
            steps.append(self.train(mode, stage, 40, preset, settings, epochs=2))
            if mode in (REFERENCE, OURS):
                steps.append(self.kernels(mode))
        return steps

    def numbers(self) -> list[Step]:
        """Ceilings, tiles, a run that is accounted for and its peer's, the tests; then further seeds of both."""
        stage, steps = "numbers", [self.ceilings(), self.tiles()]
        for number in range(SEEDS):
            if number == 1:
                steps.append(self.tests())
            for mode in (OURS, REFERENCE):
                preset, settings = MODES[mode]
                settings = {name: value for name, value in settings.items() if name != "conv"}  # the faster by layer
                name = f"{FUSED if mode == OURS else mode}-{number}"
                profile = mode == OURS and number == 0
                limit_s, least_s = (110.0, 30.0) if profile else (60.0, 15.0)
                seed = (self.request.seed or 0) + number
                more: dict[str, Any] = {"seed": seed, "profile": profile, "least_s": least_s}
                steps.append(self.train(name, stage, limit_s, preset, settings, **more))
        return steps

    def peers(self) -> list[Step]:
        """What the library can do at its best, op by op and step by step; then the checkers and the counters."""
        stage = "peers"
        preset, settings = MODES["reference-compiled"]
        return [
            self.train(AUTOTUNED, stage, 180, preset, settings, epochs=2, environment=tuple(MAX_AUTOTUNE.items())),
            self.bench(),
            Step(
                "steps",
                stage,
                _module("experiments", "steps", "--quick", "--out", str(self.out)),
                120,
                reason=self.no_gpu,
            ),
            self.sanitized("memcheck"),
            self.sanitized("racecheck"),
            *self.counters(),
        ]

    def data(self) -> list[str]:
        """The words for the data. Where no run found any, none looks for it again: it takes ten seconds to be sure."""
        if self.request.data_dir:
            return ["--data-dir", str(self.request.data_dir.absolute())]
        synthetic = self.request.synthetic or data_identity(self.out) == "synthetic"
        return ["--synthetic"] if synthetic else []

    def train(
        self,
        name: str,
        stage: str,
        limit_s: float,
        preset: str,
        settings: dict[str, str],
        epochs: int | None = None,
        seed: int | None = None,
        profile: bool = False,
        **options: Any,
    ) -> Step:
        """A training, in the folder of its name; without `epochs` to the end of its preset."""
        reason = self.unable(settings)
        if self.small:
            preset, epochs = "laptop", epochs or 1
            settings = {key: value for key, value in settings.items() if key != "preprocess"}
            settings = settings if self.gpu else {**SMALL, **settings}
        settings = settings | dict(setting.split("=", 1) for setting in self.request.settings)
        words = ["--preset", preset, *(word for pair in settings.items() for word in ("--set", "=".join(pair)))]
        words += ["--epochs", str(epochs)] if epochs else []
        words += ["--seed", str(self.request.seed or 0 if seed is None else seed)]
        measured = self.out / "ceilings.json"

        def given() -> list[str]:
            ceilings = ["--ceilings", str(measured)] if profile and measured.exists() else []
            return [*self.data(), *ceilings]

        return Step(
            name,
            stage,
            (sys.executable, "train.py", *words, *(["--profile"] if profile else []), "--out", str(self.out / name)),
            limit_s,
            fresh=name,
            given=given,
            after=lambda out: _keep_results(out / name),
            reason=reason,
            **options,
        )

    def check(self) -> Step:
        """Every kernel against float64, each op in a process that is given up when it says nothing for 40 s.

        On a CPU one op in the interpreter, which shows that the step works.
        """
        command = _module("profiling", "bench", "--check", "--out", str(self.out / "check.jsonl"))
        environment = () if self.gpu else (("TRITON_INTERPRET", "1"),)
        chosen = ("--limit", "40") if self.gpu else ("bn_finalize",)
        return Step(
            "check",
            "smoke",
            (*command, *chosen),
            110,
            accepts=(0, 1),
            together=True,
            fresh="check.jsonl",
            environment=environment,
        )

    def kernels(self, mode: str) -> Step:
        """The longest kernels of a mode's step."""
        command = _module("experiments", "longest-kernels", str(self.out / mode))
        needs, reason = f"{mode}/log.jsonl", self.unable(MODES[mode][1])
        return Step(f"kernels-{mode}", "smoke", command, 40, needs=needs, given=self.data, reason=reason)

    def unable(self, settings: dict[str, str]) -> str | None:
        """Why a run with these settings cannot be had here."""
        if settings.get("step") == "compiled" and not self.gpu:
            return "torch.compile takes minutes on a CPU"
        return self.no_gpu if settings.get("ops") else None

    def ceilings(self) -> Step:
        seconds = "0.05" if self.small else "0.4"
        dtype = [setting.split("=", 1)[1] for setting in self.request.settings if setting.startswith("dtype=")]
        words = ["--out", str(self.out / "ceilings.json"), "--seconds", seconds]
        words += ["--dtype", dtype[0]] if dtype and dtype[0] != "auto" else []
        return Step("ceilings", "numbers", _module("profiling", "device", *words), 60)

    def tests(self) -> Step:
        """Those whose result a GPU decides; on a CPU some that are quick."""
        report = f"--junitxml={self.out / 'tests.xml'}"
        chosen = (
            ["-m", "gpu", *_spread()] if self.gpu else ["tests/model/test_config.py", "tests/model/test_schedule.py"]
        )
        command = _module("pytest", "-q", "-p", "no:cacheprovider", "--tb=line", report, *chosen)
        return Step("tests", "numbers", command, 130, accepts=(0, 1))

    def tiles(self) -> Step:
        """Of the convolutions that matter most, into kernels/tiles.json: what comes after is measured with them."""
        shapes = [word for shape in TUNED for word in ("--shape", shape)]
        command = _module("profiling", "bench", "--tune", "--quick", *shapes)
        return Step("tiles", "numbers", command, 170, after=keep_tiles, reason=self.no_gpu)

    def bench(self) -> Step:
        """A dozen cases beside the best of the library; on a CPU one."""
        words = ["--short"] if self.gpu else ["bn_finalize", "--quick"]
        command = _module("profiling", "bench", *words, "--out", str(self.out / "bench.jsonl"), "--resume")
        return Step("bench", "peers", command, 150, accepts=(0, 1))

    def sanitized(self, tool: str) -> Step:
        """Our kernels under a checker; without the caching allocator an access outside of a tensor is one of memory."""
        shapes = [f"--shape={shape}" for shape in CHECKED]
        checked = _module("profiling", "bench", "--check", "--jobs", "1", "--images", "2", *shapes)
        found = shutil.which("compute-sanitizer")
        absent = None if found else "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
        return Step(
            tool,
            "peers",
            ("compute-sanitizer", f"--tool={tool}", "--error-exitcode=1", *checked),
            90,
            reason=self.no_gpu or absent,
            environment=(("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),),
        )

    def counters(self) -> list[Step]:
        """Nsight Compute reads the counters of a step of the accounted run, whose report then has them."""
        run, reason = f"{FUSED}-0", ncu.probe()
        records = self.out / run / "records"
        command = ncu.command([*PROFILE_PASS, str(self.out / run), "--ncu"], records / "ncu.csv")
        more: dict[str, Any] = {"needs": f"{run}/records/trace.json.gz", "reason": reason}
        return [
            Step("ncu", "peers", tuple(command), 90, given=self.data, **more),
            Step("report", "peers", _module("profiling", "report", str(self.out / run)), 20, **more),
        ]


def _module(*words: str) -> tuple[str, ...]:
    return sys.executable, "-m", *words


def _spread() -> list[str]:
    """What makes pytest use several processes, where its plugin is installed: most of the time the compiler works."""
    processes = min(12, (os.cpu_count() or 1) // 2)
    return ["-n", str(processes), "--dist", "worksteal"] if processes > 1 and importlib.util.find_spec("xdist") else []


def keep_tiles(out: Path) -> None:
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


def _keep_results(folder: Path) -> None:
    """Weights are not results: a folder without them is small enough to be committed. Nor is a warm-up one."""
    for path in folder.rglob("checkpoint-*"):
        path.unlink()
    if folder.name.startswith(WARM) and (folder / "summary.json").exists():
        (folder / "summary.json").rename(folder / WARM_UP)
