import dataclasses
import json
import math

import pytest

from model.config import Config
from model.errors import UsageError
from model.presets import PRESETS, preset

ARTICLE = ["article-341", "article-323", "article-308", "article-301", "article-297", "article-256"]


def changes(a: str, b: str) -> set[str]:
    """Fields, other than the name, in which two presets differ."""
    before, after = dataclasses.asdict(preset(a)), dataclasses.asdict(preset(b))
    return {name for name in before if before[name] != after[name]} - {"preset"}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("article-341", "article-323", {"prep_bn_relu", "lr_epochs", "lr_values"}),
        ("article-323", "article-308", {"preprocess", "workers"}),
        ("article-308", "article-301", {"draw", "workers"}),
        ("article-301", "article-297", {"workers"}),
        ("article-297", "article-256", {"batch_size", "lr_values"}),
        ("article-256", "fused", {"ops", "preprocess"}),
    ],
)
def test_a_rung_changes_what_the_article_changed(a, b, expected):
    assert changes(a, b) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip_through_json(name):
    config = preset(name)
    assert config.preset == name
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_article_s_recipe():
    config = preset("article-256")
    assert (config.batch_size, config.epochs, config.momentum, config.weight_decay) == (512, 35, 0.9, 5e-4)
    assert (config.lr_epochs, config.lr_values) == ((0, 15, 30, 35), (0, 0.44, 0.005, 0))
    assert config.uniform_gamma
    assert all(preset(name).batch_size == 128 for name in ARTICLE[:-1])


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("batchsize=3", "batch_size"),
        ("batch_size=-1", "batch_size"),
        ("batch_size=many", "whole number"),
        ("batch_size=9223372036854775807", "at most 1000000000"),
        ("epochs=0", "epochs"),
        ("device=\x1b[2J", "short text"),
        ("weight_decay=1e305", "number"),
        ("epochs=100001", "at most 100000"),
        ("lr_values=0,nan,0,0", "finite"),
        ("lr_values=0,1", "same number"),
        ("lr_values=0,-1,0,0", "negative"),
        ("lr_epochs=0,20,10,35", "rise"),
        ("lr_epochs=0,1,2,3", "epochs"),
        ("momentum=1", "momentum"),
        ("momentum=inf", "finite"),
        ("network=resnet50", "resnet, resnet9"),
        ("widths=64,128", "four"),
        ("widths=64,0,8,8", "multiples of 8"),
        ("widths=4,4,8,8", "multiples of 8"),
        ("widths=8,8,8,1000000000", "up to 65536"),
        ("crop_pad=32", "31"),
        ("cutout=33", "32"),
        ("seed=-1", "seed"),
        ("seed=9223372036854775808", "at most 9223372036854775807"),
        ("prep_bn_relu=maybe", "true or false"),
        ("pool_first=true", "resnet9"),
        ("workers", "key=value"),
        ("label_smoothing=1", "label_smoothing"),
        ("flip=sideways", "alternating"),
        ("checkpoint_s=-1", "checkpoint_s"),
        ("step=fast", "auto, eager, compiled, captured"),
        ("widths=8,,8,8", "widths: '' is not a whole number"),
        ("batch_size=1_000", "batch_size: '1_000' is not a whole number"),
        ("batch_size=\N{ARABIC-INDIC DIGIT FIVE}", "is not a whole number"),
        ("channels=3", "--list-settings"),
    ],
)
def test_bad_settings_are_named(setting, words):
    with pytest.raises(UsageError) as error:
        preset("article-256").with_settings([setting])
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("resnet9", ["workers=2"], "workers"),
        ("resnet9", ["draw=per_image"], "per_image"),
        ("resnet9", ["prep_bn_relu=true"], "prep_bn_relu"),
        ("article-256", ["ops=triton"], "it is called fused now"),
        ("article-256", ["conv=ours"], "conv=ours needs ops=fused"),
        ("fused", ["widths=8,16,16,16"], "multiples of 16"),
        ("resnet9", ["seed=1", "seed=2"], "twice"),
    ],
)
def test_contradictions_are_named(name, settings, words):
    with pytest.raises(UsageError, match=words):
        preset(name).with_settings(settings)


@pytest.mark.parametrize(
    ("setting", "field", "value"),
    [("dtype=bf16", "dtype", "bfloat16"), ("dtype=fp16", "dtype", "float16"), ("device=gpu", "device", "cuda")],
)
def test_short_names_of_values(setting, field, value):
    assert getattr(preset("article-256").with_settings([setting]), field) == value


def test_lr_is_the_peak_of_the_schedule():
    assert preset("article-256").with_settings(["lr=0.88"]).lr_values == pytest.approx((0, 0.88, 0.01, 0))


def test_a_schedule_of_zeros_has_no_peak():
    still = preset("article-256").with_settings(["lr_values=0,0,0,0"])
    with pytest.raises(UsageError, match="give lr_values"):
        still.with_settings(["lr=0.1"])


def test_unknown_preset_names_the_nearest():
    with pytest.raises(UsageError, match="article-256"):
        preset("article256")
    with pytest.raises(UsageError, match="the presets are"):
        preset("zzz")


def test_epochs_stretch_the_knots():
    config = preset("article-341").with_epochs(70)
    assert config.lr_epochs == (0, 30, 30, 60, 70)
    assert preset("article-341").with_settings(["epochs=70"]) == config
    assert preset("article-256").with_epochs(3).lr_epochs == pytest.approx((0, 9 / 7, 18 / 7, 3))


def test_settings_have_types():
    config = preset("article-256").with_settings(["widths=8,16,16,16", "lr_values=0,1e-1,0,0", "prep-bn-relu=true"])
    assert config.widths == (8, 16, 16, 16)
    assert math.isclose(config.lr_values[1], 0.1)
    assert config.prep_bn_relu is True


def test_learned_settings_leave_out_those_of_computation():
    learned = preset("laptop").learned()
    assert {"widths", "seed", "epochs", "batch_size"} <= set(learned)
    assert not {"device", "dtype", "ops", "workers", "preset", "checkpoint_s"} & set(learned)
