"""Measurements in, report out: clocks, records, FLOPs, the account of seconds.

Six rooms on one stair: `report` reads `account`, which reads `run`, which reads `device`, which reads `output`; `bench`
stands beside `run` and `account`. Importing this package imports no other of its own.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: where children of every command start."""
