"""Fates of a rung's process, without torch: each speaks as `experiments.stand.serve` does.

`python tests/support/rung_processes.py OUT` is a ladder of a tiny session whose rungs take a moment for a turn.
"""

import os
import signal
import sys
import time
from pathlib import Path

FACTS = {
    "dtype": "float32",
    "step": "eager",
    "workers": 0,
    "preprocessing_s": 1.0,
    "images": 70,
    "test_images": 30,
    "flops_per_image": 2.5e9,
    "input_s": 0.1,
    "epoch_s": 0.01,
    "set_up_s": 1.0,
}
SECONDS = {"train_s": 2.0, "eval_s": 0.5}


def healthy(connection, assignment, trouble=lambda asked, count: None, moment_s: float = 0.0) -> None:
    """Answer at once; `trouble(asked, count)` may do or return something else. `count` is the turn, from 1 on."""
    connection.send(("done", {}))
    count = 0
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        count += asked == "turn"
        time.sleep(moment_s)
        other = trouble(asked, count)
        facts = {"config": assignment.config.to_json(), **FACTS}
        connection.send(other or ("done", facts if asked == "set-up" else SECONDS))


def troubled(connection, assignment) -> None:
    """By its rung's name: one dies, one hangs, one fails, one is refused, one does not even start."""

    def trouble(asked: str, count: int):
        name = assignment.name
        if name == "article-341" and count == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        if name == "article-323" and count == 1:
            time.sleep(1000)
        if name == "article-308" and asked == "set-up":
            connection.send(("say", "compiling for a while"))
            return "failed", "AcceleratorError: an illegal memory access"
        if name == "article-301" and asked == "set-up":
            return "refused", "no such kernels here"
        return None

    if assignment.name == "article-297":
        sys.exit(3)
    healthy(connection, assignment, trouble)


def slow(connection, assignment) -> None:
    """Take a moment for each answer, and write the process's number to the file that PIDS names."""
    with open(os.environ["PIDS"], "a") as file:
        file.write(f"{os.getpid()}\n")
    healthy(connection, assignment, moment_s=0.2)


def ladder_of_two(out: Path) -> dict:
    """A small ladder in `out` of two rungs, whose processes are `slow`; returns its document."""
    import rung_processes

    from experiments import ladder
    from experiments.ladder_rungs import RUNGS
    from experiments.study.folder import Request
    from profiling.output.terminal import Terminal

    options = {"epochs_per_rung": 4, "rungs": RUNGS[5:7], "target": rung_processes.slow}
    return ladder.run(Request(small=True, out=out, synthetic=True), Terminal(speaks=False), None, **options)


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    from runs import tiny_session

    import train

    train.open_session = lambda *args, **kwargs: tiny_session()
    ladder_of_two(Path(sys.argv[1]))
