"""A run is a frozen `Config`.

Nothing here imports torch: a wrong key or a contradiction is answered before a second is spent on loading anything.
"""

import dataclasses
import difflib
import itertools
import math
import typing
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from model.errors import UsageError


def _setting(default: Any, about: str, learned: bool = False) -> Any:
    """A field, and what `train.py --list-settings` says of it."""
    return field(default=default, metadata={"about": about, "learned": learned})


def _learned(default: Any, about: str) -> Any:
    """A field that decides what is learned: a checkpoint fits a run only if these agree."""
    return _setting(default, about, learned=True)


@dataclass(frozen=True)
class Config:
    """One run. Raises UsageError, in one line that names the field, where a value is impossible or two contradict."""

    preset: str = ""
    # The network
    network: Literal["resnet", "resnet9"] = _learned("resnet", "the article's network, or its successor of nine layers")
    widths: tuple[int, ...] = _learned((64, 128, 256, 256), "channels of the four stages")
    prep_bn_relu: bool = _learned(False, "the redundant BN-ReLU of the 341 s entry")
    uniform_gamma: bool = _learned(False, "batch-norm weights start in U(0, 1), as in PyTorch 0.4, not at 1")
    pool_first: bool = _learned(False, "resnet9: pool before batch norm (the article's Part 8), not after ReLU")
    # The recipe: loss summed over the batch, rate = schedule / batch_size, decay = weight_decay * batch_size
    epochs: int = _learned(35, "how often each image is trained on; the learning rate's knots are stretched to it")
    batch_size: int = _learned(512, "images of a step, of all processes together")
    lr_epochs: tuple[float, ...] = _learned((0, 15, 30, 35), "the learning rate's knots, in epochs; linear in between")
    lr_values: tuple[float, ...] = _learned((0, 0.44, 0.005, 0), "the learning rate at the knots; lr=PEAK scales them")
    momentum: float = _learned(0.9, "of Nesterov's method")
    weight_decay: float = _learned(5e-4, "times the weights, added to the mean loss's gradient")
    label_smoothing: float = _learned(0.0, "the share of a label that is spread over all classes")
    seed: int = _learned(0, "of initialisation, order and augmentation")
    # The input
    crop_pad: int = _learned(4, "pixels by which a crop may be shifted")
    flip: Literal["random", "alternating", "none"] = _learned("random", "left to right, by chance or every other epoch")
    cutout: int = _learned(0, "side of the square that is cut out of each image, in pixels; 0: none")
    preprocess: Literal["every_epoch", "once", "on_device"] = _setting(
        "on_device", "normalising and augmenting: all for every batch, padding once before training, or on the device"
    )
    draw: Literal["per_image", "per_epoch"] = _setting("per_epoch", "when random numbers are drawn")
    workers: int = _setting(0, "loader processes")
    # How it is computed
    ops: Literal["reference", "batchnorm", "composed", "fused"] = _setting(
        "reference", "PyTorch's, or this project's kernels: batch norm's, convolutions too, whole blocks"
    )
    conv: Literal["table", "ours"] = _setting(
        "table", "ops=fused: the faster convolution by the tile table, or always ours"
    )
    step: Literal["auto", "eager", "compiled", "captured"] = _setting(
        "auto", "how a step is launched; auto: captured as a CUDA graph on a GPU, eager on a CPU"
    )
    device: str = _setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = _setting("auto", "of activations; auto: by the device")
    checkpoint_s: float = _setting(60.0, "seconds between checkpoints, which are taken at the end of an epoch")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            allowed = typing.get_args(f.type) if typing.get_origin(f.type) is Literal else ()
            if allowed and value not in allowed:
                renamed = _RENAMED.get((f.name, value))
                hint = f"; it is called {renamed} now" if renamed else ""
                raise UsageError(f"{f.name}={value!r} is not one of {', '.join(allowed)}{hint}")
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise UsageError(f"{f.name}={number} is not a finite number")
            _check_type(f, value)
        for name, (least, most) in _RANGE.items():
            value = getattr(self, name)
            if not least <= value <= most:
                wrong = f"small; it must be at least {least}" if value < least else f"large; it must be at most {most}"
                raise UsageError(f"{name}={value} is too {wrong}")
        if not 0 <= self.momentum < 1:
            raise UsageError(f"momentum={self.momentum} is not in [0, 1)")
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label_smoothing={self.label_smoothing} is not in [0, 1)")
        if len(self.widths) != 4 or any(not 0 < width <= WIDEST or width % 8 for width in self.widths):
            raise UsageError(f"widths={list(self.widths)} are not four multiples of 8 up to {WIDEST}, one per stage")
        self._check_schedule()
        self._check_contradictions()

    def _check_schedule(self) -> None:
        knots, values = self.lr_epochs, self.lr_values
        if len(knots) != len(values) or len(knots) < 2:
            raise UsageError(
                f"lr_epochs has {len(knots)} knots and lr_values {len(values)}; they need the same number, at least two"
            )
        if knots[0] != 0 or any(a > b for a, b in itertools.pairwise(knots)):
            raise UsageError(f"lr_epochs={list(knots)} does not rise from 0")
        if not math.isclose(knots[-1], self.epochs):
            raise UsageError(
                f"lr_epochs ends at {knots[-1]:g} but the run has {self.epochs} epochs; --epochs stretches the knots"
            )
        if min(values) < 0:
            raise UsageError(f"lr_values={list(values)} holds a negative learning rate")

    def _check_contradictions(self) -> None:
        if self.prep_bn_relu and self.network != "resnet":
            raise UsageError("prep_bn_relu is a part of network=resnet; resnet9 always has that group")
        if self.pool_first and self.network != "resnet9":
            raise UsageError("pool_first needs network=resnet9; resnet has no pooling inside")
        if self.conv != "table" and self.ops != "fused":
            raise UsageError(f"conv={self.conv} needs ops=fused; ops={self.ops} has no tile table to overrule")
        if self.ops in ("composed", "fused") and any(width % 16 for width in self.widths):
            raise UsageError(
                f"widths={list(self.widths)} are not multiples of 16, which the convolutions of ops={self.ops} need; "
                "use ops=batchnorm or reference"
            )
        if self.preprocess == "on_device" and self.workers:
            raise UsageError("workers need preprocess=every_epoch or once; on_device there is nothing for them to do")
        if self.preprocess == "on_device" and self.draw == "per_image":
            raise UsageError("draw=per_image needs preprocess=every_epoch or once; on_device draws per epoch")

    def learned(self) -> dict[str, Any]:
        """The fields that decide what is learned, as JSON values."""
        chosen = {f.name for f in dataclasses.fields(self) if f.metadata.get("learned")}
        return {name: value for name, value in self.to_json().items() if name in chosen}

    def to_json(self) -> dict[str, Any]:
        """Every field, tuples as lists."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Config":
        """The inverse of `to_json`. Raises UsageError for an unknown field, too."""
        for name in values:
            _field(name)
        return Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def with_epochs(self, epochs: int) -> "Config":
        """The same schedule stretched to `epochs`: the learning rate's knots move in proportion."""
        if epochs < 1:
            raise UsageError(f"epochs={epochs} is too small; it must be at least 1")
        return replace(self, epochs=epochs, lr_epochs=tuple(knot * epochs / self.epochs for knot in self.lr_epochs))

    def with_settings(self, settings: list[str]) -> "Config":
        """Apply `key=value` strings. `epochs` stretches the knots unless `lr_epochs` is given too; `lr` scales the
        learning rates to that peak.

        Raises UsageError for an unknown key (naming the nearest), a repeated one, or a value of the wrong type.
        """
        values: dict[str, Any] = {}
        peak: float | None = None
        for setting in settings:
            name, equals, text = setting.partition("=")
            name = name.strip().replace("-", "_")
            if not equals:
                raise UsageError(f"--set {setting!r} is not of the form key=value")
            if name == "preset":
                raise UsageError(f"a preset is no setting: give --preset {text.strip()}")
            if name in values or (name == "lr" and peak is not None):
                raise UsageError(f"--set {name} is given twice")
            if name == "lr":
                peak = _one(name, float, text.strip())
            else:
                values[name] = _parse(_field(name), text.strip())
        if peak is not None:
            if "lr_values" in values:
                raise UsageError("lr and lr_values contradict each other; give one of them")
            if max(self.lr_values) == 0:
                raise UsageError("lr scales a schedule, and this one is 0 all along; give lr_values")
            values["lr_values"] = tuple(value * peak / max(self.lr_values) for value in self.lr_values)
        config = self
        if "epochs" in values and "lr_epochs" not in values:
            config = config.with_epochs(values.pop("epochs"))
        return replace(config, **values)


WIDEST = 2**16
"""Channels of a layer: the parameters of a network of such layers are still counted in 64 bits."""

_COUNTED = 10**9  # a product of two such numbers still fits in 64 bits
_RANGE = {
    "epochs": (1, 10**5),  # a checkpoint holds a row of each
    "batch_size": (1, _COUNTED),
    "weight_decay": (0, _COUNTED),
    "seed": (0, 2**63 - 1),
    "crop_pad": (0, 31),  # a 32-pixel image reflects no more
    "cutout": (0, 32),
    "workers": (0, _COUNTED),
    "checkpoint_s": (0, _COUNTED),
}
"""The least and the most of the numbers that nothing else limits."""

_WANTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a short text"}


def _check_type(f: dataclasses.Field, value: Any) -> None:
    is_tuple = typing.get_origin(f.type) is tuple
    kind = typing.get_args(f.type)[0] if is_tuple else f.type if f.type in (int, float, bool) else str
    if isinstance(value, tuple) != is_tuple or not all(_is_a(kind, v) for v in (value if is_tuple else (value,))):
        raise UsageError(f"{f.name} is not {'a list of ' if is_tuple else ''}{_WANTED[kind]}")


def _is_a(kind: type, value: Any) -> bool:
    """Whether a field of this kind can hold `value`. Texts are shown, so there is nothing in them but letters."""
    if kind is str:
        return isinstance(value, str) and len(value) <= 100 and value.isprintable()
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    return isinstance(value, int | float if kind is float else int) and abs(value) < 1e300


def _field(name: str) -> dataclasses.Field:
    fields = {f.name: f for f in dataclasses.fields(Config)}
    if name in fields:
        return fields[name]
    nearest = difflib.get_close_matches(name, fields, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]!r}?" if nearest else "train.py --list-settings shows them"
    raise UsageError(f"unknown setting {name!r}; {hint}")


_RENAMED = {("ops", "triton"): "fused", ("conv", "triton"): "ours"}

_SHORT = {
    "dtype": {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32"},
    "device": {"gpu": "cuda"},
}
"""Short names of values."""


def _parse(f: dataclasses.Field, text: str) -> Any:
    """`text` as the field's type; tuples are comma-separated, booleans true or false."""
    if typing.get_origin(f.type) is tuple:
        kind = typing.get_args(f.type)[0]
        return tuple(_one(f.name, kind, part) for part in text.strip("()[]").split(","))
    if f.type in (int, float, bool):
        return _one(f.name, f.type, text)
    return _SHORT.get(f.name, {}).get(text, text)


def _one(name: str, kind: type, text: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if not text.isascii() or "_" in text:  # Python would read digits of all scripts
            raise ValueError
        return kind(text)
    except (KeyError, ValueError):
        raise UsageError(f"{name}: {text!r} is not {_WANTED[kind]}") from None


def about_settings(config: Config) -> list[tuple[str, str]]:
    """("key=value", what it is and what it may be) of every setting, the values being `config`'s."""
    found = []
    for f in dataclasses.fields(config):
        if "about" in f.metadata:
            value = getattr(config, f.name)
            text = ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)
            allowed = typing.get_args(f.type) if typing.get_origin(f.type) is Literal else ()
            text = text.lower() if isinstance(value, bool) else text
            found.append((f"{f.name}={text}", f.metadata["about"] + f" ({', '.join(allowed)})" * bool(allowed)))
    return found
