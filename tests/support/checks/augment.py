"""Operands of `augment`, the check that its mutants fail, and the mutants."""

import torch
from kernel_checks import Mutants

from kernels import augment as module
from kernels.augment import augment_reference


def problem(seed: int, n: int, batch: int, height: int, width: int, pad: int, cutout: int, device="cpu") -> tuple:
    """Arguments of `augment` up to the dtype, drawn from all that is legal; a function of the seed."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    highs = (2 * pad + 1, 2 * pad + 1, 2, height - cutout + 1, width - cutout + 1)
    choices = torch.stack([draw(high, n) for high in highs], dim=1).int()
    images = draw(256, n, height, width, 3).to(torch.uint8)
    mean, rstd = torch.rand(3, generator=generator) * 255, 1 / (1 + 64 * torch.rand(3, generator=generator))
    tensors = [t.to(device) for t in (images, draw(n, batch), choices, mean, rstd)]
    return (*tensors, pad, cutout)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def check(under_test, _device) -> None:
    for n, batch, height, width, pad, cutout in ((6, 5, 5, 7, 3, 2), (3, 2, 32, 32, 4, 8), (2, 3, 4, 4, 0, 0)):
        arguments = problem(0, n, batch, height, width, pad, cutout)
        ours = under_test.augment(*arguments, torch.float16)
        assert torch.equal(bits(ours), bits(augment_reference(*arguments, torch.float16)))


MUTANTS = {
    "dropped_mask_on_store": (", mask=mask)\n\n\n@torch", ")\n\n\n@torch"),
    "dropped_mask_on_load": ("mask=readable", "mask=legal"),
    "swapped_flip": ("tl.where(flip != 0, W - 1 - w, w)", "tl.where(flip == 0, W - 1 - w, w)"),
    "flip_after_the_crop": ("W - 1 - w, w) + dx - PAD", "W - 1 - (w + dx - PAD), w + dx - PAD)"),
    "crop_off_by_one": ("_reflect_index(h + dy - PAD, H)", "_reflect_index(h + dy - PAD + 1, H)"),
    "edge_repeated": ("2 * (SIZE - 1) - i, i)", "2 * (SIZE - 1) - i + 1, i)"),
    "rows_for_columns": ("choices_ptr + image * 5 + 1)", "choices_ptr + image * 5 + 0)"),
    "cutout_too_wide": ("(w < cut_x + CUTOUT)", "(w <= cut_x + CUTOUT)"),
    "cutout_forgotten": ("tl.where(inside, 0.0, out)", "out"),
    "channels_mixed": ("c, h, w = offs % 3,", "c, h, w = 2 - offs % 3,"),
    "wrong_image": ("image * (H * W * 3) + ((", "b * (H * W * 3) + (("),
}


def launch(changed) -> None:
    changed.augment(*problem(8, 3, 2, 32, 32, 4, 8), torch.float16)


ROWS = {"augment": Mutants(module, MUTANTS, check, launch)}
