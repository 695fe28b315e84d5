"""The benchmark's cases are the networks' layers, and what they compare is the same."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import batchnorm, reference
from kernels.conv_shape import ConvShape
from model.network import ResNet, ResNet9
from profiling.bench import measure
from profiling.bench.batchnorm_cases import (
    bn_apply_case,
    bn_backward_apply_case,
    bn_backward_case,
    bn_backward_reduce_case,
    bn_coefficients_case,
    bn_finalize_case,
    bn_relu_case,
    bn_stats_add_case,
    bn_stats_case,
)
from profiling.bench.case import OperandFactory
from profiling.bench.cases import augment_case, cases
from profiling.bench.command import OPS
from profiling.bench.conv_cases import conv_dgrad_case, conv_fprop_case, conv_wgrad_case
from profiling.bench.timing import QUICK, CpuTimer

CPU = torch.device("cpu")
EVEN, STRIDED, PROJECTION = ConvShape(16, 32, 8, 8), ConvShape(32, 16, 8, 8, stride=2), ConvShape(16, 32, 8, 8, 1, 2)
SMALL = [
    augment_case(),
    *(conv_fprop_case(EVEN, variant) for variant in ("", "statistics", "prologue,statistics")),
    conv_fprop_case(STRIDED, "prologue,statistics"),
    conv_fprop_case(PROJECTION, "statistics"),
    bn_stats_case(16, 8),
    bn_stats_add_case(16, 8),
    bn_finalize_case(16, 8),
    *(bn_apply_case(16, 8, variant) for variant in ("", "pool", "residual")),
    *(bn_relu_case(16, 8, variant) for variant in ("", "pool", "residual")),
    *(make(16, 8, variant) for make in (bn_backward_reduce_case, bn_coefficients_case) for variant in ("", "pool")),
    *(make(16, 8, variant) for make in (bn_backward_apply_case, bn_backward_case) for variant in ("", "pool")),
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


def named(*ops: str) -> set[tuple[str, str, str]]:
    return {(case.op, case.variant, case.shape) for case in cases() if case.op in ops}


def test_convolutions_are_those_of_the_networks():
    ops = ("conv_fprop", "conv_dgrad", "conv_wgrad")
    every_variant = named(*ops)
    assert (
        {(op, "", shape) for op, _, shape in every_variant}
        == traced(reference)
        == {c for c in every_variant if not c[1]}
    )


def test_batch_norms_are_those_of_the_networks():
    calls = traced(batchnorm)
    for op in ("bn_stats", "bn_stats_add", "bn_relu", "bn_backward_reduce", "bn_backward_apply"):
        assert named(op) == {call for call in calls if call[0] == op}, op
    forward, backward = ({call[1:] for call in calls if call[0] == op} for op in ("bn_relu", "bn_backward_reduce"))
    assert {c[1:] for c in named("bn_apply")} == forward
    assert {c[1:] for c in named("bn_backward")} == {c[1:] for c in named("bn_coefficients")} == backward
    assert {c[2] for c in named("bn_finalize")} == {shape for _, shape in forward}


def test_every_op_of_the_command_line_has_cases():
    assert tuple(dict.fromkeys(case.op for case in cases())) == OPS
    names = [case.name for case in cases()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_ours_computes_what_the_library_does(case, monkeypatch, device):
    """All of it through the benchmark's own gate: two layouts of the library, the mixture, and ours."""
    monkeypatch.setattr(measure, "_why_not", lambda provider, device: None)
    setup = measure.Setup(device, torch.float16, 4, QUICK, CpuTimer())
    providers = (measure.EAGER_NCHW, measure.EAGER, measure.HYBRID, measure.OURS)
    operands = case.operands(OperandFactory(setup.batch, setup.device, setup.dtype))
    ready, refused, _ = measure._ready(case, operands, setup, providers)
    assert not refused
    assert {measure.EAGER, measure.OURS} <= set(ready)
    assert (measure.HYBRID in ready) == case.op.startswith("conv_")
    cost = case.cost(*operands)
    assert cost.flops > 0
    assert cost.bytes > 0


def test_operands_repeat_for_a_seed_and_differ_for_another():
    x = OperandFactory(2, CPU).activation(8, 4)
    assert torch.equal(x, OperandFactory(2, CPU).activation(8, 4))
    assert not torch.equal(x, OperandFactory(2, CPU, seed=1).activation(8, 4))
    assert x.dtype == torch.float16
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_untouched_operands_look_like_drawn_ones():
    for case in SMALL:
        drawn, untouched = (case.operands(OperandFactory(2, CPU, untouched=u)) for u in (False, True))
        for a, b in zip(drawn, untouched, strict=True):
            if torch.is_tensor(a):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride()), case.name
