"""The networks from our ops glued by autograd, against the tier below and against float64."""

import pytest
import torch
from block_cases import (
    GRADIENT_CASES,
    check_compiles,
    check_evaluation,
    check_state_dict,
    check_training,
    check_two_runs,
    no_overflow_checks,  # noqa: F401
)
from kernel_checks import channels_last, mostly_slow

pytest.importorskip("triton")

from kernels import batchnorm, composed, conv_fprop, reference

pytestmark = pytest.mark.usefixtures("no_overflow_checks")


@pytest.mark.parametrize(("name", "dtype"), mostly_slow(GRADIENT_CASES, "two_blocks_fp32"))
def test_logits_gradients_and_running_statistics_match_float64(device, name, dtype):
    below = (batchnorm,) if dtype == torch.float32 else ()
    check_training(composed, name, dtype, device, *below)


@pytest.mark.parametrize("name", mostly_slow(["two_blocks_after_a_bn", "resnet9_pool_last"], 0))
def test_evaluation_matches_float64(device, name):
    check_evaluation(composed, name, device)


@pytest.mark.slow
def test_two_runs_are_bit_equal(device):
    check_two_runs(composed, "two_blocks", device)


def test_the_same_state_dict(device):
    check_state_dict(composed, "two_blocks", device)


@pytest.mark.slow
def test_compiles_into_one_graph(device):
    check_compiles(composed, "two_blocks", device, training=True)


@pytest.mark.parametrize(
    ("c", "k", "message"), [(8, 16, "C is 8 channels"), (16, 24, "K is 24 channels")], ids=["c_of_8", "k_of_24"]
)
def test_widths_that_are_no_multiples_of_16_are_refused(device, c, k, message):
    bn1, bn2 = (reference.BatchNorm(*torch.ones(4, n, device=device), True, 0.1, 1e-5) for n in (c, k))
    x = channels_last(2, c, 4, 4, dtype=torch.float32, seed=0, device=device)
    w1, w2, w3 = (
        channels_last(k, n, r, r, dtype=torch.float32, seed=1, device=device) for n, r in ((c, 3), (k, 3), (c, 1))
    )
    with pytest.raises(ValueError, match=message):
        composed.preact_block(x, None, bn1, w1, bn2, w2, w3)


@pytest.mark.parametrize("value", [0.0, torch.nan, 1e9])
def test_statistics_of_no_meaning_reach_no_other_memory(value):
    """As they are where kernels are only compiled: an index beyond the end would lose the GPU to the process."""
    y = channels_last(2, 16, 4, 4, dtype=torch.float32, seed=1, device=torch.device("cpu"))
    partials = torch.full((3, 2, 16), value)
    assert conv_fprop._add_gradient_of_statistics(y, partials, y, partials).shape == y.shape
