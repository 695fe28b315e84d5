import dataclasses
import importlib.util
import json

import pytest
import torch
from runs import final_tensors, tiny_config, tiny_dataset, tiny_session
from train_runs import RUN, invoke, stop_at, tiny

import train
from model import checkpoint
from model.errors import DeviceError
from model.interrupts import Interrupted
from model.session import require_fit


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the kernels need triton")
def test_training_on_the_fused_kernels_is_training(tmp_path, monkeypatch):
    """A run of `ops=fused` ends where the reference's does, and either's checkpoint goes on in the other."""
    monkeypatch.setattr("model.verdict.refusal", lambda *_: None)  # tests/model/test_probe.py asks
    data = tiny_dataset(8, 4)
    config = tiny_config(widths=(16, 16, 16, 16), batch_size=4, epochs=1, lr_epochs=(0, 0.5, 1), lr_values=(0, 0.02, 0))
    fused_config = dataclasses.replace(config, ops="fused")
    session = tiny_session(data)
    with pytest.raises(Interrupted):
        train.run(session, config, tmp_path / "reference", on_step=stop_at(session, 1))
    found = checkpoint.load(tmp_path / "reference")
    expected = train.run(tiny_session(data), config, tmp_path / "reference", found)
    require_fit(tiny_session(data), found, fused_config)
    fused = train.run(tiny_session(data), fused_config, tmp_path / "fused", found)
    assert (fused["ops"], fused["ops_requested"]) == ("fused", "fused")
    assert fused["triton_conv_share"] > 0.9
    for name in ("train_loss", "test_loss"):
        assert fused[name] == pytest.approx(expected[name], rel=1e-4)
    left, right = final_tensors(tmp_path / "reference"), final_tensors(tmp_path / "fused")
    assert left.keys() == right.keys()
    back = train.evaluate(tiny_session(data), config, checkpoint.load(tmp_path / "fused"))
    assert back["test_loss"] == pytest.approx(fused["test_loss"], rel=1e-4)


NO_KERNELS = {"TRITON_INTERPRET": "0"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run here")
def test_a_preset_falls_back_to_the_reference_ops_and_says_so(tmp_path):
    run = ["--preset", "fused", "--epochs", "1", "--set", "widths=16,16,16,16", "--json", "--out", tmp_path / "run"]
    done = tiny(*run, env=NO_KERNELS, fresh=True)
    assert done.returncode == 0, done.stderr
    assert b"REFERENCE OPS, NOT FUSED" in done.stderr
    summary = json.loads(done.stdout)
    assert (summary["ops"], summary["ops_requested"], summary["triton_conv_share"]) == ("reference", "fused", 0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run here")
@pytest.mark.parametrize(
    "ops", [*(pytest.param(o, marks=pytest.mark.slow) for o in ("batchnorm", "composed")), "fused"]
)
def test_kernels_asked_for_by_name_never_fall_back(tmp_path, ops):
    run = [*RUN, tmp_path / "run", "--set", f"ops={ops}", "--set", "widths=16,16,16,16"]
    done = tiny(*run, env=NO_KERNELS, fresh=True)
    assert done.returncode == 4
    assert f"ops={ops} cannot run here".encode() in done.stderr
    assert b"ops=reference" in done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()


def test_kernels_that_are_refused_are_as_good_as_absent(tmp_path, monkeypatch):
    monkeypatch.setattr("model.verdict.refusal", lambda *_: "bn_apply is wrong")
    config = tiny_config(ops="batchnorm")
    summary = train.run(tiny_session(), config, tmp_path / "falls_back")
    assert (summary["status"], summary["ops"], summary["ops_requested"]) == ("complete", "reference", "batchnorm")
    with pytest.raises(DeviceError, match="ops=batchnorm cannot run here: bn_apply is wrong; use --set") as error:
        train.run(tiny_session(), config, tmp_path / "insists", require_ops=True)
    assert error.value.exit_code == 4
    assert not (tmp_path / "insists").exists()


def test_an_absent_device_exits_4(tmp_path):
    result = invoke("--set", "device=cuda:99", "--out", str(tmp_path / "out"))
    assert result.exit_code == 4
    assert "cuda:99" in result.output
