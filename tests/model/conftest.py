import shutil

import pytest

from model import verdict


@pytest.fixture
def nothing_known(monkeypatch, tmp_path):
    """Neither by this process nor on the disk."""
    monkeypatch.setattr(verdict, "_known", {})
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def changed(monkeypatch, tmp_path):
    """`changed(file, old, new)` edits the copy that is asked from now on."""
    root = tmp_path / "project"
    for folder in ("kernels", "model"):
        shutil.copytree(verdict.ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))

    def change(file: str, old: str, new: str) -> None:
        source = (root / file).read_text()
        assert source.count(old) == 1, (file, old)
        (root / file).write_text(source.replace(old, new))
        monkeypatch.setattr(verdict, "ROOT", root)

    return change
