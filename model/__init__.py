"""The learning problem: data, network, optimiser, one training step, checkpoints.

Importing this package imports nothing else, so that the command line can check its arguments before torch is loaded.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: where children of a run start."""
