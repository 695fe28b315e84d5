"""The learning problem: data, network, optimiser, one training step, checkpoints.

Importing this package imports nothing else, so that the command line can check its arguments before torch is loaded.
"""
