"""The files of a run's folder: config.json, environment.json, log.jsonl, summary.json, dawnbench.tsv.

A write that fails is a warning: a full disk must not end a training.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from profiling.device.specifications import V100_FLOPS_PER_S, specification
from profiling.output.files import append_jsonl, write_json, write_text
from profiling.run.clock import Clock

TIMED = ("preprocessing", "warm-up", "training", "evaluation")
"""Phases whose time a resumed run adds to that of earlier sessions."""

COLUMNS = ("epoch", "lr", "train s", "loss", "accuracy", "test loss", "test acc", "images/s", "total s")


def counted(n: int, what: str) -> str:
    """The number with its noun, as "1 epoch" or "2 epochs"."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the log under COLUMNS; train s and images/s are of the epoch, total s is training so far."""
    return [
        str(row["epoch"]),
        f"{row['learning_rate']:.4f}",
        f"{row['epoch_train_s']:.2f}",
        f"{row['train_loss']:.4f}",
        f"{row['train_accuracy']:.2%}",
        f"{row['test_loss']:.4f}",
        f"{row['test_accuracy']:.2%}",
        f"{row['images_per_s']:,.0f}",
        f"{row['train_s']:.2f}",
    ]


def closing_lines(summary: dict[str, Any]) -> list[str]:
    """The end of a complete run in three lines."""
    s = summary
    what = "synthetic images, not CIFAR-10" if s["data_identity"] == "synthetic" else f"{s['data_identity']} data"
    memory = "unknown" if s["peak_memory_bytes"] is None else f"{s['peak_memory_bytes'] / 1e6:,.0f} MB"
    if s["peak_reserved_bytes"] is not None:
        memory += f" in tensors, {s['peak_reserved_bytes'] / 1e6:,.0f} MB reserved"
    return [
        f"test accuracy {s['test_accuracy']:.2%} after {counted(s['epochs'], 'epoch')} ({what}, n = 1)",
        f"training {s['train_s']:.2f} s (with preprocessing, as DAWNBench counts) + evaluation {s['eval_s']:.2f} s "
        f"= {s['train_plus_eval_s']:.2f} s; warm-up {s['warmup_s']:.2f} s; process {s['wall_s']:.2f} s",
        f"{s['images_per_s']:,.0f} images/s; {s['flops'] / s['train_s'] / 1e12:.3g} TFLOP/s, "
        f"{100 * s['v100_normalised']:.2g} % of the article's V100 peak; peak memory {memory}",
    ]


class RunLog:
    """The figures of a run while it goes on.

    facts     the entries of summary.json that do not change
    kept      the `state()` of the session that this one continues, or {}
    writes    whether this process writes files
    """

    def __init__(
        self,
        out: Path,
        clock: Clock,
        facts: dict[str, Any],
        flops_per_image: int,
        kept: dict[str, Any],
        writes: bool,
        warn: Callable[[str], None],
    ):
        self.out, self.clock, self.facts, self.flops_per_image = out, clock, facts, flops_per_image
        self.writes, self.warn = writes, warn
        self.history: list[dict[str, Any]] = list(kept.get("history", []))
        self.before: dict[str, float] = kept.get("seconds", {})

    def state(self) -> dict[str, Any]:
        """The state from which a later session continues these figures."""
        return {"history": self.history, "seconds": {name: self.seconds(name) for name in TIMED}}

    def begin(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Write what is known before the first step; the log starts with the epochs of earlier sessions."""

        def write() -> None:
            write_json(self.out / "config.json", config)
            write_json(self.out / "environment.json", environment)
            (self.out / "log.jsonl").unlink(missing_ok=True)
            for row in self.history:
                append_jsonl(self.out / "log.jsonl", row)

        self._write(write)

    def seconds(self, phase: str) -> float:
        """Time spent in `phase`, in this session and in those that it continues."""
        return self.before.get(phase, 0.0) + self.clock.seconds(phase)

    def train_s(self) -> float:
        """DAWNBench's rule: preprocessing counts, validation does not."""
        return self.seconds("preprocessing") + self.seconds("training")

    def add_epoch(
        self, step: int, learning_rate: float, images: int, training: tuple[float, float], test: tuple[float, float]
    ) -> dict[str, Any]:
        """An epoch of `images` images ended after `step`, with (loss, accuracy) on each set; returns its row."""
        train_s, eval_s = self.train_s(), self.seconds("evaluation")
        earlier = self.history[-1] if self.history else {"train_s": self.seconds("preprocessing"), "eval_s": 0.0}
        row = {
            "epoch": len(self.history) + 1,
            "step": step,
            "learning_rate": learning_rate,
            "epoch_train_s": train_s - earlier["train_s"],
            "epoch_eval_s": eval_s - earlier["eval_s"],
            "train_loss": training[0],
            "train_accuracy": training[1],
            "test_loss": test[0],
            "test_accuracy": test[1],
            "images_per_s": images / (train_s - earlier["train_s"]),
            "train_s": train_s,
            "eval_s": eval_s,
        }
        self.history.append(row)
        self._write(append_jsonl, self.out / "log.jsonl", row)
        # DAWNBench's own format: hours of training, and accuracy in percent
        rows = [f"{r['epoch']}\t{r['train_s'] / 3600:.8f}\t{100 * r['test_accuracy']:.2f}" for r in self.history]
        self._write(write_text, self.out / "dawnbench.tsv", "\n".join(["epoch\thours\ttop1Accuracy", *rows, ""]))
        return row

    def finish(
        self,
        status: str,
        code: int,
        steps: int,
        images: int,
        peak_memory_bytes: int | None,
        peak_reserved_bytes: int | None = None,
    ) -> dict[str, Any]:
        """Write and return summary.json: flat, and None for whatever is not known."""
        last = self.history[-1] if self.history else {}
        train_s, eval_s = self.train_s(), self.seconds("evaluation")
        flops = images * self.flops_per_image
        known = train_s > 0 and images > 0
        sheet, dtype = specification(self.facts.get("device") or ""), self.facts.get("dtype")
        # fp32 convolutions run as tf32, which is PyTorch's default
        peak = sheet and sheet.flops_per_s.get("tf32" if dtype == "float32" else dtype)
        summary = {
            "status": status,
            "exit_code": code,
            **self.facts,
            "epochs": len(self.history),
            "steps": steps,
            "train_loss": last.get("train_loss"),
            "train_accuracy": last.get("train_accuracy"),
            "test_loss": last.get("test_loss"),
            "test_accuracy": last.get("test_accuracy"),
            "train_s": train_s,
            "eval_s": eval_s,
            "train_plus_eval_s": train_s + eval_s,
            "warmup_s": self.seconds("warm-up"),
            "wall_s": self.clock.wall_s(),
            "images_per_s": images / train_s if known else None,
            "flops": flops,
            "mfu": flops / train_s / peak if known and peak else None,
            "v100_normalised": flops / train_s / V100_FLOPS_PER_S if known else None,
            "peak_memory_bytes": peak_memory_bytes,
            "peak_reserved_bytes": peak_reserved_bytes,
        }
        self._write(write_json, self.out / "summary.json", summary)
        return summary

    def _write(self, write: Callable[..., Any], *arguments: Any) -> None:
        if not self.writes:
            return
        try:
            write(*arguments)
        except OSError as error:
            self.warn(f"{self.out}: {error}; the run goes on without this file")
