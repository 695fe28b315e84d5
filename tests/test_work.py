import pytest
import torch
import torch.nn.functional as F
from modelled_steps import step

from profiling.work import family, from_json, to_json, work_of

FLOPS_PER_IMAGE = 2_756_474_880  # the article's network: three passes, no dgrad for the first convolution


@pytest.mark.parametrize("ops", ["reference", "batchnorm", "composed", "triton"])
def test_convolutions_of_every_implementation_are_the_networks(ops):
    rows = [r for r in step(ops=ops) if r.family in ("fprop", "dgrad", "wgrad", "matrix product")]
    assert [sum(r.family == f for r in rows) for f in ("fprop", "dgrad", "wgrad")] == [20, 19, 20]
    assert sum(r.flops for r in rows) == 512 * FLOPS_PER_IMAGE


def test_bytes_of_a_convolution_are_its_operands_and_result_once():
    x = torch.empty(4, 16, 8, 8, dtype=torch.float16, device="meta", requires_grad=True)
    w = torch.empty(32, 16, 3, 3, dtype=torch.float16, device="meta", requires_grad=True)
    rows = work_of(lambda: F.conv2d(x, w, stride=2, padding=1).sum())
    convolutions = [r for r in rows if r.flops]
    sizes = 2 * (4 * 16 * 8 * 8 + 32 * 16 * 9 + 4 * 32 * 4 * 4)
    assert [(r.family, r.bytes) for r in convolutions] == [(f, sizes) for f in ("fprop", "dgrad", "wgrad")]
    assert {r.layer for r in convolutions} == {"16x8x8-32x3x3-s2"}
    assert {r.flops for r in convolutions} == {2 * 4 * 4 * 4 * 32 * 16 * 9}


def test_no_gradient_for_the_image_is_no_work():
    x, w = torch.empty(4, 3, 8, 8, device="meta"), torch.empty(8, 3, 3, 3, device="meta", requires_grad=True)
    rows = work_of(lambda: F.conv2d(x, w, padding=1).sum())
    assert [r.family for r in rows if r.flops] == ["fprop", "wgrad"]


def test_the_update_reads_three_and_writes_two():
    w = torch.empty(10, device="meta", requires_grad=True)
    update = work_of(lambda: w.sum(), [w])[-1]
    assert (update.family, update.bytes) == ("optimiser", 5 * 10 * 4)


def test_an_op_made_of_kernels_is_counted_as_its_kernels():
    names = {r.op for r in step(ops="triton")}
    assert "cifar::preact_block" not in names
    assert {"cifar::conv_fprop", "cifar::conv_dgrad", "cifar::conv_wgrad", "cifar::bn_backward_apply"} <= names


def test_views_move_nothing():
    x = torch.empty(4, 6, device="meta", requires_grad=True)
    assert next(r.op for r in work_of(lambda: x.view(24).detach().requires_grad_().t().sum())) == "aten::sum"


def test_a_kernel_is_recognised_by_family_and_extents_in_any_order():
    fprop, dgrad = (next(r for r in step() if r.family == f) for f in ("fprop", "dgrad"))
    assert family("aten::cudnn_convolution") == family("aten::mkldnn_convolution") == fprop.key.family
    assert dgrad.key.family == family("aten::convolution_backward") == "conv backward"


def test_the_record_gives_the_rows_back():
    rows = list(step())
    assert from_json(to_json(rows, 512, "float16")) == rows


@pytest.mark.parametrize("record", [{}, {"version": 2, "ops": []}, {"version": 1, "ops": [{"op": "x"}]}])
def test_another_record_is_refused(record):
    with pytest.raises(ValueError, match=r"version|form"):
        from_json(record)
