import json

import pytest
from typer.testing import CliRunner

from experiments import expected, predictions, predictions_held
from experiments.__main__ import app
from model.errors import DataError
from model.presets import preset
from profiling.bench import cases
from profiling.bench.ahead_of_time import Build, Facts
from profiling.device.specifications import H100, H200
from profiling.output.files import append_jsonl, write_json


def facts_of(builds: list[Build]) -> list[Facts]:
    return [Facts("", 90, registers=64, warps=4) for _ in builds]


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    """Pages of an H100 and an H200 on which the compiler says next to nothing, of steps on few images."""
    chosen = [case for case in cases.cases() if case.op in ("bn_finalize", "bn_apply")]
    with pytest.MonkeyPatch.context() as patched:
        few = {name: (*settings, "batch_size=128") for name, settings in expected.STEPS.items()}
        patched.setattr(expected, "STEPS", few)
        return predictions.pages((H100, H200), facts_of, chosen)


@pytest.fixture(scope="module")
def document(documents) -> dict:
    return documents[1]


def test_machines_of_one_architecture_are_compiled_for_once(monkeypatch):
    monkeypatch.setattr(expected, "fused_step", lambda *operands: [])
    compiled = []

    def compile_(builds):
        compiled.extend(build.key() for build in builds)
        return facts_of(builds)

    chosen = [case for case in cases.cases() if case.name == "bn_apply 64x32x32"]
    predictions.pages((H100, H200), compile_, chosen)
    assert len(compiled) == len(set(compiled)) == 1


def test_the_document_is_json_marked_as_modelled_and_reads_as_tables(document):
    assert json.loads(json.dumps(document)) == json.loads(json.dumps(document, allow_nan=False))
    assert document["status"] == "modelled"
    text = predictions.markdown(document)
    assert "Modelled, not measured" in text
    assert text.count("\n| bn_apply") == sum(name.startswith("bn_apply") for name in document["cases"])
    widths = {line.count("|") for line in text.splitlines() if line.startswith("| bn_")}
    assert widths == {text.split("| case |")[1].split("\n")[0].count("|") + 2}


def test_a_step_is_given_with_what_each_assumption_adds(documents):
    for document in documents:
        eager, fused = (document["steps"][name] for name in ("article-256", "fused"))
        assert fused["floor_us"] < eager["floor_us"]
        for s in (eager, fused):
            assert s["floor_us"] < s["no_l2_us"] < s["l2_high_us"] < s["expected_us"] < s["l2_low_us"]
        assert eager["reductions_us"] == 0
        assert fused["reductions_us"] > 0
        text = predictions.markdown(document)
        assert f"# Predictions for one {document['machine']['name']}" in text
        assert "| `article-256` `preprocess=on_device` | " in text
        assert "maybe 5.5 to 7.0" in text
    h100, h200 = (document["steps"]["fused"]["expected_us"] for document in documents)
    assert h100 > h200


def timing(case: str, us: float | None, gpu: str = "NVIDIA H200", mode: str = "cold", provider: str = "ours") -> dict:
    about = {"kind": "timing", "case": case, "provider": provider, "mode": mode, "dtype": "float16"}
    return about | {"us": {"value": us}, "machine": {"gpu": gpu}}


def run_of(folder, name: str, step_us: float, settings: tuple[str, ...] = (), **changes) -> None:
    folder.mkdir(parents=True)
    config = preset(name).with_settings([*expected.STEPS.get(name, ())]).with_settings([*settings])
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
    step, *kernels = predictions_held.hold([document], tmp_path)
    assert (step.name, step.ratio) == ("a step of fused", pytest.approx(2))
    assert [one.name for one in kernels] == [apply, finalize]
    assert [one.ratio for one in kernels] == [pytest.approx(3), pytest.approx(0.5)]
    first, second, third = predictions_held.sentences([step, *kernels])
    assert "2.00 times as long (n = 1)" in first
    assert "from 0.50 to 3.00" in second
    assert third.endswith(f"wrong there: {finalize}.")


def test_each_measurement_is_held_against_the_page_of_its_own_gpu(documents, tmp_path):
    """Runs lie wherever they were put; of several of one kind the median counts."""
    for i, us in enumerate((6000, 9000, 5000)):
        run_of(tmp_path / "numbers" / f"run-{i}", "fused", us)
    run_of(tmp_path / "smoke" / "article", "article-256", 7000, device=H100.name)
    append_jsonl(tmp_path / "bench.jsonl", timing("bn_apply 64x32x32", 50.0, gpu=H100.name))
    held = predictions_held.hold(documents, tmp_path)
    known = [(one.gpu, one.name, one.measured_us, one.n) for one in held]
    assert known == [
        (H100.name, "a step of article-256", 7000, 1),
        (H100.name, "bn_apply 64x32x32", 50.0, 1),
        (H200.name, "a step of fused", 6000, 3),
    ]
    for one, document in zip(held, (documents[0], documents[0], documents[1]), strict=True):
        table = document["cases"] if "step" not in one.name else document["steps"]
        assert one.expected_us == table[one.name.removeprefix("a step of ")]["expected_us"]


NOTHING = {
    "another_gpu": timing("bn_apply 64x32x32", 1.0, gpu="NVIDIA A100"),
    "unavailable": timing("bn_apply 64x32x32", None),
    "another_preset": {"name": "laptop"},
    "a_cpu": {"device": "AMD EPYC"},
    "interrupted": {"status": "interrupted"},
    "fell_back_to_other_ops": {"ops": "reference"},
    "fell_back_to_eager_steps": {"step": "eager"},
    "another_dtype": {"dtype": "bfloat16"},
    "another_batch": {"settings": ("batch_size=128",)},
    "batches_of_the_host": {"name": "article-256", "settings": ("preprocess=once",)},
}


@pytest.mark.parametrize("measured", [None, *NOTHING.values()], ids=["nothing", *NOTHING])
def test_measurements_of_anything_else_are_refused(document, tmp_path, measured):
    if measured and "kind" in measured:
        append_jsonl(tmp_path / "bench.jsonl", measured)
    elif measured:
        run_of(tmp_path / "profiled", **{"name": "fused", "step_us": 1.0} | measured)
    with pytest.raises(DataError, match="holds no measurement on NVIDIA H200"):
        predictions_held.hold([document], tmp_path)


def invoke(*arguments):
    return CliRunner().invoke(app, ["predictions", *map(str, arguments)])


def test_from_the_command_line(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "pages", lambda machines: documents[: len(machines)])
    out, measured = tmp_path / "predicted", tmp_path / "measured"
    done = invoke("--out", out, "--gpu", "h100")
    assert done.exit_code == 0, done.output
    assert [path.name for path in out.iterdir()] == ["predictions-h100"]
    done = invoke("--out", out)
    assert done.exit_code == 0, done.output
    pages = sorted(path.relative_to(out).as_posix() for path in out.rglob("predictions.*"))
    assert pages == [f"predictions-{gpu}/predictions.{kind}" for gpu in ("h100", "h200") for kind in ("json", "md")]
    run_of(measured / "profiled", "fused", 5000)
    done = invoke("--out", out, "--against", measured, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads((measured / "predictions-held.json").read_text())
    assert "a step of fused on NVIDIA H200" in done.stderr
    assert "took 5,000" in done.stderr
    assert invoke("--out", out / "predictions-h200", "--against", measured).exit_code == 0
    assert invoke("--out", out / "predictions-h100", "--against", measured).exit_code == 3


def test_a_gpu_without_a_page_is_refused():
    done = invoke("--gpu", "A100-SXM4-80GB")
    assert done.exit_code == 2
    assert "--gpu A100-SXM4-80GB: predictions are made for H100 and H200" in done.stderr
    assert invoke("--gpu", "H100", "--against", ".").exit_code == 2


def test_folders_that_hold_nothing_are_named(tmp_path):
    done = invoke("--against", tmp_path / "none")
    assert (done.exit_code, "is not a folder" in done.stderr) == (2, True)
    done = invoke("--against", tmp_path, "--out", tmp_path)
    assert (done.exit_code, "holds no predictions-*/predictions.json" in done.stderr) == (3, True)
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
        ("predicted/predictions-h200/predictions.json", "{}"),
        ("predicted/predictions-h200/predictions.json", "["),
    ],
    ids=["no_json", "no_row", "no_summary", "no_predictions", "torn_predictions"],
)
def test_a_damaged_file_is_one_line(document, tmp_path, file, text):
    run_of(tmp_path / "measured" / "profiled", "fused", 5000)
    (tmp_path / "predicted" / "predictions-h200").mkdir(parents=True)
    write_json(tmp_path / "predicted" / "predictions-h200" / "predictions.json", document)
    (tmp_path / file).write_text(text)
    done = invoke("--out", tmp_path / "predicted", "--against", tmp_path / "measured")
    assert done.exit_code == 3
    assert done.stderr.count("\n") == 1
    assert "is damaged" in done.stderr
