"""Measurements in, report out: clocks, records, FLOPs, the account of seconds.

Importing this package imports nothing else.
"""
