"""Good operands of every op, for what is asked of all ops alike: registration, compilation, refusals, FLOPs."""

import inspect

import torch
from checks import augment as augments
from checks import bn_apply as applies
from checks import bn_backward as backwards
from checks import conv_dgrad as dgrads
from checks import conv_fprop as fprops
from checks import conv_wgrad as wgrads
from checks import sgd as updates
from kernel_checks import channels_last

from kernels.augment import augment
from kernels.bn_apply import bn_apply
from kernels.bn_backward import bn_backward_apply, bn_backward_reduce, bn_coefficients
from kernels.bn_relu import bn_relu
from kernels.bn_stats import bn_finalize, bn_stats, bn_stats_add
from kernels.conv_dgrad import conv_dgrad
from kernels.conv_fprop import conv_fprop
from kernels.conv_shape import ConvShape
from kernels.conv_wgrad import conv_wgrad
from kernels.fused_conv_bn_relu import conv_bn_relu, conv_bn_relu_backward
from kernels.fused_preact import preact_block, preact_block_backward
from kernels.sgd import sgd

HALF, EPS = torch.float16, 1e-5
SHAPE = (2, 16, 4, 6)
LAYER = (2, ConvShape(16, 32, 4, 4))


def normal(*shape: int, device, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """channels_last; on the meta device without values."""
    if str(device) == "meta":
        return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
    return channels_last(*shape, dtype=dtype, seed=seed, device=device)


def of_bn_backward(device, pool: bool = True) -> tuple:
    return backwards.problem(SHAPE, pool, HALF, 0, device)


def of_bn_relu(device, pool: bool = True, constant: bool = False) -> tuple:
    x, _, gamma, residual, _ = applies.problem(SHAPE, pool, True, HALF, 0, device)
    return x, bn_stats(x), gamma, gamma + 1, EPS, constant, residual, pool


def of_conv_bn_relu(device, c: int = 16, k: int = 32, size: int = 4, pool: str | None = None) -> tuple:
    x, w = normal(2, c, size, size, device=device, dtype=HALF), normal(k, c, 3, 3, device=device, seed=1)
    pooled, ones = size if pool is None else size // 2, torch.ones(k, device=device)
    residual = normal(2, k, pooled, pooled, device=device, dtype=HALF, seed=2)
    return x, w, ones, ones.clone(), None, EPS, pool, residual, False


def of_conv_bn_relu_backward(device, pool: str | None = None) -> tuple:
    forward = of_conv_bn_relu(device, pool=pool)
    return *conv_bn_relu(*forward)[:1], forward[0], *conv_bn_relu(*forward)[1:], forward[1], pool, False, False


def of_preact_block(
    device, images: int = 2, c: int = 16, k: int = 16, size: int = 4, stride: int = 1, evaluation: bool = False
) -> tuple:
    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device=device)

    w1, w2, w3 = (normal(k, n, r, r, device=device, seed=r) for n, r in ((c, 3), (k, 3), (c, 1)))
    x, running = normal(images, c, size, size, device=device, dtype=HALF), ones(3, 1, k) if evaluation else None
    w3 = w3 if stride != 1 or c != k else None
    return x, ones(3, 1, c), ones(c), ones(c), w1, ones(k), ones(k), w2, w3, running, stride, EPS, EPS, False


def backward_of(forward: tuple, y, _, h, norm1, norm2, a, b) -> tuple:
    """Operands of `preact_block_backward`, from those of `preact_block` and its results."""
    x, *_, w1, _, _, w2, w3, _, stride, _, _, forced = forward
    return y, x, h, norm1, norm2, a, b, w1, w2, w3, stride, False, forced


def of_preact_block_backward(device, **options) -> tuple:
    forward = of_preact_block(device, **options)
    return backward_of(forward, *preact_block(*forward))


def of_conv(checks):
    def operands(device, case: str | tuple = LAYER, options: str = "all", dtype: torch.dtype = HALF) -> list:
        return checks.operands(case, options, dtype, device)

    return operands


MAKE = {
    augment: lambda device: (*augments.problem(4, 5, 4, 8, 8, 2, 2, device), HALF),
    bn_apply: lambda device: applies.problem(SHAPE, True, True, HALF, 0, device),
    bn_stats: lambda device: (normal(*SHAPE, device=device, dtype=HALF),),
    bn_stats_add: lambda device: [normal(*SHAPE, device=device, dtype=HALF, seed=seed) for seed in (0, 1)],
    bn_finalize: lambda device: (torch.ones(3, 2, 16, device=device), *torch.rand(2, 16).to(device), EPS),
    bn_backward_reduce: lambda device, pool=True: (*of_bn_backward(device, pool), pool),
    bn_coefficients: lambda device: (torch.rand(2, 3, 16).to(device), torch.ones(5, 16, device=device), 48.0),
    bn_backward_apply: lambda device, pool=True: (
        *of_bn_backward(device, pool),
        torch.ones(4, 16, device=device),
        pool,
    ),
    bn_relu: of_bn_relu,
    conv_fprop: of_conv(fprops),
    conv_dgrad: of_conv(dgrads),
    conv_wgrad: of_conv(wgrads),
    conv_bn_relu: of_conv_bn_relu,
    conv_bn_relu_backward: of_conv_bn_relu_backward,
    preact_block: of_preact_block,
    preact_block_backward: of_preact_block_backward,
    sgd: lambda device, momentum=0.9, copy=HALF: updates.problem(40, momentum, device, copy).values(),
}
OPS = {op._name: op for op in MAKE}


def operands(op: str, device, **options) -> dict[str, object]:
    """Operands of the op of this name, by their names; those with defaults may be missing at the end."""
    names = inspect.signature(OPS[op]._init_fn).parameters
    return dict(zip(names, MAKE[OPS[op]](device, **options), strict=False))
