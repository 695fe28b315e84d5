import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import reproduce_plan
from experiments.reproduce_plan import CHECKED, MODES, STAGES, VARIED, Step, plan
from experiments.study.folder import Request
from model.presets import preset
from profiling.bench import cases
from profiling.output.files import write_json

GPU = "NVIDIA H100 80GB HBM3"


def steps(out: Path, small: bool = False, gpu: str | None = GPU, **request) -> dict[str, Step]:
    return {step.name: step for step in plan(out, Request(**request), small, gpu)}


def value(step: Step, option: str) -> str:
    words = step.words()
    return words[words.index(option) + 1]


def trainings(planned: dict[str, Step]) -> dict[str, Step]:
    return {name: step for name, step in planned.items() if "train.py" in step.command}


def settings(step: Step) -> dict[str, str]:
    words = step.words()
    return dict(after.split("=", 1) for word, after in itertools.pairwise(words) if word == "--set")


@pytest.mark.parametrize(("small", "gpu"), [(True, None), (False, GPU), (True, GPU)], ids=["cpu", "gpu", "look"])
def test_the_plan_is_the_same_list_in_order_of_value(tmp_path, small, gpu):
    planned = steps(tmp_path, small, gpu)
    names = {stage: [step.name for step in planned.values() if step.stage == stage] for stage in STAGES}
    assert names["smoke"] == [
        *("nvidia-smi", "doctor", "check", "warm-reference-compiled", "warm-batchnorm", "warm-composed", "warm-ours"),
        *("reference", "kernels-reference", "ours", "kernels-ours", "reference-eager", "reference-compiled"),
        *("batchnorm", "composed"),
    ]
    assert names["numbers"][:6] == [
        *("ceilings", "tiles", "fused-0", "reference-0", "tests", "fused-1"),
    ]
    assert names["numbers"][6:9] == ["reference-1", "fused-2", "reference-2"]
    assert names["numbers"][-1] == "reference-9"
    assert names["peers"] == [
        *("reference-max-autotune", "bench", "steps", "memcheck", "racecheck", "ncu", "report"),
    ]


def test_a_cpu_does_what_it_can(tmp_path):
    able = {name for name, step in steps(tmp_path, True, None).items() if not step.reason}
    seeds = {f"reference-{number}" for number in range(10)}
    expected = {"doctor", "check", "reference", "kernels-reference", "reference-eager", "ceilings", "tests", "bench"}
    assert able == expected | seeds


def test_what_fits_into_a_stage_is_what_is_needed_at_most(tmp_path):
    """Steps that run at once take as long as the longest; of a stage's rest each has its own limit."""
    for stage, limit_s in STAGES.items():
        of = [step for step in steps(tmp_path).values() if step.stage == stage]
        assert all(step.limit_s <= limit_s / 1.9 for step in of)
    smoke = [step for step in steps(tmp_path).values() if step.stage == "smoke"]
    at_once, rest = [step for step in smoke if step.together], [step for step in smoke if not step.together]
    assert [*at_once, *rest] == smoke
    first = max(step.limit_s for step in at_once) + sum(step.limit_s for step in rest[:2])
    assert first < STAGES["smoke"], "though all that compiles hangs, the reference is timed"


def test_every_training_is_of_a_preset_with_settings_that_it_takes(tmp_path):
    for small, gpu in ((False, GPU), (True, GPU), (True, None)):
        for step in trainings(steps(tmp_path, small, gpu)).values():
            if step.reason:
                continue
            config = preset(value(step, "--preset")).with_settings([f"{k}={v}" for k, v in settings(step).items()])
            assert config.preset == ("laptop" if small else config.preset)
            assert Path(value(step, "--out")) == tmp_path / step.name
            assert step.fresh == step.name


def test_the_modes_are_trained_as_they_are_called(tmp_path):
    planned = steps(tmp_path)
    for mode, (name, changed) in MODES.items():
        assert value(planned[mode], "--preset") == name
        assert settings(planned[mode]) == changed
        assert value(planned[mode], "--epochs") == "2"
    assert settings(planned["ours"]) == {"ops": "fused", "conv": "ours"}, "so that nothing stands in for a kernel"
    assert settings(planned["fused-1"]) == {"ops": "fused"}, "the faster convolution of each layer"
    assert "--epochs" not in planned["fused-0"].words()
    assert set(VARIED) >= {key for _, changed in MODES.values() for key in changed}
    tuned = dict(planned["reference-max-autotune"].environment)
    assert set(tuned) == {f"TORCHINDUCTOR_{n}" for n in ("MAX_AUTOTUNE", "COORDINATE_DESCENT_TUNING", "CUDAGRAPHS")}


@pytest.mark.slow
def test_the_compiler_s_variables_make_max_autotune(tmp_path):
    """They are read as the library is imported."""
    code = (
        "import torch._inductor as inductor; from torch._inductor import config\n"
        "mode = inductor.list_mode_options('max-autotune')\n"
        "print(all(config.get_config_copy()[key] == value for key, value in mode.items()))"
    )
    environment = {**os.environ, **dict(steps(tmp_path)["reference-max-autotune"].environment)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "True\n", done.stderr


def test_what_is_asked_for_goes_to_every_training(tmp_path):
    planned = steps(tmp_path, settings=("momentum=0.8",), seed=4, data_dir=tmp_path)
    for name, step in trainings(planned).items():
        assert settings(step)["momentum"] == "0.8"
        assert value(step, "--data-dir") == str(tmp_path)
        number = int(name.rpartition("-")[2]) if name[-1].isdigit() else 0
        assert value(step, "--seed") == str(4 + number)
    assert settings(steps(tmp_path, True, None)["reference"])["widths"] == "8,8,8,8"
    assert settings(steps(tmp_path, True, None, settings=("widths=16,16,16,16",))["reference"])["widths"] != "8,8,8,8"


def test_images_that_no_run_found_are_not_looked_for_again(tmp_path):
    reference = steps(tmp_path)["reference"]
    assert not {"--synthetic", "--data-dir"} & set(reference.words())
    (tmp_path / "warm-ours").mkdir()
    write_json(tmp_path / "warm-ours" / "summary.json", {"data_identity": "synthetic"})
    steps(tmp_path)["warm-ours"].after(tmp_path)
    assert not list(tmp_path.rglob("summary.json")), "a warm-up's times mean nothing"
    assert "--synthetic" in reference.words()
    assert "--synthetic" in steps(tmp_path)["kernels-ours"].words()
    assert "--synthetic" in steps(tmp_path / "other", synthetic=True)["reference"].words()


def test_the_ceilings_of_this_folder_are_given_to_the_run_that_is_accounted_for(tmp_path):
    planned = steps(tmp_path, settings=("dtype=bfloat16",))
    assert value(planned["ceilings"], "--dtype") == "bfloat16"
    assert "--dtype" not in steps(tmp_path)["ceilings"].words()
    assert "--ceilings" not in planned["fused-0"].words()
    (tmp_path / "ceilings.json").touch()
    assert value(planned["fused-0"], "--ceilings") == value(planned["ceilings"], "--out")
    assert "--profile" in planned["fused-0"].words()
    assert not {"--profile", "--ceilings"} & set(planned["fused-1"].words())


def test_the_tests_of_a_gpu_use_the_cores_that_there_are(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce_plan.importlib.util, "find_spec", lambda name: True)
    for cores, spread in ((16, ["-n", "8"]), (6, ["-n", "3"]), (64, ["-n", "12"]), (2, []), (None, [])):
        monkeypatch.setattr(reproduce_plan.os, "cpu_count", lambda cores=cores: cores)
        words = steps(tmp_path)["tests"].words()
        assert words[words.index("gpu") + 1 :][:2] == spread
    monkeypatch.setattr(reproduce_plan.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(reproduce_plan.os, "cpu_count", lambda: 16)
    assert "-n" not in steps(tmp_path)["tests"].words()


def test_the_checkers_need_a_gpu_and_their_program(tmp_path, monkeypatch):
    def reasons(gpu: str | None) -> set:
        return {step.reason for name, step in steps(tmp_path, gpu=gpu).items() if name in ("memcheck", "racecheck")}

    monkeypatch.setattr(reproduce_plan.shutil, "which", lambda name: None)
    assert reasons(None) == {"it needs a CUDA GPU"}
    assert reasons(GPU) == {"compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"}
    monkeypatch.setattr(reproduce_plan.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert reasons(GPU) == {None}


def test_every_op_is_among_the_cases_of_the_checkers():
    """With all that can be fused into it."""
    small = [case for case in cases.cases() if case.shape in CHECKED]
    assert {(case.op, case.variant) for case in small} == {(case.op, case.variant) for case in cases.cases()}
    assert set(CHECKED) == {case.shape for case in small}


def test_the_tuned_layers_are_convolutions_of_the_network():
    shapes = {case.shape for case in cases.cases() if case.op == "conv_fprop"}
    assert set(reproduce_plan.TUNED) <= shapes


def test_runs_keep_no_weights(tmp_path):
    (tmp_path / "ours").mkdir()
    for name in ("checkpoint-1.safetensors", "checkpoint-1.json", "summary.json"):
        (tmp_path / "ours" / name).touch()
    steps(tmp_path)["ours"].after(tmp_path)
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["summary.json"]


def test_tiles_are_kept_and_come_back_in_another_checkout(tmp_path, monkeypatch):
    """Of the machine they were tuned on, nothing but OUT may be left."""
    table, out = tmp_path / "tiles.json", tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(reproduce_plan, "TILES", table)
    table.write_text("tuned")
    assert not reproduce_plan.take_tiles(out)
    steps(out)["tiles"].after(out)
    assert not reproduce_plan.take_tiles(out)
    table.write_text("as committed")
    assert reproduce_plan.take_tiles(out)
    assert table.read_text() == "tuned"
