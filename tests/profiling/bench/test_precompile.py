import os

import pytest

from profiling.bench import precompile
from profiling.bench.precompile import Precompiler


@pytest.fixture(scope="module")
def pool():
    pool = Precompiler(2)
    yield pool
    pool.close()


def test_what_was_submitted_has_ended_when_it_was_waited_for(pool, tmp_path):
    """In other processes, and badly too: the caller finds that out for itself."""
    for name in ("one", "two"):
        pool.submit("work", os.mkdir, str(tmp_path / name))
    pool.submit("work", os.mkdir, str(tmp_path / "no" / "parent"))
    pool.wait("work")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    pool.wait("work")
    pool.wait("never submitted")


def test_a_process_that_dies_costs_no_more_than_its_work(tmp_path):
    pool = Precompiler(2)
    pool.submit("dead", os._exit, 1)
    pool.wait("dead")
    pool.submit("after", os.mkdir, str(tmp_path / "after"))
    pool.wait("after")
    pool.close()


def test_after_close_nothing_is_begun(tmp_path):
    pool = Precompiler(2)
    pool.close()
    pool.submit("late", os.mkdir, str(tmp_path / "late"))
    pool.wait("late")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("cores", "processes"), [(16, 8), (64, 8), (6, 3), (2, 0), (None, 0)])
def test_there_are_as_many_processes_as_half_of_the_cores(monkeypatch, cores, processes):
    made = []
    monkeypatch.setattr(precompile.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(precompile.concurrent.futures, "ProcessPoolExecutor", lambda count, *more: made.append(count))
    Precompiler()
    assert made == [processes] * (processes > 0)
