import sys
import types

import pytest

from profiling.device import ncu
from profiling.device.ncu import Measured, command, hint, probe, read

TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    f'"CC","dram__bytes.sum","gpu__time_duration.sum","{TENSOR}"\n'
)


def table(units, *rows):
    """Output in the layout of `ncu --csv --page raw`, made for this test: progress, header, units, a row a launch."""
    lead = '"{i}","17","python","127.0.0.1","{name}","1","7","(256, 1, 1)","(64, 1, 1)","0","9.0",'
    lines = [lead.format(i=i, name=name) + cells + "\n" for i, (name, cells) in enumerate(rows)]
    return (
        "==PROF== Connected to process 17\n"
        + HEADER
        + '"","","","","","","","","","","",'
        + units
        + "\n"
        + "".join(lines)
    )


def test_launches_in_base_units():
    text = table(
        '"byte","ns","%"',
        ("void cutlass::Kernel<int, (bool)1>(Params)", '"67,108,864","31,456","62.50"'),
        ("bn_apply_kernel", '"134217728","40000","0"'),
    )
    assert read(text) == [
        Measured("void cutlass::Kernel<int, (bool)1>(Params)", 67108864, 0.625, 31456),
        Measured("bn_apply_kernel", 134217728, 0, 40000),
    ]


@pytest.mark.parametrize(
    ("units", "cells"),
    [('"Mbyte","usecond","%"', '"2","3","50"'), ('"Kbyte","ms","%"', '"2000","0.003","50"')],
    ids=["older_names", "newer_names"],
)
def test_units_that_ncu_chose_itself(units, cells):
    assert read(table(units, ("k", cells))) == [Measured("k", 2e6, 0.5, pytest.approx(3e3))]


def test_what_ncu_cannot_tell_is_not_known():
    assert read(table('"byte","ns","%"', ("k", '"n/a","nan",""'))) == [Measured("k", None, None, None)]
    assert read(table('"byte","fortnight","%"', ("k", '"1","2","3"'))) == [Measured("k", 1, 0.03, None)]


def test_a_metric_that_the_gpu_does_not_have():
    text = '"Kernel Name","gpu__time_duration.sum"\n"","ns"\n"k","5"\n'
    assert read(text) == [Measured("k", None, None, 5)]


REFUSED = (
    "==PROF== Connected to process 17 (/usr/bin/python3)\n"
    "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters\n"
    "==PROF== Disconnected from process 17\n"
)


@pytest.mark.parametrize(
    "text",
    ["", REFUSED, "\0\0\0", HEADER, "no table\nhere\n", "Kernel Name\n"],
    ids=["empty", "refused", "binary", "header_only", "prose", "no_units"],
)
def test_output_without_launches(text):
    assert read(text) == []


def test_a_torn_last_row_and_foreign_lines_are_skipped():
    text = table('"byte","ns","%"', ("k", '"1","2","3"'), ("torn", '"1"')) + "a line of the program's own\n"
    assert [row.name for row in read(text)] == ["k"]


def test_a_refusal_is_a_hint_with_its_remedy():
    assert "NVreg_RestrictProfilingToAdminUsers=0" in hint(REFUSED)
    assert hint("==ERROR== No kernels were profiled.\n") == "ncu: No kernels were profiled."
    assert hint(table('"byte","ns","%"')) is None


def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(ncu, "find", lambda: "/opt/ncu")
    words = command(["python", "train.py"], tmp_path / "ncu.csv", launches=7)
    assert words[0] == "/opt/ncu"
    assert words[-2:] == ["python", "train.py"]
    assert words[words.index("--log-file") + 1] == str(tmp_path / "ncu.csv")
    assert words[words.index("--launch-count") + 1] == "7"
    assert f"dram__bytes.sum,{TENSOR},gpu__time_duration.sum" in words


def machine(monkeypatch, tmp_path, gpus=1, path="/opt/ncu", admin_only=1, capabilities=0):
    module = types.SimpleNamespace(nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: gpus)
    monkeypatch.setitem(sys.modules, "pynvml", module if gpus is not None else None)
    monkeypatch.setattr(ncu, "find", lambda: path)
    (tmp_path / "params").write_text(f"ResmanDebugLevel: 4294967295\nRmProfilingAdminOnly: {admin_only}\n")
    (tmp_path / "status").write_text(f"Name:\tpython\nCapEff:\t{capabilities:016x}\n")
    monkeypatch.setattr(ncu, "PARAMETERS", tmp_path / "params")
    monkeypatch.setattr(ncu, "STATUS", tmp_path / "status")


CASES = {
    "no_library": ({"gpus": None}, "no NVIDIA GPU"),
    "no_gpu": ({"gpus": 0}, "no NVIDIA GPU"),
    "not_installed": ({"path": None}, "not installed"),
    "not_permitted": ({}, "ERR_NVGPUCTRPERM"),
    "root_in_a_container": ({"capabilities": 0xA80425FB}, "--cap-add=SYS_ADMIN"),
    "sys_admin": ({"capabilities": 1 << 21}, None),
    "perfmon": ({"capabilities": 1 << 38}, None),
    "everybody_may": ({"admin_only": 0}, None),
}


@pytest.mark.parametrize(("what", "words"), CASES.values(), ids=CASES)
def test_why_counters_cannot_be_read(monkeypatch, tmp_path, what, words):
    machine(monkeypatch, tmp_path, **what)
    reason = probe()
    assert reason is None if words is None else words in reason


def test_a_driver_that_does_not_say_is_not_in_the_way(monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path)
    monkeypatch.setattr(ncu, "PARAMETERS", tmp_path / "absent")
    assert probe() is None


def test_ncu_is_found_where_its_installers_put_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(ncu, "PLACES", (str(tmp_path / "nsight-compute" / "*" / "ncu"),))
    assert ncu.find() is None
    for version in ("2024.3.2", "2025.1.0"):
        (tmp_path / "nsight-compute" / version).mkdir(parents=True)
        (tmp_path / "nsight-compute" / version / "ncu").touch()
    assert ncu.find() == str(tmp_path / "nsight-compute" / "2025.1.0" / "ncu")
