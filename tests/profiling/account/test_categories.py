import ast
import json
from pathlib import Path

import pytest

from profiling import ROOT
from profiling.account.categories import CATEGORIES, categorise
from profiling.account.trace import Kernel

# In the order of the sweep; a kernel's name as it stands in published traces, or it and the operations around it.
KERNELS = json.loads(Path(__file__).with_name("kernels.json").read_text())


def category(name: str, *ops: str, kind: str = "kernel") -> str:
    return categorise(Kernel(name, 0, 1, 7, 0, kind, 1, ops))


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [(kernel, category) for category, kernels in KERNELS.items() for kernel in kernels],
    ids=lambda value: str(value)[:60],
)
def test_kernels_are_known_by_their_operations_and_names(kernel, expected):
    name, *ops = [kernel] if isinstance(kernel, str) else kernel
    assert category(name, *ops) == expected


def test_categories_are_those_of_the_account_in_the_order_of_the_sweep():
    assert tuple(KERNELS) == CATEGORIES


def test_this_projects_kernels_are_known_whatever_launches_them():
    nodes = [node for path in (ROOT / "kernels").glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.decorator_list]
    found = [function.name for function in functions if function.name.endswith("_kernel")]
    assert len(found) >= 10
    wanted = {
        "augment": "augmentation and data",
        "conv": "convolution",
        "bn": "batch norm",
        "sgd": "optimiser and loss",
    }
    for name in found:
        assert category(name) == category(name, "cifar::preact_block") == wanted[name.partition("_")[0]], name


def test_without_a_device_a_name_is_an_operation_and_no_kernel():
    assert category("convolve everything", "convolve everything", kind="cpu") == "unknown"
    assert category("convolve everything") == "convolution"
