import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from profiling import ROOT
from profiling.__main__ import app
from profiling.device import ceilings, command
from profiling.device.ceilings import Ceilings
from profiling.device.command import document, rows
from profiling.device.specifications import SPECIFICATIONS, specification
from profiling.output.files import read_json
from tests.profiling.device.test_ceilings import FOUND, ceiling

CPU = dataclasses.replace(
    FOUND,
    device="AMD EPYC",
    dtype="bfloat16",
    convolutions=[
        dataclasses.replace(ceiling(1e12, name), shape="64x32x32-64x3x3-s1, batch 64") for name in ("fprop", "wgrad")
    ],
    sm_clock_mhz=None,
    reasons=(),
)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def measured_cpu(monkeypatch, no_gpu):
    """A CPU whose ceilings were measured before this test began."""
    asked = []

    def measure(device, dtype, seconds, say):
        asked.append((device.type, dtype, seconds))
        say("matrix product 1024^3: 1 TFLOP/s")
        return CPU

    monkeypatch.setattr(ceilings, "measure", measure)
    return asked


def invoke(*arguments):
    return CliRunner().invoke(app, ["device", *map(str, arguments)])


def test_a_known_gpu_stands_beside_its_data_sheet():
    found = {row.label: row for row in rows(FOUND, specification(FOUND.device), "")}
    gemm = found["matrix product 8192^3"]
    assert (gemm.quoted.value, gemm.quoted.status) == (989.5e12, "quoted")
    assert "H200 data sheet" in gemm.quoted.source
    assert gemm.measured.status == "measured"
    assert found["copy 8192^3"].quoted.value == 4.8e12
    assert found["launch, 8192^3"].quoted.status == "unavailable"


def test_of_each_pass_the_fastest_convolution_is_shown():
    slow, fast = (
        dataclasses.replace(ceiling(value, "fprop"), shape=f"{shape}, batch 512")
        for value, shape in ((1e12, "64x32x32-64x3x3-s1"), (2e12, "128x16x16-128x3x3-s1"))
    )
    found = rows(dataclasses.replace(FOUND, convolutions=[slow, fast]), None, "unknown")
    (shown,) = (row for row in found if "fprop" in row.label)
    assert shown.label == "fastest fprop 128x16x16-128x3x3-s1"
    assert shown.measured.value == 2e12


def test_a_ceiling_says_how_much_of_it_was_under_the_power_cap():
    capped = dataclasses.replace(FOUND, gemm=[dataclasses.replace(ceiling(650e12), power_capped_share=0.975)])
    first, *_, last = rows(capped, specification(FOUND.device), "")
    assert command._cells(first)[-2:] == ("66%", "98%")
    assert command._cells(last)[-1] == ""


def test_an_unknown_gpu_has_no_promise_and_its_measured_ceiling_stands():
    unknown = dataclasses.replace(FOUND, device="NVIDIA GeForce RTX 9999")
    found = rows(unknown, specification(unknown.device), "RTX 9999 is not in the table")
    assert {row.quoted.status for row in found} == {"unavailable"}
    assert found[0].quoted.source == "RTX 9999 is not in the table"
    assert found[0].measured.value == 790e12


def test_arithmetic_that_a_gpu_has_no_unit_for_is_not_promised():
    v100 = specification("Tesla V100-SXM2-16GB")
    bf16 = dataclasses.replace(FOUND, gemm=[dataclasses.replace(ceiling(9e12), arithmetic="bfloat16")])
    assert rows(bf16, v100, "")[0].quoted.source == "V100 SXM2 has no unit for bfloat16"


def test_the_document_gives_every_number_its_status():
    made = document(FOUND, specification(FOUND.device), "")
    assert Ceilings.from_json(json.loads(json.dumps(made["ceilings"]))) == FOUND
    for figure in made["figures"]:
        assert set(figure) == {"label", "quoted", "measured"}
        assert figure["measured"]["status"] == "measured"
        assert figure["quoted"]["source"]


def test_a_cpu(measured_cpu, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = invoke("--seconds", 0.5, "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
    assert measured_cpu == [("cpu", torch.bfloat16, 0.5)]
    assert "unavailable, a CPU has no entry in the table of specifications" in done.stdout
    assert "790 TFLOP/s" in done.stdout
    assert "64x32x32-64x3x3-s1" in done.stdout
    assert done.stdout.count("unavailable") >= 6
    assert all(len(line) <= 80 for line in done.stdout.split("The roofs")[0].splitlines())


@pytest.mark.usefixtures("measured_cpu")
def test_without_a_dtype_it_is_the_training_s(measured_cpu):
    assert invoke().exit_code == 0
    assert measured_cpu[0][1] in (torch.bfloat16, torch.float32)


def on_h200(monkeypatch, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(ceilings, "measure", lambda device, dtype, seconds, say: found)


def test_a_gpu(monkeypatch):
    on_h200(monkeypatch, dataclasses.replace(FOUND, lacks=("wgrad 64x32x32-64x3x3-s1: no engine",)))
    done = invoke("--device", "cuda:0")
    assert done.exit_code == 0, done.output
    assert "989.5 TFLOP/s" in done.stdout
    assert "80%" in done.stdout
    assert "SM clock 345 MHz before, 1755 MHz hot" in done.stdout
    assert "held back by power cap" in done.stderr
    assert "cannot run wgrad 64x32x32-64x3x3-s1: no engine" in done.stderr


def test_ceilings_are_written(measured_cpu, tmp_path):
    done = invoke("--out", tmp_path / "ceilings.json", "--json")
    assert Ceilings.from_json(read_json(tmp_path / "ceilings.json")) == CPU
    assert json.loads(done.stdout)["specification"] is None
    assert "The roofs of a run here" in done.stderr


@pytest.mark.usefixtures("measured_cpu")
def test_a_disk_that_is_full_is_one_line(monkeypatch, tmp_path):
    def full(path, value):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("profiling.output.files.write_json", full)
    done = invoke("--out", tmp_path / "x.json")
    assert done.exit_code == 2
    assert "No space left" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_whole_table():
    done = invoke("--list", "--json")
    assert [spec["name"] for spec in json.loads(done.stdout)] == [spec.name for spec in SPECIFICATIONS]
    assert all(spec.source in done.stderr for spec in SPECIFICATIONS)


BAD = {
    "unknown_dtype": (("--dtype", "float61"), "--dtype is 'float61', expected float16, bfloat16, float32"),
    "unknown_device": (("--device", "gpu"), "--device is 'gpu', expected auto, cpu, cuda or cuda:N"),
    "no_time": (("--seconds", "0"), "--seconds is 0.0"),
    "endless": (("--seconds", "inf"), "--seconds is inf"),
    "out_is_a_folder": (("--out", "."), "expected a file in a folder that exists"),
    "out_in_no_folder": (("--out", "no/such/x.json"), "expected a file in a folder that exists"),
    "list_to_a_file": (("--list", "--out", "x.json"), "leave --out out"),
    "fp16_on_a_cpu": (("--device", "cpu", "--dtype", "float16"), "expected bfloat16 or float32 on cpu"),
    "unknown_option": (("--secs", "1"), "No such option"),
}


@pytest.mark.parametrize(("arguments", "line"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_2(arguments, line):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert line in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.usefixtures("no_gpu")
def test_a_gpu_that_is_not_there_is_exit_4():
    done = invoke("--device", "cuda")
    assert done.exit_code == 4
    assert done.stderr.count("\n") == 1
    assert "no CUDA GPU" in done.stderr


def test_a_gpu_of_a_number_that_is_not_there_is_exit_4(monkeypatch):
    on_h200(monkeypatch, FOUND)
    done = invoke("--device", "cuda:3")
    assert done.exit_code == 4
    assert "there is one GPU" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (torch.OutOfMemoryError("not even 256 fits into the device's memory"), 6, "not even 256"),
        (RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore"), 4, "CUBLAS_STATUS_NOT_SUPPORTED"),
    ],
    ids=["out_of_memory", "no_such_product"],
)
@pytest.mark.usefixtures("no_gpu")
def test_a_device_that_cannot_is_one_line(monkeypatch, error, code, words):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(ceilings, "measure", fail)
    done = invoke()
    assert done.exit_code == code
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_slip_of_the_finger_does_not_import_torch():
    code = (
        "import sys, profiling.__main__ as m\n"
        "try: m.app(['device', '--dtype', 'fp16'])\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 False\n", done.stderr
