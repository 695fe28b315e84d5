"""Imports run one way: from room to room down one stair, inside of functions too."""

import ast
import functools
import sys
from pathlib import Path

import pytest

from profiling import ROOT

MEASURING = {f"profiling/{room}" for room in ("output", "device", "run", "account", "bench")}
PROFILED = {f"profiling/{room}" for room in ("output", "device", "run", "account", "report")}
BELOW = {
    "profiling/output": set(),
    "profiling/device": {"profiling/output"},
    "profiling/run": {"profiling/output", "profiling/device"},
    "profiling/account": {"profiling/output", "profiling/device", "profiling/run"},
    "profiling/bench": {"profiling/output", "profiling/device"},
    "profiling/report": {"profiling/output", "profiling/device", "profiling/run", "profiling/account"},
    "profiling": {*PROFILED, "profiling/bench"},
    "model/data": {f"model/{name}" for name in ("config", "errors", "files", "implementation", "memory")},
    "model": {"model/data"},
    "profile_pass": {"model", "model/data", *PROFILED},
    "train": {"profile_pass", "model", "model/data", *PROFILED},
    "experiments/study": {"train", "model", "model/data", *MEASURING},
    "experiments": {"experiments/study", "train", "model", "model/data", *MEASURING},
    "kernels": set(),
}
"""What each room may import beside itself. A room stands for those inside of it too, where it is named without them."""
KERNELS_FOR = ("kernels", "model", "profiling/account", "profiling/bench", "profiling/device", "profiling/report")
NAMES = {"kernels", "model", "profiling", "profile_pass", "train", "experiments", "tests"}
HOUSES = ("kernels", "model", "profiling", "experiments")
MODULES = [ROOT / "train.py", ROOT / "profile_pass.py", *(p for h in HOUSES for p in sorted((ROOT / h).rglob("*.py")))]


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(tree: ast.Module, top: bool = False) -> set[str]:
    """Modules that a module imports, wherever in it or at its `top`, by full names; `from a import b` gives a.b."""
    names = set()
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def place(name: str) -> str:
    """The file that a dotted name lies in, without its suffix, as "model/config", or the folder of a package."""
    parts = name.split(".")
    while parts and not (ROOT / "/".join(parts)).with_suffix(".py").exists():
        if (ROOT / "/".join(parts)).is_dir():
            break
        parts.pop()
    return "/".join(parts)


def own_place(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix("")).removesuffix("/__init__")


def room_of(path: str) -> str:
    return max((room for room in BELOW if f"{path}/".startswith(f"{room}/")), key=len)


def breaches(room: str, tree: ast.Module) -> set[str]:
    """Imports that go up the stair."""
    found = set()
    for name in imported(tree):
        if name.split(".")[0] not in NAMES:
            continue
        target = place(name)
        if not target or target == "tests" or target.startswith("tests/"):
            found.add(name)
            continue
        other = room_of(target)
        allowed = BELOW[room] | {room}
        if other == "kernels":
            allowed |= {"kernels"} if room in KERNELS_FOR else set()
        own = any(a.split("/")[0] == target for a in allowed) and "/" not in target  # the house itself: its ROOT
        if own or other in allowed or target in allowed or any(other.startswith(f"{a}/") for a in allowed - {room}):
            continue
        found.add(name)
    return found


@pytest.mark.parametrize("path", MODULES, ids=own_place)
def test_imports_run_down_the_stair(path):
    assert not breaches(room_of(own_place(path)), tree_of(path))


def test_no_circle():
    """Module by module, of the imports that run at import."""
    edges = {}
    for path in MODULES:
        names = imported(tree_of(path), top=True)
        edges[own_place(path)] = {place(name) for name in names if name.split(".")[0] in NAMES} - {own_place(path)}
    while edges:
        leaves = {name for name, needs in edges.items() if not needs & set(edges)}
        assert leaves, f"a circle among {sorted(edges)}"
        edges = {name: needs for name, needs in edges.items() if name not in leaves}


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("kernels", "import model"),
        ("model", "def f():\n    from profiling.run.clock import Clock"),
        ("profiling/output", "from profiling.device import nvml"),
        ("profiling/bench", "from profiling.account.terms import account"),
        ("profiling/report", "from profiling.bench import cases"),
        ("profiling/account", "import train"),
        ("model/data", "from model import trainer"),
        ("experiments/study", "from experiments.ladder import run"),
        ("train", "from profiling.bench import measure"),
        ("model", "from tests import runs"),
    ],
)
def test_a_breach_is_found(room, source):
    assert breaches(room, ast.parse(source))


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").glob("*.py"):
        foreign = {n.split(".")[0] for n in imported(tree_of(path))} - {"torch", "triton", "kernels"}
        assert foreign <= set(sys.stdlib_module_names), path


def test_no_module_without_a_purpose():
    assert not {path.stem for path in MODULES} & {"utils", "util", "common", "base", "misc", "helpers"}


def test_nothing_is_ever_unpickled():
    for path in MODULES:
        assert "pickle" not in {name.split(".")[0] for name in imported(tree_of(path))}, path
        calls = {ast.unparse(node.func) for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)}
        assert "torch.load" not in calls, path
