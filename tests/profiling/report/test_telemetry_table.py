from report_sample import gpu

from profiling.report.telemetry_table import telemetry_table


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
