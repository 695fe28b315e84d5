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
OPS = ["reference", "batchnorm", "composed", "fused"]


@pytest.mark.parametrize("ops", OPS)
def test_convolutions_of_every_implementation_are_the_networks(ops):
    rows = [r for r in step(ops=ops) if r.family in ("fprop", "dgrad", "wgrad", "matrix product")]
    assert [sum(r.family == f for r in rows) for f in ("fprop", "dgrad", "wgrad")] == [20, 19, 20]
    assert sum(r.flops for r in rows) == 512 * FLOPS_PER_IMAGE


def test_bytes_of_a_convolution_are_its_operands_and_result_once():
    """No gradient for the image is no work."""
    x, w = (torch.empty(e, dtype=torch.float16, device="meta") for e in ((4, 16, 8, 8), (32, 16, 3, 3)))
    for families in (("fprop", "wgrad"), ("fprop", "dgrad", "wgrad")):
        x.requires_grad_("dgrad" in families)
        rows = [r for r in work_of(lambda: F.conv2d(x, w.requires_grad_(), stride=2, padding=1).sum()) if r.flops]
        sizes = 2 * (4 * 16 * 8 * 8 + 32 * 16 * 9 + 4 * 32 * 4 * 4)
        assert [(r.family, r.bytes) for r in rows] == [(family, sizes) for family in families]
        assert {(r.layer, r.flops) for r in rows} == {("16x8x8-32x3x3-s2", 2 * 4 * 4 * 4 * 32 * 16 * 9)}


@pytest.mark.parametrize(
    ("ops", "op", "passes"),
    [("reference", "aten::_fused_sgd_", 5), ("batchnorm", "cifar::sgd", 6.5), ("fused", "cifar::sgd", 6.5)],
)
def test_update_is_the_one_that_runs(ops, op, passes):
    """PyTorch's in one pass, three read and two written; ours reads the gradient twice, and writes the 16-bit copy."""
    (update,) = [row for row in step(ops=ops) if row.family == "optimiser"]
    assert (update.op, update.bytes) == (op, passes * 4 * PARAMETERS)


@pytest.mark.parametrize("ops", OPS)
def test_batch_is_made_by_the_ops_that_make_it(ops):
    """No op makes a batch that comes from the host."""
    made = [row for row in step("resnet9", ops=ops) if row.family == "augment"]
    assert made
    if ops == "reference":
        assert all(row.op.startswith("aten::") for row in made)
        assert next(row for row in made if row.op == "aten::index").key.family == "index"  # as a trace shows it
    else:
        assert [row.op for row in made] == ["cifar::augment"]
    assert not [row for row in step("article-256", ops=ops) if row.family == "augment"]


def test_op_made_of_kernels_is_counted_as_its_kernels():
    names = {r.op for r in step(ops="fused")}
    assert "cifar::preact_block" not in names
    assert {"cifar::conv_fprop", "cifar::conv_dgrad", "cifar::conv_wgrad", "cifar::bn_backward_apply"} <= names


def test_views_move_nothing():
    x = torch.empty(4, 6, device="meta", requires_grad=True)
    assert next(r.op for r in work_of(lambda: x.view(24).detach().requires_grad_().t().sum())) == "aten::sum"


def test_kernel_is_recognised_by_family_and_extents_in_any_order():
    fprop, dgrad = (next(r for r in step() if r.family == f) for f in ("fprop", "dgrad"))
    assert family("aten::cudnn_convolution") == family("aten::mkldnn_convolution") == fprop.key.family
    assert dgrad.key.family == family("aten::convolution_backward") == "conv backward"


def test_record_gives_the_rows_back():
    rows = list(step())
    record = json.dumps({"version": 1, "ops": [dataclasses.asdict(row) for row in rows]})
    assert from_json(json.loads(record)) == rows


@pytest.mark.parametrize("record", [{}, {"version": 2, "ops": []}, {"version": 1, "ops": [{"op": "x"}]}])
def test_another_record_is_refused(record):
    with pytest.raises(ValueError, match=r"version|form"):
        from_json(record)


NETWORKS = {
    "article": (ResNet, 0.920e9, 2.7565e9),
    "redundant_bn": (lambda: ResNet(prep_bn_relu=True), 0.920e9, 2.7565e9),
    "resnet9": (ResNet9, 0.7585e9, 2.2720e9),
    "resnet9_pool_first": (lambda: ResNet9(pool_first=True), 0.7585e9, 2.2720e9),
}


@pytest.mark.parametrize(("build", "forward", "training"), NETWORKS.values(), ids=NETWORKS)
def test_flops_are_those_of_the_article(build, forward, training):
    assert flops_per_image(build) == (pytest.approx(forward, rel=1e-4), pytest.approx(training, rel=1e-4))


def test_closed_formula_agrees():
    """2 K C R S P Q for each convolution, three passes, less the first one's gradient with respect to the image."""
    layers = [(3, 64, 3, 32)]
    c, size = 64, 32
    for stage, k in enumerate((64, 128, 256, 256)):
        size = size if stage == 0 else size // 2
        layers += [(c, k, 3, size), *[(k, k, 3, size)] * 3]
        if stage:
            layers.append((c, k, 1, size))
        c = k
    assert len(layers) == 20
    forward = sum(2 * k * c * r * r * p * p for c, k, r, p in layers) + 2 * 512 * 10  # and the classifier
    training = 3 * forward - 2 * 64 * 3 * 9 * 32 * 32
    assert flops_per_image(ResNet) == (forward, training)
    assert training * 50_000 * 35 / V100_FLOPS_PER_S == pytest.approx(38.6, abs=0.05)  # the article's 40 s


def test_ops_are_modelled_as_the_device_runs_them(monkeypatch):
    """A tile may have an activation stored, by a kernel that the trace then shows."""
    gpu_of, tile, gpu, hopper = tiles.gpu_of, tiles.tile, torch.device("cuda"), tiles.Gpu("a GPU", (9, 0))
    monkeypatch.setattr(tiles, "gpu_of", lambda device: hopper if device == gpu else gpu_of(device))

    def stores_on_hopper(op, shape, dtype, on):
        found = tile(op, shape, dtype, on)
        return dataclasses.replace(found, prologue="stored") if on == hopper and op == "conv_fprop" else found

    monkeypatch.setattr(tiles, "tile", stores_on_hopper)

    def stored() -> int:
        rows = work_of(*modelled_step(dataclasses.replace(preset("fused"), batch_size=8), torch.float16))
        return sum(row.family == "bn_apply" for row in rows)

    assert stored() == 0
    with as_on(gpu):
        assert stored() > 0
    assert stored() == 0
