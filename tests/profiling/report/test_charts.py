import itertools
import json
import re

import plotly.graph_objects as go
import pytest
from report_sample import cpu, empty, gpu, hostile

from profiling.report.charts import charts, learning_curve, waterfall
from profiling.report.html import HERE

SAMPLES = [gpu, cpu, empty, hostile]


def of(report):
    return {chart.key: chart for chart in charts(report)}


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


@pytest.mark.parametrize("make", SAMPLES, ids=lambda make: make.__name__)
def test_plotly_accepts_every_figure(make):
    for chart in charts(make()):
        for layout in (chart.layout, chart.layout | chart.narrow):
            go.Figure({"data": chart.data, "layout": layout})  # raises for a property that it does not know
        json.dumps([chart.data, chart.layout], allow_nan=False)
        assert bool(chart.data) == bool(chart.says) != bool(chart.reason)
        assert len(chart.says) < 1500


def test_a_property_that_plotly_does_not_know_is_found():
    with pytest.raises(ValueError, match="nonsense"):
        go.Figure({"data": [{"type": "bar", "nonsense": 1}]})


@pytest.mark.parametrize("make", [gpu, hostile], ids=["gpu", "hostile"])
def test_the_only_markup_is_our_own(make):
    for chart in charts(make()):
        for words in strings([chart.data, chart.layout, chart.narrow]):
            assert not re.sub(r"</?[bi]>|<br>|<extra></extra>", "", words).count("<"), words
            assert not re.search(r"%\{(?!y:)", words), words


def test_every_colour_is_in_the_style_sheet():
    css = (HERE / "report.css").read_text()
    used = {word for chart in charts(gpu()) for word in strings([chart.data, chart.layout]) if word.startswith("var(")}
    assert len(used) > 10
    for name in used:
        assert f"{name[4:-1]}:" in css, name


def test_each_bar_begins_where_the_one_before_ended():
    report = gpu()
    bars = of(report)["waterfall"].data[1]
    known = {term["key"]: term["ns"] / 1e9 for term in report["terms"]}
    assert list(filter(None, bars["x"][:-1])) == pytest.approx(list(known.values()))
    *terms, last = zip(bars["base"], bars["x"], strict=True)
    for (base, length), (following, _) in itertools.pairwise(terms):
        assert base + length == pytest.approx(following)
    assert last == (0, pytest.approx(sum(known.values())))


def test_a_negative_term_goes_back_and_is_marked():
    chart = of(gpu())["waterfall"]
    bars, labels = chart.data[1], chart.data[2]["text"]
    i = bars["x"].index(-0.014)
    assert labels[i] == " \N{MINUS SIGN}0.014"
    assert bars["marker"]["pattern"]["shape"][i] == "/"
    assert bars["base"][i + 1] < bars["base"][i]


def test_both_waterfalls_have_the_same_rows():
    both = of(gpu())
    ours, theirs = both["waterfall"], both["article"]
    assert ours.layout["yaxis"]["ticktext"] == theirs.layout["yaxis"]["ticktext"]
    assert "validation" in ours.layout["yaxis"]["ticktext"]
    assert ours.data[1]["marker"]["color"] == theirs.data[1]["marker"]["color"]
    assert theirs.data[2]["text"][1] == " —", "the article has no ceiling gap"
    assert (ours.layout["yaxis"]["showticklabels"], theirs.layout["yaxis"]["showticklabels"]) == (True, False)
    assert "showticklabels" not in theirs.narrow["yaxis"], "on a phone it stands below and names its rows"


def test_a_waterfall_says_where_its_numbers_come_from():
    chart = waterfall(
        "key", "title", [{"key": "ideal", "name": "n", "ns": 5, "status": "modelled", "source": "s"}], {"ideal": "n"}
    )
    assert "modelled: s" in chart.data[1]["hovertext"][0]


def test_the_curve_skips_what_was_not_logged():
    rows = [{"epoch": 1, "train_loss": 2.0}, {"epoch": 2, "train_loss": None}, {"epoch": 3, "train_loss": 1.0}]
    chart = learning_curve({"epochs": rows}, "loss", {"train_loss": "training", "test_loss": "test"})
    (curve,) = chart.data
    assert (curve["x"], curve["y"]) == ([1, 3], [2.0, 1.0])


def test_the_target_is_drawn_where_it_is_near():
    names = {"test_accuracy": "test", "train_accuracy": "training"}
    near, far = ({"epochs": [{"epoch": 1, "test_accuracy": a}]} for a in (0.93, 0.5))
    assert [s["y0"] for s in learning_curve(near, "accuracy", names).layout["shapes"]] == [94]
    assert not learning_curve(far, "accuracy", names).layout["shapes"]


def test_each_chart_says_what_it_shows_with_its_main_figures():
    said = {key: chart.says.replace("\xa0", " ") for key, chart in of(gpu()).items()}
    assert said["waterfall"] == (
        "Waterfall of this run, 9.73 s; its largest terms are ideal at the data sheet's peak 4.87 s; convolutions "
        "below their roof 1.90 s; peak that this device does not sustain 1.23 s."
    )
    assert said["article"].startswith(
        "Waterfall of The article's V100, 256 s, 256 s; its largest terms are not attributed"
    )
    assert said["roofline"] == (
        "Roofline: FLOP/s over FLOP per byte, below 790 TFLOP/s and 4.30 TB/s; the longest, conv_wgrad_kernel, reached "
        "493 TFLOP/s at 288 FLOP/B, 62.4 % of its roof."
    )
    for words in ("SM clock 345 MHz to 1,980 MHz", "tensor cores active 0 % to ", "power "):
        assert words in said["timeline"]
    first, last = gpu()["epochs"][0], gpu()["epochs"][-1]
    assert (
        f"epoch 1, training: {first['train_loss']:.3f}; epoch 35, training: {last['train_loss']:.5f};" in said["loss"]
    )
    assert f"epoch 35, test: {last['test_accuracy']:.2%}".replace("%", " %") in said["accuracy"]


def test_one_epoch_is_said_once():
    chart = learning_curve({"epochs": [{"epoch": 1, "train_loss": 2.5}]}, "loss", {"train_loss": "training", "x": "y"})
    assert chart.says == "Curve of the loss: epoch 1, training: 2.500."


def test_a_chart_is_not_drawn_for_a_reason():
    assert of(cpu())["timeline"].reason == "no NVIDIA driver"
    assert all(chart.reason for chart in of(empty()).values())
    assert waterfall("key", "title", [], {"ideal": ""}).reason
