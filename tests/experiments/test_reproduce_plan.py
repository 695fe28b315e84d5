"""The steps of a reproduction: their order, their words, and what they keep."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import reproduce_plan
from experiments.reproduce_plan import CHECKED, MODES, STAGES, TUNED, VARIED, Step, plan, tidy
from experiments.study.folder import Request
from model.presets import preset
from profiling.bench import cases
from profiling.output.files import write_json

GPU = "NVIDIA H100 80GB HBM3"


def steps(out: Path, small: bool = False, gpu: str | None = GPU, **request) -> dict[str, Step]:
    """The plan's, with their words as they are now."""
    asked = Request(**request)
    found = itertools.chain(*itertools.chain(*plan(out, asked, small, gpu).values()))
    return {step.name: step._replace(argv=tuple(reproduce_plan.words(step, out, asked))) for step in found}


def value(step: Step, option: str) -> str:
    return step.argv[step.argv.index(option) + 1]


def trainings(planned: dict[str, Step]) -> dict[str, Step]:
    return {name: step for name, step in planned.items() if "train.py" in step.argv}


def settings(step: Step) -> dict[str, str]:
    return dict(after.split("=", 1) for word, after in itertools.pairwise(step.argv) if word == "--set")


def test_plan_is_one_list_in_order_of_value(tmp_path):
    """Each stage fits: steps that run at once take as long as the longest, and each has its own limit."""
    planned = plan(tmp_path, Request(), False, GPU)
    names = {stage: [[step.name for step in group] for group in groups] for stage, groups in planned.items()}
    assert list(names) == list(STAGES) == ["smoke", "numbers", "peers"]
    at_once, *one_by_one = names["smoke"]
    assert at_once == [
        *("nvidia-smi", "doctor", "check", "warm-reference-compiled", "warm-batchnorm", "warm-composed", "warm-ours")
    ]
    assert one_by_one == [[name] for name in (
        *("reference", "kernels-reference", "ours", "kernels-ours", "reference-eager", "reference-compiled"),
        *("batchnorm", "composed"),
    )]  # fmt: skip
    numbers = [name for (name,) in names["numbers"]]
    assert numbers[:7] == ["ceilings", "tiles", "fused-0", "reference-0", "tests", "fused-1", "reference-1"]
    assert (numbers[-1], len(numbers)) == ("reference-9", 23)
    peers = [name for (name,) in names["peers"]]
    assert peers == ["reference-max-autotune", "bench", "steps", "memcheck", "racecheck", "ncu", "report"]
    for small, gpu in ((True, None), (True, GPU)):
        assert list(steps(tmp_path, small, gpu)) == list(itertools.chain(*itertools.chain(*names.values())))
    for stage, groups in planned.items():
        assert all(step.seconds <= STAGES[stage] / 1.9 for step in itertools.chain(*groups))
    first, *rest = planned["smoke"]
    worst = max(step.seconds for step in first) + sum(step.seconds for (step,) in rest[:2])
    assert worst < STAGES["smoke"], "though all that compiles hangs, the reference is timed"


def test_cpu_does_what_it_can(tmp_path):
    able = {name for name, step in steps(tmp_path, True, None).items() if not step.reason} - {"nvidia-smi"}
    expected = {"doctor", "check", "reference", "kernels-reference", "reference-eager", "ceilings", "tests", "bench"}
    assert able == expected | {f"reference-{number}" for number in range(10)}
    assert steps(tmp_path, True, None)["check"].argv[:2] == ("env", "TRITON_INTERPRET=1")
    assert {"bn_finalize", "--quick"} <= set(steps(tmp_path, True, None)["bench"].argv)


def test_trainings_are_of_presets_with_settings_that_they_take(tmp_path):
    for small, gpu in ((False, GPU), (True, GPU), (True, None)):
        for step in trainings(steps(tmp_path, small, gpu)).values():
            if not step.reason:
                asked = [f"{key}={word}" for key, word in settings(step).items()]
                config = preset(value(step, "--preset")).with_settings(asked)
                assert config.preset == ("laptop" if small else config.preset)
                assert Path(value(step, "--out")) == tmp_path / step.name
                assert step.fresh == step.name
    planned = steps(tmp_path)
    for mode, (name, changed) in MODES.items():
        found = (value(planned[mode], "--preset"), settings(planned[mode]), value(planned[mode], "--epochs"))
        assert found == (name, changed, "2")
    assert settings(planned["ours"]) == {"ops": "fused", "conv": "ours"}, "so that nothing stands in for a kernel"
    assert settings(planned["fused-1"]) == {"ops": "fused"}, "the faster convolution of each layer"
    assert "--epochs" not in planned["fused-0"].argv
    assert set(VARIED) >= {key for _, changed in MODES.values() for key in changed}


@pytest.mark.slow
def test_compiler_s_variables_make_max_autotune(tmp_path):
    """They are read as the library is imported."""
    code = (
        "import torch._inductor as inductor; from torch._inductor import config\n"
        "mode = inductor.list_mode_options('max-autotune')\n"
        "print(all(config.get_config_copy()[key] == value for key, value in mode.items()))"
    )
    argv = steps(tmp_path)["reference-max-autotune"].argv
    variables = argv[1 : argv.index(sys.executable)]
    done = subprocess.run(["env", *variables, sys.executable, "-c", code], capture_output=True, text=True)
    assert (len(variables), done.stdout) == (3, "True\n"), done.stderr


def test_request_goes_to_every_training(tmp_path):
    planned = steps(tmp_path, settings=("momentum=0.8", "dtype=bfloat16"), seed=4, data_dir=tmp_path)
    for name, step in trainings(planned).items():
        number = int(name.rpartition("-")[2]) if name[-1].isdigit() else 0
        assert (settings(step)["momentum"], value(step, "--seed")) == ("0.8", str(4 + number))
        assert value(step, "--data-dir") == str(tmp_path)
    assert value(planned["ceilings"], "--dtype") == "bfloat16"
    assert "--dtype" not in steps(tmp_path)["ceilings"].argv
    assert settings(steps(tmp_path, True, None)["reference"])["widths"] == "8,8,8,8"
    assert settings(steps(tmp_path, True, None, settings=("widths=16,16,16,16",))["reference"])["widths"] != "8,8,8,8"


def test_later_steps_are_given_what_earlier_ones_found(tmp_path):
    """Images that no run found are not looked for again; the accounted run takes the ceilings of this folder."""
    planned = steps(tmp_path)
    assert not {"--synthetic", "--data-dir"} & set(planned["reference"].argv)
    assert "--synthetic" in steps(tmp_path, synthetic=True)["reference"].argv
    assert "--ceilings" not in planned["fused-0"].argv
    write_json(tmp_path / "ceilings.json", {})
    (tmp_path / "warm-ours").mkdir()
    write_json(tmp_path / "warm-ours" / "summary.json", {"data_identity": "synthetic"})
    planned = steps(tmp_path)
    for name in ("reference", "kernels-ours", "fused-0"):
        assert "--synthetic" in planned[name].argv
    assert value(planned["fused-0"], "--ceilings") == value(planned["ceilings"], "--out")
    assert "--profile" in planned["fused-0"].argv
    assert not {"--profile", "--ceilings"} & set(planned["fused-1"].argv)


@pytest.mark.parametrize(
    ("cores", "xdist", "spread"),
    [(16, True, "8"), (6, True, "3"), (64, True, "12"), (2, True, None), (None, True, None), (16, False, None)],
)
def test_tests_of_a_gpu_use_the_cores_that_there_are(tmp_path, monkeypatch, cores, xdist, spread):
    monkeypatch.setattr(reproduce_plan.importlib.util, "find_spec", lambda name: xdist or None)
    monkeypatch.setattr(reproduce_plan.os, "cpu_count", lambda: cores)
    step = steps(tmp_path)["tests"]
    assert (value(step, "-n") if spread else None) == spread
    assert spread or "-n" not in step.argv


@pytest.mark.parametrize(
    ("gpu", "found", "reason"),
    [
        (None, False, "it needs a CUDA GPU"),
        (GPU, False, "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"),
        (GPU, True, None),
    ],
)
def test_checkers_need_a_gpu_and_their_program(tmp_path, monkeypatch, gpu, found, reason):
    monkeypatch.setattr(reproduce_plan.shutil, "which", lambda name: f"/usr/bin/{name}" if found else None)
    planned = steps(tmp_path, gpu=gpu)
    assert {planned[name].reason for name in ("memcheck", "racecheck")} == {reason}
    assert planned["nvidia-smi"].reason == (None if found else "it is not on the PATH")


def test_layers_that_are_checked_and_tuned_are_the_benchmark_s():
    """Every op is checked, with all that can be fused into it."""
    small = [case for case in cases.cases() if case.shape in CHECKED]
    assert {(case.op, case.variant) for case in small} == {(case.op, case.variant) for case in cases.cases()}
    assert set(CHECKED) == {case.shape for case in small}
    assert set(TUNED) <= {case.shape for case in cases.cases() if case.op == "conv_fprop"}


def test_runs_keep_no_weights_and_tiles_come_back_in_another_checkout(tmp_path, monkeypatch):
    """Nothing but OUT may be left of the machine that tuned them."""
    (tmp_path / "ours").mkdir()
    for name in ("checkpoint-1.safetensors", "checkpoint-1.json", "summary.json"):
        (tmp_path / "ours" / name).touch()
    tidy(tmp_path, "ours")
    assert os.listdir(tmp_path / "ours") == ["summary.json"]
    table = tmp_path / "table.json"
    monkeypatch.setattr(reproduce_plan, "TILES", table)
    table.write_text("tuned")
    assert not reproduce_plan.take_tiles(tmp_path)
    tidy(tmp_path, "tiles")
    assert not reproduce_plan.take_tiles(tmp_path)
    table.write_text("as committed")
    assert reproduce_plan.take_tiles(tmp_path)
    assert table.read_text() == "tuned"
