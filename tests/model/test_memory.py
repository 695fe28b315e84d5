import platform
import resource
import subprocess
import sys

import pytest
import torch

from model.errors import OutOfMemoryError
from model.memory import forget_peak, free_shared_bytes, out_of_memory, peak
from profiling import ROOT

CPU = torch.device("cpu")


FAULTS = """
import resource, sys, torch
from model.memory import keep_freed_memory, preallocate

def faults(allocate):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    allocate()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def again():
    for _ in range(5):
        torch.empty(64 * 2**20 // 4).fill_(1)

def held():
    return [torch.empty(4 * 2**20).fill_(1) for _ in range(10)]

if sys.argv[1] == "freed":
    print(faults(again), int(keep_freed_memory()), min(faults(again) for _ in range(4)))
else:
    preallocate(200 * 2**20 * keep_freed_memory())
    print(faults(held))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_freed_memory_is_kept_and_memory_at_hand_needs_no_new_pages():
    """Page faults of large allocations; each case in a process of its own, since the switch is process-wide."""

    def faults(case: str) -> list[int]:
        done = subprocess.run([sys.executable, "-c", FAULTS, case], capture_output=True, check=True, cwd=ROOT)
        return [int(word) for word in done.stdout.split()]

    before, switched, after = faults("freed")
    assert switched
    assert after < before / 100
    (at_hand,) = faults("at hand")
    assert at_hand < 10 * 4 * 2**20 * 4 / resource.getpagesize() / 10  # of ten tensors of 16 MB


def test_the_peak_is_at_least_what_was_held():
    held = torch.ones(50 * 2**20 // 4)
    forget_peak(CPU)
    assert peak(CPU).allocated > held.nbytes
    assert peak(CPU).reserved is None


def test_the_peak_of_a_gpu_is_its_tensors_and_recordings_and_what_is_reserved(monkeypatch):
    """A replay allocates nothing, but needs what its recording did."""
    known = {"max_memory_allocated": 100, "max_memory_reserved": 500}
    for name, value in known.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert peak(torch.device("cuda"), recorded=30) == (130, 500)
    called = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device, name=name: called.append(name))
    forget_peak(torch.device("cuda"))
    assert called == ["empty_cache", "reset_peak_memory_stats"], "what is not in use is not reserved for the training"


def test_free_memory_is_shared(monkeypatch):
    found = free_shared_bytes()
    assert found is None or found >= 0

    def absent(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr("os.statvfs", absent)
    assert free_shared_bytes() is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError(),
    ],
    ids=["python", "cpu_allocator", "cuda_allocator"],
)
def test_out_of_memory_is_recognised_and_names_a_batch_to_try(error):
    found = out_of_memory(error, CPU, 512)
    assert isinstance(found, OutOfMemoryError)
    assert "batch_size=512" in str(found)
    assert "--set batch_size=256" in str(found)


def test_other_errors_are_not_ours():
    assert out_of_memory(RuntimeError("shape mismatch"), CPU, 512) is None
