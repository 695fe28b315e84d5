"""The steps that `reproduce` takes on a device: three stages, each stage's most valuable evidence first.

`smoke` says whether anything works and how fast a step is, `numbers` is what can be quoted, `peers` is what the library
offers and what the checkers say. A step's seconds are what it needs on an H100, with some room.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from experiments.reproduce_runs import FUSED, REFERENCE, WARM, data_identity
from experiments.study.folder import Request
from profiling import ROOT
from profiling.device import ncu
from profiling.run.collect import PROFILE_PASS

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
WHOLE = {FUSED: ("fused", {"ops": "fused"}), REFERENCE: MODES[REFERENCE]}
"""The runs to their end; of the convolutions the faster of each layer."""
WARMED = ("reference-compiled", "batchnorm", "composed", OURS)
"""Modes that compile for long: all at once, before any is timed."""
AUTOTUNED = "reference-max-autotune"
MAX_AUTOTUNE = [f"TORCHINDUCTOR_{name}=1" for name in ("MAX_AUTOTUNE", "COORDINATE_DESCENT_TUNING", "CUDAGRAPHS")]
"""The settings of mode="max-autotune", as variables that torch._inductor.config reads (torch/_inductor/__init__.py)."""
VARIED = ("ops", "conv", "step", "preprocess", "epochs")
"""Settings in which the runs differ."""
SMALL = {"widths": "8,8,8,8"}
"""Settings for a look on a CPU; on a GPU it takes the preset `laptop` as it is."""
SEEDS = 10
"""Runs to the end of each kind, if there is time."""
TUNED = (
    *("64x32x32-64x3x3-s1", "64x32x32-128x3x3-s2", "128x16x16-128x3x3-s1", "128x16x16-256x3x3-s2"),
    *("256x8x8-256x3x3-s1", "256x8x8-256x3x3-s2", "256x4x4-256x3x3-s1"),
)
"""The 3x3 layers of the article's network: three quarters of a step's time on an H200."""
CHECKED = (
    *("3x32x32", "64x32x32-128x1x1-s2", "256x8x8-256x3x3-s2", "256x4x4-256x3x3-s1", "512x4x4-512x3x3-s1"),
    *("256x4x4", "512x4x4", "512x8x8"),
)
"""Layers by which every op of the benchmark runs at least once, with everything that can be fused into it."""
FINDINGS = ("check", "tests", "bench")
"""Steps whose exit code 1 is a finding: they are done."""
DATA, CEILINGS = "<data>", "<ceilings>"
"""Words of a step that stand for what earlier steps found: see `words`."""


class Step(NamedTuple):
    """A command that may take `seconds`.

    It `needs` a file in OUT that an earlier step leaves. `fresh` is what an attempt leaves in OUT and another cannot
    use. With a `reason` it cannot run here.
    """

    name: str
    argv: tuple[str, ...]
    seconds: float
    needs: str | None = None
    fresh: str | None = None
    reason: str | None = None


Plan = dict[str, list[list[Step]]]
"""By stage its steps in order; those in one list run at once."""


def plan(out: Path, request: Request, small: bool, gpu: str | None) -> Plan:
    """The steps for the absolute folder `out`; `gpu` is its name, None where there is none."""
    make = _Maker(out, request, small, gpu)
    return {"smoke": make.smoke(), "numbers": make.numbers(), "peers": [[step] for step in make.peers()]}


def words(step: Step, out: Path, request: Request) -> list[str]:
    """The command as it is now. Where no run found images, none looks for them again: it takes ten seconds."""
    if request.data_dir:
        data = ["--data-dir", str(request.data_dir.absolute())]
    else:
        data = ["--synthetic"] if request.synthetic or data_identity(out) == "synthetic" else []
    measured = out / "ceilings.json"
    found = {DATA: data, CEILINGS: ["--ceilings", str(measured)] if measured.exists() else []}
    return [word for one in step.argv for word in found.get(one, [one])]


def tidy(out: Path, name: str) -> None:
    """Keep the results of a step that has ended, and no weights. Raises OSError."""
    if name == "tiles":  # with what was tuned before time ran out
        shutil.copyfile(TILES, out / "tiles.json")
    for path in (out / name).rglob("checkpoint-*"):
        path.unlink()


def take_tiles(out: Path) -> bool:
    """Make the table of `out` this checkout's again; whether it was another.

    An earlier call may have tuned another copy of the checkout, and all of a folder's results are measured with the
    same tiles.
    """
    kept = out / "tiles.json"
    other = kept.exists() and kept.read_bytes() != TILES.read_bytes()
    if other:
        shutil.copyfile(kept, TILES)
    return other


class _Maker:
    def __init__(self, out: Path, request: Request, small: bool, gpu: str | None):
        self.out, self.request, self.small, self.gpu = out, request, small, gpu
        self.no_gpu = None if gpu else "it needs a CUDA GPU"

    def smoke(self) -> list[list[Step]]:
        """Facts, every kernel against float64 and compilers' caches at once; then what is timed, one by one.

        The check gives a kernel up that says nothing for 40 s; on a CPU it interprets one op.
        """
        absent = None if shutil.which("nvidia-smi") else "it is not on the PATH"
        checked = _module("profiling", "bench", "--check", "--out", str(self.out / "check.jsonl"))
        checked = (*checked, "--limit", "40") if self.gpu else _with(["TRITON_INTERPRET=1"], *checked, "bn_finalize")
        at_once = [
            Step("nvidia-smi", ("nvidia-smi",), 20, reason=absent),
            Step("doctor", _module("profiling", "doctor"), 60),
            Step("check", checked, 110, fresh="check.jsonl"),
            *(self.train(f"{WARM}{mode}", 120, *MODES[mode], epochs=1) for mode in WARMED),
        ]
        one_by_one = []
        for mode, (preset, settings) in MODES.items():
            one_by_one.append(self.train(mode, 40, preset, settings, epochs=2))
            if mode in (REFERENCE, OURS):
                longest = _module("experiments", "longest-kernels", str(self.out / mode), DATA)
                reason = self.unable(settings)
                one_by_one.append(Step(f"kernels-{mode}", longest, 40, needs=f"{mode}/log.jsonl", reason=reason))
        return [at_once, *([step] for step in one_by_one)]

    def numbers(self) -> list[list[Step]]:
        """Ceilings, tiles, a run that is accounted for and its peer's, the tests; then further seeds of both."""
        dtype = next((s.split("=", 1)[1] for s in self.request.settings if s.startswith("dtype=")), "auto")
        ceilings = _module("profiling", "device", "--out", str(self.out / "ceilings.json"))
        ceilings += ("--seconds", "0.05" if self.small else "0.4", *(("--dtype", dtype) if dtype != "auto" else ()))
        tune = _module("profiling", "bench", "--tune", "--quick", *(f"--shape={shape}" for shape in TUNED))
        report = f"--junitxml={self.out / 'tests.xml'}"
        quick = [f"tests/model/test_{name}.py" for name in ("config", "schedule")]
        chosen = ["-m", "gpu", *_spread()] if self.gpu else quick
        tests = _module("pytest", "-q", "-p", "no:cacheprovider", "--tb=line", report, *chosen)
        runs = [
            self.train(f"{kind}-{number}", 60, *WHOLE[kind], seed=number)
            for number in range(SEEDS)
            for kind in (FUSED, REFERENCE)
        ]
        accounted = (*runs[0].argv, "--profile", CEILINGS)
        runs[0] = runs[0]._replace(seconds=110, argv=accounted)
        first = [Step("ceilings", ceilings, 60), Step("tiles", tune, 170, reason=self.no_gpu), *runs[:2]]
        return [[step] for step in [*first, Step("tests", tests, 130), *runs[2:]]]

    def peers(self) -> list[Step]:
        """The library at its best, op by op and step by step; then the checkers and the counters.

        Under the checkers nothing caches memory: an access outside of a tensor is one outside of any allocation.
        """
        autotuned = self.train(AUTOTUNED, 180, *MODES["reference-compiled"], epochs=2)
        chosen = ["--short"] if self.gpu else ["bn_finalize", "--quick"]
        bench = _module("profiling", "bench", *chosen, "--out", str(self.out / "bench.jsonl"), "--resume")
        speeds = _module("experiments", "steps", "--quick", "--out", str(self.out))
        checked = _module("profiling", "bench", "--check", "--jobs", "1", "--images", "2")
        checked += tuple(f"--shape={shape}" for shape in CHECKED)
        sanitizer = shutil.which("compute-sanitizer")
        absent = None if sanitizer else "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
        run = self.out / f"{FUSED}-0"
        counted = tuple(ncu.command([*PROFILE_PASS, str(run), "--ncu", DATA], run / "records" / "ncu.csv"))
        traced, uncounted = f"{run.name}/records/trace.json.gz", ncu.probe()
        return [
            autotuned._replace(argv=_with(MAX_AUTOTUNE, *autotuned.argv)),
            Step("bench", bench, 150),
            Step("steps", speeds, 120, reason=self.no_gpu),
            *(
                Step(
                    tool,
                    _with(
                        ["PYTORCH_NO_CUDA_MEMORY_CACHING=1"],
                        *("compute-sanitizer", f"--tool={tool}", "--error-exitcode=1", *checked),
                    ),
                    90,
                    reason=self.no_gpu or absent,
                )
                for tool in ("memcheck", "racecheck")
            ),
            Step("ncu", counted, 90, needs=traced, reason=uncounted),
            Step("report", _module("profiling", "report", str(run)), 20, needs=traced, reason=uncounted),
        ]

    def train(
        self,
        name: str,
        seconds: float,
        preset: str,
        settings: dict[str, str],
        epochs: int | None = None,
        seed: int = 0,
    ) -> Step:
        """A training, in the folder of its name; without `epochs` to the end of its preset."""
        reason = self.unable(settings)
        if self.small:
            preset, epochs = "laptop", epochs or 1
            settings = {key: value for key, value in settings.items() if key != "preprocess"}
            settings = settings if self.gpu else {**SMALL, **settings}
        settings = settings | dict(setting.split("=", 1) for setting in self.request.settings)
        asked = [word for pair in settings.items() for word in ("--set", "=".join(pair))]
        asked += ["--epochs", str(epochs)] if epochs else []
        asked += ["--seed", str((self.request.seed or 0) + seed), "--out", str(self.out / name)]
        argv = (sys.executable, "train.py", "--preset", preset, *asked, DATA)
        return Step(name, argv, seconds, fresh=name, reason=reason)

    def unable(self, settings: dict[str, str]) -> str | None:
        """Why a run with these settings cannot be had here."""
        if settings.get("step") == "compiled" and not self.gpu:
            return "torch.compile takes minutes on a CPU"
        return self.no_gpu if settings.get("ops") else None


def _module(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", *arguments


def _with(variables: list[str], *argv: str) -> tuple[str, ...]:
    """The command with more variables in its environment."""
    return "env", *variables, *argv


def _spread() -> list[str]:
    """pytest's words for several processes, where its plugin is installed: most of the time the compiler works."""
    processes = min(12, (os.cpu_count() or 1) // 2)
    return ["-n", str(processes), "--dist", "worksteal"] if processes > 1 and importlib.util.find_spec("xdist") else []
