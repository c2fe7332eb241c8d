"""Raw uint8 pixels -> what a net is fed. The same at training, test and prediction, and stored with the weights."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from reslab.errors import WorkError


@dataclass(frozen=True)
class Preprocess:
    """Images are decoded to `canvas` pixels a side, and their middle `image_size` is used, as (x / 255 - mean) / std.

    `mean` holds one number a channel, or an image (C, H, W) of `image_size`; `std` one a channel.
    """

    image_size: int
    canvas: int
    channels: int
    mean: Tensor
    std: Tensor

    def unit(self, pixels: Tensor, device: torch.device) -> Tensor:
        """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0, 1], channels-last in memory."""
        return pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)

    def normalise(self, x: Tensor) -> Tensor:
        """[0, 1] -> zero mean, unit deviation. A mean image is stretched where `x` is larger than it."""
        mean = self.mean.to(x.device)
        if mean.ndim == 3 and mean.shape[1:] != x.shape[2:]:
            mean = torch.nn.functional.interpolate(mean[None], x.shape[2:], mode="bilinear", align_corners=False)
        elif mean.ndim == 1:
            mean = mean.view(1, -1, 1, 1)
        return (x - mean) / self.std.to(x.device).view(1, -1, 1, 1)

    def crop(self, x: Tensor) -> Tensor:
        """The middle `image_size` pixels."""
        offset = (x.shape[2] - self.image_size) // 2
        return x[:, :, offset : offset + self.image_size, offset : offset + self.image_size]

    def __call__(self, pixels: Tensor, device: torch.device) -> Tensor:
        """uint8 (N, canvas, canvas, C) -> float32 (N, C, image_size, image_size)."""
        return self.normalise(self.crop(self.unit(pixels, device)))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "image_size": self.image_size,
            "canvas": self.canvas,
            "channels": self.channels,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises WorkError for what cannot be."""
        try:
            mean, std = torch.tensor(held["mean"], dtype=torch.float32), torch.tensor(held["std"], dtype=torch.float32)
            made = cls(int(held["image_size"]), int(held["canvas"]), int(held["channels"]), mean, std)
        except (KeyError, TypeError, ValueError) as error:
            raise WorkError(f"the preprocessing stored with the model is damaged: {error!r}") from error
        sized = mean.shape in ((made.channels,), (made.channels, made.image_size, made.image_size))
        if not (1 <= made.image_size <= made.canvas <= 8192 and made.channels in (1, 3) and sized and std.shape == (made.channels,)):
            raise WorkError("the preprocessing stored with the model is damaged: sizes do not agree")
        return made
