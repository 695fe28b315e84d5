"""Costs add, and bytes are counted from the tensors."""

import torch

from kernels.cost import Cost, nbytes


def test_nbytes_counts_elements_and_skips_what_is_absent():
    assert nbytes(torch.zeros(3, 4, dtype=torch.float16), None, torch.zeros(5)) == 3 * 4 * 2 + 5 * 4


def test_costs_add():
    assert Cost(1, 2) + Cost(10, 20) == Cost(11, 22)
