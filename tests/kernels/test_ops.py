"""The same questions to all ops: registration, repetition, one graph, and FLOPs as PyTorch counts them."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from block_cases import no_overflow_checks  # noqa: F401
from checks.ops import OPS, operands
from conv_cases import CASES, use_tile

from kernels.conv_dgrad import conv_dgrad_reference
from kernels.conv_fprop import conv_fprop_reference
from kernels.conv_wgrad import conv_wgrad_reference

pytestmark = pytest.mark.usefixtures("no_overflow_checks")
DIFFERENTIABLE = {"bn_stats_add", "bn_relu", "conv_fprop", "conv_bn_relu", "preact_block"}
CONSTANT = {"partials", "running", "running2"}
REFERENCES = {
    "conv_fprop": conv_fprop_reference,
    "conv_dgrad": conv_dgrad_reference,
    "conv_wgrad": conv_wgrad_reference,
}


class Call(NamedTuple):
    """An op, options of its operands, and for a convolution options of a small tile."""

    op: str
    options: Mapping = MappingProxyType({})
    tile: Mapping | None = None


CALLS = [
    Call("augment"),
    Call("bn_apply"),
    Call("bn_stats"),
    Call("bn_stats_add"),
    Call("bn_finalize"),
    Call("bn_backward_reduce"),
    Call("bn_backward_reduce", {"pool": False}),
    Call("bn_coefficients"),
    Call("bn_backward_apply"),
    Call("bn_backward_apply", {"pool": False}),
    Call("bn_relu"),
    Call("bn_relu", {"pool": False}),
    Call("bn_relu", {"constant": True}),
    Call("conv_fprop", {"case": "stride2_odd", "dtype": torch.float32}),
    Call("conv_fprop", {"case": "projection_1x1", "options": "plain", "dtype": torch.float32}),
    Call("conv_fprop", {"case": "stride2"}, {}),
    Call("conv_dgrad", {"case": "stride2_odd"}),
    Call("conv_dgrad", {"case": "projection_1x1", "options": "strided_shortcut"}),
    Call("conv_dgrad", {"case": "partial_last_tile", "options": "plain"}),
    Call("conv_dgrad", {"case": "stride2"}, {}),
    Call("conv_dgrad", {"case": "stride2"}, {"descriptors": True, "form": "columns"}),
    Call("conv_dgrad", {"case": "several_channel_blocks"}, {"descriptors": True, "form": "lines"}),
    Call("conv_wgrad", {"case": "stride2_odd"}),
    Call("conv_wgrad", {"case": "projection_1x1", "options": "plain"}),
    Call("conv_wgrad", {"case": "stride2"}, {}),
    Call("conv_bn_relu", {"pool": "first"}),
    Call("conv_bn_relu", {"pool": "last"}),
    Call("conv_bn_relu_backward"),
    Call("conv_bn_relu_backward", {"pool": "first"}),
    Call("preact_block", {"c": 16, "k": 32, "stride": 2}),
    Call("preact_block", {"evaluation": True}),
    Call("preact_block_backward"),
    Call("preact_block_backward", {"c": 16, "k": 32, "stride": 2}),
    Call("sgd"),
    Call("sgd", {"momentum": 0.0, "copy": None}),
]


def calls(*plain: str) -> list:
    """The calls, of which a plain run makes the first of each op among `plain`."""
    found, seen = [], set()
    for call in CALLS:
        marks = () if call.op in plain and call.op not in seen else pytest.mark.slow
        words = [call.op, *map(str, call.options.values()), *map(str, (call.tile or {}).values())]
        found.append(pytest.param(call, id="-".join(words), marks=marks))
        seen.add(call.op)
    return found


@pytest.fixture
def given(request, device, monkeypatch) -> list:
    """Operands of the test's call, those that ask for gradients where the op is differentiable."""
    op, options, tile = request.getfixturevalue("call")
    if tile is not None:
        use_tile(monkeypatch, options["case"], **tile)
    found = operands(op, device, **options)
    for name, x in found.items():
        if op in DIFFERENTIABLE and isinstance(x, torch.Tensor) and name not in CONSTANT:
            x.requires_grad_()
    return list(found.values())


def results(function, given: list) -> list[torch.Tensor]:
    """The function's results, the gradients of their sum, and its operands, which it may have changed."""
    given = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x for x in given]
    out = [x for x in tree_leaves(function(*given)) if isinstance(x, torch.Tensor)]
    roots, leaves = ([x for x in some if isinstance(x, torch.Tensor) and x.requires_grad] for some in (out, given))
    gradients = torch.autograd.grad(sum(root.sum() for root in roots), leaves) if roots else ()
    return [*out, *gradients, *(x for x in given if isinstance(x, torch.Tensor))]


@pytest.mark.parametrize("call", calls("augment", "bn_apply", "sgd"))
def test_registration(call, given):
    torch.library.opcheck(OPS[call.op], given)


@pytest.mark.parametrize(
    "call", calls("augment", "bn_apply", "bn_finalize", "bn_stats_add", "bn_relu", "conv_wgrad", "preact_block", "sgd")
)
def test_repeats_bit_for_bit_and_compiles_into_one_graph(call, given):
    """Forward, and where the op is differentiable backward."""
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: OPS[call.op](*given), fullgraph=True, backend="aot_eager")
    first, again, of_graph = (results(function, given) for function in (OPS[call.op], OPS[call.op], compiled))
    for one, *others in zip(first, again, of_graph, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("case", ["odd_map", "stride2_odd", "projection_1x1"])
@pytest.mark.parametrize("op", REFERENCES)
def test_flops_are_pytorchs(device, op, case):
    """fprop forward and backward is three convolutions."""
    given = operands(op, device, case=case, dtype=torch.float32)
    for name in ("x", "w") if op == "conv_fprop" else ():
        given[name].requires_grad_()
    counts = []
    for function in (OPS[op], REFERENCES[op]):
        with FlopCounterMode(display=False) as counter:
            results(function, list(given.values()))
        counts.append(counter.get_total_flops())
    n, shape = CASES[case]
    assert counts[0] == counts[1] == (3 if op == "conv_fprop" else 1) * shape.flops(n)


def test_flops_of_the_gradients_that_are_asked_for(device):
    given = operands("conv_fprop", device, case="stride2", options="plain", dtype=torch.float32)
    given["w"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        OPS["conv_fprop"](**given, statistics=False)[0].sum().backward()
    assert given["w"].grad is not None
    assert counter.get_total_flops() == 2 * CASES["stride2"][1].flops(2), "no dgrad"
