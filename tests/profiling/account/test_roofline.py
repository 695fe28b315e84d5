import json

import pytest
import torch
import torch.nn.functional as F

from profiling.account.roofline import Roofs, Timed, kernel_rows, layer_rows
from profiling.account.work import work_of

ROOFS = Roofs(flops_per_s=1e12, bytes_per_s=1e10)


@pytest.fixture(scope="module")
def work():
    """Two equal convolutions and a ReLU, forward and backward."""
    x = torch.empty(4, 16, 8, 8, device="meta", requires_grad=True)
    w = torch.empty(16, 16, 3, 3, device="meta", requires_grad=True)
    return work_of(lambda: F.relu(F.conv2d(F.conv2d(x, w, padding=1), w, padding=1)).sum())


X, W = [4, 16, 8, 8], [16, 16, 3, 3]
FLOPS = 2 * 4 * 8 * 8 * 16 * 16 * 9
BYTES = 4 * (2 * 4 * 16 * 64 + 16 * 16 * 9)


def timed(name="k", op="aten::cudnn_convolution", dims=(X, W), category="convolution", calls=2, ns=2e6) -> Timed:
    return Timed(name, op, category, json.dumps(list(dims)), calls, ns)


def test_a_kernel_is_as_fast_as_its_ops_work_over_its_time(work):
    (row,) = kernel_rows([timed(calls=4, ns=4e6)], work, steps=2, roofs=ROOFS)
    assert (row.calls_per_step, row.ns_per_step, row.share) == (2, 2e6, 1)
    assert (row.flops, row.bytes, row.shape) == (FLOPS, BYTES, "16x8x8-16x3x3-s1")
    assert row.flops_per_s == pytest.approx(FLOPS / 1e-3)
    assert row.bytes_per_s == pytest.approx(BYTES / 1e-3)
    assert row.bound == "memory"  # 1.2 us of arithmetic, 4.2 us of bytes
    assert row.roof_fraction == pytest.approx(BYTES / 1e10 / 1e-3)


def test_the_roof_is_the_longer_of_the_two(work):
    (row,) = kernel_rows([timed()], work, steps=1, roofs=Roofs(1e9, 1e10))
    assert row.bound == "compute"
    assert row.roof_fraction == pytest.approx(FLOPS / 1e9 / 1e-3)


def test_kernels_of_a_backward_are_told_apart_by_name(work):
    gradients = [timed(f"sm80_{g}_implicit", "aten::convolution_backward", (X, X, W)) for g in ("dgrad", "wgrad")]
    rows = kernel_rows(gradients, work, steps=1, roofs=ROOFS)
    assert [row.flops for row in rows] == [FLOPS, FLOPS]
    assert {row.name for row in layer_rows(gradients, work, 1, ROOFS)} == {
        "16x8x8-16x3x3-s1 dgrad",
        "16x8x8-16x3x3-s1 wgrad",
    }


def test_what_runs_beside_the_main_kernel_did_none_of_the_work(work):
    """On an H200 a reduction and a padding had the FLOPs of their convolution, 12 and 4 times their roof."""
    op, dims = "aten::convolution_backward", (X, X, W)
    main = [timed(f"sm90_{g}_implicit", op, dims) for g in ("dgrad", "wgrad")]
    others = [timed("wgrad_reduce", op, dims, ns=1e5), timed("nhwcAddPadding", op, dims, "layout and cast", ns=1e5)]
    rows = {row.name: row.flops for row in kernel_rows([*main, *others], work, 1, ROOFS)}
    assert rows == {
        "sm90_dgrad_implicit": FLOPS,
        "sm90_wgrad_implicit": FLOPS,
        "wgrad_reduce": None,
        "nhwcAddPadding": None,
    }
    layers = {row.name.split()[-1]: row.ns_per_step for row in layer_rows([*main, *others], work, 1, ROOFS)}
    assert layers == {"dgrad": 2e6, "wgrad": 2.1e6}


def test_a_backward_that_is_one_kernel_did_both(work):
    backward = [timed("mkldnn", "aten::mkldnn_convolution_backward", (X, X, W))]
    assert kernel_rows(backward, work, 1, ROOFS)[0].flops == 2 * FLOPS
    assert [(r.name, r.flops) for r in layer_rows(backward, work, 1, ROOFS)] == [
        ("16x8x8-16x3x3-s1 backward", 2 * FLOPS)
    ]


def test_kernels_that_cannot_be_told_apart_are_given_no_flops(work):
    both = [timed(name, "aten::convolution_backward", (X, X, W)) for name in ("first", "second")]
    assert [row.flops for row in kernel_rows(both, work, 1, ROOFS)] == [None, None]
    (layer,) = layer_rows(both, work, 1, ROOFS)
    assert layer.flops == 2 * FLOPS
    assert layer.ns_per_step == 4e6


def test_an_ops_wrappers_on_a_cpu_did_none_of_its_work(work):
    inner = timed("mkldnn", "aten::mkldnn_convolution", ns=2e6)
    wrappers = [timed(op, op, ns=1e4) for op in ("aten::conv2d", "aten::convolution")]
    rows = {row.op: row for row in kernel_rows([inner, *wrappers], work, 1, ROOFS)}
    assert rows["aten::mkldnn_convolution"].flops == FLOPS
    assert [rows[t.op].flops for t in wrappers] == [None, None]


def test_of_an_op_and_its_wrapper_on_a_cpu_the_longer_did_the_work(work):
    """Of whatever name: a wrapper of the family's own name is no kernel that is called after it."""
    of_relu = (("aten::clamp_min_", 7e3), ("aten::relu_", 3e3))
    rows = kernel_rows([timed(op, op, ([4, 16, 8, 8],), "memory-bound", 1, ns) for op, ns in of_relu], work, 1, ROOFS)
    assert [(row.op, row.bytes) for row in rows] == [("aten::clamp_min_", 2 * 4 * 4 * 16 * 64), ("aten::relu_", None)]


def batch_norm(x):
    return F.batch_norm(x, None, None, *torch.ones(2, 16, device="meta", requires_grad=True), True)


@pytest.mark.parametrize(
    ("forward", "ops"),
    [
        (F.relu, {"aten::relu": 1, "aten::threshold_backward": 1}),
        (lambda x: F.max_pool2d(x, 2), dict.fromkeys(("aten::max_pool2d_with_indices", "_backward"), 1)),
        (batch_norm, {"aten::native_batch_norm": 6, "_backward": 9}),
        (lambda x: x + x[:1, :1, :1, :1], {"aten::add": 1}),
    ],
    ids=["relu", "pool", "batch_norm", "broadcast"],
)
def test_what_only_moves_bytes_has_its_place_by_modelled_flops(forward, ops):
    first, *_ = ops
    work = work_of(lambda: forward(torch.empty(X, device="meta", requires_grad=True)).sum())
    for op, each in ops.items():
        done = next(w for w in work if w.op == (first + op if op.startswith("_") else op))
        (row,) = kernel_rows([timed(done.op, done.op, list(map(list, done.dims)), "", 1)], work, 1, ROOFS)
        assert row.flops == each * 4 * 16 * 8 * 8
        assert (row.intensity, row.bound, row.per_element) == (row.flops / row.bytes, "memory", each)
        assert f"FLOPs: modelled, {each} for each element" in row.source


def test_flops_that_were_counted_are_not_modelled_again(work):
    assert kernel_rows([timed()], work, 1, ROOFS)[0].per_element is None


def test_a_copy_does_no_arithmetic():
    x = torch.empty(X, device="meta", requires_grad=True)
    work = work_of(lambda: x.to(torch.float16).sum())
    (row,) = kernel_rows([timed("copy", "aten::copy_", (X,), "layout and cast", 1)], work, 1, ROOFS)
    assert (row.flops, row.intensity, row.bytes) == (None, None, 6 * 4 * 16 * 64)


def test_a_kernel_of_unknown_work_keeps_its_time(work):
    (row,) = kernel_rows([timed(op="aten::other", category="unknown", dims=([7],))], work, 1, ROOFS)
    assert row.ns_per_step == 2e6
    assert (row.flops, row.bytes, row.bound, row.roof_fraction) == (None,) * 4


def test_without_roofs_speeds_remain(work):
    (row,) = kernel_rows([timed()], work, 1, Roofs(None, None))
    assert row.flops_per_s
    assert row.roof_fraction is None


@pytest.mark.parametrize("dims", ["", "no json", "[[1, null]]", "{}", "[[]]", "3", "[" * 5000])
def test_dims_of_any_kind_are_survived(work, dims):
    assert kernel_rows([Timed("k", "aten::relu", "memory-bound", dims, 1, 1.0)], work, 1, ROOFS)[0].flops is None


def test_rows_come_by_falling_time_and_shares_sum_to_one(work):
    rows = kernel_rows([timed("a", ns=1), timed("b", ns=3), timed("c", ns=2)], work, 1, ROOFS)
    assert [row.name for row in rows] == ["b", "c", "a"]
    assert sum(row.share for row in rows) == pytest.approx(1)
