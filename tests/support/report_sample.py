"""Reports to draw in tests. EVERY NUMBER IN THIS FILE IS MADE UP: plausible for the device named, measured on none."""

import copy
import math
from typing import Any

from profiling.output.forms import clean

MADE_UP = "MADE UP FOR TESTS"
S = 1_000_000_000

TERMS = [  # key, name, seconds on the H200 and on the article's V100 (None: no such term), share that can be recovered
    ("ideal", "ideal at the data sheet's peak", 4.870, 38.6, 0),
    ("ceiling_gap", "peak that this device does not sustain", 1.231, None, 0),
    ("conv_bytes", "convolutions bound by bytes", 0.412, 3.1, 0),
    ("conv_inefficiency", "convolutions below their roof", 1.904, None, 1),
    ("batch norm", "batch norm and fused epilogues", 0.633, 31.9, 1),
    ("memory-bound", "pool, add, ReLU", 0.288, 4.7, 1),
    ("layout and cast", "layout and casts", -0.014, None, 1),
    ("optimiser and loss", "optimiser and loss", 0.161, 0.9, 1),
    ("augmentation and data", "augmentation and data, exposed", 0.034, None, 1),
    ("unknown", "kernels of no known category", 0.021, None, 1),
    ("idle", "idle", 0.155, None, 1),
    ("validation", "validation", None, 15.3, 0),
    ("unattributed", "not attributed", None, 161.5, 0),
    ("residual", "residual", 0.037, None, 0),
]
LONG = (
    "sm90_xmma_dgrad_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1"
    "_execute_segment_k_off_kernel__5x_cudnn"
)
KERNELS = [  # name, op, category, shape, calls a step, us a call, GFLOP a call, MB a call
    ("conv_fprop_kernel", "cifar::conv_fprop", "convolution", "512x32x32x64 * 64x3x3x64", 4, 66.1, 38.65, 134.4),
    ("conv_dgrad_kernel", "cifar::conv_dgrad", "convolution", "512x32x32x64 * 64x3x3x64", 4, 71.0, 38.65, 201.5),
    ("conv_wgrad_kernel", "cifar::conv_wgrad", "convolution", "512x32x32x64 * 64x3x3x64", 4, 78.4, 38.65, 134.3),
    ("conv_fprop_kernel", "cifar::conv_fprop", "convolution", "512x16x16x128 * 128x3x3x128", 3, 55.9, 38.65, 67.4),
    ("conv_dgrad_kernel", "cifar::conv_dgrad", "convolution", "512x16x16x128 * 128x3x3x128", 3, 58.8, 38.65, 101.0),
    ("conv_wgrad_kernel", "cifar::conv_wgrad", "convolution", "512x16x16x128 * 128x3x3x128", 3, 61.2, 38.65, 67.4),
    ("conv_fprop_kernel", "cifar::conv_fprop", "convolution", "512x8x8x256 * 256x3x3x256", 3, 54.1, 38.65, 34.7),
    (LONG, "aten::convolution_backward", "convolution", "512x8x8x256 * 256x3x3x256", 3, 57.3, 38.65, 51.5),
    ("conv_wgrad_kernel", "cifar::conv_wgrad", "convolution", "512x8x8x256 * 256x3x3x256", 3, 60.9, 38.65, 34.7),
    ("bn_backward_reduce_kernel", "cifar::bn_backward", "batch norm", "512x32x32x64", 4, 36.4, 0.2, 134.2),
    ("bn_relu_kernel", "cifar::bn_relu", "batch norm", "512x32x32x64", 2, 35.2, 0.1, 134.2),
    ("multi_tensor_apply_kernel", "Optimizer.step#SGD.step", "optimiser and loss", "5205834", 1, 31.0, 0.04, 104.1),
    ("augment_kernel", "cifar::augment", "augmentation and data", "512x3x32x32", 1, 5.1, 0.01, 4.7),
    ("max_pool_backward_nhwc", "aten::max_pool2d_backward", "memory-bound", "512x256x4x4", 1, 8.8, None, 5.3),
    ("Memcpy DtoD (Device -> Device)", "aten::copy_", "layout and cast", "512x256", 2, 2.1, None, 0.5),
    ("vectorized_elementwise_kernel<4, lambda>", "aten::add_", "memory-bound", "512x16x16x128", 3, 18.4, 0.02, 101.0),
]
SMALL = [
    (f"triton_poi_fused_add_relu_{i}", "inductor", "memory-bound", f"512x{8 + i}x8x256", 1, 6.0 - i / 10, 0.01, 8.0)
    for i in range(28)
]


def figure(value: float | None, unit: str, status: str, source: str, label: str | None = None) -> dict[str, Any]:
    """A Number's record; unavailable if `value` is None, and then `source` is the reason."""
    record = {"value": value, "unit": unit, "status": "unavailable" if value is None else status, "source": source}
    return record if label is None else record | {"label": label}


def gpu() -> dict[str, Any]:
    """A complete report of a run on an H200. Made up."""
    report = _common()
    total = sum(term["ns"] for term in report["terms"])
    report["title"] = f"article-256 on the fused kernels, NVIDIA H200 ({MADE_UP})"
    report["headline"] = (
        "Trained in 9.73 s: arithmetic that this H200's tensor cores could do in 4.87 s, at 50 % MFU; "
        "1.90 s of the gap are convolutions below the device's own ceiling."
    )
    report["figures"] = {
        "train_s": figure(total / S, "s", "measured", "device events of the unprofiled run", "training"),
        "wall_s": figure(31.4, "s", "measured", "monotonic clock of the process", "process"),
        "flops": figure(4.824e15, "FLOP", "modelled", "FlopCounterMode on the meta device", "arithmetic"),
        "ideal_s": figure(4.870, "s", "modelled", "FLOPs / data sheet peak of the H200", "ideal"),
        "achieved": figure(4.958e14, "FLOP/s", "measured", "FLOPs / training time", "achieved"),
        "mfu": figure(0.501, "share", "measured", "FLOPs / (training x 989 TFLOP/s)", "MFU"),
        "mfu_at_clock": figure(
            0.523,
            "share",
            "modelled",
            "NVIDIA H200 data sheet, its peak times 1,755 MHz / 1,830 MHz",
            "MFU at the clock",
        ),
        "step_s": figure(0.00284, "s", "measured", "of 3,430 steps of the timed run", "a step, median")
        | {"spread": "nine in ten took 2.81 to 2.93 ms"},
        "of_ceiling": figure(0.628, "share", "measured", "FLOPs / (training x 790 TFLOP/s)", "of measured ceiling"),
        "v100": figure(3.967, "share", "measured", "FLOPs / (training x 125 TFLOP/s)", "V100-normalised"),
        "images_per_s": figure(179_856.0, "images/s", "measured", "images / training time", "images"),
        "test_accuracy": figure(0.9407, "share", "measured", "10,000 test images, n = 1", "test accuracy"),
        "perturbation": figure(1.034, "ratio", "measured", "profiled step / unprofiled step", "perturbation"),
        "energy_j": figure(5312.0, "J", "measured", "NVML energy counter", "energy"),
        "peak_memory": figure(6_442_450_944, "B", "measured", "torch's allocator", "peak memory"),
        "residual_share": figure(0.0038, "share", "measured", "residual / training", "residual"),
        "dram": figure(None, "B", "", "Nsight Compute may not read counters (ERR_NVGPUCTRPERM)", "DRAM traffic"),
    }
    report["kernels"] = [_kernel(*row) for row in sorted(KERNELS + SMALL, key=lambda r: -r[4] * r[5])]
    report["kernels"][0] |= {"dram_bytes": 210_000_000, "tensor_active": 0.62}
    report["layers"] = [_kernel(f"{r[1][12:]} {r[3]}", *r[1:]) for r in KERNELS if r[1].startswith("cifar::conv")]
    report["roofs"] = {
        "compute": [
            figure(7.9e14, "FLOP/s", "measured", "best sustained GEMM, fp16, 2 s hot", "measured, fp16"),
            figure(9.89e14, "FLOP/s", "quoted", "NVIDIA H200 data sheet, dense", "specification, fp16"),
        ],
        "bandwidth": [
            figure(4.3e12, "B/s", "measured", "copy, bytes read plus bytes written", "measured"),
            figure(4.8e12, "B/s", "quoted", "NVIDIA H200 data sheet", "specification"),
        ],
    }
    report["timeline"] = _timeline()
    return report


def cpu() -> dict[str, Any]:
    """A report of a run on a CPU: no telemetry, no specification, no layers, one thing lacking. Made up."""
    report = _common()
    for term in report["terms"]:
        term["ns"] *= 11
        term["recoverable_ns"] *= 11
    report["terms"] = [t for t in report["terms"] if t["key"] != "ceiling_gap"]
    report["terms"][0]["name"] = "ideal at the measured ceiling"
    report["title"] = f"laptop on two CPU cores ({MADE_UP})"
    report["headline"] = "Trained in 93.5 s on two cores, whose measured ceiling would allow 53.6 s."
    report["status"] = "incomplete"
    report["lacks"] = ["unknown kernels take 6.1 % of the training, more than 5 %", "trace incomplete: it ends early"]
    report["doubts"] = ["7.1% of training is unexplained, more than 5%"]
    report["run"] |= {
        "on_gpu": False,
        "device": "AMD EPYC 9B45",
        "dtype": "bfloat16",
        "preset": "laptop",
        "data_identity": "synthetic",
    }
    reason = "no NVIDIA driver"
    report["figures"] = {
        "train_s": figure(93.5, "s", "measured", "monotonic clock", "training"),
        "wall_s": figure(112.3, "s", "measured", "monotonic clock of the process", "process"),
        "flops": figure(3.61e13, "FLOP", "modelled", "FlopCounterMode on the meta device", "arithmetic"),
        "step_s": figure(None, "s", "", "the timed run's steps are not known", "a step, median") | {"spread": ""},
        "of_ceiling": figure(0.573, "share", "measured", "FLOPs / (training x ceiling)", "of measured ceiling"),
        "mfu": figure(None, "share", "", "no specification of this CPU is known", "MFU"),
        "test_accuracy": figure(0.8421, "share", "measured", "10,000 test images, n = 1", "test accuracy"),
        "energy_j": figure(None, "J", "", reason, "energy"),
    }
    report["kernels"] = [_kernel(*row, speed=2000) for row in KERNELS[:6]]
    report["layers"] = []
    report["roofs"] = {
        "compute": [figure(6.7e11, "FLOP/s", "measured", "best sustained GEMM, bf16", "measured, bf16")],
        "bandwidth": [figure(3.1e10, "B/s", "measured", "copy", "measured")],
    }
    report["timeline"] = {"phases": [], "samples": {}, "fields": {}, "unavailable": {}, "reason": reason}
    return report


def empty() -> dict[str, Any]:
    """Every key of a report, of which nothing is known."""
    rows = ("phases", "terms", "levers", "floors", "kernels", "layers", "epochs")
    report = cpu() | {key: [] for key in rows} | {"figures": {}, "roofs": {"compute": [], "bandwidth": []}}
    report["figures"] = {"train_s": figure(None, "s", "", "the run was killed", "training")}
    return report | {"article": report["article"] | {"terms": []}, "run": dict.fromkeys(report["run"])}


HOSTILE = (
    "</script><script>document.documentElement.dataset.hacked = 1</script>",
    '<img src=x onerror="document.documentElement.dataset.hacked = 2"><b>bold</b> & \'quoted\' "twice"',
    "<a href='javascript:document.documentElement.dataset.hacked=3'>link</a> %{x} $\\LaTeX$ var(--ink)",
    "NUL \0, escape \x1b[31m, separators \u2028\u2029, bidi \u202e\u2066, surrogate \ud800",
    "| pipe `tick` ``` fence\n# heading\n<details> [link](http://example.invalid) ![i](http://example.invalid/i) *b*",
    "<!-- <script> " + "very_long_name_" * 400,
    "{{ 7 * 7 }}{% raw %}]]>--><style>*{display:none}</style><link rel=stylesheet href=http://example.invalid/>",
)
HOSTILE_IDS = ("script", "image", "link", "control", "markdown", "comment", "template")


def hostile() -> dict[str, Any]:
    """`gpu()` with a hostile text in place of every string but units, statuses and bounds, clean as a report is."""
    number = 0

    def poison(value: Any, key: str) -> Any:
        nonlocal number
        if isinstance(value, dict):
            return {k: poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(item, key) for item in value]
        if isinstance(value, str) and key not in ("unit", "status", "bound", "key"):
            number += 1
            return HOSTILE[number % len(HOSTILE)]
        return value

    report = poison(copy.deepcopy(gpu()), "")
    fields = report["timeline"]["fields"]
    fields[HOSTILE[0]] = {"label": HOSTILE[1], "unit": HOSTILE[2]}
    report["timeline"]["samples"][HOSTILE[0]] = list(range(len(report["timeline"]["samples"]["t_s"])))
    report["environment"] |= {name: name for name in HOSTILE}
    report["figures"][HOSTILE[0]] = figure(1.0, HOSTILE[1], HOSTILE[2], HOSTILE[0], HOSTILE[1])
    return clean(report)


def _common() -> dict[str, Any]:
    terms, article = [], []
    total = sum(round(here * S) for _, _, here, _, _ in TERMS if here is not None)
    for key, name, here, there, share in TERMS:
        fixed = {"key": key, "name": name, "note": None, "what_if": "", "recoverable_ns": 0}
        if there is not None:
            there_ns = {"ns": round(there * S), "status": "modelled", "source": f"floors by passes ({MADE_UP})"}
            article.append(fixed | there_ns)
        if here is None:
            continue
        ns = round(here * S)
        term = fixed | {"ns": ns, "status": "measured", "source": f"torch.profiler, a pass of its own ({MADE_UP})"}
        if here * share > 0:
            left = total - ns
            term |= {
                "recoverable_ns": ns,
                "what_if": f"training takes {left / S:.4g} s, {total / left:.3g} times as fast",
            }
        if key == "idle":
            parts = {"launching kernels": 91, "waiting in a synchronisation": 22, "between queued kernels": 42}
            term["parts"] = [{"name": n, "ns": ms * 1_000_000} for n, ms in parts.items()]
        if here < 0:
            term["note"] = "negative: the model says more than was measured"
        terms.append(term)
    phases = [("import and set-up", 8.1), ("data", 1.9), ("warm-up", 9.2), ("training", 9.732), ("evaluation", 1.6)]
    phases += [("checkpoint and logs", 0.5), ("shutdown", 0.4)]
    source = f"{MADE_UP}"
    return {
        "version": 1,
        "title": "",
        "headline": "",
        "status": "complete",
        "doubts": [],
        "lacks": [],
        "no_levers": "",
        "run": {
            **{"preset": "fused", "data_identity": "official", "data_source": "data/", "device": "NVIDIA H200"},
            **{"dtype": "float16", "ops": "fused", "epochs": 35, "steps": 3430, "batch_size": 512, "seed": 0},
            **{"images": 1_750_000, "git_sha": "0123456789ab", "dirty": False, "date": "2026-01-01T00:00:00Z"},
            **{"status": "complete", "on_gpu": True},
        },
        "environment": {"torch": "2.13.0", "triton": "3.6.0", "driver": None, "cpu_count": 16, "note": MADE_UP},
        "figures": {},
        "phases": [{"name": n, "ns": round(s * S), "status": "measured", "source": source} for n, s in phases],
        "terms": terms,
        "article": {"title": "The article's V100, 256 s", "total_ns": sum(t["ns"] for t in article), "terms": article},
        "levers": [
            {"name": "fewer FLOPs", "factor": 1.0, "log": 0.0, "status": "modelled", "source": source},
            {"name": "better use", "factor": 3.32, "log": math.log(3.32), "status": "measured", "source": source},
            {"name": "more peak", "factor": 7.91, "log": math.log(7.91), "status": "quoted", "source": source},
        ],
        "floors": [
            {"name": "eager", "passes": 19, "ns": round(13.5 * S), "note": "each op reads and writes"},
            {"name": "torch.compile", "passes": 16, "ns": round(10.8 * S), "note": "14 if its reductions fuse"},
            {"name": "fused", "passes": 10, "ns": round(8.1 * S), "note": "these kernels"},
            {"name": "limit", "passes": 9, "ns": round(7.09 * S), "note": "everything in prologues"},
        ],
        "profiled": {"steps": 20, "refused": [], "said": "", "eager_step": 18, "fell_back": False},
        "epochs": [_epoch(e) for e in range(1, 36)],
        "sentences": [
            "Of 9.73 s, 4.87 s are arithmetic at the data sheet's peak; 1.23 s more is what the device cannot sustain.",
            "The largest part that can be recovered is the convolutions' inefficiency: 1.90 s, most of it in wgrad.",
            "Next: tiles for the 32x32 layers, where three kernels reach half of their roof; then batch norm.",
        ],
        "assumption": "Assumed: kernels take as long in the profiled pass as in the timed run.",
    }


def _kernel(
    name, op, category, shape, calls: int, us: float, gflop: float | None, mb: float, speed=1.0
) -> dict[str, Any]:
    """`speed` times slower than written."""
    seconds, flops, nbytes = us * 1e-6 * speed, None if gflop is None else gflop * 1e9, mb * 1e6
    at_roof = max((flops or 0) / 7.9e14, nbytes / 4.3e12) * speed
    return {
        "name": name,
        "op": op,
        "category": category,
        "shape": shape,
        "calls_per_step": calls,
        "ns_per_step": round(calls * seconds * S),
        "share": calls * us / 2837,
        "flops": flops,
        "bytes": nbytes,
        "flops_per_s": None if flops is None else flops / seconds,
        "bytes_per_s": nbytes / seconds,
        "intensity": None if flops is None else flops / nbytes,
        "bound": None if flops is None else "compute" if flops / nbytes > 184 else "memory",
        "roof_fraction": None if flops is None else min(at_roof / seconds, 1.1),
        "per_element": 1 if op == "aten::add_" else None,
        "status": "measured",
        "source": f"trace of 20 steps ({MADE_UP})",
    }


def _timeline() -> dict[str, Any]:
    """Thirty-one seconds, a sample every 25 ms."""
    times = [i * 0.025 for i in range(1256)]

    def busy(t: float) -> float:
        return 1.0 if 19.2 < t < 28.9 else 0.7 if 28.9 <= t < 30.5 else 0.3 if 12 < t <= 19.2 else 0.0

    def wobble(i: int) -> float:
        return math.sin(i * 12.9898) * math.cos(i * 4.1414)

    samples: dict[str, list[Any]] = {
        "t_s": times,
        "sm_clock_mhz": [1980 - 90 * busy(t) * abs(wobble(i)) if t > 10 else 345 for i, t in enumerate(times)],
        "memory_clock_mhz": [3201] * len(times),
        "power_w": [118 + 510 * busy(t) + 25 * wobble(i) for i, t in enumerate(times)],
        "temperature_c": [34 + 22 * min(max(t - 12, 0) / 16, 1) for t in times],
        "kernel_running": [min(busy(t) * 1.2, 1.0) for t in times],
        "sm_active": [busy(t) * (0.93 + 0.04 * wobble(i)) for i, t in enumerate(times)],
        "tensor_active": [busy(t) * (0.55 + 0.05 * wobble(i)) for i, t in enumerate(times)],
        "dram_active": [None if i % 97 == 0 else busy(t) * (0.48 + 0.06 * wobble(i)) for i, t in enumerate(times)],
        "reasons": [["power cap"] if 24 < t < 26 else [] for t in times],
    }
    clocks = {"sm_clock_mhz": "SM clock", "memory_clock_mhz": "memory clock"}
    shares = {"kernel_running": "some kernel ran", "sm_active": "SM active", "tensor_active": "tensor cores active"}
    fields = {
        **{key: {"label": label, "unit": "MHz"} for key, label in clocks.items()},
        "power_w": {"label": "power", "unit": "W"},
        "temperature_c": {"label": "temperature", "unit": "°C"},
        **{key: {"label": label, "unit": "share"} for key, label in (shares | {"dram_active": "DRAM active"}).items()},
        "reasons": {"label": "clock event reasons", "unit": ""},
    }
    names = [("import and set-up", 8.1), ("data", 10.0), ("warm-up", 19.2), ("training", 28.93), ("evaluation", 30.5)]
    ends = [0.0, *(end for _, end in names)]
    return {
        "phases": [{"name": n, "start_s": s, "end_s": e} for (n, e), s in zip(names, ends, strict=False)],
        "samples": samples,
        "fields": fields,
        "unavailable": {"memory_used_bytes": "the driver says NotSupported"},
        "reason": None,
    }


def _epoch(epoch: int) -> dict[str, Any]:
    loss = 1.6 * math.exp(-epoch / 7) + 0.03
    return {
        "epoch": epoch,
        "learning_rate": 0.4 * (1 - abs(epoch - 15) / 20),
        "epoch_train_s": 0.278,
        "train_loss": loss,
        "train_accuracy": 1 - loss / 3.2,
        "test_loss": loss + 0.17 + 0.05 * math.sin(epoch),
        "test_accuracy": 0.9407 - 0.55 * math.exp(-epoch / 6) + 0.01 * math.sin(epoch * 2) * (35 - epoch) / 35,
        "images_per_s": 179_856.0,
        "train_s": 0.278 * epoch,
    }
