"""Random numbers of training: pure functions of (seed, epoch, image index), so no generator has a state to keep.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) turns a counter and a key into
four 32-bit words. The counter is (image, epoch, stream, 0), the key is the seed. Nothing drifts with batch size, rank
count, the device, or a resumed run.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_CROP, _ORDER = 0, 1  # streams


def philox(counter: tuple, key: tuple[int, int]) -> tuple:
    """Four words in 0..2**32-1 from a counter of four and a key of two. Words are Python ints or int64 tensors.

    An int64 product wraps modulo 2**64, which keeps all the bits that the shift and the masks below look at.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


class Augmentation(NamedTuple):
    """The random choices: crops of an image padded by `crop_pad`, flips, and the corner of a cutout square."""

    crop_pad: int
    flip: str  # "random", "alternating" (each image both ways round in any two epochs) or "none"
    cutout: int

    def choose(self, seed: int, epoch: int, image: int | Tensor) -> tuple:
        """(dy, dx, flip, cut_y, cut_x) of one image (ints) or of many (int64 tensors of `image`'s shape)."""
        key = (seed & _MASK, seed >> 32)
        w0, w1, w2, w3 = philox((image, epoch, _CROP, 0), key)
        flip = w0 & 1
        if self.flip == "alternating":
            flip = (philox((image, 0, _CROP, 0), key)[0] + epoch) & 1
        elif self.flip == "none":
            flip = flip * 0
        positions, corners = 2 * self.crop_pad + 1, 33 - self.cutout
        # The high bits of a 32-bit word times n, shifted down: uniform in 0..n-1 to one part in 2**26
        return (w0 * positions) >> 32, (w1 * positions) >> 32, flip, (w2 * corners) >> 32, (w3 * corners) >> 32


def draw_choices(what: Augmentation, seed: int, epoch: int, images: int, device: torch.device | str = "cpu") -> Tensor:
    """int32 [images, 5], a row (dy, dx, flip, cut_y, cut_x) per image of the dataset, drawn on `device`."""
    return torch.stack(what.choose(seed, epoch, torch.arange(images, device=device)), dim=1).int()


def draw_order(seed: int, epoch: int, images: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [images], the order in which an epoch visits the images: the same on every device."""
    w0, w1, _, _ = philox((torch.arange(images, device=device), epoch, _ORDER, 0), (seed & _MASK, seed >> 32))
    return torch.argsort((w0 << 32) ^ w1, stable=True)
