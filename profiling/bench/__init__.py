"""Benchmarks of every op at every layer's shape."""

OPS = (
    *("augment", "conv_fprop", "bn_stats", "bn_stats_add", "bn_finalize", "bn_apply", "bn_relu", "bn_backward_reduce"),
    *("bn_coefficients", "bn_backward_apply", "bn_backward", "conv_dgrad", "conv_wgrad"),
)
"""The ops of `profiling.bench.cases`, which imports torch: a typo is answered without it."""
