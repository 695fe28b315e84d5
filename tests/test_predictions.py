import json

import pytest
from typer.testing import CliRunner

from experiments import predictions
from experiments.__main__ import app
from experiments.expected import H200
from model.config import preset
from model.errors import DataError
from profiling import cases
from profiling.ahead_of_time import Build, Facts
from profiling.records import append_jsonl, write_json


def facts_of(builds: list[Build]) -> list[Facts]:
    return [Facts("", 90, registers=64, warps=4) for _ in builds]


@pytest.fixture(scope="module")
def document() -> dict:
    chosen = [case for case in cases.cases() if case.op in ("bn_finalize", "bn_apply")]
    return predictions.make(H200, facts_of, chosen)


def test_the_document_is_json_marked_as_modelled_and_reads_as_tables(document):
    assert json.loads(json.dumps(document)) == json.loads(json.dumps(document, allow_nan=False))
    assert document["status"] == "modelled"
    text = predictions.markdown(document)
    assert "Modelled, not measured" in text
    assert text.count("\n| bn_apply") == sum(name.startswith("bn_apply") for name in document["cases"])
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| bn_")}
    assert widths == {text.split("| case |")[1].split("\n")[0].count("|") + 2}


def test_fused_takes_less_time_and_more_arithmetic_than_eager(document):
    eager, fused = (document["steps"][name] for name in ("article-256", "fused"))
    assert fused["floor_us"] < eager["floor_us"]
    assert fused["expected_us"] > fused["floor_us"]


def timing(case: str, us: float | None, gpu: str = "NVIDIA H200", mode: str = "cold", provider: str = "ours") -> dict:
    return {
        "kind": "timing",
        "case": case,
        "provider": provider,
        "mode": mode,
        "dtype": "float16",
        "us": {"value": us},
        "machine": {"gpu": gpu},
    }


def run_of(folder, name: str, step_us: float, settings: tuple[str, ...] = (), **changes) -> None:
    folder.mkdir(parents=True)
    config = preset(name).with_settings(list(settings))
    run = {"status": "complete", "preset": name, "device": "NVIDIA H200", "steps": 1000}
    run |= {"ops": config.ops, "dtype": "float16", "step": "captured"}
    write_json(folder / "config.json", config.to_json())
    write_json(folder / "summary.json", run | {"train_s": step_us / 1000} | changes)


def test_measurements_are_held_against_what_was_expected(document, tmp_path):
    run_of(tmp_path / "profiled", "fused", 2 * document["steps"]["fused"]["expected_us"])
    apply, finalize = "bn_apply 64x32x32", "bn_finalize 64x32x32"
    expected_us = {name: document["cases"][name]["expected_us"] for name in (apply, finalize)}
    for row in (
        timing(finalize, 0.5 * expected_us[finalize]),
        timing(apply, 3 * expected_us[apply]),
        timing(apply, 1.0, mode="hot"),
        timing(apply, 1.0, provider="torch.compile"),
        timing(apply, None),
        timing("gone", 1.0),
        {"kind": "facts"},
    ):
        append_jsonl(tmp_path / "bench.jsonl", row)
    step, *kernels = predictions.hold(document, tmp_path)
    assert (step.name, step.ratio) == ("a step of fused", pytest.approx(2))
    assert [one.name for one in kernels] == [apply, finalize]
    assert [one.ratio for one in kernels] == [pytest.approx(3), pytest.approx(0.5)]
    first, second, third = predictions.sentences([step, *kernels])
    assert "2.00 times as long" in first
    assert "from 0.50 to 3.00" in second
    assert third.endswith(f"wrong there: {finalize}.")


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: None,
        lambda folder: append_jsonl(folder / "bench.jsonl", timing("bn_apply 64x32x32", 1.0, gpu="NVIDIA A100")),
        lambda folder: append_jsonl(folder / "bench.jsonl", timing("bn_apply 64x32x32", None)),
        lambda folder: run_of(folder / "profiled", "laptop", 1.0),
        lambda folder: run_of(folder / "profiled", "fused", 1.0, device="AMD EPYC"),
        lambda folder: run_of(folder / "profiled", "fused", 1.0, status="interrupted"),
        lambda folder: run_of(folder / "profiled", "fused", 1.0, ops="reference"),
        lambda folder: run_of(folder / "profiled", "fused", 1.0, step="eager"),
        lambda folder: run_of(folder / "profiled", "fused", 1.0, dtype="bfloat16"),
        lambda folder: run_of(folder / "profiled", "fused", 1.0, ("batch_size=128",)),
    ],
    ids=[
        *("nothing", "another_gpu", "unavailable", "another_preset", "a_cpu", "interrupted"),
        *("fell_back_to_other_ops", "fell_back_to_eager_steps", "another_dtype", "another_batch"),
    ],
)
def test_what_says_nothing_about_the_predicted_machine_is_refused(document, tmp_path, make):
    make(tmp_path)
    with pytest.raises(DataError, match="holds no measurement on NVIDIA H200"):
        predictions.hold(document, tmp_path)


def invoke(*arguments):
    return CliRunner().invoke(app, ["predictions", *map(str, arguments)])


def test_from_the_command_line(document, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "make", lambda: document)
    out, measured = tmp_path / "predicted", tmp_path / "measured"
    done = invoke("--out", out)
    assert done.exit_code == 0, done.output
    assert {path.name for path in out.iterdir()} == {"predictions.json", "predictions.md"}
    run_of(measured / "profiled", "fused", 5000)
    done = invoke("--out", out, "--against", measured, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((measured / "predictions-held.json").read_text())
    assert "took 5,000" in done.stderr


def test_folders_that_hold_nothing_are_named(tmp_path):
    done = invoke("--against", tmp_path / "none")
    assert (done.exit_code, "is not a folder" in done.stderr) == (2, True)
    done = invoke("--against", tmp_path, "--out", tmp_path)
    assert (done.exit_code, "holds no predictions.json" in done.stderr) == (3, True)
    (tmp_path / "file").touch()
    done = invoke("--out", tmp_path / "file" / "below")
    assert done.exit_code == 1
    assert "Not a directory" in done.stderr


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("measured/bench.jsonl", "no JSON\n"),
        ("measured/bench.jsonl", "[]\n"),
        ("measured/profiled/summary.json", "{}"),
        ("predicted/predictions.json", "{}"),
        ("predicted/predictions.json", "["),
    ],
    ids=["no_json", "no_row", "no_summary", "no_predictions", "torn_predictions"],
)
def test_a_damaged_file_is_one_line(document, tmp_path, file, text):
    run_of(tmp_path / "measured" / "profiled", "fused", 5000)
    (tmp_path / "predicted").mkdir()
    write_json(tmp_path / "predicted" / "predictions.json", document)
    (tmp_path / file).write_text(text)
    done = invoke("--out", tmp_path / "predicted", "--against", tmp_path / "measured")
    assert done.exit_code == 3
    assert done.stderr.count("\n") == 1
    assert "is damaged" in done.stderr
