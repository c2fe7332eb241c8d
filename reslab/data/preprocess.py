"""Raw uint8 pixels -> what a net is fed. The same at training, test and prediction, and stored with the weights.

Importing this needs no torch, and neither does decoding images for an exported file, whose graph preprocesses by itself.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from reslab.errors import WorkError

if TYPE_CHECKING:
    from torch import Tensor, device

VIEWS = {"none": 1, "mirror": 2, "shifts": 6}  # that a classifier looks at of an image


@dataclass(frozen=True)
class Frame:
    """The square that images are decoded to, `canvas` pixels a side with 1 or 3 `channels`, and its middle that is used."""

    image_size: int
    canvas: int
    channels: int

    def __post_init__(self) -> None:
        """Raises WorkError: the numbers come from a stored model."""
        numbers = (self.image_size, self.canvas, self.channels)
        if not (all(type(n) is int for n in numbers) and 1 <= self.image_size <= self.canvas <= 8192 and self.channels in (1, 3)):
            raise WorkError(f"the preprocessing stored with the model is damaged: sizes {numbers} cannot be")


@dataclass(frozen=True)
class Preprocess(Frame):
    """Images are decoded to `canvas` pixels a side, and their middle `image_size` is used, as (x / 255 - mean) / std.

    `mean` holds one float32 a channel, or an image (C, H, W) of `image_size`; `std` one a channel. `tta`, test-time
    augmentation, is a row of VIEWS: a classifier also looks at the mirror image, and its logits are the mean of both; or at the
    image shifted by a pixel up and left, and down and right, too, which count half (Jordan 2024, 2404.00498, section 3.5).
    """

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    tta: str = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes = (self.channels,), (self.channels, self.image_size, self.image_size)
        if self.mean.shape not in shapes or self.std.shape != shapes[0] or self.tta not in VIEWS:
            raise WorkError("the preprocessing stored with the model is damaged: sizes do not agree")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.std).all() and (self.std > 0).all()):
            raise WorkError("the preprocessing stored with the model is damaged: mean and std must be finite, and std above 0")

    def unit(self, pixels: "Tensor", device: "device") -> "Tensor":
        """uint8 (N, H, W, C) -> float32 (N, C, H, W) in [0, 1], channels-last in memory."""
        return pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)

    def normalise(self, x: "Tensor") -> "Tensor":
        """[0, 1] -> zero mean, unit deviation. A mean image is resized where `x` has another size."""
        from torch import as_tensor
        from torch.nn.functional import interpolate

        mean, std = as_tensor(self.mean, device=x.device), as_tensor(self.std, device=x.device)
        if mean.ndim == 3 and mean.shape[1:] != x.shape[2:]:
            mean = interpolate(mean[None], x.shape[2:], mode="bilinear", align_corners=False)
        elif mean.ndim == 1 and x.stride(1) == 1:  # channels last: a row at a time, for three numbers are too few for a processor's vectors
            n, channels, height, width = x.shape
            rows = x.permute(0, 2, 3, 1).reshape(n, height, width * channels)
            return (rows - mean.repeat(width)).div_(std.repeat(width)).view(n, height, width, channels).permute(0, 3, 1, 2)
        elif mean.ndim == 1:
            mean = mean.view(1, -1, 1, 1)
        return (x - mean).div_(std.view(1, -1, 1, 1))

    def crop(self, x: "Tensor") -> "Tensor":
        """The middle `image_size` pixels."""
        offset = (x.shape[2] - self.image_size) // 2
        return x[:, :, offset : offset + self.image_size, offset : offset + self.image_size]

    def __call__(self, pixels: "Tensor", device: "device") -> "Tensor":
        """uint8 (N, canvas, canvas, C) -> float32 (N, C, image_size, image_size)."""
        return self.normalise(self.crop(self.unit(pixels, device)))

    def views(self, x: "Tensor") -> "Tensor":
        """What is looked at of prepared images (N, C, H, W): one view after the other, VIEWS times N."""
        from torch import cat
        from torch.nn.functional import pad

        if self.tta == "none":
            return x
        seen = [x]
        if self.tta == "shifts":
            height, width = x.shape[2:]
            wide = pad(x, (1, 1, 1, 1), mode="reflect")
            seen += [wide[:, :, :height, :width], wide[:, :, 2:, 2:]]
        return cat([view for image in seen for view in (image, image.flip(3))])

    def answer(self, logits: "Tensor") -> "Tensor":
        """The logits (N, classes) of images from those of their views."""
        if self.tta == "none":
            return logits
        seen = logits.view(VIEWS[self.tta] // 2, 2, -1, logits.shape[1]).mean(1)
        return seen[0] if self.tta == "mirror" else 0.5 * seen[0] + 0.5 * seen[1:].mean(0)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "image_size": self.image_size,
            "canvas": self.canvas,
            "channels": self.channels,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "tta": self.tta,
        }

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises WorkError for what cannot be."""
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite
                mean, std = (np.asarray(held[name], dtype=np.float32) for name in ("mean", "std"))
            tta = held.get("tta", "mirror" if held.get("mirror") else "none")  # as older models say it
            return cls(held["image_size"], held["canvas"], held["channels"], mean, std, tta)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise WorkError(f"the preprocessing stored with the model is damaged: {error!r}") from error
