"""A heat map drawn over the image it explains, where it lies in it, at whatever resolution the image has."""

import base64
import io
from functools import cache

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reslab.data.preprocess import Frame

COLOURS = "inferno"  # perceptually uniform, dark to bright
OPACITY = (0.25, 0.75)  # of no heat and of the most: the image stays visible everywhere
UNSEEN = 0.55  # how dark the part is that the net does not look at


def overlay(image: Image.Image, heat: NDArray[np.float32], preprocess: Frame) -> Image.Image:
    """An RGB image with `heat`, float32 (canvas, canvas) in [0, 1], over the part that the net sees; the rest is darkened.

    All work is on 8-bit pixels, a few copies of the image: one of 80 megapixels needs about 1 GiB.
    """
    box = seen_box(*image.size, preprocess)
    start, size = (preprocess.canvas - preprocess.image_size) // 2, preprocess.image_size
    seen = np.rint(255 * heat[start : start + size, start : start + size]).astype(np.uint8)
    grain = Image.fromarray(seen).resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC)
    low, high = OPACITY
    opacity = grain.point([round(255 * low + (high - low) * v) for v in range(256)])
    grain.putpalette(_palette())
    drawn = image.copy()
    for strip in _around(box, image.size):
        drawn.paste((0, 0, 0), strip, Image.new("L", (strip[2] - strip[0], strip[3] - strip[1]), round(255 * UNSEEN)))
    drawn.paste(grain.convert("RGB"), box, opacity)
    return drawn


def seen_box(width: int, height: int, preprocess: Frame) -> tuple[int, int, int, int]:
    """(left, top, right, bottom): the pixels of an image of that size that reach the net, the middle of its middle square."""
    short = min(width, height)
    side = short * preprocess.image_size / preprocess.canvas
    start = short * ((preprocess.canvas - preprocess.image_size) // 2) / preprocess.canvas
    left, top = round((width - short) / 2 + start), round((height - short) / 2 + start)
    length = max(1, round(side))
    return left, top, min(width, left + length), min(height, top + length)


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The image with its long side `side` pixels: smooth when it shrinks; grown, each of its pixels stays a square."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST, reducing_gap=3.0 if scale < 1 else None)


def png(image: Image.Image) -> bytes:
    """The content of a PNG file, packed lightly: photos at full resolution would take seconds."""
    held = io.BytesIO()
    image.save(held, "PNG", compress_level=3)
    return held.getvalue()


def data_uri(image: Image.Image) -> str:
    """For a page that needs no files beside it: JPEG, as these are pictures to look at."""
    held = io.BytesIO()
    image.save(held, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def scale() -> list[str]:
    """The colours from no heat to the most, as CSS, for a legend."""
    return ["#{:02x}{:02x}{:02x}".format(*_palette()[3 * v : 3 * v + 3]) for v in range(0, 256, 51)]


@cache
def _palette() -> list[int]:
    return [int(v) for v in np.rint(255 * matplotlib.colormaps[COLOURS](np.arange(256))[:, :3]).flatten()]


def _around(box: tuple[int, int, int, int], size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """The four strips of an image around a box, those that are not empty."""
    left, top, right, bottom = box
    width, height = size
    strips = [(0, 0, width, top), (0, bottom, width, height), (0, top, left, bottom), (right, top, width, bottom)]
    return [s for s in strips if s[2] > s[0] and s[3] > s[1]]
