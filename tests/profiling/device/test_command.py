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
from profiling.device.command import rows
from profiling.device.specifications import SPECIFICATIONS, specification
from profiling.output.files import read_json
from tests.profiling.device.test_ceilings import FOUND, ceiling

H200 = specification(FOUND.device)
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


def test_rows_beside_the_data_sheet():
    shapes = (1e12, "64x32x32-64x3x3-s1"), (2e12, "128x16x16-128x3x3-s1")
    both = [replace(ceiling(value, "fprop"), shape=f"{shape}, batch 512") for value, shape in shapes]
    capped = [replace(ceiling(650e12), power_capped_share=0.975), ceiling(700e12)]
    first, second, fastest, copy, launch = rows(replace(FOUND, gemm=capped, convolutions=both), H200, "")
    assert first.label == second.label == "matrix product 8192^3", "two halved sizes may be the same"
    assert (first.quoted.value, first.quoted.status, first.measured.status) == (989.5e12, "quoted", "measured")
    assert "H200 data sheet" in first.quoted.source
    assert (fastest.label, fastest.measured.value) == ("fastest fprop 128x16x16-128x3x3-s1", 2e12)
    assert copy.quoted.value == 4.8e12
    assert launch.quoted.status == "unavailable"
    assert first.cells()[-2:] == ("66%", "98%")
    assert launch.cells()[-1] == ""


def test_a_ceiling_without_a_promise_stands():
    found = list(rows(FOUND, None, "RTX 9999 is not in the table"))
    assert {row.quoted.status for row in found} == {"unavailable"}
    assert (found[0].quoted.source, found[0].measured.value) == ("RTX 9999 is not in the table", 790e12)
    bf16 = replace(FOUND, gemm=[replace(ceiling(9e12), arithmetic="bfloat16")])
    first, *_ = rows(bf16, specification("Tesla V100-SXM2-16GB"), "")
    assert first.quoted.source == "V100 SXM2 has no unit for bfloat16"


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
    asked = machine(replace(FOUND, lacks=("wgrad 64x32x32-64x3x3-s1: no engine",)), gpu=True)
    done = invoke("--device", "cuda:0", "--json")
    assert (done.exit_code, asked) == (0, [("cuda", torch.float16, 2.0)]), done.output
    for words in (
        *("989.5\xa0TFLOP/s", "80%", "SM clock 345 MHz before, 1755 MHz hot", "held back by power cap"),
        "cannot run wgrad 64x32x32-64x3x3-s1: no engine",
    ):
        assert words in done.stderr
    made = json.loads(done.stdout)
    assert (made["version"], made["specification"]["name"]) == (1, "H200 SXM")
    assert Ceilings.from_json(made["ceilings"]).flops_per_s == 790e12
    for figure in made["figures"]:
        assert set(figure) == {"label", "quoted", "measured"}
        assert figure["measured"]["status"] == "measured"
        assert figure["quoted"]["source"]


def test_the_whole_table():
    done = invoke("--list", "--json")
    assert [spec["name"] for spec in json.loads(done.stdout)] == [spec.name for spec in SPECIFICATIONS]
    assert all(spec.source in done.stderr for spec in SPECIFICATIONS)


MEMORY = torch.OutOfMemoryError("not even 256 fits into the device's memory")
PRODUCT = RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")
REFUSED = {
    "unknown_dtype": (None, False, "--dtype float61", 2, "--dtype is 'float61', expected float16, bfloat16, float32"),
    "unknown_device": (None, False, "--device gpu", 2, "--device is 'gpu', expected auto, cpu, cuda or cuda:N"),
    "no_time": (None, False, "--seconds 0", 2, "--seconds is 0.0"),
    "endless": (None, False, "--seconds inf", 2, "--seconds is inf"),
    "not_a_time": (None, False, "--seconds nan", 2, "--seconds is nan"),
    "out_is_a_folder": (None, False, "--out .", 2, "expected a file in a folder that exists"),
    "out_in_no_folder": (None, False, "--out no/such/x.json", 2, "expected a file in a folder that exists"),
    "list_to_a_file": (None, False, "--list --out x.json", 2, "leave --out out"),
    "fp16_on_a_cpu": (None, False, "--device cpu --dtype float16", 2, "expected bfloat16 or float32 on cpu"),
    "unknown_option": (None, False, "--secs 1", 2, "No such option"),
    "full_disk": (CPU, False, "--out x.json", 2, "No space left"),
    "no_gpu": (CPU, False, "--device cuda", 4, "no CUDA GPU"),
    "no_such_gpu": (FOUND, True, "--device cuda:3", 4, "there is one GPU"),
    "out_of_memory": (MEMORY, False, "", 6, "not even 256"),
    "no_such_product": (PRODUCT, False, "", 4, "CUBLAS_STATUS_NOT_SUPPORTED"),
}


@pytest.mark.parametrize(("found", "gpu", "words", "code", "line"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_one_line_and_its_exit_code(machine, monkeypatch, found, gpu, words, code, line):
    """`found` is the machine; without one the command runs on this one."""

    def full(path, value):
        raise OSError(28, "No space left on device")

    if found is not None:
        machine(found, gpu)
    monkeypatch.setattr(command, "write_json", full)
    done = invoke(*words.split())
    assert done.exit_code == code
    assert line in done.stderr
    assert "Traceback" not in done.output
    if "No such option" not in line:  # typer's own, which `command_line.run` shortens
        assert done.stderr.count("\n") == 1


def test_a_typo_does_not_import_torch():
    code = (
        "import sys, profiling.__main__ as m\n"
        "try: m.app(['device', '--dtype', 'fp16'])\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 False\n", done.stderr
