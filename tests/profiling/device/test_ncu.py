import pytest

from profiling.device import ncu
from profiling.device.ncu import Measured, command, hint, probe, read

TENSOR = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"
HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    f'"CC","dram__bytes.sum","gpu__time_duration.sum","{TENSOR}"\n'
)
REFUSED = (
    "==PROF== Connected to process 17 (/usr/bin/python3)\n"
    "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters\n"
)


def table(units, *rows):
    """Output in the layout of `ncu --csv --page raw`: progress, header, units, a row a launch. MADE UP."""
    lead = '"{i}","17","python","127.0.0.1","{name}","1","7","(256, 1, 1)","(64, 1, 1)","0","9.0",'
    lines = [lead.format(i=i, name=name) + cells + "\n" for i, (name, cells) in enumerate(rows)]
    return "".join(["==PROF== Connected to process 17\n", HEADER, 11 * '"",', units, "\n", *lines])


BASE = '"byte","ns","%"'
CUTLASS = "void cutlass::Kernel<int, (bool)1>(Params)"
OUTPUTS = {
    "launches": (
        table(BASE, (CUTLASS, '"67,108,864","31,456","62.50"'), ("bn", '"134217728","40000","0"')),
        [Measured(CUTLASS, 67108864, 0.625, 31456), Measured("bn", 134217728, 0, 40000)],
    ),
    "units_of_older_names": (table('"Mbyte","usecond","%"', ("k", '"2","3","50"')), [Measured("k", 2e6, 0.5, 3e3)]),
    "units_of_newer_names": (table('"Kbyte","ms","%"', ("k", '"2000","0.003","50"')), [Measured("k", 2e6, 0.5, 3e3)]),
    "not_known": (table(BASE, ("k", '"n/a","nan",""')), [Measured("k", None, None, None)]),
    "unknown_unit": (table('"byte","fortnight","%"', ("k", '"1","2","3"')), [Measured("k", 1, 0.03, None)]),
    "fewer_metrics": ('"Kernel Name","gpu__time_duration.sum"\n"","ns"\n"k","5"\n', [Measured("k", None, None, 5)]),
    "torn_and_foreign_lines": (
        table(BASE, ("k", '"1","2","3"'), ("torn", '"1"')) + "a line of the program's own\n",
        [Measured("k", 1, 0.03, 2)],
    ),
    **{
        f"none_{i}": (t, []) for i, t in enumerate(("", REFUSED, "\0\0\0", HEADER, "no table\nhere\n", "Kernel Name\n"))
    },
}


@pytest.mark.parametrize(("text", "launches"), OUTPUTS.values(), ids=OUTPUTS)
def test_launches_of_an_output(text, launches):
    found = read(text)
    assert [row.name for row in found] == [row.name for row in launches]
    for row, expected in zip(found, launches, strict=True):
        assert row[1:] == tuple(None if v is None else pytest.approx(v) for v in expected[1:])


def test_a_refusal_is_a_hint_with_its_remedy():
    assert "NVreg_RestrictProfilingToAdminUsers=0" in hint(REFUSED)
    assert hint("==ERROR== No kernels were profiled.\n") == "ncu: No kernels were profiled."
    assert hint(table(BASE)) is None


def test_the_command_line_of_the_newest_ncu(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(ncu, "PLACES", (str(tmp_path / "nsight-compute" / "*" / "ncu"),))
    assert ncu.find() is None
    for version in ("2024.3.2", "2025.1.0"):
        (tmp_path / "nsight-compute" / version).mkdir(parents=True)
        (tmp_path / "nsight-compute" / version / "ncu").touch()
    words = command(["python", "train.py"], tmp_path / "ncu.csv", launches=7)
    assert (words[0], words[-2:]) == (str(tmp_path / "nsight-compute/2025.1.0/ncu"), ["python", "train.py"])
    assert words[words.index("--log-file") + 1] == str(tmp_path / "ncu.csv")
    assert words[words.index("--launch-count") + 1] == "7"
    assert f"dram__bytes.sum,{TENSOR},gpu__time_duration.sum" in words


RESTRICTED = {"ncu": "/opt/ncu", "gpus": 1, "params": "RmProfilingAdminOnly: 1", "capabilities": "0"}
CASES = {
    "no_library": ({"gpus": None}, "no NVIDIA GPU"),
    "no_gpu": ({"gpus": 0}, "no NVIDIA GPU"),
    "not_installed": ({"ncu": None}, "not installed"),
    "not_permitted": ({}, "ERR_NVGPUCTRPERM"),
    "root_in_a_container": ({"capabilities": "a80425fb"}, "--cap-add=SYS_ADMIN"),
    "sys_admin": ({"capabilities": f"{1 << 21:x}"}, None),
    "perfmon": ({"capabilities": f"{1 << 38:x}"}, None),
    "root_where_nobody_tells": ({"capabilities": "none", "uid": 0}, None),
    "everybody_may": ({"params": "RmProfilingAdminOnly: 0"}, None),
    "the_driver_does_not_say": ({"params": None}, None),
}


@pytest.mark.parametrize(("changed", "words"), CASES.values(), ids=CASES)
def test_why_counters_cannot_be_read(fake, monkeypatch, tmp_path, changed, words):
    case = RESTRICTED | changed
    fake.nvmlDeviceGetCount = lambda: case["gpus"]
    if case["gpus"] is None:
        fake.fail("nvmlInit", "LibraryNotFound")
    monkeypatch.setattr(ncu, "find", lambda: case["ncu"])
    monkeypatch.setattr(ncu.os, "geteuid", lambda: case.get("uid", 1000), raising=False)
    if case["params"]:
        (tmp_path / "params").write_text(f"ResmanDebugLevel: 4294967295\n{case['params']}\n")
    (tmp_path / "status").write_text(f"Name:\tpython\nCapEff:\t{case['capabilities']}\n")
    monkeypatch.setattr(ncu, "PARAMETERS", tmp_path / "params")
    monkeypatch.setattr(ncu, "STATUS", tmp_path / "status")
    reason = probe()
    assert reason is None if words is None else words in reason
