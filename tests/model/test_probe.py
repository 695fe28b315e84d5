"""The probe: right kernels are accepted; wrong, endless and fatal ones are refused by name."""

import os
import re

import pytest
import torch
from block_cases import no_overflow_checks  # noqa: F401
from probe_runs import config, refusal

pytest.importorskip("triton")

from kernels import batchnorm
from model import probe

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="asks the interpreter"),
    pytest.mark.usefixtures("nothing_known"),
]


# What the probe finds


@pytest.mark.parametrize(
    ("network", "ops"),
    [
        ("resnet9", "batchnorm"),
        ("resnet9", "fused"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("resnet9", "composed"), *(("resnet", ops) for ops in ("batchnorm", "composed", "fused")))
        ),
    ],
)
def test_right_kernels_are_accepted(no_overflow_checks, network, ops):  # noqa: F811
    begun = []
    assert probe.refusal(config(ops, network), begun.append) == (None, [])
    called = {place.split()[0] for place in begun}
    convolutions, norms = {"conv_fprop", "conv_dgrad", "conv_wgrad"}, {"bn_finalize", "bn_apply", "bn_backward_apply"}
    assert convolutions & called == (set() if ops == "batchnorm" else convolutions)
    assert norms <= called or (network == "resnet" and ops != "batchnorm")


def test_faults_between_the_ops_are_found(monkeypatch, no_overflow_checks):  # noqa: F811
    normalise = batchnorm._normalise
    without = lambda x, statistics, bn, residual=None, pool=False: normalise(x, statistics, bn, None, pool)  # noqa: E731
    monkeypatch.setattr(batchnorm, "_normalise", without)
    reason, _ = probe.refusal(config("batchnorm"))
    assert re.match(r"of a step of 2 images the \S.* is wrong, though no op is: it deviates by \d", reason)


def test_with_too_little_memory_fewer_images_are_compared(monkeypatch):
    sizes = []

    def compare(config, *_):
        sizes.append(config.batch_size)
        if config.batch_size > 4:
            raise torch.OutOfMemoryError
        return None, []

    monkeypatch.setattr(probe, "INTERPRETED_IMAGES", 16)
    monkeypatch.setattr(probe, "_refusal", compare)
    assert probe.refusal(config()) == (None, [])
    assert sizes == [16, 8, 4]
    monkeypatch.setattr(probe, "INTERPRETED_IMAGES", 2)
    monkeypatch.setattr(probe, "_refusal", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        probe.refusal(config())


# A copy of the project with a line changed, asked as a run asks


FPROP = r"conv_fprop 16x32x32-16x3x3-s1 fp32, tile 1024x16x16 4 warps 1 stages pointers, "
DOT = "            acc = tl.dot(a, b.T, acc"


@pytest.mark.parametrize(
    ("edits", "words"),
    [
        pytest.param(
            [
                ("kernels/conv_fprop_kernels.py", "(tap * C + c + offs_k))", "((R * R - 1 - tap) * C + c + offs_k))"),
                ("model/probe.py", "INTERPRETED_IMAGES = 2", "INTERPRETED_IMAGES = 1"),
            ],
            r"is wrong: relative error 0\.\d+ against float64, PyTorch's own is \de-0\d; .*",
            marks=pytest.mark.slow,  # tests/model/test_op_checks.py has one for each op
        ),
        (
            [
                ("kernels/conv_fprop_kernels.py", "range(R * R * BLOCKS_C)", "range(R * R * BLOCKS_C * 10**9)"),
                ("model/op_checks.py", "OP_LIMIT_S = 60", "OP_LIMIT_S = 4"),
            ],
            "did not end within the time limit of one op",
        ),
        (
            [("kernels/conv_fprop_kernels.py", DOT, "            import os; os.abort()\n" + DOT)],
            "ended the probe's process by SIGABRT.*",
        ),
        (
            [
                (
                    "kernels/conv_fprop_kernels.py",
                    DOT,
                    "            raise ValueError('out of resource: 300000 bytes\\nand more')\n" + DOT,
                )
            ],
            r"failed with \w+Error: .*",
        ),
    ],
    ids=["finite_and_wrong", "never_ends", "crashes", "does_not_compile"],
)
def test_a_broken_kernel_is_refused_by_op_shape_and_tile(changed, edits, words):
    for edit in edits:
        changed(*edit)
    assert re.fullmatch(FPROP + words, refusal())
