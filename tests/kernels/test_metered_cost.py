import pytest
import torch

pytest.importorskip("triton")

from kernels.bn_apply import bn_apply, bn_apply_cost
from kernels.bn_stats import bn_stats, bn_stats_cost
from kernels.metered_cost import metered_cost


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_sum_of_the_ops_that_are_called(device):
    """At the shapes that they are called with; PyTorch's own operations are not counted."""
    x = torch.empty(2, 16, 8, 8, dtype=torch.float16, device=device).to(memory_format=torch.channels_last)
    c = torch.empty(16, device=device)

    def body(x, c):
        return bn_stats(bn_apply(x, c, c, pool=True) * 2)

    pooled = torch.empty(2, 16, 4, 4, dtype=torch.float16, device="meta")
    assert metered_cost(body, x, c) == bn_apply_cost(x, c, c, pool=True) + bn_stats_cost(pooled)
