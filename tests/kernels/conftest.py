import pytest


@pytest.fixture(autouse=True)
def poisoned(poisoned_memory: None) -> None:
    """Every test of the kernels runs with poisoned memory."""
