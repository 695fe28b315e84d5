"""Imports run one way: experiments -> train -> model -> kernels, and train -> profiling -> kernels."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HOUSES = {"kernels", "model", "profiling", "train", "experiments", "tests"}
MAY_IMPORT = {
    "kernels": {"kernels"},
    "model": {"model", "kernels"},
    "profiling": {"profiling", "kernels"},
    "train": {"model", "profiling"},
    "experiments": {"experiments", "train", "model", "profiling"},
}
KERNELS_LIBRARIES = {"torch", "triton"}


def modules() -> list[Path]:
    found = []
    for house in MAY_IMPORT:
        found += sorted((ROOT / house).rglob("*.py")) or [ROOT / f"{house}.py"]
    return found


def imported(source: str) -> set[str]:
    """Top-level names that a module imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the direction"
            names.add(node.module.split(".")[0])
    return names


def breaches(house: str, source: str) -> set[str]:
    return (imported(source) & HOUSES) - MAY_IMPORT[house]


def house_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    if path.exists():
        assert not breaches(house_of(path), path.read_text())


def test_the_houses_exist():
    assert {house_of(path) for path in modules() if path.exists()} >= {"kernels", "model", "profiling", "train"}


@pytest.mark.parametrize(
    ("house", "source"),
    [
        ("kernels", "import model"),
        ("model", "def f():\n    from profiling.clock import Clock"),
        ("profiling", "import train"),
    ],
    ids=["kernels_to_model", "hidden_in_a_function", "profiling_to_train"],
)
def test_a_breach_is_found(house, source):
    assert breaches(house, source)


def test_kernels_import_torch_and_triton_only():
    for path in (ROOT / "kernels").glob("*.py"):
        foreign = {n for n in imported(path.read_text()) if n not in KERNELS_LIBRARIES | {"kernels"}}
        assert foreign <= set(sys.stdlib_module_names), path


def test_no_module_without_a_purpose():
    names = {path.stem for path in modules()}
    assert not names & {"utils", "util", "common", "base", "misc", "helpers"}


def test_nothing_is_ever_unpickled():
    for path in modules():
        if path.exists():
            tree = ast.parse(path.read_text())
            assert "pickle" not in imported(path.read_text()), path
            calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
            assert "torch.load" not in calls, path
