"""Tensors in, tensors out: the operations that training consists of, each beside its PyTorch reference.

The layout is fixed here, once. Activations are logical NCHW and channels_last in memory (so NHWC); weights are logical
KCRS and channels_last (so KRSC). Activations are fp16 (bf16 or fp32 on a CPU); accumulation, statistics and master
weights are fp32. The names are CUTLASS's: x[N,H,W,C], w[K,R,S,C], y[N,P,Q,K]; fprop, dgrad, wgrad; dx, dw, dy.

A network is given its `ops` once, at the constructor, and calls nothing else: an implementation has `stem`,
`preact_block` and `conv_bn_relu` with the signatures of `kernels.reference`, and `augment` and `sgd` for what comes
before and after a network. There are four, each tested against the one before: `reference` (PyTorch alone),
`batchnorm` (library convolutions, our batch norm), `composed` (our ops, glued by autograd) and `fused` (one op a block,
backward by hand).
"""
