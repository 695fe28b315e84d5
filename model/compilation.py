"""Compile a network's kernels in parallel, by running its blocks side by side before the first step needs them."""

import contextlib
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only


def compile_kernels(network: nn.Module, reference: nn.Module, x: Tensor) -> None:
    """Run each different block of `network` forward and backward, in a thread of its own, on zeros.

    `reference` is the same network on the meta device, in any ops that run there; it says what the blocks are given for
    the images x. Triton compiles outside of Python's lock, and assembles in another process, so that threads suffice.
    Running statistics change. A kernel that fails is left for the step that needs it, which says so.
    """
    calls = _block_calls(reference, x)

    def run(name: str) -> None:
        # Backward too in this thread: the engine's own, of which a device has one, would compile one after another.
        with contextlib.suppress(Exception), _device(x), torch.autograd.set_multithreading_enabled(False):
            block = network.get_submodule(name)
            args, kwargs = tree_map_only(Tensor, lambda t: _zeros(t, x), calls[name])
            y = tree_leaves(block(*args, **kwargs))[0]
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            torch.autograd.grad(y.float().sum(), [*inputs, *block.parameters()])

    first, *others = calls
    run(first)  # what all blocks share is compiled once
    threads = ThreadPoolExecutor()
    try:
        list(threads.map(run, others))
    finally:
        threads.shutdown(cancel_futures=True)


def _block_calls(reference: nn.Module, x: Tensor) -> dict[str, tuple]:
    """(args, kwargs) of each block, on the meta device, by its name; blocks that would compile the same occur once."""
    calls: dict[str, tuple] = {}
    seen: set[str] = set()

    def remember(name: str):
        def hook(block: nn.Module, args: tuple, kwargs: dict) -> None:
            shapes = tree_map_only(Tensor, lambda t: t.shape, (args, kwargs))
            own = {k: v for k, v in vars(block).items() if isinstance(v, int | str | None)}
            kind = f"{shapes} {[p.shape for p in block.parameters()]} {own}"
            if kind not in seen:
                seen.add(kind)
                calls[name] = args, kwargs

        return hook

    for name, module in reference.named_modules():
        if hasattr(module, "op"):
            module.register_forward_pre_hook(remember(name), with_kwargs=True)
    reference(x.to("meta"))
    return calls


def _zeros(like: Tensor, x: Tensor) -> Tensor:
    zeros = torch.zeros(like.shape, dtype=x.dtype, device=x.device)
    return zeros.contiguous(memory_format=torch.channels_last).requires_grad_()


def _device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
