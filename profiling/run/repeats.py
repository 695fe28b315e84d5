"""Several runs as one claim: n, mean, standard deviation, 95 % interval and the share that reached the target."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

SAME = ("preset", "data_identity", "data_source", "device", "world_size", "dtype", "ops", "ops_requested", "epochs")
"""What the summary of several runs has of the first of them."""
AVERAGED = ("train_s", "eval_s", "train_plus_eval_s", "warmup_s", "images_per_s")
"""What it has the means of."""


class Claim(NamedTuple):
    """`sd` and `interval` are None for a single value, which has neither; `share_at_target` is without a target."""

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
        **{key: _largest(s.get(key) for s in summaries) for key in ("peak_memory_bytes", "peak_reserved_bytes")},
        "git_sha": first["git_sha"],
    }


def unfit(summary: Any) -> str | None:
    """Why `aggregate` cannot take what was read as a run's summary; None where it can."""
    if not isinstance(summary, dict):
        return "not a record"
    for key in ("test_accuracy", *AVERAGED, "epochs", "world_size", "seed"):
        value, most = summary.get(key), 1 if key == "test_accuracy" else 1e300
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            return f"{key} is not a number from 0 to {most:g}"
    for key in ("peak_memory_bytes", "peak_reserved_bytes"):
        if not isinstance(summary.get(key), int | None):
            return f"{key} is not a whole number"
    for key in (*SAME, "git_sha"):
        if key not in summary or not isinstance(summary[key], str | int | None):
            return f"{key} is not a text or a number"
    return None


def _largest(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


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
