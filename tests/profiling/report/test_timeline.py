import itertools

from report_sample import cpu, gpu

from profiling.device.nvml import GpuSample
from profiling.report.timeline import MOST_SAMPLES, telemetry_table, timeline_chart, timeline_record
from profiling.run.telemetry import Telemetry

S = 10**9
PHASES = {
    "start_ns": 5 * S,
    "phases": [
        {"name": "set-up", "start_ns": 5 * S, "end_ns": 6 * S},
        {"name": "training", "start_ns": 6 * S, "end_ns": 9 * S},
    ],
}


def test_seconds_are_from_the_runs_start():
    found = timeline_record(PHASES, Telemetry([GpuSample(t_ns=7 * S, power_w=400.0)], {"sm_active": "no GPM"}, []))
    assert found["phases"][1] == {"name": "training", "start_s": 1.0, "end_s": 4.0}
    assert found["samples"] == {"t_s": [2.0], "power_w": [400.0]}
    assert found["fields"] == {"power_w": {"label": "power", "unit": "W"}}
    assert found["unavailable"]["sm_active"] == "no GPM"
    assert found["unavailable"]["temperature_c"] == "no sample has it"
    assert found["reason"] is None


def test_without_samples_there_is_a_reason_and_no_zero():
    found = timeline_record(PHASES, Telemetry([], {}, [], reason="no NVIDIA driver"))
    assert found["samples"] == {}
    assert found["reason"] == "no NVIDIA driver"
    assert timeline_record(None, Telemetry([], {}, []))["reason"]


def test_a_long_run_is_thinned_over_its_whole_length():
    samples = [GpuSample(t_ns=5 * S + i, power_w=float(i)) for i in range(3 * MOST_SAMPLES + 1)]
    drawn = timeline_record(PHASES, Telemetry(samples, {}, []))["samples"]["power_w"]
    assert MOST_SAMPLES / 2 < len(drawn) <= MOST_SAMPLES
    assert drawn[-1] > 3 * MOST_SAMPLES - 5


def test_a_field_that_few_samples_have_is_not_lost_in_thinning():
    """Activity comes with every fifth sample; thinning by ten must not skip it."""
    samples = [GpuSample(t_ns=i, power_w=1.0, sm_active=0.5 if i % 5 == 3 else None) for i in range(10 * MOST_SAMPLES)]
    assert set(timeline_record(PHASES, Telemetry(samples, {}, []))["samples"]["sm_active"]) == {0.5}


def test_a_panel_for_each_unit_on_one_axis_of_time():
    chart = timeline_chart(gpu())
    assert {trace["yaxis"] for trace in chart.data} == {"y", "y2", "y3", "y4"}
    assert {trace.get("xaxis", "x") for trace in chart.data} == {"x"}
    domains = [chart.layout[f"yaxis{n}"]["domain"] for n in ("", 2, 3, 4)]
    for above, below in itertools.pairwise(domains):
        assert above[0] > below[1]
    assert domains[-1][0] == 0


def test_series_are_scaled_to_what_their_axis_says():
    chart = timeline_chart(gpu())
    power = next(trace for trace in chart.data if trace["name"] == "power")
    assert max(power["y"]) > 600
    assert chart.layout["yaxis2"]["title"]["text"] == "W"
    active = next(trace for trace in chart.data if trace["name"] == "SM active")
    assert 90 < max(active["y"]) <= 100
    assert chart.layout["yaxis4"]["title"]["text"] == "%"
    assert None in next(trace for trace in chart.data if trace["name"] == "DRAM active")["y"], "a gap stays a gap"


def test_training_is_shaded_and_phases_are_named_where_there_is_room():
    chart = timeline_chart(gpu())
    assert [(shape["x0"], shape["x1"]) for shape in chart.layout["shapes"]] == [(19.2, 28.93)]
    names = [label["text"] for label in chart.layout["annotations"]]
    assert "training" in names
    assert len(chart.narrow["annotations"]) < len(names)


def test_epochs_have_one_name_and_a_shade_each():
    report, ends = gpu(), [10.0, 12.0, 14.0, 16.0, 19.0, 30.0]
    names = ["set-up", "training", "evaluation", "training", "evaluation", "shutdown"]
    starts = [0.0, *ends]
    report["timeline"]["phases"] = [
        {"name": n, "start_s": s, "end_s": e} for n, s, e in zip(names, starts, ends, strict=False)
    ]
    chart = timeline_chart(report)
    assert [(shape["x0"], shape["x1"]) for shape in chart.layout["shapes"]] == [(10, 12), (14, 16)]
    labels = {label["text"]: label["x"] for label in chart.layout["annotations"]}
    assert labels == {"set-up": 5, "training, evaluation": 13, "evaluation": 17.5, "shutdown": 24.5}


def test_words_are_no_series():
    assert "clock event reasons" not in {trace["name"] for trace in timeline_chart(gpu()).data}


def test_without_samples_there_is_a_reason():
    chart = timeline_chart(cpu())
    assert (chart.data, chart.reason) == ([], "no NVIDIA driver")


def table(phases):
    report = gpu()
    report["timeline"]["phases"] = phases
    return {row.cells[0].text: row for row in telemetry_table(report).rows}


def lowest(rows, sensor):
    return rows[sensor].cells[1].text.replace("\xa0", " ")


def test_it_is_of_the_training_phase():
    rows = table(gpu()["timeline"]["phases"])
    assert [cell.text for cell in rows["some kernel ran"].cells[1:]] == ["84.0\xa0%", "100\xa0%", "100\xa0%"]
    assert rows["clock event reasons"].cells[0].under == "power cap in 20.3\xa0% of the samples"


def test_it_is_of_every_stretch_of_training_and_of_nothing_between():
    training = [{"name": "training", "start_s": s, "end_s": e} for s, e in ((20.0, 22.0), (26.0, 28.0))]
    between = {"name": "evaluation", "start_s": 22.0, "end_s": 26.0}
    rows = table([training[0], between, training[1]])
    assert rows["power"].source == "162 samples of the driver"
    assert rows["clock event reasons"].cells[0].under.startswith("none"), "the power cap was between them"


def test_it_is_of_the_whole_run_where_training_is_not_known():
    assert lowest(table([]), "some kernel ran") == "0 %"


def test_without_any_sample_one_reason_is_enough():
    report = gpu()
    report["timeline"] = {"reason": "no NVIDIA driver", "unavailable": {"power_w": "no NVIDIA driver"}, "fields": {}}
    assert telemetry_table(report).rows == []


def test_what_has_no_sample_has_its_reason():
    report = gpu()
    report["timeline"]["samples"]["power_w"] = [None] * 3
    rows = {row.cells[0].text: row for row in telemetry_table(report).rows}
    assert rows["memory_used_bytes"].provenance == "unavailable: the driver says NotSupported"
    assert rows["power"].provenance == "unavailable: no sample"
