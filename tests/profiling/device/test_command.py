import json
import subprocess
import sys
from dataclasses import replace

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

CPU = replace(
    FOUND,
    device="AMD EPYC",
    dtype="bfloat16",
    convolutions=[replace(ceiling(1e12, name), shape="64x32x32-64x3x3-s1, batch 64") for name in ("fprop", "wgrad")],
    sm_clock_mhz=None,
    reasons=(),
)


def invoke(*arguments):
    return CliRunner().invoke(app, ["device", *map(str, arguments)])


@pytest.fixture
def machine(monkeypatch):
    """A function that puts a machine of these ceilings, or of this failure, in this one's place; returns the calls."""

    def of(found, gpu=False):
        asked = []

        def measure(device, dtype, seconds, say):
            asked.append((device.type, dtype, seconds))
            say("matrix product 1024^3: 1 TFLOP/s")
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(ceilings, "measure", measure)
        return asked

    return of


def test_a_known_gpu_stands_beside_its_data_sheet():
    found = {row.label: row for row in rows(FOUND, specification(FOUND.device), "")}
    gemm = found["matrix product 8192^3"]
    assert (gemm.quoted.value, gemm.quoted.status, gemm.measured.status) == (989.5e12, "quoted", "measured")
    assert "H200 data sheet" in gemm.quoted.source
    assert found["copy 8192^3"].quoted.value == 4.8e12
    assert found["launch, 8192^3"].quoted.status == "unavailable"
    bf16 = replace(FOUND, gemm=[replace(ceiling(9e12), arithmetic="bfloat16")])
    v100 = specification("Tesla V100-SXM2-16GB")
    assert rows(bf16, v100, "")[0].quoted.source == "V100 SXM2 has no unit for bfloat16"


def test_the_fastest_convolution_of_each_pass_is_shown():
    shapes = (1e12, "64x32x32-64x3x3-s1"), (2e12, "128x16x16-128x3x3-s1")
    both = [replace(ceiling(value, "fprop"), shape=f"{shape}, batch 512") for value, shape in shapes]
    (shown,) = (row for row in rows(replace(FOUND, convolutions=both), None, "unknown") if "fprop" in row.label)
    assert (shown.label, shown.measured.value) == ("fastest fprop 128x16x16-128x3x3-s1", 2e12)


def test_the_share_under_the_power_cap_is_shown():
    capped = replace(FOUND, gemm=[replace(ceiling(650e12), power_capped_share=0.975)])
    first, *_, last = rows(capped, specification(FOUND.device), "")
    assert command._cells(first)[-2:] == ("66%", "98%")
    assert command._cells(last)[-1] == ""


def test_an_unknown_gpu_has_no_promise_and_its_measured_ceiling_stands():
    found = rows(replace(FOUND, device="NVIDIA GeForce RTX 9999"), None, "RTX 9999 is not in the table")
    assert {row.quoted.status for row in found} == {"unavailable"}
    assert (found[0].quoted.source, found[0].measured.value) == ("RTX 9999 is not in the table", 790e12)


def test_the_document_gives_every_number_its_status():
    made = document(FOUND, specification(FOUND.device), "")
    assert Ceilings.from_json(json.loads(json.dumps(made["ceilings"]))) == FOUND
    for figure in made["figures"]:
        assert set(figure) == {"label", "quoted", "measured"}
        assert figure["measured"]["status"] == "measured"
        assert figure["quoted"]["source"]


def test_a_cpu(machine, monkeypatch, tmp_path):
    asked = machine(CPU)
    monkeypatch.setenv("COLUMNS", "80")
    done = invoke("--seconds", 0.5, "--dtype", "bfloat16")
    assert (done.exit_code, asked) == (0, [("cpu", torch.bfloat16, 0.5)]), done.output
    for words in ("unavailable, a CPU has no entry in the table", "790.0\xa0TFLOP/s", "64x32x32-64x3x3-s1"):
        assert words in done.stdout
    assert done.stdout.count("unavailable") >= 6
    assert all(len(line) <= 80 for line in done.stdout.split("The roofs")[0].splitlines())
    done = invoke("--out", tmp_path / "ceilings.json", "--json")
    assert asked[1][1] in (torch.bfloat16, torch.float32), "a training's"
    assert Ceilings.from_json(read_json(tmp_path / "ceilings.json")) == CPU
    assert json.loads(done.stdout)["specification"] is None
    assert "The roofs of a run here" in done.stderr


def test_a_gpu(machine):
    machine(replace(FOUND, lacks=("wgrad 64x32x32-64x3x3-s1: no engine",)), gpu=True)
    done = invoke("--device", "cuda:0")
    assert done.exit_code == 0, done.output
    for words in ("989.5\xa0TFLOP/s", "80%", "SM clock 345 MHz before, 1755 MHz hot"):
        assert words in done.stdout
    assert "held back by power cap" in done.stderr
    assert "cannot run wgrad 64x32x32-64x3x3-s1: no engine" in done.stderr


def test_the_whole_table():
    done = invoke("--list", "--json")
    assert [spec["name"] for spec in json.loads(done.stdout)] == [spec.name for spec in SPECIFICATIONS]
    assert all(spec.source in done.stderr for spec in SPECIFICATIONS)


BAD = {
    "unknown_dtype": ("--dtype float61", "--dtype is 'float61', expected float16, bfloat16, float32"),
    "unknown_device": ("--device gpu", "--device is 'gpu', expected auto, cpu, cuda or cuda:N"),
    "no_time": ("--seconds 0", "--seconds is 0.0"),
    "endless": ("--seconds inf", "--seconds is inf"),
    "out_is_a_folder": ("--out .", "expected a file in a folder that exists"),
    "out_in_no_folder": ("--out no/such/x.json", "expected a file in a folder that exists"),
    "list_to_a_file": ("--list --out x.json", "leave --out out"),
    "fp16_on_a_cpu": ("--device cpu --dtype float16", "expected bfloat16 or float32 on cpu"),
    "unknown_option": ("--secs 1", "No such option"),
}


@pytest.mark.parametrize(("words", "line"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_2(words, line):
    done = invoke(*words.split())
    assert done.exit_code == 2
    assert line in done.stderr
    assert "Traceback" not in done.output


FAILED = {
    "no_gpu": (CPU, False, "--device cuda", 4, "no CUDA GPU"),
    "no_such_gpu": (FOUND, True, "--device cuda:3", 4, "there is one GPU"),
    "out_of_memory": (
        torch.OutOfMemoryError("not even 256 fits into the device's memory"),
        False,
        "",
        6,
        "not even 256",
    ),
    "no_such_product": (RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore"), False, "", 4, "CUBLAS_STATUS_NOT_SUPPORTED"),
    "full_disk": (CPU, False, "--out x.json", 2, "No space left"),
}


@pytest.mark.parametrize(("found", "gpu", "words", "code", "line"), FAILED.values(), ids=FAILED)
def test_a_failure_is_one_line_and_its_exit_code(machine, monkeypatch, found, gpu, words, code, line):
    def full(path, value):
        raise OSError(28, "No space left on device")

    machine(found, gpu)
    monkeypatch.setattr(command, "write_json", full)
    done = invoke(*words.split())
    assert done.exit_code == code
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_slip_of_the_finger_does_not_import_torch():
    code = (
        "import sys, profiling.__main__ as m\n"
        "try: m.app(['device', '--dtype', 'fp16'])\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 False\n", done.stderr
