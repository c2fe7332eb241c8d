"""Random boxes of images: drawn for a whole epoch at once, so that who decodes an image also cuts it.

A box is (left, top, width, height) as shares of the image's middle square.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from reslab.data.decode import Pixels

Boxes = NDArray[np.float32]
Range = tuple[float, float]


class Crops(NamedTuple):
    """What an epoch cuts out: a box for each image in the order of its batches, float32 (n, 4), and the pixels a side of the batch of each number."""

    boxes: Boxes
    size: Callable[[int], int]


def resized(n: int, generator: Generator, scale: Range = (0.35, 1.0), ratio: Range = (3 / 4, 4 / 3)) -> Boxes:
    """Boxes with `scale` of the area, `ratio` wide to high (Szegedy et al. 2014). What would not fit is narrowed until it does."""
    area = torch.empty(n).uniform_(*scale, generator=generator)
    aspect = torch.empty(n).uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=generator).exp()
    return _placed((area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1), generator)


def scaled(n: int, generator: Generator, size: int = 224, shortest: tuple[int, int] = (256, 480)) -> Boxes:
    """A square of `size` where the short side is scaled to a whole number in `shortest` (He et al. 2015, section 3.4)."""
    side = size / torch.randint(shortest[0], shortest[1] + 1, (n,), generator=generator)
    return _placed(side, side, generator)


def least_side(box: Boxes, size: int) -> int:
    """Pixels that the square must have on a side for the box to be `size` pixels at its shortest."""
    return math.ceil(size / min(float(box[2]), float(box[3])))


def cut(square: Pixels, box: Boxes, size: int) -> Tensor:
    """The box of a square uint8 (S, S, C), resized with an antialiased bilinear filter: uint8 (size, size, C)."""
    left, top, width, height = (round(float(share) * len(square)) for share in box)
    width, height = max(1, width), max(1, height)
    left, top = min(left, len(square) - width), min(top, len(square) - height)
    part = torch.from_numpy(square[None, top : top + height, left : left + width].copy())
    return interpolate(part.permute(0, 3, 1, 2), size=(size, size), mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def _placed(width: Tensor, height: Tensor, generator: Generator) -> Boxes:
    left = torch.rand(len(width), generator=generator) * (1 - width)
    top = torch.rand(len(width), generator=generator) * (1 - height)
    boxes: Boxes = torch.stack([left, top, width, height], dim=1).numpy()
    return boxes
