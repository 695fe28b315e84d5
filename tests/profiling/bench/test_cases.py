"""Cases are the networks' layers, their providers compute the same, and a result is judged by its error."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import batchnorm, reference
from kernels.conv_shape import ConvShape, parse
from model.network import ResNet, ResNet9
from profiling.bench import batchnorm_cases, measure
from profiling.bench.case import OperandFactory, disagreement
from profiling.bench.cases import augment_case, cases
from profiling.bench.conv_cases import conv_dgrad_case, conv_fprop_case, conv_wgrad_case
from profiling.bench.timing import QUICK, CpuTimer

CPU = torch.device("cpu")
EVEN, STRIDED, PROJECTION = ConvShape(16, 32, 8, 8), ConvShape(32, 16, 8, 8, stride=2), ConvShape(16, 32, 8, 8, 1, 2)
VARIANTS = {"bn_apply": ("", "pool", "residual"), "bn_relu": ("", "pool", "residual")}
VARIANTS |= {f"bn_{op}": ("", "pool") for op in ("backward_reduce", "coefficients", "backward_apply", "backward")}
SMALL = [
    augment_case(),
    *(conv_fprop_case(EVEN, variant) for variant in ("", "statistics", "prologue,statistics")),
    conv_fprop_case(STRIDED, "prologue,statistics"),
    conv_fprop_case(PROJECTION, "statistics"),
    *(getattr(batchnorm_cases, f"{op}_case")(16, 8) for op in ("bn_stats", "bn_stats_add", "bn_finalize")),
    *(getattr(batchnorm_cases, f"{op}_case")(16, 8, variant) for op in VARIANTS for variant in VARIANTS[op]),
    *(conv_dgrad_case(EVEN, variant) for variant in ("", "mask,sums")),
    conv_dgrad_case(STRIDED, "mask,sums"),
    *(conv_wgrad_case(EVEN, variant) for variant in ("", "prologue")),
    conv_wgrad_case(PROJECTION, "prologue"),
]


def traced(ops) -> set[tuple[str, str, str]]:
    """(op, variant, shape) of every call of a training step of both networks at the article's widths.

    A library convolution counts as our three; a pool or a residual is a variant.
    """
    calls = set()

    def shape_of(x: Tensor) -> str:
        return "x".join(map(str, x.shape[1:]))

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            name = op.name().partition("::")[2].partition(".")[0]
            if op.namespace == "aten" and name == "convolution" and args[0].shape[1] != 3:
                shape = ConvShape.of(args[0], args[1], args[3][0])
                calls.update((conv, "", str(shape)) for conv in ("conv_fprop", "conv_wgrad"))
                calls.add(("conv_dgrad", "", str(shape.of_dgrad)))
            if op.namespace == "cifar":
                if name in ("bn_stats", "bn_stats_add"):
                    calls.add((name, "", shape_of(args[0])))
                elif name == "bn_relu":
                    residual, pool = (*args[6:], None, False)[:2]
                    calls.add((name, "pool" if pool else "residual" if residual is not None else "", shape_of(args[0])))
                elif name in ("bn_backward_reduce", "bn_backward_apply"):
                    calls.add((name, "pool" if args[-1] is True else "", shape_of(args[1])))
            return op(*args, **(kwargs or {}))

    for network in (ResNet, ResNet9):
        with FakeTensorMode(), Record():
            images = torch.empty(512, 3, 32, 32, dtype=torch.float16).to(memory_format=torch.channels_last)
            network(ops=ops)(images).sum().backward()
    return calls


def test_cases_are_the_layers_of_the_networks():
    """Each under a name of its own."""
    named: dict[str, set] = {}
    for case in cases():
        named.setdefault(case.op, set()).add((case.variant, case.shape))
    plain, calls = traced(reference), traced(batchnorm)
    for op in ("conv_fprop", "conv_dgrad", "conv_wgrad"):
        layers = {shape for name, _, shape in plain if name == op}
        assert {shape for _, shape in named[op]} == {shape for variant, shape in named[op] if not variant} == layers
    for op in ("bn_stats", "bn_stats_add", "bn_relu", "bn_backward_reduce", "bn_backward_apply"):
        assert named[op] == {call[1:] for call in calls if call[0] == op}, op
    assert named["bn_apply"] == named["bn_relu"]
    assert named["bn_backward"] == named["bn_coefficients"] == named["bn_backward_reduce"]
    assert {shape for _, shape in named["bn_finalize"]} == {shape for _, shape in named["bn_relu"]}
    assert len({case.name for case in cases()}) == len(cases())


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_providers_compute_the_same(case, monkeypatch, device):
    """By the benchmark's own check: two layouts of the library, the mixture, and ours."""
    monkeypatch.setattr(measure, "_why_not", lambda provider, device: None)
    setup = measure.Setup(device, torch.float16, 4, QUICK, CpuTimer())
    providers = (measure.EAGER_NCHW, measure.EAGER, measure.HYBRID, measure.OURS)
    operands = case.operands(OperandFactory(setup.batch, setup.device, setup.dtype))
    ready, refused, _ = measure._ready(case, operands, setup, providers)
    assert not refused
    assert {measure.EAGER, measure.OURS} <= set(ready)
    assert (measure.HYBRID in ready) == case.op.startswith("conv_")
    cost = case.cost(*operands)
    assert min(cost.flops, cost.bytes) > 0


def test_operands_follow_the_seed_and_untouched_ones_have_the_same_layout():
    x = OperandFactory(2, CPU).activation(8, 4)
    assert torch.equal(x, OperandFactory(2, CPU).activation(8, 4))
    assert not torch.equal(x, OperandFactory(2, CPU, seed=1).activation(8, 4))
    assert (x.dtype, x.is_contiguous(memory_format=torch.channels_last)) == (torch.float16, True)
    for case in SMALL:
        drawn, untouched = (case.operands(OperandFactory(2, CPU, untouched=u)) for u in (False, True))
        for a, b in zip(drawn, untouched, strict=True):
            if torch.is_tensor(a):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), case.name


EPS = torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("result", "baseline", "dtype", "wrong"),
    [
        ([1.019], 1.01, torch.float16, None),  # twice the library's error
        ([1.021], 1.01, torch.float16, "output 0 is off by 0.021"),
        ([1 + 3 * EPS], 1.0, torch.float16, None),  # four units of rounding
        ([1 + 6 * EPS], 1.0, torch.float16, "output 0 is off by"),
        ([1.02], None, torch.float16, None),  # half of the digits: sqrt(eps) of fp16 is 0.031
        ([1.04], None, torch.float16, "output 0 is off by"),
        ([1.02], None, torch.float32, "output 0 is off by"),
        ([torch.nan], 1.01, torch.float16, "output 0 is off by"),
        ([1.0, 1.0], None, torch.float16, "shapes [[1000], [1000]], expected [[1000]]"),
    ],
)
def test_allowed_error(result, baseline, dtype, wrong):
    """Twice that of the library or four units of rounding; without a baseline half of the digits."""
    compared = None if baseline is None else [torch.full((1000,), baseline)]
    truth = [torch.ones(1000, dtype=torch.float64)]
    found = disagreement([torch.full((1000,), x) for x in result], compared, truth, dtype)
    assert found is None if wrong is None else found.startswith(wrong)


def test_no_gradient_of_weights_is_beyond_fp16():
    """Summed over the pixels of a GPU's batch some were, and the library's, which are fp16, could not be compared."""
    for shape in ("64x32x32-64x3x3-s1", "128x16x16-128x3x3-s1", "256x8x8-512x3x3-s1"):
        case = conv_wgrad_case(parse(shape), "prologue")
        x, dy, _, scale, shift, *_ = case.operands(OperandFactory(8, CPU, torch.float32))
        a = torch.relu(x * scale[:, None, None] + shift[:, None, None])
        one_tap = torch.einsum("nchw,nkhw->kc", a, dy)
        assert one_tap.abs().max() * measure.BATCH / 8 < torch.finfo(torch.float16).max / 2
