"""The presets: each a function that derives its Config from the one before in a few lines. Imports no torch."""

import difflib
import types
from dataclasses import replace

from model.config import Config
from model.errors import UsageError

TARGET = 0.94
"""The accuracy that the article and DAWNBench train to."""


def article_341() -> Config:
    """The DAWNBench entry the article starts from: redundant BN-ReLU, schedule with a kink, 16 workers."""
    return Config(
        preset="article-341",
        prep_bn_relu=True,
        uniform_gamma=True,
        batch_size=128,
        # bkj/basenet's linear_cycle(0.1, 30, low 0.005, extra 5): up to 0.1, a jump to 0.105, down to 0.005, then to 0
        lr_epochs=(0, 15, 15, 30, 35),
        lr_values=(0, 0.1, 0.105, 0.005, 0),
        preprocess="every_epoch",
        draw="per_image",
        workers=16,
    )


def article_323() -> Config:
    """The redundant BN-ReLU and the kink removed."""
    return replace(
        article_341(),
        preset="article-323",
        prep_bn_relu=False,
        lr_epochs=(0, 15, 30, 35),
        lr_values=(0, 0.1, 0.005, 0),
    )


def article_308() -> Config:
    """Padding, normalisation and transposition once, before training; fewer loader processes."""
    return replace(article_323(), preset="article-308", preprocess="once", workers=4)


def article_301() -> Config:
    """All random numbers of an epoch drawn at once; one loader process is enough."""
    return replace(article_308(), preset="article-301", draw="per_epoch", workers=1)


def article_297() -> Config:
    """No loader process: batches are put together on the main thread."""
    return replace(article_301(), preset="article-297", workers=0)


def article_256() -> Config:
    """Batch 128 -> 512, and the linearly scaled learning rate + 10 %: the end of the article's Part 2."""
    return replace(article_297(), preset="article-256", batch_size=512, lr_values=(0, 0.44, 0.005, 0))


def fused() -> Config:
    """The same recipe on this project's kernels: augmentation on the device, fused conv-BN-ReLU blocks."""
    return replace(article_256(), preset="fused", ops="fused", preprocess="on_device")


def resnet9() -> Config:
    """The article's Part 4: another network, cutout, 24 epochs (79 s on a V100); augmentation on the device."""
    return replace(
        article_256(),
        preset="resnet9",
        network="resnet9",
        widths=(64, 128, 256, 512),
        uniform_gamma=False,
        epochs=24,
        lr_epochs=(0, 5, 24),
        lr_values=(0, 0.4, 0),
        cutout=8,
        preprocess="on_device",
    )


def laptop() -> Config:
    """A narrow ResNet9 that two CPU cores train in a minute or two."""
    return replace(
        resnet9(),
        preset="laptop",
        widths=(16, 32, 64, 128),
        pool_first=True,
        epochs=6,
        batch_size=256,
        lr_epochs=(0, 1.2, 6),
        lr_values=(0, 0.6, 0),
        crop_pad=2,
        flip="alternating",
        cutout=0,
    )


PRESETS: types.MappingProxyType = types.MappingProxyType(
    {
        config.__name__.replace("_", "-"): config
        for config in (
            article_341,
            article_323,
            article_308,
            article_301,
            article_297,
            article_256,
            fused,
            resnet9,
            laptop,
        )
    }
)


def preset(name: str) -> Config:
    """The preset of that name. Raises UsageError, naming the nearest."""
    if name in PRESETS:
        return PRESETS[name]()
    nearest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"the presets are {', '.join(PRESETS)}"
    raise UsageError(f"unknown preset {name!r}; {hint}")
