from profiling.device.nvml import GpuSample
from profiling.report.timeline import MOST_SAMPLES, timeline
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
    found = timeline(PHASES, Telemetry([GpuSample(t_ns=7 * S, power_w=400.0)], {"sm_active": "no GPM"}, []))
    assert found["phases"][1] == {"name": "training", "start_s": 1.0, "end_s": 4.0}
    assert found["samples"] == {"t_s": [2.0], "power_w": [400.0]}
    assert found["fields"] == {"power_w": {"label": "power", "unit": "W"}}
    assert found["unavailable"]["sm_active"] == "no GPM"
    assert found["unavailable"]["temperature_c"] == "no sample has it"
    assert found["reason"] is None


def test_without_samples_there_is_a_reason_and_no_zero():
    found = timeline(PHASES, Telemetry([], {}, [], reason="no NVIDIA driver"))
    assert found["samples"] == {}
    assert found["reason"] == "no NVIDIA driver"
    assert timeline(None, Telemetry([], {}, []))["reason"]


def test_a_long_run_is_thinned_over_its_whole_length():
    samples = [GpuSample(t_ns=5 * S + i, power_w=float(i)) for i in range(3 * MOST_SAMPLES + 1)]
    drawn = timeline(PHASES, Telemetry(samples, {}, []))["samples"]["power_w"]
    assert MOST_SAMPLES / 2 < len(drawn) <= MOST_SAMPLES
    assert drawn[-1] > 3 * MOST_SAMPLES - 5


def test_a_field_that_few_samples_have_is_not_lost_in_thinning():
    """Activity comes with every fifth sample; thinning by ten must not skip it."""
    samples = [GpuSample(t_ns=i, power_w=1.0, sm_active=0.5 if i % 5 == 3 else None) for i in range(10 * MOST_SAMPLES)]
    assert set(timeline(PHASES, Telemetry(samples, {}, []))["samples"]["sm_active"]) == {0.5}
