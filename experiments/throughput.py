"""Images per second and peak memory of training on this machine's CPU, beside the loop a user would write.

    python -m experiments.throughput

Each measurement is a process of its own (the allocator's setting is process-wide, and so is the peak), and the two that
are compared take turns, ours-plain-plain-ours, so that a drift of the machine does not read as a gain.
`experiments.loops` has the two; arguments are checked before it imports torch.
"""

import argparse
import itertools
import json
import subprocess
import sys

from experiments.study.arguments import Parser, at_least
from profiling import ROOT
from profiling.output.terminal import Terminal

BATCH = 512


def child(case: str, steps: int) -> None:
    """Measure `case` in this process and print {images_per_s, peak_memory_bytes}."""
    import resource

    from experiments.loops import ours, plain

    ends = plain(steps) if case == "plain" else ours(case.split(), steps)
    batch = 256 if case.startswith("laptop") else BATCH
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    fastest = min(b - a for a, b in itertools.pairwise(ends))
    print(json.dumps({"images_per_s": batch / fastest, "peak_memory_bytes": peak}))


def measure(case: str, steps: int) -> dict[str, float]:
    """`child` in a fresh process."""
    command = [sys.executable, "-m", "experiments.throughput", "--case", case, "--steps", str(steps)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument(
        "--steps", type=at_least(2), default=4, help="steps per measurement; the fastest after the first counts"
    )
    arguments = parser.parse_args()
    if arguments.case:
        child(arguments.case, arguments.steps)
        return
    terminal, steps = Terminal(), arguments.steps
    article = "article-256"
    turns = [(case, measure(case, steps)) for case in (article, "plain", "plain", article)]
    speed = {case: [m["images_per_s"] for c, m in turns if c == case] for case in (article, "plain")}
    terminal.table(
        f"The article's network at batch {BATCH}, training on this CPU",
        ["", "images/s, each turn", "peak memory"],
        [
            [name, ", ".join(f"{v:.0f}" for v in speed[case]), f"{peak(turns, case) / 1e6:,.0f} MB"]
            for name, case in (("train.py", article), ("plain fp32 NCHW eager loop", "plain"))
        ],
    )
    ratios = [a / b for a, b in zip(speed[article], speed["plain"], strict=True)]
    terminal.say(
        f"train.py is {sum(ratios) / 2:.2f} times the plain loop's speed ({ratios[0]:.2f} and {ratios[1]:.2f})"
    )
    others = [("article-256 dtype=float32", "train.py, fp32"), ("laptop", "laptop")]
    rows = [(name, measure(case, steps)) for case, name in others]
    terminal.table(
        "Peak memory of the process",
        ["", "images/s", "peak memory"],
        [[name, f"{m['images_per_s']:,.0f}", f"{m['peak_memory_bytes'] / 1e6:,.0f} MB"] for name, m in rows],
    )


def peak(turns: list, case: str) -> float:
    """The larger of a case's peaks."""
    return max(m["peak_memory_bytes"] for c, m in turns if c == case)


if __name__ == "__main__":
    main()
