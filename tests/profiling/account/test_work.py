import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from modelled_steps import step

from kernels import tiles
from model.network import ResNet, ResNet9
from model.presets import preset
from model.trainer import modelled_step
from profiling.account.work import as_on, family, flops_per_image, from_json, work_of
from profiling.device.specifications import V100_FLOPS_PER_S

FLOPS_PER_IMAGE = 2_756_474_880  # the article's network: three passes, no dgrad for the first convolution
PARAMETERS = 5_205_834


@pytest.mark.parametrize("ops", ["reference", "batchnorm", "composed", "fused"])
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


@pytest.mark.parametrize(
    ("ops", "op", "passes"),
    [("reference", "aten::_fused_sgd_", 5), ("batchnorm", "cifar::sgd", 6.5), ("fused", "cifar::sgd", 6.5)],
)
def test_the_update_is_the_one_that_runs(ops, op, passes):
    """PyTorch's in one pass, three read and two written; ours reads the gradient twice, and writes the 16-bit copy."""
    (update,) = [row for row in step(ops=ops) if row.family == "optimiser"]
    assert (update.op, update.bytes) == (op, passes * 4 * PARAMETERS)


@pytest.mark.parametrize("ops", ["reference", "batchnorm", "composed", "fused"])
def test_a_batch_is_made_by_the_ops_that_make_it(ops):
    """By none where it comes from the host."""
    made = [row.op for row in step("resnet9", ops=ops) if row.family == "augment"]
    assert all(op.startswith("aten::") for op in made) if ops == "reference" else made == ["cifar::augment"]
    assert made
    assert not [row for row in step("article-256", ops=ops) if row.family == "augment"]


def test_an_augmentation_s_kernels_are_still_recognised_as_their_ops():
    row = next(row for row in step("resnet9") if row.op == "aten::index")
    assert row.key.family == "index"


def test_an_op_made_of_kernels_is_counted_as_its_kernels():
    names = {r.op for r in step(ops="fused")}
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
    record = json.dumps({"version": 1, "ops": [dataclasses.asdict(row) for row in rows]})
    assert from_json(json.loads(record)) == rows


@pytest.mark.parametrize("record", [{}, {"version": 2, "ops": []}, {"version": 1, "ops": [{"op": "x"}]}])
def test_another_record_is_refused(record):
    with pytest.raises(ValueError, match=r"version|form"):
        from_json(record)


@pytest.mark.parametrize(
    ("build", "forward", "training"),
    [
        (ResNet, 0.920e9, 2.7565e9),
        (lambda: ResNet(prep_bn_relu=True), 0.920e9, 2.7565e9),
        (ResNet9, 0.7585e9, 2.2720e9),
        (lambda: ResNet9(pool_first=True), 0.7585e9, 2.2720e9),
    ],
    ids=["article", "redundant_bn", "resnet9", "resnet9_pool_first"],
)
def test_flops_are_those_of_the_article(build, forward, training):
    counted = flops_per_image(build)
    assert counted.forward == pytest.approx(forward, rel=1e-4)
    assert counted.training == pytest.approx(training, rel=1e-4)


def test_the_closed_formula_agrees():
    """2 K C R S P Q for each convolution, three passes, less the first one's gradient with respect to the image."""
    layers = [(3, 64, 3, 32)]
    c, size = 64, 32
    for stage, k in enumerate((64, 128, 256, 256)):
        size = size if stage == 0 else size // 2
        layers += [(c, k, 3, size), (k, k, 3, size), (k, k, 3, size), (k, k, 3, size)]
        if stage:
            layers.append((c, k, 1, size))
        c = k
    assert len(layers) == 20
    convolutions = sum(2 * k * c * r * r * p * p for c, k, r, p in layers)
    linear = 2 * 512 * 10
    first = 2 * 64 * 3 * 9 * 32 * 32
    counted = flops_per_image(ResNet)
    assert counted.forward == convolutions + linear
    assert counted.training == 3 * (convolutions + linear) - first
    assert counted.training * 50_000 * 35 / V100_FLOPS_PER_S == pytest.approx(38.6, abs=0.05)  # the article's 40 s


def test_ops_are_modelled_as_the_device_runs_them(monkeypatch):
    """A tile may have an activation stored, by a kernel that the trace then shows."""
    gpu_of, gpu = tiles.gpu_of, torch.device("cuda")
    hopper = tiles.Gpu("a GPU", (9, 0))
    monkeypatch.setattr(tiles, "gpu_of", lambda device: hopper if device == gpu else gpu_of(device))
    default = tiles.tile
    monkeypatch.setattr(
        tiles,
        "tile",
        lambda op, shape, dtype, gpu: (
            dataclasses.replace(default(op, shape, dtype, gpu), prologue="stored")
            if gpu == hopper and op == "conv_fprop"
            else default(op, shape, dtype, gpu)
        ),
    )

    def stored() -> int:
        rows = work_of(*modelled_step(dataclasses.replace(preset("fused"), batch_size=8), torch.float16))
        return sum(row.family == "bn_apply" for row in rows)

    assert stored() == 0
    with as_on(gpu):
        assert stored() > 0
    assert stored() == 0
