"""A GPU run's folder whose trace, steps and ceilings are made by hand: MADE UP, measured on no device."""

import traces

from profiling.device.ceilings import Ceiling, Ceilings
from profiling.output.files import append_jsonl, read_json, write_json
from profiling.run import sampler

S, MS, US = 10**9, 10**6, 10**3
STEPS, ACTIVE, BATCH = 100, 20, 512
STEP_NS = 20 * MS  # of the timed run
PASS_NS = 21 * MS  # of the profiled pass
CONV_NS, BN_NS, CAST_NS, OVERLAP_NS = 8 * MS, 5 * MS, 1 * MS, 500 * US
IDLE_NS = STEP_NS - CONV_NS - BN_NS - CAST_NS
OUTSIDE_NS = 20 * MS  # of the training phase, outside of its steps
TRAINING_NS = STEPS * STEP_NS + OUTSIDE_NS
X, W = [BATCH, 64, 32, 32], [64, 64, 3, 3]
FLOPS = 2 * BATCH * 64 * 64 * 9 * 32 * 32  # of a step


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


def make_run(folder, step_ns=STEP_NS, active=ACTIVE):
    """A run of 100 steps in two epochs on an H200, and 20 ms outside of them; the pass profiled `active` steps."""
    records, training = folder / "records", STEPS * step_ns + OUTSIDE_NS
    records.mkdir(parents=True)
    summary = {"preset": "made-up", "device": "NVIDIA H200", "dtype": "float16", "status": "complete", "seed": 0}
    summary |= {"epochs": 2, "steps": STEPS, "train_s": training / S, "train_plus_eval_s": 3.0, "wall_s": 4.0}
    summary |= {"data_identity": "official", "data_source": "made up", "ops": "reference", "step": "eager"}
    summary |= {"test_accuracy": 0.9407, "images_per_s": 25_600.0, "peak_memory_bytes": 6 << 30, "git_sha": "0a1b" * 10}
    write_json(folder / "summary.json", summary)
    write_json(folder / "config.json", {"batch_size": BATCH})
    write_json(folder / "environment.json", {"gpu": {"name": "NVIDIA H200"}})
    for epoch in (1, 2):
        losses = {
            "train_loss": 2 / epoch,
            "train_accuracy": 0.4 * epoch,
            "test_loss": None,
            "test_accuracy": 0.45 * epoch,
        }
        append_jsonl(
            folder / "log.jsonl",
            {"epoch": epoch, "learning_rate": 0.4, "images_per_s": 1e4, "train_s": epoch, **losses},
        )
    phases = [("set-up", 0, S), ("training", S, S + training), ("evaluation", S + training, 4 * S)]
    of_phases = [{"name": n, "start_ns": a, "end_ns": b} for n, a, b in phases]
    write_json(records / "phases.json", {"version": 1, "start_ns": 0, "end_ns": 4 * S, "phases": of_phases})
    starts = [S + i * step_ns for i in range(STEPS + 1)]
    epochs = [starts[: STEPS // 2 + 1], starts[STEPS // 2 :]]
    write_json(records / "steps.json", {"version": 1, "epochs": epochs, "missed_steps": 0, "source": "made by hand"})
    profile = {"version": 1, "eager_step": None, "error": None}
    write_json(records / "profile.json", profile | {"step_images": [BATCH] * active, "step_ns": [PASS_NS] * active})
    layer, size = "64x32x32-64x3x3-s1", 2 * BATCH * 64 * 32 * 32
    ops = [
        ("aten::convolution", "fprop", layer, [X, W], FLOPS, 2 * size),
        ("aten::cudnn_batch_norm", "batch norm", "512x64x32x32", [X, [64]], 0, 2 * size),
    ]
    names = ("op", "family", "layer", "dims", "flops", "bytes")
    rows = [dict(zip(names, op, strict=True)) | {"backward": False} for op in ops]
    work = {
        "version": 1,
        "batch": BATCH,
        "images": STEPS * BATCH,
        "dtype": "float16",
        "flops_per_image": FLOPS // BATCH,
    }
    work |= {"article_batch": BATCH, "article_flops_per_image": 2_756_474_880}
    write_json(records / "work.json", work | dict.fromkeys(("ops", "reference", "fused", "article"), rows))
    write_json(records / "ceilings.json", ceilings().to_json())
    make_trace(records / "trace.json.gz", active=active)
    return folder


def ceilings() -> Ceilings:
    def ceiling(value, unit):
        return Ceiling("made up", "none", value, value, unit, 1, 1.0, "float16" if unit == "FLOP/s" else "")

    computed, copied, launched = ceiling(7e14, "FLOP/s"), ceiling(4e12, "B/s"), ceiling(1e-6, "s")
    return Ceilings("NVIDIA H200", "float16", [computed], [], copied, launched, None, None, (), "x")


def sampled(folder, mhz: int, count: int = 60, **fields):
    """The run with a clock that was sampled, and other `fields`, in training for most of `count` samples."""
    rows = [sampler.header("GPU-0", "NVIDIA H200", 50.0, {}, None)]
    rows += [{"t_ns": S + i * 50 * MS, "sm_clock_mhz": mhz, **fields} for i in range(count)]
    for row in [*rows, {"end": sampler.STOPPED}]:
        append_jsonl(folder / "records" / "telemetry.jsonl", row)
    return folder


def change(path, **entries) -> None:
    """A record with other entries."""
    write_json(path, read_json(path) | entries)
