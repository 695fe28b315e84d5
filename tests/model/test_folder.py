import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from model import folder
from model.errors import UsageError
from profiling import ROOT


def holding_elsewhere(path: Path) -> subprocess.CompletedProcess:
    """The words of another process that tries to hold `path`."""
    code = (
        "import sys; from pathlib import Path; from model import folder, errors\n"
        "try:\n    with folder.hold(Path(sys.argv[1]), print): print('held')\n"
        "except errors.UsageError as error: print(error); sys.exit(error.exit_code)"
    )
    return subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_name_is_never_given_twice(tmp_path):
    made = [folder.make_new(tmp_path / "runs" / "a") for _ in range(3)]
    assert [path.name for path in made] == ["a", "a-2", "a-3"]
    assert all(path.is_dir() for path in made)


@pytest.mark.parametrize("make", [folder.make, folder.make_new])
@pytest.mark.parametrize("link", [True, False], ids=["dangling_link", "file"])
def test_a_folder_that_cannot_be_made(tmp_path, make, link):
    (tmp_path / "x").symlink_to(tmp_path / "nowhere") if link else (tmp_path / "x").touch()
    with pytest.raises(UsageError, match="cannot be made"):
        make(tmp_path / "x" / "run")


def test_one_process_holds_a_folder_as_often_as_it_likes(tmp_path):
    with folder.hold(tmp_path, pytest.fail):
        with folder.hold(tmp_path, pytest.fail):
            pass
        refused = holding_elsewhere(tmp_path)
        assert refused.returncode == 2
        assert f"in use by process {os.getpid()} on {platform.node()} since 20" in refused.stdout
        assert folder.is_empty(tmp_path)
    assert holding_elsewhere(tmp_path).stdout == "held\n"
    assert folder.is_empty(tmp_path)
    (tmp_path / "log.jsonl").touch()
    assert not folder.is_empty(tmp_path)


def test_a_killed_process_holds_nothing(tmp_path):
    code = (
        "import os, sys, signal; from pathlib import Path; from model import folder\n"
        "with folder.hold(Path(sys.argv[1]), print): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT).returncode < 0
    with folder.hold(tmp_path, pytest.fail):
        assert str(os.getpid()) in (tmp_path / folder.OWNER).read_text()


@pytest.mark.parametrize("name", [folder.LOCK, folder.OWNER])
def test_nothing_is_written_through_a_link(tmp_path, name):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / name).symlink_to("victim")
    warnings = []
    with folder.hold(tmp_path, warnings.append):
        pass
    assert (tmp_path / "victim").read_text() == "precious"
    assert len(warnings) == (name == folder.LOCK)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_the_owner_is_read_from_a_regular_file_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "owner")
    assert folder._said_by(tmp_path / "owner") == "another process"
    (tmp_path / "word").write_text("\x1b[2Jprocess 1\n")
    assert folder._said_by(tmp_path / "word") == "[2Jprocess 1"
