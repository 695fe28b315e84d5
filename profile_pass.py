"""Profile a run: its report after the training, and the pass of its own that traces steps and counts their work."""

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import torch

from model.config import Config
from model.data.batches import Batches
from model.errors import UsageError
from model.memory import preallocate
from model.presets import preset
from model.session import Session
from model.trainer import Trainer, build_network, choose_dtype, dtype_name, modelled_step
from profiling import ROOT
from profiling.account import work
from profiling.account.work import flops_per_image
from profiling.device.ceilings import Ceilings, reread
from profiling.device.environment import environment
from profiling.output.files import read_json, write_json
from profiling.run.collect import RECORDS, WARM_UP_STEPS, record_trace

PROFILER_BYTES = 2 << 30
"""Memory that a profiled pass on a CPU may need besides the run's own."""


def profile(
    session: Session,
    config: Config,
    out: Path,
    data: list[str],
    counters: bool = False,
    ceilings: Ceilings | None = None,
) -> None:
    """Account for the run in `out`, as `profiling.report.command.profile` does, whose arguments these are."""
    from profiling.report import command  # a second of imports that other runs do without

    if session.device.type == "cuda":
        torch.cuda.empty_cache()
    dtype = dtype_name(choose_dtype(config.dtype, session.device, config.ops))
    command.profile(out, str(session.device), dtype, data, session.terminal, counters, ceilings)


def profile_pass(session: Session, out: Path, counters: bool) -> None:
    """In a fresh process: profile steps of the run in `out` and count their work; with `counters`, let ncu read one."""
    dataset, device, folder = session.dataset, session.device, out / RECORDS
    config = Config.from_json(read_json(out / "config.json"))
    dtype = choose_dtype(config.dtype, device, config.ops)
    trainer = Trainer(
        Batches(dataset.train_images, dataset.train_labels, config, device, dtype), dataset, session.ranks
    )
    if device.type == "cuda" or trainer.step_requested != "eager":
        trainer.warm_up()
    if device.type == "cpu":
        preallocate(PROFILER_BYTES)
    steps = (images for epoch in itertools.count() for images in trainer.train(epoch))
    if counters:
        list(itertools.islice(steps, WARM_UP_STEPS))
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        next(steps)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        return
    with work.as_on(device):
        write_json(folder / "work.json", _work(config, dtype, config.epochs * len(dataset.train_images)))
    eagerly = trainer.step.eagerly if trainer.step_mode == "captured" else None
    record_trace(steps, device, folder, environment(device, ROOT), eagerly)


def _work(config: Config, dtype: torch.dtype, images: int) -> dict[str, Any]:
    """records/work.json: the work of a step of this run, by its own ops and by others, and of the article's step."""
    article = preset("article-256")
    variants = {
        "ops": (config, dtype),
        "reference": (dataclasses.replace(config, ops="reference", conv="table"), dtype),
        "article": (article, torch.float16),
    }
    with contextlib.suppress(UsageError):  # widths that the fused kernels do not take
        variants["fused"] = (dataclasses.replace(config, ops="fused"), dtype)
    counted = {name: work.work_of(*modelled_step(*variant)) for name, variant in variants.items()}

    def flops(c: Config) -> int:
        return flops_per_image(lambda: build_network(dataclasses.replace(c, ops="reference", conv="table"))).training

    return {
        "version": work.VERSION,
        "batch": config.batch_size,
        "dtype": dtype_name(dtype),
        "images": images,
        "flops_per_image": flops(config),
        "article_batch": article.batch_size,
        "article_flops_per_image": flops(article),
        **{name: [dataclasses.asdict(row) for row in rows] for name, rows in counted.items()},
    }


def ceilings_for(path: Path, session: Session, config: Config) -> Ceilings:
    """The ceilings in the file of --ceilings. Raises UsageError where they are not of this run's machine and dtype."""
    try:
        return reread(path, session.device, choose_dtype(config.dtype, session.device, config.ops))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--ceilings {path}: {error}; measure them with python -m profiling device --out FILE, or leave it out"
        ) from None
