"""A run's verdict on a probe's answer, silence or end, and its memory of it."""

import dataclasses
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from probe_runs import CPU, config, refusal

pytest.importorskip("triton")

from model import verdict
from model.distributed import Ranks
from model.interrupts import Interrupted, Interrupts
from model.trainer import with_available_ops

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="asks the interpreter"),
    pytest.mark.usefixtures("nothing_known"),
]


# The limit, and who is ended with it


def shell(monkeypatch, script: str) -> None:
    """Let a probe be this script."""
    monkeypatch.setattr(verdict, "COMMAND", ["sh", "-c", script])


def gone(pid: int) -> bool:
    """Whether the process ends, or has ended: what init is yet to collect, or its parent, has."""
    for _ in range(1000):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


# Like a probe it begins when it has read what it is asked: so a signal finds the run waiting, not starting it.
ENDLESS = """cat > /dev/null; echo '{"running": "bn_apply 2x16"}'; sleep 1000 & echo $$ $! > pids; wait"""


def test_a_probe_beyond_its_limit_is_ended_with_its_children(monkeypatch, tmp_path):
    monkeypatch.setattr(verdict, "LIMIT_S", 3)
    monkeypatch.setattr(verdict, "ROOT", tmp_path)
    shell(monkeypatch, ENDLESS)
    assert refusal() == "bn_apply 2x16, did not end within 3 s"
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def test_a_signal_to_the_run_is_no_failure_of_the_kernels_and_ends_the_probe(monkeypatch, tmp_path):
    monkeypatch.setattr(verdict, "ROOT", tmp_path)
    shell(monkeypatch, ENDLESS.replace("; wait", f"; kill -TERM {os.getpid()}; wait"))
    before = signal.signal(signal.SIGTERM, Interrupts().handle)
    try:
        with pytest.raises(Interrupted):
            refusal()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert all(gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo no library >&2; exit 3", r"the probe, ended the probe's process with exit code 3 \(no library\)"),
        ("kill -SEGV $$", "the probe, ended the probe's process by SIGSEGV"),
        ("""echo '{"reason": null}'; echo of no meaning; echo '{"half'; kill -SEGV $$""", "None"),
    ],
    ids=["error", "crash", "crash_after_the_verdict"],
)
def test_how_a_probe_ended(monkeypatch, script, reason):
    shell(monkeypatch, script)
    assert re.fullmatch(reason, str(refusal()))


def test_a_probe_that_cannot_be_started_is_a_reason(monkeypatch):
    monkeypatch.setattr(verdict, "COMMAND", ["/no/such/interpreter"])
    assert refusal().startswith("the probe could not be started: ")


# What is remembered


def answers(monkeypatch, reason, compared=True, **more) -> None:
    """Let the next probes give this verdict."""
    verdict_json = json.dumps({"reason": reason, "compared": compared, **more})
    shell(monkeypatch, f"cat > /dev/null; echo '{verdict_json}'")


def test_a_verdict_is_kept_and_the_next_process_does_not_ask(monkeypatch, tmp_path):
    answers(monkeypatch, "bn_apply is wrong")
    said = []
    assert refusal(say=said.append) == "bn_apply is wrong"
    assert len(said) == 1
    (record,) = (tmp_path / "cache" / "verdicts").iterdir()
    answers(monkeypatch, None)
    for known in (verdict._known, {}):
        monkeypatch.setattr(verdict, "_known", known)
        assert refusal(say=said.append).startswith("bn_apply is wrong")
    assert len(said) == 1
    assert refusal().endswith(f"; to ask again delete {record})")
    record.unlink()
    monkeypatch.setattr(verdict, "_known", {})
    assert refusal() is None


@pytest.mark.parametrize(
    "damage", ["", "[1]", "{}", '{"reason": 0, "date": "x"}', '{"reason": null}', "\x80", "nested", os.mkfifo]
)
def test_a_damaged_record_is_asked_for_again(monkeypatch, tmp_path, damage):
    answers(monkeypatch, None)
    assert refusal() is None
    (record,) = (tmp_path / "cache" / "verdicts").iterdir()
    if callable(damage):
        record.unlink()
        damage(record)
    else:
        record.write_text("[" * 200_000 if damage == "nested" else damage, encoding="latin-1")
    monkeypatch.setattr(verdict, "_known", {})
    answers(monkeypatch, "wrong")
    assert refusal() == "wrong"
    assert json.loads(record.read_text())["reason"] == "wrong"


def test_a_crash_is_known_to_this_process_only(monkeypatch, tmp_path):
    answers(monkeypatch, "failed", compared=False)
    assert refusal() == "failed"
    assert not (tmp_path / "cache").exists()
    answers(monkeypatch, None)
    assert refusal() == "failed"
    monkeypatch.setattr(verdict, "_known", {})
    assert refusal() is None


def test_a_folder_that_cannot_be_written_to_does_no_harm(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("no folder")
    answers(monkeypatch, None)
    assert refusal() is None


def test_checks_that_could_not_be_made_are_named(monkeypatch):
    answers(monkeypatch, None, unchecked=["conv_fprop: RuntimeError"])
    said = []
    refusal(say=said.append)
    assert said[1:] == ["not compared with float64: conv_fprop: RuntimeError"]


def test_a_verdict_is_of_kernels_versions_and_what_the_kernels_compute(changed):
    key = verdict._key(config(), CPU)
    assert {"torch", "triton", "driver", "gpu", "capability", "sources"} <= set(key)
    for other in (config("composed"), config(network="resnet"), dataclasses.replace(config(), batch_size=40)):
        assert verdict._key(other, CPU) != key
    changed("kernels/tiles.json", '"schema": 1', '"schema":  1')
    assert verdict._key(config(), CPU)["sources"] != key["sources"]


def test_seed_and_schedule_ask_for_no_verdict_of_their_own(monkeypatch):
    answers(monkeypatch, None)
    said = []
    for asked in (config(), config(seed=3), config().with_epochs(5), config(weight_decay=0.1)):
        assert refusal(asked, said.append) is None
    assert len(said) == 1


# Several ranks


class Two(Ranks):
    """One of two ranks."""

    def gather(self, value):
        return [value, others.pop(0)] if self.is_first else [others.pop(0), value]


others = []


def of_two(rank, *words):
    """The rank `rank` of two, to which the other one says these words in turn."""
    others[:] = words
    return Two(rank, 2)


def test_a_rank_takes_the_first_one_s_verdict_on_the_same_gpu(monkeypatch):
    monkeypatch.setattr(verdict, "COMMAND", ["/must/not/be/asked"])
    key = verdict._key(dataclasses.replace(config(), batch_size=10), CPU)
    monkeypatch.setattr(verdict, "_key", lambda *_: key)
    assert refusal(ranks=of_two(1, (key, None), None)) is None
    assert refusal(ranks=of_two(1, (key, "wrong"), "wrong")) == "wrong"
    assert refusal(ranks=of_two(1, ({"gpu": "another"}, "wrong"), "wrong")) == "wrong"


def test_a_rank_on_another_gpu_asks_for_itself_and_a_refusal_is_for_all(monkeypatch):
    answers(monkeypatch, "wrong here")
    assert refusal(ranks=of_two(1, ({"gpu": "another"}, None), None)) == "wrong here"
    assert refusal(ranks=of_two(0, (None, None), "wrong there")) == "wrong here"
    answers(monkeypatch, None)
    asked = config(network="resnet")
    assert refusal(asked, ranks=of_two(0, (None, None), "wrong there")) == "wrong there"


def test_a_rank_without_kernels_keeps_all_from_them(monkeypatch):
    monkeypatch.setattr(verdict, "unavailable", lambda device: "no GPU")
    monkeypatch.setattr(verdict, "COMMAND", ["/must/not/be/asked"])
    assert refusal(ranks=of_two(1, ({}, None), None)) == "no GPU"
    assert refusal(ranks=of_two(0, (None, None), None)) == "no GPU"


def test_refused_ops_are_replaced_by_the_reference(monkeypatch):
    answers(monkeypatch, "wrong")
    asked = config(conv="ours")
    assert with_available_ops(asked, CPU) == (dataclasses.replace(asked, ops="reference", conv="table"), "wrong")
    answers(monkeypatch, None)
    monkeypatch.setattr(verdict, "_known", {})
    shutil.rmtree(os.environ["TRITON_CACHE_DIR"])
    assert with_available_ops(asked, CPU) == (asked, None)
    monkeypatch.setattr(verdict, "COMMAND", ["/must/not/be/asked"])
    reference = dataclasses.replace(config(), ops="reference")
    assert with_available_ops(reference, CPU) == (reference, None)
