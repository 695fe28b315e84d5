import math

import pytest
from report_sample import cpu, gpu

from profiling.report.roofline_chart import LARGEST_POINT_PX, roofline


def points(chart, group):
    return [trace for trace in chart.data if trace.get("meta") == group]


def test_a_point_for_each_kernel_and_layer_that_has_flops_and_bytes():
    report = gpu()
    report["kernels"][0]["dram_bytes"] = None
    chart = roofline(report)
    for group in ("kernels", "layers"):
        expected = {(row["intensity"], row["flops_per_s"]) for row in report[group] if row["intensity"]}
        traces = points(chart, group)
        assert {pair for trace in traces for pair in zip(trace["x"], trace["y"], strict=True)} == expected
    assert chart.groups == ("kernels", "layers")
    assert {trace["visible"] for trace in points(chart, "kernels")} == {True}
    assert {trace["visible"] for trace in points(chart, "layers")} == {False}


def test_area_is_time():
    report = gpu()
    time = {(row["intensity"], row["flops_per_s"]): row["ns_per_step"] for row in report["kernels"]}
    traces = [trace for trace in points(roofline(report), "kernels") if trace["name"] != "by counted bytes"]
    for trace in traces:
        marker = trace["marker"]
        assert marker["sizemode"] == "area"
        assert marker["size"] == [time[pair] for pair in zip(trace["x"], trace["y"], strict=True)]
    (scale,) = {trace["marker"]["sizeref"] for trace in traces}  # plotly's diameter is sqrt(2 size / sizeref)
    assert math.sqrt(2 * max(time.values()) / scale) == pytest.approx(LARGEST_POINT_PX)


def test_the_roofs_bend_where_bytes_and_arithmetic_take_as_long():
    measured, sheet = (trace for trace in roofline(gpu()).data if trace["mode"] == "lines")
    assert measured["x"][1] == pytest.approx(7.9e14 / 4.3e12)
    assert measured["y"][1:] == [7.9e14, 7.9e14]
    assert measured["y"][0] / measured["x"][0] == pytest.approx(4.3e12)
    assert sheet["x"][1] == pytest.approx(9.89e14 / 4.8e12)
    assert (measured["line"]["dash"], sheet["line"]["dash"]) == ("solid", "dash")


def test_everything_is_within_the_axes():
    chart = roofline(gpu())
    for name in "xy":
        low, high = chart.layout[f"{name}axis"]["range"]
        values = [math.log10(value) for trace in chart.data for value in trace[name]]
        assert low <= min(values)
        assert max(values) <= high


def test_hover_says_what_it_is_and_how_it_is_known():
    said = points(roofline(gpu()), "kernels")[0]["hovertext"][0]
    for words in ("conv_wgrad_kernel", "512x32x32x64", "493\xa0TFLOP/s", "62.4\xa0% of the roof", "measured: trace"):
        assert words in said


@pytest.mark.parametrize(("per_element", "shape"), [(None, "circle"), (6, "circle-open")])
def test_what_has_modelled_flops_is_a_ring(per_element, shape):
    kernel = gpu()["kernels"][1] | {"per_element": per_element}
    (trace,) = points(roofline(gpu() | {"kernels": [kernel]}), "kernels")
    assert trace["marker"]["symbol"] == [shape]


def test_bytes_that_the_hardware_counted_are_a_point_of_their_own():
    (trace,) = (trace for trace in roofline(gpu()).data if trace.get("name") == "by counted bytes")
    kernel = gpu()["kernels"][0]
    assert (trace["x"], trace["y"]) == ([kernel["flops"] / 210e6], [kernel["flops_per_s"]])
    assert trace["meta"] == "kernels"


def test_without_a_specification_only_what_was_measured_is_a_roof():
    chart = roofline(cpu())
    assert len([trace for trace in chart.data if trace["mode"] == "lines"]) == 1
    assert not any("data sheet" in label["text"] for label in chart.layout["annotations"])


def test_points_need_no_roof_and_roofs_no_point():
    assert points(roofline(gpu() | {"roofs": {"compute": [], "bandwidth": []}}), "kernels")
    chart = roofline(gpu() | {"kernels": [], "layers": []})
    assert chart.data
    assert chart.groups == ()


@pytest.mark.parametrize("intensity", [None, 0, -1.0], ids=["none", "zero", "negative"])
def test_what_has_no_place_on_a_logarithmic_axis_is_left_out(intensity):
    report = gpu() | {"kernels": [gpu()["kernels"][0] | {"intensity": intensity}], "layers": []}
    report["roofs"] = {"compute": [], "bandwidth": []}
    assert roofline(report).reason
