"""The rungs of the ladder: the article's, from 341 s to 256 s on its V100, and this project's from there on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from model.config import Config
from model.errors import UsageError
from model.presets import preset

ARTICLE_EPOCHS, ARTICLE_IMAGES, ARTICLE_TEST_IMAGES = 35, 50_000, 10_000
INPUT = ("article-308", "article-301", "article-297")
"""The rungs that only change how batches are made."""


@dataclass(frozen=True)
class Rung:
    """`preset` with `changes` on top. `article_s`: the article's seconds on a V100, validation included (quoted).

    `credited_s` is the gain that the article credits this step with (quoted), None where it says nothing.
    """

    name: str
    what: str
    preset: str
    changes: tuple[tuple[str, Any], ...] = ()
    article_s: float | None = None
    credited_s: float | None = None

    def config(self, cutout: int = 0, settings: Sequence[str] = ()) -> Config:
        """The run, as it trains: on a GPU its steps are captured. Raises UsageError where its parts contradict."""
        base = replace(preset(self.preset), **{"cutout": cutout, **dict(self.changes)})
        return base.with_settings(list(settings))

    @property
    def needs_gpu(self) -> bool:
        """Whether it is about kernels, or about what a CUDA graph saves."""
        return not {"ops", "step"}.isdisjoint(key for key, _ in self.changes)


_DEVICE = (("preprocess", "on_device"),)
_KERNELS = (*_DEVICE, ("ops", "fused"))

RUNGS = (
    Rung("article-341", "redundant BN-ReLU, kinked schedule, 16 workers", "article-341", article_s=341),
    Rung("article-323", "without that BN-ReLU and that kink", "article-323", article_s=323, credited_s=-18),
    Rung("article-308", "images prepared once", "article-308", article_s=308, credited_s=-15),
    Rung("article-301", "random numbers of an epoch at once", "article-301", article_s=301, credited_s=-7),
    Rung("article-297", "no worker process", "article-297", article_s=297, credited_s=-4),
    Rung("article-256", "batch 512", "article-256", article_s=256, credited_s=-41),
    Rung("on-device", "augmentation on the device", "article-256", _DEVICE),
    Rung("batch-norm", "fused batch norm", "article-256", (*_DEVICE, ("ops", "batchnorm"))),
    Rung("fused", "fused convolutions, as the preset has it", "article-256", _KERNELS),
    Rung("eager", "launched by the host, kernel by kernel", "article-256", (*_KERNELS, ("step", "eager"))),
)
"""Each makes one step on from the one before; the last is the one before without its CUDA graph."""
HOST, WITHOUT_HOST = "eager", "fused"
"""The rung that shows the host's share, which is no step of the ladder, and the rung that it is compared with."""

VARIED = frozenset(
    {"prep_bn_relu", "preprocess", "draw", "workers", "batch_size", "lr_epochs", "lr_values", "ops", "conv", "step"}
)
"""Settings in which rungs differ."""


def require_own(settings: Sequence[str]) -> None:
    """Raise UsageError for a setting that would make rungs alike."""
    for setting in settings:
        key = setting.partition("=")[0].strip().replace("-", "_")
        if key in VARIED:
            raise UsageError(f"--set {key} would make rungs alike, which differ in it; leave it to the rungs")
        if key == "cutout":
            raise UsageError("cutout is an option of every rung: use --cutout")
