import itertools

from report_sample import cpu, gpu

from profiling.report.timeline_chart import thin, timeline


def test_a_panel_for_each_unit_on_one_axis_of_time():
    chart = timeline(gpu())
    assert {trace["yaxis"] for trace in chart.data} == {"y", "y2", "y3", "y4"}
    assert {trace.get("xaxis", "x") for trace in chart.data} == {"x"}
    domains = [chart.layout[f"yaxis{n}"]["domain"] for n in ("", 2, 3, 4)]
    for above, below in itertools.pairwise(domains):
        assert above[0] > below[1]
    assert domains[-1][0] == 0


def test_series_are_scaled_to_what_their_axis_says():
    chart = timeline(gpu())
    power = next(trace for trace in chart.data if trace["name"] == "power")
    assert max(power["y"]) > 600
    assert chart.layout["yaxis2"]["title"]["text"] == "W"
    active = next(trace for trace in chart.data if trace["name"] == "SM active")
    assert 90 < max(active["y"]) <= 100
    assert chart.layout["yaxis4"]["title"]["text"] == "%"


def test_training_is_shaded_and_phases_are_named_where_there_is_room():
    chart = timeline(gpu())
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
    chart = timeline(report)
    assert [(shape["x0"], shape["x1"]) for shape in chart.layout["shapes"]] == [(10, 12), (14, 16)]
    labels = {label["text"]: label["x"] for label in chart.layout["annotations"]}
    assert labels == {"set-up": 5, "training, evaluation": 13, "evaluation": 17.5, "shutdown": 24.5}


def test_words_are_no_series():
    assert "clock event reasons" not in {trace["name"] for trace in timeline(gpu()).data}


def test_without_samples_there_is_a_reason():
    chart = timeline(cpu())
    assert (chart.data, chart.reason) == ([], "no NVIDIA driver")


def test_thinning_keeps_the_extremes_in_their_order():
    times = [float(i) for i in range(1000)]
    values = [0.0] * 1000
    values[503], values[507] = 9.0, -7.0
    x, y = thin(times, values, buckets=10)
    assert len(x) <= 20
    assert x == sorted(x)
    assert (x[y.index(9.0)], x[y.index(-7.0)]) == (503, 507)


def test_a_gap_stays_a_gap():
    _, y = thin([float(i) for i in range(100)], [1.0] * 50 + [None] * 50, buckets=10)
    assert y.count(None) == 5


def test_few_samples_are_all_drawn():
    assert thin([0, 1, 3], [5, None, None]) == ([0, 1, 3], [5, None, None])
