import json

import pytest
import torch
import torch.nn.functional as F

from profiling.account.roofline import Roofs, Timed, kernel_rows, layer_rows
from profiling.account.work import work_of

ROOFS = Roofs(flops_per_s=1e12, bytes_per_s=1e10)
X, W = [4, 16, 8, 8], [16, 16, 3, 3]
ELEMENTS = 4 * 16 * 8 * 8
FLOPS = 2 * 4 * 8 * 8 * 16 * 16 * 9
BYTES = 4 * (2 * ELEMENTS + 16 * 16 * 9)
BACKWARD = ("aten::convolution_backward", (X, X, W))


@pytest.fixture(scope="module")
def work():
    """Two equal convolutions and a ReLU, forward and backward."""
    x, w = (torch.empty(extents, device="meta", requires_grad=True) for extents in (X, W))
    return work_of(lambda: F.relu(F.conv2d(F.conv2d(x, w, padding=1), w, padding=1)).sum())


def timed(name="k", op="aten::cudnn_convolution", dims=(X, W), category="convolution", calls=2, ns=2e6) -> Timed:
    return Timed(name, op, category, json.dumps(list(dims)), calls, ns)


def test_kernel_is_as_fast_as_its_ops_work_over_its_time(work):
    (row,) = kernel_rows([timed(calls=4, ns=4e6)], work, steps=2, roofs=ROOFS)
    assert (row.calls_per_step, row.ns_per_step, row.share) == (2, 2e6, 1)
    assert (row.flops, row.bytes, row.shape, row.per_element) == (FLOPS, BYTES, "16x8x8-16x3x3-s1", None)
    assert (row.flops_per_s, row.bytes_per_s) == (pytest.approx(FLOPS / 1e-3), pytest.approx(BYTES / 1e-3))
    assert (row.bound, row.roof_fraction) == ("memory", pytest.approx(BYTES / 1e10 / 1e-3))  # 1.2 us of arithmetic, 4.2


def test_roof_is_the_longer_of_the_two(work):
    (row,) = kernel_rows([timed()], work, steps=1, roofs=Roofs(1e9, 1e10))
    assert (row.bound, row.roof_fraction) == ("compute", pytest.approx(FLOPS / 1e9 / 1e-3))


def test_speeds_remain_without_roofs(work):
    (row,) = kernel_rows([timed()], work, 1, Roofs(None, None))
    assert (row.flops_per_s, row.roof_fraction) == (pytest.approx(FLOPS / 1e-3), None)


GRADIENTS = [timed(f"sm90_{gradient}_implicit", *BACKWARD) for gradient in ("dgrad", "wgrad")]
BESIDE = [timed("wgrad_reduce", *BACKWARD, ns=1e5), timed("nhwcAddPadding", *BACKWARD, "layout and cast", ns=1e5)]
WRAPPERS = [timed(op, op, ns=1e4) for op in ("aten::conv2d", "aten::convolution")]
RELU = [timed(op, op, (X,), "memory-bound", 1, ns) for op, ns in (("aten::clamp_min_", 7e3), ("aten::relu_", 3e3))]
# Kernels of an op; the FLOPs of each; the layers by gradient: (FLOPs, time).
SHARED = {
    "told_apart_by_name": (GRADIENTS, [FLOPS, FLOPS], {"dgrad": (FLOPS, 2e6), "wgrad": (FLOPS, 2e6)}),
    # On an H200 a reduction and a padding had the FLOPs of their convolution, 12 and 4 times their roof.
    "beside_the_main_kernel": (
        [*GRADIENTS, *BESIDE],
        [FLOPS, FLOPS, None, None],
        {"dgrad": (FLOPS, 2e6), "wgrad": (FLOPS, 2.1e6)},
    ),
    "both_in_one": ([timed("mkldnn", *BACKWARD)], [2 * FLOPS], {"backward": (2 * FLOPS, 2e6)}),
    "not_told_apart": (
        [timed(name, *BACKWARD) for name in ("first", "second")],
        [None, None],
        {"backward": (2 * FLOPS, 4e6)},
    ),
    "wrappers_on_a_cpu": ([timed("mkldnn", "aten::mkldnn_convolution"), *WRAPPERS], [FLOPS, None, None], None),
    "of_op_and_wrapper_the_longer": (RELU, [ELEMENTS, None], {}),  # a wrapper of the family's name is no kernel
}


@pytest.mark.parametrize(("kernels", "flops", "layers"), SHARED.values(), ids=SHARED)
def test_work_of_an_op_is_of_the_kernel_that_did_it(work, kernels, flops, layers):
    rows = {row.name: row.flops for row in kernel_rows(kernels, work, 1, ROOFS)}
    assert rows == {kernel.name: of for kernel, of in zip(kernels, flops, strict=True)}
    found = {row.name: (row.flops, row.ns_per_step) for row in layer_rows(kernels, work, 1, ROOFS)}
    assert layers is None or found == {f"16x8x8-16x3x3-s1 {of}": layer for of, layer in layers.items()}


def batch_norm(x):
    return F.batch_norm(x, None, None, *torch.ones(2, 16, device="meta", requires_grad=True), True)


PER_ELEMENT = {
    "relu": (F.relu, {"aten::relu": 1, "aten::threshold_backward": 1}),
    "pool": (
        lambda x: F.max_pool2d(x, 2),
        {"aten::max_pool2d_with_indices": 1, "aten::max_pool2d_with_indices_backward": 1},
    ),
    "batch_norm": (batch_norm, {"aten::native_batch_norm": 6, "aten::native_batch_norm_backward": 9}),
    "broadcast": (lambda x: x + x[:1, :1, :1, :1], {"aten::add": 1}),
}


@pytest.mark.parametrize(("forward", "ops"), PER_ELEMENT.values(), ids=PER_ELEMENT)
def test_memory_bound_ops_are_placed_by_modelled_flops(forward, ops):
    work = work_of(lambda: forward(torch.empty(X, device="meta", requires_grad=True)).sum())
    for op, each in ops.items():
        done = next(w for w in work if w.op == op)
        (row,) = kernel_rows([timed(op, op, list(map(list, done.dims)), "", 1)], work, 1, ROOFS)
        assert row.flops == each * ELEMENTS
        assert (row.intensity, row.bound, row.per_element) == (row.flops / row.bytes, "memory", each)
        assert f"FLOPs: modelled, {each} for each element" in row.source


def test_copy_does_no_arithmetic():
    x = torch.empty(X, device="meta", requires_grad=True)
    copies = [timed("copy", "aten::copy_", (X,), "layout and cast", 1)]
    (row,) = kernel_rows(copies, work_of(lambda: x.to(torch.float16).sum()), 1, ROOFS)
    assert (row.flops, row.intensity, row.bytes) == (None, None, 6 * ELEMENTS)


def test_kernel_of_unknown_work_keeps_its_time(work):
    (row,) = kernel_rows([timed(op="aten::other", category="unknown", dims=([7],))], work, 1, ROOFS)
    assert (row.ns_per_step, row.flops, row.bytes, row.bound, row.roof_fraction) == (2e6, None, None, None, None)


@pytest.mark.parametrize("dims", ["", "no json", "[[1, null]]", "{}", "[[]]", "3", "[" * 5000])
def test_dims_of_any_kind_are_survived(work, dims):
    assert kernel_rows([Timed("k", "aten::relu", "memory-bound", dims, 1, 1.0)], work, 1, ROOFS)[0].flops is None


def test_rows_come_by_falling_time_and_shares_sum_to_one(work):
    rows = kernel_rows([timed("a", ns=1), timed("b", ns=3), timed("c", ns=2)], work, 1, ROOFS)
    assert [row.name for row in rows] == ["b", "c", "a"]
    assert sum(row.share for row in rows) == pytest.approx(1)
