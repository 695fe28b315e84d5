"""Images per second of a training step run eagerly, compiled and captured, and how much of the time the GPU is idle.

    python -m experiments.step_modes --out FOLDER                 # batches 128, 512 and 2048 of what `train.py` trains
    python -m experiments.step_modes --batch 32 --modes eager --set widths=8,8,8,8    # a look, on a CPU

`experiments.step_speeds` measures them; arguments are checked before it imports torch.
"""

import dataclasses
from argparse import Namespace
from pathlib import Path

from experiments.study.arguments import Parser, at_least
from experiments.study.folder import Request
from model.errors import RunError, UsageError
from model.presets import preset

MODES = ("eager", "compiled", "captured")
VARIED = {"batch_size": "--batch", "step": "--modes"}
"""Settings, and the options that list their values."""


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--preset", help="what to train; default: fused on a GPU, laptop on a CPU")
    parser.add_argument("--batch", type=at_least(1), nargs="+", default=[128, 512, 2048])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=at_least(1), default=20, help="steps of one sample")
    parser.add_argument("--quick", action="store_true", help="few samples: a look, not a measurement to quote")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as train.py's")
    parser.add_argument("--data-dir", type=Path, help="default: generated images, which take the same time")
    parser.add_argument("--out", type=Path, help="a folder for step_modes.json")
    arguments = parser.parse_args()
    try:
        check(arguments)
    except UsageError as error:
        parser.fail(str(error))
    from experiments.step_speeds import report
    from profiling.output.terminal import Terminal

    terminal = Terminal()
    try:
        report(arguments, terminal)
    except RunError as error:
        terminal.error(str(error))
        raise SystemExit(error.exit_code) from None


def check(arguments: Namespace) -> None:
    """Raise UsageError for what cannot be measured, as far as that is known without torch."""
    Request(out=arguments.out)
    config = preset(arguments.preset or "laptop").with_settings(arguments.set)
    for batch in arguments.batch:
        dataclasses.replace(config, batch_size=batch)
    for setting in arguments.set:
        key = setting.partition("=")[0].strip().replace("-", "_")
        if key in VARIED:
            raise UsageError(f"--set {key} is what this measures several of; give {VARIED[key]} instead")


if __name__ == "__main__":
    main()
