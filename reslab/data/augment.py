"""Augmentation of whole batches, on the device the batch is on. Images are float NCHW, normalised: zero is the mean colour.

Every random choice is drawn on the CPU from the given generator, so that a seed means the same on every device.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from reslab.errors import needs_extra


def pad_crop(x: Tensor, pad: int, generator: Generator, reflect: bool = False) -> Tensor:
    """Each image shifted by up to `pad` pixels in each direction; zeros come in (He et al. 2015, section 4.2), or its own mirror image."""
    h, w = x.shape[2:]
    top, left = torch.randint(0, 2 * pad + 1, (2, len(x)), generator=generator).to(x.device)
    windows = F.pad(x, (pad, pad, pad, pad), mode="reflect" if reflect else "constant").unfold(2, h, 1).unfold(3, w, 1)  # a view: every shift of every image
    return windows[torch.arange(len(x), device=x.device), :, top, left]


def flip(x: Tensor, mirrored: Tensor, across: int = 3) -> Tensor:
    """A copy in which the images for which `mirrored` (N, bool) holds run right to left; columns lie along dimension `across`."""
    which = mirrored.nonzero()[:, 0].to(x.device)
    return x.index_copy(0, which, x[which].flip(across))


def cutout(x: Tensor, size: int, generator: Generator) -> Tensor:
    """A square of `size` pixels in each image set to zero, centred anywhere (DeVries & Taylor 2017, 1708.04552)."""
    n, _, h, w = x.shape
    y = torch.randint(0, h, (n, 1, 1, 1), generator=generator).to(x.device) - size // 2
    c = torch.randint(0, w, (n, 1, 1, 1), generator=generator).to(x.device) - size // 2
    rows = torch.arange(h, device=x.device).view(1, 1, h, 1)
    columns = torch.arange(w, device=x.device).view(1, 1, 1, w)
    inside = (rows >= y) & (rows < y + size) & (columns >= c) & (columns < c + size)
    return x.masked_fill(inside, 0)


def mixup(x: Tensor, targets: Tensor, alpha: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Each image and its target blended with another's, one Beta(alpha, alpha) share a batch (Zhang et al. 2017, 1710.09412)."""
    share = _beta(alpha, generator)
    other = torch.randperm(len(x), generator=generator).to(x.device)
    return share * x + (1 - share) * x[other], share * targets + (1 - share) * targets[other]


def cutmix(x: Tensor, targets: Tensor, alpha: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """A box of each image replaced by another's, targets blended by its area (Yun et al. 2019, 1905.04899)."""
    h, w = x.shape[2:]
    side = (1 - _beta(alpha, generator)) ** 0.5
    y, c = (int(torch.randint(0, n, (1,), generator=generator)) for n in (h, w))
    top, bottom = max(0, round(y - side * h / 2)), min(h, round(y + side * h / 2))
    left, right = max(0, round(c - side * w / 2)), min(w, round(c + side * w / 2))
    other = torch.randperm(len(x), generator=generator).to(x.device)
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[other, :, top:bottom, left:right]
    share = 1 - (bottom - top) * (right - left) / (h * w)
    return mixed, share * targets + (1 - share) * targets[other]


def _beta(alpha: float, generator: Generator) -> float:
    """One draw of Beta(alpha, alpha). torch.distributions takes no generator, so numpy draws from a seed of ours."""
    import numpy as np

    seed = int(torch.randint(0, 2**63 - 1, (1,), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))


# Principal components of ImageNet's RGB values in [0, 1]: Krizhevsky et al. 2012, section 4.1; numbers as fb.resnet.torch
LIGHTING_VALUES = (0.2175, 0.0188, 0.0045)
LIGHTING_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def lighting(x: Tensor, deviation: float, std: Tensor, generator: Generator) -> Tensor:
    """Each colour image shifted along the principal components of natural colours (Krizhevsky et al. 2012, section 4.1).

    `std` is what the images were divided by. Greyscale images are returned as they are.
    """
    if x.shape[1] != 3:
        return x
    amounts = torch.randn(len(x), 3, generator=generator) * deviation * torch.tensor(LIGHTING_VALUES)
    shift = (amounts @ torch.tensor(LIGHTING_VECTORS).T).to(x.device) / std
    return x + shift.view(-1, 3, 1, 1)


LUMA = (0.299, 0.587, 0.114)
TO_YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))  # FCC, NTSC


def jitter(x: Tensor, strength: float, generator: Generator) -> Tensor:
    """Brightness, contrast and saturation changed by up to `strength`, hue turned by up to a quarter of it, of images in [0, 1].

    In this order, as one 3x3 matrix and a shift for each image, and clipped once; hue is turned about the grey axis of YIQ.
    Greyscale images get brightness and contrast.
    """
    n, channels = x.shape[:2]
    bright, contrast, saturation = (1 + strength * (2 * torch.rand(3, n, 1, 1, generator=generator) - 1)).clamp(min=0)
    turn = 2 * math.pi * strength / 4 * (2 * torch.rand(n, generator=generator) - 1)
    if channels == 1:
        luma, colours = torch.ones(1, 1), torch.ones(n, 1, 1)
    else:
        luma = torch.tensor([LUMA])
        grey = torch.ones(3, 1) @ luma  # what saturation moves colours away from
        colours = _turned(turn) @ (grey + saturation * (torch.eye(3) - grey))
    height, width = x.shape[2:]
    flat = x.permute(0, 2, 3, 1).reshape(n, -1, channels)  # a view of what is channels last
    mean = (flat.mean(1, keepdim=True) @ luma.mT.to(x.device)) * bright.to(x.device)
    out = torch.bmm(flat, (bright * contrast * colours).mT.to(x.device)).view(n, height, width * channels)
    shift = ((1 - contrast).to(x.device) * mean).expand(n, 1, channels).repeat(1, 1, width)  # a row, which is quicker to add than a pixel
    return out.add_(shift).clamp_(0, 1).view(n, height, width, channels).permute(0, 3, 1, 2)


def _turned(angle: Tensor) -> Tensor:
    """Matrices (N, 3, 3) that turn the hue of RGB by angles (N), in radians; grey and luma stay."""
    yiq, sine, cosine = torch.tensor(TO_YIQ), angle.sin(), angle.cos()
    turn = torch.eye(3).repeat(len(angle), 1, 1)
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cosine, -sine, sine, cosine
    turned: Tensor = torch.linalg.inv(yiq) @ turn @ yiq
    return turned


def randaugment(x: Tensor, operations: int, generator: Generator) -> Tensor:
    """That many of RandAugment's operations for each image, on images in [0, 1] (Cubuk et al. 2020, 1909.13719), as kornia has them.

    kornia itself would give all images the same ones. Raises WorkError when the extra `aug` is not installed.
    """
    channels, every = x.shape[1], _operations()
    drawn = torch.rand(len(x), len(every), generator=generator).argsort(dim=1)[:, :operations]
    x = x.clone() if channels == 3 else x.repeat(1, 3, 1, 1)
    with torch.random.fork_rng(devices=[]):  # kornia draws from the global generator
        torch.manual_seed(int(torch.randint(0, 2**63 - 1, (1,), generator=generator)))
        for turn in drawn.unbind(1):
            for number, operation in enumerate(every):
                which = (turn == number).nonzero()[:, 0].to(x.device)
                if len(which):
                    x[which] = operation(x[which])
    return x[:, :channels].clamp(0, 1)


@cache
def _operations() -> list[Callable[[Tensor], Tensor]]:
    """Each as an augmentation of its own, at a third of its largest strength and with a sign of its own for each image."""
    auto = require_kornia().auto
    return [auto.RandAugment(n=1, m=10, policy=[one]) for one in auto.rand_augment.rand_augment.default_policy]


def require_kornia() -> Any:
    """kornia's augmentations. Raises WorkError when the extra `aug` is not installed."""
    try:
        import kornia.augmentation
    except ImportError as error:
        raise needs_extra("kornia", "aug") from error
    return kornia.augmentation
