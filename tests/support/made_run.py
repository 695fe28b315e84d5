"""A GPU run's folder whose trace, steps and ceilings are made by hand: MADE UP, measured on no device."""

import traces

from profiling.account.run_folder import EPOCH
from profiling.device.ceilings import Ceiling, Ceilings
from profiling.output.files import append_jsonl, write_json
from profiling.run import sampler

S, MS, US = 10**9, 10**6, 10**3
STEPS, ACTIVE, BATCH = 100, 20, 512
STEP_NS = 20 * MS  # of the timed run
PASS_NS = 21 * MS  # of the profiled pass
CONV_NS, BN_NS, CAST_NS, OVERLAP_NS = 8 * MS, 5 * MS, 1 * MS, 500 * US
IDLE_NS = STEP_NS - CONV_NS - BN_NS - CAST_NS
X, W = [BATCH, 64, 32, 32], [64, 64, 3, 3]


def make_trace(path, factor=1.0, active=ACTIVE, queued_ns=0) -> None:
    """Steps that launch at once; a copy on another stream lies half under a convolution. `factor` times as long.

    After each convolution the device is empty for `queued_ns`.
    """
    trace = traces.HandMadeTrace()
    step_ns, conv_ns, bn_ns, cast_ns = (round(factor * ns) for ns in (PASS_NS, CONV_NS, BN_NS, CAST_NS))

    def launched(name, op, dims, launch, start, duration, stream=7):
        trace.op(op, launch - 2 * US, 20 * US, dims)
        trace.kernel(name, launch, start, duration, stream)

    for number in range(active):
        begin = number * step_ns
        trace.step(number + 6, begin, step_ns)
        start = begin + 100 * US
        launched(
            "sm90_xmma_fprop_implicit_gemm_f16f16", "aten::cudnn_convolution", [X, W], begin + 10 * US, start, conv_ns
        )
        start += conv_ns + queued_ns
        launched("cudnn::bn_fw_tr_1C11", "aten::cudnn_batch_norm", [X, [64]], begin + 40 * US, start, bn_ns)
        start += bn_ns - OVERLAP_NS
        launched("nchwToNhwcKernel", "aten::copy_", [X, X], begin + 80 * US, start, cast_ns + OVERLAP_NS, stream=8)
    trace.write(path)


TRAINING_NS = STEPS * STEP_NS + 20 * MS


def make_run(folder, step_ns=STEP_NS, active=ACTIVE):
    """A run of 100 steps on an H200 and 20 ms outside of them, with a profiled pass of `active` of its steps."""
    records, training = folder / "records", STEPS * step_ns + 20 * MS
    records.mkdir(parents=True)
    summary = {"preset": "made-up", "device": "NVIDIA H200", "dtype": "float16", "status": "complete"}
    summary |= {"epochs": 1, "steps": STEPS, "train_s": training / S, "train_plus_eval_s": 3.0, "wall_s": 4.0}
    summary |= {"data_identity": "synthetic", "data_source": "made up", "ops": "reference", "step": "eager", "seed": 0}
    summary |= dict.fromkeys(["git_sha", "test_accuracy", "images_per_s", "peak_memory_bytes"])
    write_json(folder / "summary.json", summary)
    write_json(folder / "config.json", {"batch_size": BATCH})
    write_json(folder / "environment.json", {"gpu": {"name": "NVIDIA H200"}})
    append_jsonl(folder / "log.jsonl", {"epoch": 1} | dict.fromkeys(EPOCH.keys() - {"epoch"}))
    phases = [("set-up", 0, S), ("training", S, S + training), ("evaluation", S + training, 4 * S)]
    of_phases = [{"name": n, "start_ns": a, "end_ns": b} for n, a, b in phases]
    write_json(records / "phases.json", {"version": 1, "start_ns": 0, "end_ns": 4 * S, "phases": of_phases})
    starts = [S + i * step_ns for i in range(STEPS + 1)]
    write_json(records / "steps.json", {"version": 1, "epochs": [starts], "missed_steps": 0, "source": "made by hand"})
    profile = {
        "version": 1,
        "eager_step": None,
        "step_images": [BATCH] * active,
        "step_ns": [PASS_NS] * active,
        "error": None,
    }
    write_json(records / "profile.json", profile)
    flops = 2 * BATCH * 64 * 64 * 9 * 32 * 32
    row = {
        "op": "aten::convolution",
        "family": "fprop",
        "layer": "64x32x32-64x3x3-s1",
        "dims": [X, W],
        "backward": False,
    }
    work = {
        "version": 1,
        "batch": BATCH,
        "images": STEPS * BATCH,
        "flops_per_image": flops // BATCH,
        "dtype": "float16",
    }
    work |= {"flops_per_image": flops // BATCH, "article_batch": BATCH, "article_flops_per_image": 2_756_474_880}
    write_json(records / "work.json", work | {"ops": [row | {"flops": flops, "bytes": 2 * 10**8}]})

    def ceiling(value, unit):
        return Ceiling("made up", "none", value, value, unit, 1, 1.0, "float16" if unit == "FLOP/s" else "")

    made = Ceilings(
        "NVIDIA H200",
        "float16",
        [ceiling(7e14, "FLOP/s")],
        [],
        ceiling(4e12, "B/s"),
        ceiling(1e-6, "s"),
        None,
        None,
        (),
        "x",
    )
    write_json(records / "ceilings.json", made.to_json())
    make_trace(records / "trace.json.gz", active=active)
    return folder


def sampled(folder, mhz: int, count: int = 60):
    """The run with a clock that was sampled, in training for most of `count` samples."""
    rows = [sampler.header("GPU-0", "NVIDIA H200", 50.0, {}, None)]
    rows += [{"t_ns": S + i * 50 * MS, "sm_clock_mhz": mhz} for i in range(count)]
    for row in [*rows, {"end": sampler.STOPPED}]:
        append_jsonl(folder / "records" / "telemetry.jsonl", row)
    return folder
