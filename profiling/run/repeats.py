"""Several runs as one claim: n, mean, standard deviation, 95 % interval and the share that reached the target."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from profiling.output.forms import COUNT, NUMBER, SHARE, Number, fit

SAME = ("preset", "data_identity", "data_source", "device", "world_size", "dtype", "ops", "ops_requested", "epochs")
"""Entries that the summary of several runs takes from the first run."""
AVERAGED = ("train_s", "eval_s", "train_plus_eval_s", "warmup_s", "images_per_s")
"""Entries that it averages."""

MEMORY = ("peak_memory_bytes", "peak_reserved_bytes")
_FORM = {
    "test_accuracy": SHARE,
    **dict.fromkeys((*AVERAGED, "epochs", "world_size", "seed"), Number(0, 1e300)),
    **{f"{key}?": COUNT for key in MEMORY},
    **dict.fromkeys((*(key for key in SAME if key not in ("epochs", "world_size")), "git_sha"), (str, NUMBER, None)),
}
"""The entries of a run's summary that `aggregate` reads."""


class Claim(NamedTuple):
    """`sd` and `interval` are None for a single value, `share_at_target` without a target."""

    n: int
    mean: float
    sd: float | None
    interval: tuple[float, float] | None
    share_at_target: float | None


def claim(values: Sequence[float], target: float | None) -> Claim:
    """Summarise at least one value in 0..1; raises ValueError for none.

    The interval is Student's, two-sided, for the mean, as far as it is of possible means.
    """
    if not values:
        raise ValueError("no values to summarise; expected at least one")
    n, mean = len(values), statistics.fmean(values)
    share = None if target is None else sum(v >= target for v in values) / n
    if n == 1:
        return Claim(n, mean, None, None, share)
    sd = statistics.stdev(values)
    half = t_quantile(n - 1) * sd / math.sqrt(n)
    return Claim(n, mean, sd, (max(mean - half, 0.0), min(mean + half, 1.0)), share)


def aggregate(
    summaries: Sequence[dict[str, Any]], requested: int, target: float | None, required: bool, wall_s: float
) -> dict[str, Any]:
    """One summary.json for several runs: times are means, memory is the largest, the accuracy comes with its spread.

    With fewer than `requested` the status is "unfinished" and there is no `exit_code` yet. Where the target is
    `required` and the mean is below it, `exit_code` is 7.
    """
    first = summaries[0]
    accuracy = claim([s["test_accuracy"] for s in summaries], target)
    status, code = ("target missed", 7) if required and accuracy.mean < target else ("complete", 0)
    if accuracy.n < requested:
        status, code = "unfinished", None
    return {
        "status": status,
        "exit_code": code,
        **{key: first[key] for key in SAME},
        "seeds": [s["seed"] for s in summaries],
        "runs": accuracy.n,
        "runs_requested": requested,
        "target_accuracy": target,
        "share_at_target": accuracy.share_at_target,
        "test_accuracy": accuracy.mean,
        "test_accuracy_sd": accuracy.sd,
        "test_accuracy_low": accuracy.interval and accuracy.interval[0],
        "test_accuracy_high": accuracy.interval and accuracy.interval[1],
        **{key: statistics.fmean(s[key] for s in summaries) for key in AVERAGED},
        "wall_s": wall_s,
        **{key: max((s[key] for s in summaries if s.get(key) is not None), default=None) for key in MEMORY},
        "git_sha": first["git_sha"],
    }


def unfit(summary: Any) -> str | None:
    """Why `aggregate` cannot take what was read as a run's summary; None where it can."""
    try:
        fit(summary, _FORM, "summary")
    except ValueError as error:
        return str(error)
    return None


def claim_in_words(summary: dict[str, Any]) -> str:
    """The aggregate's claim as a sentence."""
    s = summary
    spread = ""
    if s["test_accuracy_sd"] is not None:
        spread = f", standard deviation {s['test_accuracy_sd']:.2%}, 95 % interval of the mean "
        spread += f"{s['test_accuracy_low']:.2%} to {s['test_accuracy_high']:.2%}"
    reached = ""
    if s["target_accuracy"] is not None:
        reached = f"; {s['share_at_target']:.0%} of the runs at or above {s['target_accuracy']:.0%}"
    return f"n = {s['runs']}: mean test accuracy {s['test_accuracy']:.2%}{spread}{reached} ({s['data_identity']} data)"


def t_quantile(dof: int, confidence: float = 0.95) -> float:
    """The t with P(|T| <= t) = confidence, T Student-distributed with `dof` degrees of freedom, by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, dof) < confidence else (low, middle)
    return low


def _t_inside(t: float, dof: int) -> float:
    """P(|T| <= t), by the finite sums of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    theta = math.atan(t / math.sqrt(dof))
    cosine = math.cos(theta)
    term, total = (cosine if dof % 2 else 1.0), 0.0
    for k in range(dof // 2 if dof % 2 == 0 else (dof - 1) // 2):
        total += term
        term *= cosine**2 * ((2 * k + 2) / (2 * k + 3) if dof % 2 else (2 * k + 1) / (2 * k + 2))
    if dof % 2:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total
