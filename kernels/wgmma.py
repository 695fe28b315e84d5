"""Rules that a Hopper GPU's matrix instructions set for the code around them.

wgmma runs on while the warps go on, and reads a first operand in registers as it comes to it. ptxas before 13.3, which
Triton up to 3.8 brings for compute capability 9.0, hands the registers out again too early, so that a later operand may
be multiplied in an earlier one's place, without a word (triton-lang/triton#9433; #11781 has 61 for 64 on an H100). So a
loop with such products waits for them at the end of each step. Another program of the multiprocessor is to multiply
meanwhile.
"""

from torch import Tensor

from kernels import tiles
from kernels.jit import tl, triton


def must_wait(x: Tensor) -> bool:
    """Whether a loop on x's device must wait for products whose first operand is in registers."""
    capability = tiles.gpu_of(x.device).capability
    return capability is not None and capability[0] == 9


@triton.jit
def wait_for_product(acc):
    """acc, fp32, when its product is done: to read it, be it by no instruction at all, Triton waits."""
    return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def halves_of_columns(tile):
    """The first and the second half of a tile's columns, where they are: in registers.

    An accumulator of 128x128 takes 128 of a thread's 255. An epilogue that loads another tile to add takes halves.
    """
    return tl.split(tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1))
