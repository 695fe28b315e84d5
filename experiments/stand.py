"""A rung of the ladder in a process of its own that waits for its turn: a rung that breaks leaves the others alone.

A process starts once, sets its rung up once, and sleeps on a pipe between its turns, so that a turn costs no start and
disturbs no other rung. It ends when the ladder's process closes the pipe or ends. Each answer is awaited for a limited
time.
"""

import multiprocessing
import multiprocessing.connection
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.config import Config
from model.errors import DeviceError, UsageError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    import torch

    from model.data.cifar10 import Dataset
    from model.trainer import Trainer

START_S = 300.0
"""For a process to start and import; many do at once."""
SET_UP_S = {"cuda": 300.0, "cpu": 4 * 3600.0}
"""For compilation and an epoch of training; on a CPU the article's network takes most of an hour for it."""
TURN_S, TURN_EPOCHS = 60.0, 10
"""A turn may take TURN_EPOCHS times the epoch that is not counted, and TURN_S on top."""
END_S = 5.0


class RungRefusedError(Exception):
    """The rung cannot run on this device, now or later."""


class RungFailedError(Exception):
    """The rung's process ended, failed or did not answer in time."""


@dataclass(frozen=True)
class Assignment:
    """The work of a rung's process: train `config` on `device` with the images in the file `data`."""

    name: str
    config: Config
    device: str
    data: Path
    threads: int | None = None


class TimedRung:
    """A rung ready to be timed, warmed up by an epoch. `facts` of its set-up are for its row.

    Raises DeviceError where the rung cannot run on the device as it would train there.
    """

    def __init__(
        self,
        config: Config,
        dataset: "Dataset",
        device: "torch.device",
        say: Callable[[str], Any] = lambda text: None,
    ):
        from model.trainer import build_network, choose_dtype, dtype_name, with_available_ops
        from profiling.account.work import flops_per_image

        self.dataset, self.device = dataset, device
        available, reason = with_available_ops(config, device, say)
        if reason:
            raise DeviceError(reason)
        dtype = choose_dtype(config.dtype, device, config.ops)
        start_s = time.monotonic()
        self.trainer = self._trainer(available, dtype)
        asked = self.trainer.step_requested
        reason = self.trainer.warm_up() if device.type == "cuda" or asked != "eager" else None
        if reason:
            raise DeviceError(f"the step cannot be {asked}: {reason}")
        reference = replace(config, ops="reference", conv="table")
        loader = getattr(self.trainer.batches, "loader", None)
        self.epoch = 0
        uncounted = self.turn()
        if device.type == "cuda" and self.trainer.step_mode == "captured":
            import torch

            torch.cuda.empty_cache()  # the rehearsals' memory: the processes of all rungs share the device
        self.facts = {
            "config": config.to_json(),
            "dtype": dtype_name(dtype),
            "step": self.trainer.step_mode,
            "workers": 0 if loader is None else loader.num_workers,
            "preprocessing_s": self.preprocessing_s,
            "images": self.trainer.batches.count,
            "test_images": self.trainer.test_count,
            "flops_per_image": flops_per_image(lambda: build_network(reference)).training,
            "input_s": self._seconds(self._only_batches),
            "epoch_s": sum(uncounted.values()),
            "set_up_s": time.monotonic() - start_s,
        }

    def _trainer(self, config: Config, dtype: "torch.dtype") -> "Trainer":
        from model.data.batches import Batches
        from model.distributed import Ranks
        from model.trainer import Trainer

        data, start_s = self.dataset, time.monotonic()
        batches = Batches(data.train_images, data.train_labels, config, self.device, dtype)
        self._wait()
        self.preprocessing_s = time.monotonic() - start_s
        return Trainer(batches, data, Ranks())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)

    def turn(self) -> dict[str, float]:
        """Seconds of an epoch's training, and of its validation."""
        train_s = self._seconds(lambda: list(self.trainer.train(self.epoch)))
        self.trainer.check_finite()
        eval_s = self._seconds(self.trainer.evaluate)
        self.epoch += 1
        return {"train_s": train_s, "eval_s": eval_s}

    def _only_batches(self) -> None:
        """Make an epoch's batches, without training."""
        for batch in self.trainer.batches.epoch(self.epoch):
            self.trainer.batches.load(*batch)

    def _seconds(self, work: Callable[[], Any]) -> float:
        self._wait()
        start_s = time.monotonic()
        work()
        self._wait()
        return time.monotonic() - start_s


def serve(connection: "Connection", assignment: Assignment) -> None:
    """Answer "set-up" and "turn", in the rung's process, until the ladder hangs up or something fails.

    Answers are ("done", JSON values), ("refused", why), ("failed", why); ("say", text) may come before one.
    """
    for signum in (signal.SIGINT, signal.SIGTERM):  # they go to the whole group, of which the ladder's process decides
        signal.signal(signum, signal.SIG_IGN)
    import torch

    from model.memory import keep_freed_memory, out_of_memory
    from model.trainer import search_convolutions

    keep_freed_memory()
    if assignment.threads:
        torch.set_num_threads(assignment.threads)
    device, stand = torch.device(assignment.device), None
    search_convolutions(device)
    answer = "done", {}
    with suppress(EOFError, OSError):  # the ladder is over, or its process is no more
        while True:
            connection.send(answer)
            if answer[0] != "done":
                return
            asked = connection.recv()
            try:
                if asked == "set-up":
                    stand = TimedRung(
                        assignment.config, _read(assignment.data), device, lambda text: connection.send(("say", text))
                    )
                    answer = "done", stand.facts
                else:
                    answer = "done", stand.turn()
            except (DeviceError, UsageError) as error:
                answer = "refused", str(error)
            except Exception as error:  # a driver has one for everything
                error = out_of_memory(error, device, assignment.config.batch_size) or error
                reason = (str(error).strip() or "no reason given").splitlines()[0]
                answer = "failed", f"{type(error).__name__}: {reason}"


class Worker:
    """A rung's process, seen from the ladder's."""

    def __init__(self, assignment: Assignment, say: Callable[[str], Any], target: Callable[..., None] = serve):
        context = multiprocessing.get_context("spawn")  # a fork would share the ladder's CUDA context and its threads
        self.name, self.say = assignment.name, say
        self._here, there = context.Pipe()
        self._process = context.Process(target=target, args=(there, assignment), name=assignment.name)
        self._process.start()
        there.close()

    def ask(self, word: str, limit_s: float) -> dict[str, Any]:
        """The answer to `word`. Raises RungRefusedError and RungFailedError, after which the process has ended."""
        with suppress(OSError):  # one that has ended is noticed below
            self._here.send(word)
        return self.answer(limit_s)

    def answer(self, limit_s: float) -> dict[str, Any]:
        """The next answer, within `limit_s` seconds. Raises as `ask`."""
        deadline_s = time.monotonic() + limit_s
        while True:
            left_s = max(0.0, deadline_s - time.monotonic())
            if not multiprocessing.connection.wait([self._here, self._process.sentinel], left_s):
                self.end(0)
                raise RungFailedError(f"its process did not answer within {limit_s:,.0f} s")
            try:
                kind, value = self._here.recv() if self._here.poll() else ("ended", None)
            except (EOFError, OSError):
                kind, value = "ended", None
            if kind == "say":
                self.say(value)
                continue
            if kind == "done":
                return value
            self.end()
            if kind == "ended":
                code = self._process.exitcode
                name = next((known.name for known in signal.Signals if known == -code), f"exit code {code}")
                raise RungFailedError(f"its process ended by {name}")
            raise (RungRefusedError if kind == "refused" else RungFailedError)(value)

    def hang_up(self) -> None:
        """Let the process end by itself, when its present turn is over."""
        self._here.close()

    def end(self, within_s: float = END_S) -> None:
        """Wait until the process has ended; end it where that takes longer than `within_s` seconds."""
        self.hang_up()
        self._process.join(within_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


class Company:
    """The processes of several rungs; in its context they wait for their turns, and behind it they have ended."""

    def __init__(self, dataset: "Dataset", say: Callable[[str], Any], target: Callable[..., None] = serve):
        self.dataset, self.say, self.target = dataset, say, target
        self.workers: dict[str, Worker] = {}

    def __enter__(self) -> "Company":
        self._folder = tempfile.TemporaryDirectory()
        self.data = Path(self._folder.name) / "images.safetensors"
        _write(self.dataset, self.data)
        return self

    def start(self, assignment: Assignment) -> None:
        """Start a rung's process; its first answer shows whether it has started."""
        self.workers[assignment.name] = Worker(assignment, self.say, self.target)

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.hang_up()
        end_s = time.monotonic() + END_S
        for worker in self.workers.values():
            worker.end(max(0.0, end_s - time.monotonic()))
        self._folder.cleanup()


_TENSORS = ("train_images", "train_labels", "test_images", "test_labels")


def _write(dataset: "Dataset", path: Path) -> None:
    """Write the images that every rung reads: they are loaded, and cut, once."""
    from safetensors.torch import save_file

    tensors = {name: getattr(dataset, name).contiguous() for name in _TENSORS}
    save_file(tensors, path, {"identity": dataset.identity, "source": dataset.source})


def _read(path: Path) -> "Dataset":
    from safetensors import safe_open

    from model.data.cifar10 import Dataset

    with safe_open(path, "pt") as file:
        return Dataset(*(file.get_tensor(name) for name in _TENSORS), **file.metadata())
