"""Runs whose reports tests draw, and hostile words for their names. EVERY NUMBER IS MADE UP, measured on no device."""

import shutil
from collections.abc import Iterator
from typing import Any

from made_run import change, make_run, sampled

from profiling.output.files import write_json
from profiling.output.forms import clean


def whole_run(folder):
    """A complete run on an H200, with all that a run can leave behind."""
    make_run(folder)
    change(folder / "environment.json", cores=16, date="2026-01-01")
    fields = {"memory_clock_mhz": 3201, "power_w": 612.5, "temperature_c": 56, "kernel_running": 1.0}
    sampled(folder, 1464, **fields, sm_active=0.93, tensor_active=0.55)
    (folder / "records" / "ncu.csv").write_text(
        '"ID","Kernel Name","dram__bytes.sum","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed"\n'
        '"","","byte","%"\n'
        '"0","sm90_xmma_fprop_implicit_gemm_f16f16","200000000","60"\n'
        '"1","sm90_xmma_fprop_implicit_gemm_f16f16","220000000","64"\n'
    )
    return folder


def bare_run(folder):
    """A run on a CPU of which a summary was left, and an empty folder of records."""
    make_run(folder)
    shutil.rmtree(folder / "records")
    (folder / "records").mkdir()
    (folder / "log.jsonl").unlink()
    write_json(folder / "environment.json", {"gpu": None, "cores": 2, "threads": 2})
    lost = dict.fromkeys(["test_accuracy", "train_plus_eval_s", "wall_s", "images_per_s", "peak_memory_bytes"])
    change(folder / "summary.json", device="AMD EPYC 9B45", dtype="bfloat16", data_identity="synthetic", **lost)
    return folder


HOSTILE = {
    "script": "</script><script>document.documentElement.dataset.hacked = 1</script>",
    "image": '<img src=x onerror="document.documentElement.dataset.hacked = 2"><b>bold</b> & \'quoted\' "twice"',
    "link": "<a href='javascript:document.documentElement.dataset.hacked=3'>link</a> %{x} $\\LaTeX$ var(--ink)",
    "control": "NUL \0, escape \x1b[31m, separators \u2028\u2029, bidi \u202e\u2066, surrogate \ud800",
    "markdown": "| pipe `tick` ``` fence\n# heading\n<details> [link](http://a.invalid) ![i](http://a.invalid/i) *b*",
    "comment": "<!-- <script> " + "very_long_name_" * 400,
    "template": "{{ 7 * 7 }}{% raw %}]]>--><style>*{display:none}</style><link rel=stylesheet href=http://a.invalid/>",
}


def hostile(report: dict[str, Any]) -> dict[str, Any]:
    """The report with a hostile text in place of every string but units, statuses and keys; clean, as a report is."""
    words = list(HOSTILE.values())
    count = 0

    def poison(value: Any, key: str) -> Any:
        nonlocal count
        if isinstance(value, dict):
            return {k: poison(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(item, key) for item in value]
        if isinstance(value, str) and key not in ("unit", "status", "bound", "key"):
            count += 1
            return words[count % len(words)]
        return value

    poisoned = poison(report, "")
    poisoned["environment"] |= {word: word for word in words}
    return clean(poisoned)


def strings(value: Any) -> Iterator[str]:
    """Every text in a nested value, but for keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)
