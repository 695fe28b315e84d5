import itertools
import json
import math
import re

import plotly.graph_objects as go
import pytest
from report_sample import strings

from profiling.account.timeline import MOST_SAMPLES, timeline
from profiling.device.nvml import GpuSample
from profiling.report.charts import charts, learning_curve, waterfall
from profiling.report.html import HERE
from profiling.report.plot import PAINT, clip, escape
from profiling.report.roofline_chart import LARGEST_POINT_PX, roofline
from profiling.report.timeline import timeline_chart
from profiling.run.telemetry import Telemetry

S = 10**9


def of(report):
    return {chart.key: chart for chart in charts(report)}


def test_plotly_accepts_every_figure(whole, bare):
    for report, drawn in ((whole, 6), (bare, 1)):
        made = charts(report)
        assert sum(bool(chart.data) for chart in made) == drawn
        for chart in made:
            for layout in (chart.layout, chart.layout | chart.narrow):
                go.Figure({"data": chart.data, "layout": layout})  # raises for a property that it does not know
            json.dumps([chart.data, chart.layout], allow_nan=False)
            assert bool(chart.data) == bool(chart.says) != bool(chart.reason)
    with pytest.raises(ValueError, match="nonsense"):
        go.Figure({"data": [{"type": "bar", "nonsense": 1}]})


def test_every_colour_is_in_the_style_sheet(whole):
    """The colours of terms are there twice, light and dark."""
    css = (HERE / "report.css").read_text()
    used = {word for chart in charts(whole) for word in strings([chart.data, chart.layout]) if word.startswith("var(")}
    assert len(used) > 10
    for name in used:
        assert f"{name[4:-1]}:" in css, name
    for name in {*PAINT.values(), "other", "total"}:
        assert len(re.findall(rf"--term-{name}:", css)) == 2, name


def test_long_texts_are_broken_and_cut():
    lines = escape("word " * 200).split("<br>")
    assert len(lines) > 3
    assert max(map(len, lines)) <= 52
    assert sum(map(len, lines)) <= 300
    assert [clip("abcdef", 4), clip("abcd", 4)] == ["abc…", "abcd"]


def test_each_chart_describes_itself_with_its_main_figures(whole):
    said = {key: chart.says.replace("\xa0", " ") for key, chart in of(whole).items()}
    assert said == {
        "waterfall": "Waterfall of this run, 2.02 s; its largest terms are convolutions below their roof 794 ms; idle "
        "600 ms; batch norm 500 ms.",
        "article": "Waterfall of the article, one V100, 256 s; its largest terms are not attributed 201 s; ideal at "
        "the data sheet's peak 38.6 s; validation 15.3 s.",
        "roofline": "Roofline: FLOP/s over FLOP per byte, below 700 TFLOP/s and 4.00 TB/s; the longest, "
        "sm90_xmma_fprop_implicit_gemm_f16f16, reached 4.83 TFLOP/s at 288 FLOP/B, 0.690 % of its roof.",
        "timeline": "Curves of the sensors over the run: SM clock 1,464 MHz to 1,464 MHz, memory clock 3,201 MHz to "
        "3,201 MHz, power 612 W to 612 W, temperature 56.0 °C to 56.0 °C, some kernel running 100 % to 100 %, "
        "SMs active 93.0 % to 93.0 %, tensor cores active 55.0 % to 55.0 %.",
        "loss": "Curve of the loss: epoch 1, training: 2.000; epoch 2, training: 1.000.",
        "accuracy": "Curve of the accuracy: epoch 1, training: 40.00 %; epoch 2, training: 80.00 %; epoch 1, test: "
        "45.00 %; epoch 2, test: 90.00 %.",
    }


def test_a_chart_is_not_drawn_for_a_reason(bare):
    assert {key: chart.reason for key, chart in of(bare).items() if not chart.data} == {
        "article": "no term of this account is known",
        "roofline": "no kernel with known FLOPs and bytes, and no roof",
        "timeline": "the sampler left no file",
        "loss": "no epoch was logged",
        "accuracy": "no epoch was logged",
    }


def test_each_bar_begins_where_the_one_before_ended_and_a_negative_one_goes_back(whole):
    whole["terms"][5]["ns"] *= -1  # the casts
    chart = of(whole)["waterfall"]
    _, bars, labels = chart.data
    known = [term["ns"] / 1e9 for term in whole["terms"]]
    assert [x for x in bars["x"][:-1] if x] == [x for x in known if x]
    *terms, last = zip(bars["base"], bars["x"], strict=True)
    for (base, length), (following, _) in itertools.pairwise(terms):
        assert base + length == pytest.approx(following)
    assert last == (0, sum(term["ns"] for term in whole["terms"]) / 1e9)
    i = bars["x"].index(-0.1)
    assert labels["text"][i] == " \N{MINUS SIGN}0.100"
    assert [shape for shape in bars["marker"]["pattern"]["shape"] if shape] == ["/"]
    assert bars["marker"]["pattern"]["shape"][i] == "/"
    source = f"<i>measured: {whole['terms'][5]['source']}</i>"
    assert bars["hovertext"][i].replace("<br>", " ").endswith(source)
    assert waterfall("key", "title", [], {"ideal": ""}).reason


def test_both_waterfalls_have_the_same_rows(whole):
    ours, theirs = (of(whole)[key] for key in ("waterfall", "article"))
    names, others = (chart.layout["yaxis"]["ticktext"] for chart in (ours, theirs))
    assert "validation" in names
    assert [pair for pair in zip(names, others, strict=True) if pair[0] != pair[1]] == [
        ("batch norm", "batch norm and ReLU")
    ]
    assert ours.data[1]["marker"]["color"] == theirs.data[1]["marker"]["color"]
    assert theirs.data[2]["text"][1] == " —", "the article has no ceiling gap"
    assert (ours.layout["yaxis"]["showticklabels"], theirs.layout["yaxis"]["showticklabels"]) == (True, False)
    assert "showticklabels" not in theirs.narrow["yaxis"], "on a phone it stands below and names its rows"


def test_a_curve_skips_what_was_not_logged_and_one_epoch_is_said_once():
    rows = [{"epoch": 1, "loss": 2.5}, {"epoch": 2, "loss": None}, {"epoch": 3, "loss": 1.0}]
    chart = learning_curve({"epochs": rows}, "loss", {"loss": "training"} | dict.fromkeys(["epoch"], "x"))
    assert (chart.data[0]["x"], chart.data[0]["y"]) == ([1, 3], [2.5, 1.0])
    row = {"epoch": 1, "train_loss": 2.5, "test_loss": None}
    chart = learning_curve({"epochs": [row]}, "loss", {"train_loss": "training", "test_loss": "test"})
    assert chart.says == "Curve of the loss: epoch 1, training: 2.500."


def test_the_target_is_drawn_where_it_is_near(whole):
    assert [s["y0"] for s in of(whole)["accuracy"].layout["shapes"]] == [94]
    whole["epochs"].pop()
    assert not of(whole)["accuracy"].layout["shapes"]


def points(report, group):
    return [trace for trace in roofline(report).data if trace.get("meta") == group]


def test_a_point_for_each_kernel_and_layer_that_has_flops_and_bytes(whole):
    convolution, norm, counted = points(whole, "kernels")
    rows = whole["kernels"]
    assert [(t["x"], t["y"]) for t in (convolution, norm)] == [([r["intensity"]], [r["flops_per_s"]]) for r in rows[:2]]
    assert (counted["name"], counted["x"], counted["y"]) == (
        "by counted bytes",
        [rows[0]["flops"] / 210e6],
        convolution["y"],
    )
    assert [t["marker"]["symbol"] for t in (convolution, norm)] == [["circle"], ["circle-open"]], (
        "modelled FLOPs: a ring"
    )
    assert [t["marker"]["line"]["width"] for t in (convolution, norm)] == [[1], [2]]
    (layer,) = points(whole, "layers")
    assert (layer["x"], layer["marker"]["symbol"]) == ([whole["layers"][0]["intensity"]], ["diamond"])
    assert [t["visible"] for t in (convolution, norm, counted, layer)] == [True, True, True, False]
    assert roofline(whole).groups == ("kernels", "layers")
    for words in (
        "sm90_xmma_fprop",
        "64x32x32-64x3x3-s1",
        "4.83\xa0TFLOP/s",
        "0.690\xa0% of the roof",
        "measured: time",
    ):
        assert words in convolution["hovertext"][0]
    assert counted["hovertext"][0].endswith("counted by Nsight Compute</i>")
    # plotly's diameter is sqrt(2 size / sizeref): the area is the time
    assert [t["marker"]["size"] for t in (convolution, norm)] == [[8e6], [5e6]]
    assert {t["marker"]["sizemode"] for t in (convolution, norm, layer)} == {"area"}
    assert math.sqrt(2 * 8e6 / convolution["marker"]["sizeref"]) == pytest.approx(LARGEST_POINT_PX)


def test_the_roofs_bend_where_bytes_and_arithmetic_take_as_long(whole):
    chart = roofline(whole)
    measured, sheet = (trace for trace in chart.data if trace["mode"] == "lines")
    assert measured["x"][1] == pytest.approx(7e14 / 4e12)
    assert measured["y"][1:] == [7e14, 7e14]
    assert measured["y"][0] / measured["x"][0] == pytest.approx(4e12)
    assert sheet["x"][1] == pytest.approx(989.5e12 / 4.8e12, rel=1e-3)
    assert (measured["line"]["dash"], sheet["line"]["dash"]) == ("solid", "dash")
    for name in "xy":
        low, high = chart.layout[f"{name}axis"]["range"]
        values = [math.log10(value) for trace in chart.data for value in trace[name]]
        assert low <= min(values)
        assert max(values) <= high
    whole["roofs"] = {key: rows[:1] for key, rows in whole["roofs"].items()}  # of a device without a data sheet
    chart = roofline(whole)
    assert len([trace for trace in chart.data if trace["mode"] == "lines"]) == 1
    assert not any("data sheet" in label["text"] for label in chart.layout["annotations"])


def test_points_need_no_roof_and_roofs_no_point(whole):
    no_roofs, no_points = {"roofs": {"compute": [], "bandwidth": []}}, {"kernels": [], "layers": []}
    assert points(whole | no_roofs, "kernels")
    chart = roofline(whole | no_points)
    assert (bool(chart.data), chart.groups) == (True, ())
    for intensity in (None, 0, -1.0):  # none has a place on a logarithmic axis
        row = whole["kernels"][0] | {"intensity": intensity}
        assert roofline(whole | no_roofs | no_points | {"kernels": [row]}).reason


PHASES = {
    "start_ns": 5 * S,
    "phases": [{"name": n, "start_ns": a * S, "end_ns": b * S} for n, a, b in (("set-up", 5, 6), ("training", 6, 9))],
}


def test_a_timeline_is_in_seconds_from_the_runs_start():
    found = timeline(PHASES, Telemetry([GpuSample(t_ns=7 * S, power_w=400.0)], {"sm_active": "no GPM"}, []))
    assert found["phases"][1] == {"name": "training", "start_s": 1.0, "end_s": 4.0}
    assert found["samples"] == {"t_s": [2.0], "power_w": [400.0]}
    assert found["fields"] == {"power_w": {"label": "power", "unit": "W"}}
    assert (found["unavailable"]["sm_active"], found["unavailable"]["temperature_c"]) == ("no GPM", "no sample has it")
    assert found["reason"] is None
    nothing = timeline(None, Telemetry([], {}, []))
    assert (nothing["samples"], nothing["reason"]) == ({}, "there are no samples")


def test_a_long_run_is_thinned_over_its_whole_length():
    """Activity comes with every fifth sample; thinning by ten must not skip it."""
    samples = [
        GpuSample(t_ns=i, power_w=float(i), sm_active=0.5 if i % 5 == 3 else None) for i in range(9 * MOST_SAMPLES + 1)
    ]
    drawn = timeline(PHASES, Telemetry(samples, {}, []))["samples"]
    assert MOST_SAMPLES / 2 < len(drawn["power_w"]) <= MOST_SAMPLES
    assert drawn["power_w"][-1] > 9 * MOST_SAMPLES - 10
    assert set(drawn["sm_active"][:-1]) == {0.5}


def test_a_panel_for_each_unit_in_which_series_are_scaled(whole):
    samples = whole["timeline"]["samples"]
    samples["sm_active"] = [v if i % 4 == 0 else None for i, v in enumerate(samples["sm_active"])]
    samples["tensor_active"][9:19] = [None] * 10
    chart = timeline_chart(whole)
    assert {trace["yaxis"] for trace in chart.data} == {"y", "y2", "y3", "y4"}
    assert {trace.get("xaxis", "x") for trace in chart.data} == {"x"}
    axes = [chart.layout[f"yaxis{n}"] for n in ("", 2, 3, 4)]
    assert [axis["title"]["text"] for axis in axes] == ["MHz", "W", "°C", "%"]
    for above, below in itertools.pairwise(axis["domain"] for axis in axes):
        assert above[0] > below[1]
    assert axes[-1]["domain"][0] == 0
    drawn = {trace["name"]: trace["y"] for trace in chart.data}
    assert drawn["power"] == [612.5] * 60
    assert drawn["SMs active"] == [93] * 15, "a curve of the samples that have it, and not 15 points that no line joins"
    assert drawn["tensor cores active"] == [*[55] * 9, None, *[55] * 41], "a gap stays a gap"


def test_epochs_have_one_name_and_a_shade_each(whole):
    ends = [10.0, 12.0, 14.0, 16.0, 19.0, 30.0]
    names = ["set-up", "training", "evaluation", "training", "evaluation", "shutdown"]
    whole["timeline"]["phases"] = [
        {"name": n, "start_s": s, "end_s": e} for n, s, e in zip(names, [0.0, *ends], ends, strict=False)
    ]
    chart = timeline_chart(whole)
    assert [(shape["x0"], shape["x1"]) for shape in chart.layout["shapes"]] == [(10, 12), (14, 16)]
    labels = {label["text"]: label["x"] for label in chart.layout["annotations"]}
    assert labels == {"set-up": 5, "training, evaluation": 13, "evaluation": 17.5, "shutdown": 24.5}
    narrow = [label["text"] for label in chart.narrow["annotations"]]
    assert narrow == ["set-up", "shutdown", "trainin…"], "where there is room"
