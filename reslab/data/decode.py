"""Image file -> uint8 pixels: (size, size, channels), whatever was in the file.

EXIF rotation is applied. Greyscale, palette, CMYK, 16-bit and float images become 8-bit; transparency goes onto white.
The short side is scaled to `size` and the middle square kept. JPEG goes through simplejpeg, all else through Pillow; of
large JPEGs half, a quarter or an eighth of the resolution is decoded, where that is enough.
"""

import io
import math
import struct
import warnings
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from PIL.Image import Transpose as Turn

MAX_PIXELS = 89_478_485  # Pillow's own limit: a quarter of a GiB as RGB
OVERSHOT = 2  # of a float image from 0 to 1, the largest value at most: resampling goes a little beyond 1
GREY_MODES = ("1", "L", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")
EXIF_ORIENTATION = 0x0112
ROWS_PER_STRIP, TILE_WIDTH, TILE_LENGTH = 278, 322, 323  # tags of a TIFF
TURNS = {
    2: Turn.FLIP_LEFT_RIGHT,
    3: Turn.ROTATE_180,
    4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE,
    6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE,
    8: Turn.ROTATE_90,
}
# Of Pillow's readers those that neither run a program nor open what lies within by another reader, beyond every limit
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")
SCANS = 500  # of a progressive JPEG, at most: each is decoded over all of the image, and a few bytes make one
SCAN = b"\xff\xda"  # begins one, and occurs nowhere else in what is compressed

Pixels = NDArray[np.uint8]

# Our own limit is applied to every image, so Pillow's warning at the same limit says nothing new.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# What Pillow warns of in odd files, such as broken EXIF, is either harmless or becomes an Unreadable.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class Unreadable(Exception):
    """An image that cannot be used, with the reason in a few words."""


class Header(NamedTuple):
    """What an image file says of itself: pixels after EXIF rotation, and whether it has no colour."""

    width: int
    height: int
    grey: bool


def read_header(data: bytes) -> Header:
    """Raises Unreadable for what is no image, a bomb, or a file that stops before its end."""
    with _open(data) as image:
        _check_whole(image, data)
        turned = _orientation(image, data) in (5, 6, 7, 8)
        width, height = image.size[::-1] if turned else image.size
        return Header(width, height, image.mode in GREY_MODES)


def dimensions(data: bytes) -> tuple[int, int]:
    """Width and height that decoding makes room for, as the head of the file has them; nothing is decoded. Raises Unreadable.

    They are the image's, or of a TIFF those of a tile that is larger.
    """
    with _open(data) as image:
        return max(image.size, _block(image), key=math.prod) if image.format == "TIFF" else image.size


def decode(data: bytes, size: int, channels: int) -> Pixels:
    """uint8 (size, size, channels), channels 1 or 3. Raises Unreadable."""
    return resize(_upright(data, size, channels), size)


def decode_square(data: bytes, least: int, channels: int) -> Pixels:
    """The middle square without resampling: uint8 (S, S, channels), S at least `least` where the image has as much. Raises Unreadable.

    For training: the decoder takes its quick ways, which change a JPEG's colours by a few levels at edges.
    """
    return middle_square(_upright(data, least, channels, quick=True))


def middle_square(pixels: Pixels) -> Pixels:
    """A view of the middle of uint8 (H, W, C)."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return pixels[top : top + side, left : left + side]


def decode_whole(data: bytes) -> Pixels:
    """uint8 (height, width, 3): all of the image at its own resolution, upright. Raises Unreadable."""
    with _open(data) as image:
        try:
            _load_first(image)
            turn = TURNS.get(_orientation(image, data))
            return np.asarray(_eight_bit(image if turn is None else image.transpose(turn), 3))
        except MemoryError:  # no fault of the image
            raise
        except Exception as error:  # decoders raise many types on broken files
            raise Unreadable(_reason(error)) from error


def resize(pixels: Pixels, size: int) -> Pixels:
    """uint8 (H, W, C) -> (size, size, C), as `decode` does."""
    pixels = middle_square(pixels)
    if pixels.shape[0] == size:
        return pixels
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image = image.resize((size, size), Image.Resampling.BILINEAR)  # Pillow's filters are antialiased
    return np.asarray(image).reshape(size, size, pixels.shape[2])


def with_channels(pixels: Pixels, channels: int) -> Pixels:
    """uint8 (H, W, 1 or 3) -> (H, W, channels), 1 or 3: grey is repeated, colour becomes its luma, as in `decode`."""
    if pixels.shape[2] == channels:
        return pixels
    return pixels.repeat(3, axis=2) if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]


def _upright(data: bytes, least: int, channels: int, quick: bool = False) -> Pixels:
    """uint8 (H, W, channels), no side shorter than `least` where the image itself has as much."""
    with _open(data) as image:
        try:
            _load_first(image)
            orientation = _orientation(image, data)
            if image.format == "JPEG" and orientation == 1 and image.mode in ("L", "RGB"):
                with suppress(ValueError):  # simplejpeg is strict; Pillow reads what is merely odd and refuses what is broken
                    # Only whole halvings: in between, as at three eighths, the decoder is slower than at full size
                    enough = _halved(min(image.size), least)
                    array: Pixels = simplejpeg.decode_jpeg(
                        data, "RGB" if channels == 3 else "GRAY", fastdct=quick, fastupsample=quick, min_height=enough, min_width=enough, min_factor=2
                    )
                    return array
            if image.format == "JPEG":
                image.draft(None, (least, least))
            turn = TURNS.get(orientation)
            found = np.asarray(_eight_bit(image if turn is None else image.transpose(turn), channels))
        except MemoryError:
            raise
        except Exception as error:  # decoders raise many types on broken files
            raise Unreadable(_reason(error)) from error
    return found if channels == 3 else found[:, :, None]


def _halved(side: int, least: int) -> int:
    """The side halved up to three times, as a JPEG decoder rounds, while it is at least `least`."""
    return min((half for half in (-(-side // n) for n in (8, 4, 2)) if half >= least), default=side)


@cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image, data: bytes) -> int:
    """1 to 8 as EXIF counts; 1, upright, where the block is missing or broken."""
    late = image.format != "PNG" or b"eXIf" in data  # Pillow decodes a PNG to look for the block behind its pixels
    try:
        return int((image.getexif() if late else Image.Image.getexif(image)).get(EXIF_ORIENTATION, 1))
    except Exception:
        return 1


def _load_first(image: Image.Image) -> None:
    """Decodes where Pillow would do so unasked: a PNG where its orientation is looked for, which loses what is wrong with it, so
    that it would be black; and a TIFF, which comes out upright then, and says so no sooner.
    """
    if image.format in ("PNG", "TIFF"):
        image.load()


def _open(data: bytes) -> Image.Image:
    if not data:
        raise Unreadable("empty file (0 bytes)")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=formats())
    except MemoryError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Unreadable(f"too many pixels: the limit is {MAX_PIXELS / 1e6:.0f} megapixels") from error
    except Exception as error:
        raise Unreadable("not an image of a known format") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Unreadable(f"{width} x {height} px: the limit is {MAX_PIXELS / 1e6:.0f} megapixels")
    if (image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg") and data.count(SCAN) > SCANS:
        raise Unreadable(f"a JPEG of more than {SCANS} scans")
    if image.format == "TIFF" and math.prod(_block(image)) > MAX_PIXELS:
        raise Unreadable(f"a TIFF with a tile of more than {MAX_PIXELS / 1e6:.0f} megapixels")
    if image.format == "PNG" and "transparency" in image.info:
        image.info["transparency"] = _transparent(image)
    return image


def _block(image: Image.Image) -> tuple[int, int]:
    """Width and height of a TIFF's tile or strip, which libtiff makes room for, however small the image is. Strips beyond all bounds mean the whole image."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    width, length, rows = (value if isinstance(value := tags.get(tag), int) else 0 for tag in (TILE_WIDTH, TILE_LENGTH, ROWS_PER_STRIP))
    return max((width, length), (image.width, rows if rows < 1 << 31 else 0), key=math.prod)


def _transparent(image: Image.Image) -> Any:
    """The transparent value of a PNG as its pixels will have it; Pillow leaves it at the depth of the file."""
    tile = image.tile  # type: ignore[attr-defined]
    value, depth = image.info["transparency"], tile[0][3] if tile else ""  # a damaged one has no pixels
    if depth in ("L;2", "L;4"):
        return (value & 3) * 85 if depth == "L;2" else (value & 15) * 17
    return tuple(part >> 8 for part in value) if depth == "RGB;16B" else value


def _check_whole(image: Image.Image, data: bytes) -> None:
    """JPEG and PNG end in a marker, which is cheap to look for; what lacks it, and other formats, are decoded."""
    tail = data[-4096:]
    if (image.format == "JPEG" and b"\xff\xd9" in tail) or (image.format == "PNG" and b"IEND" in tail):
        return
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise Unreadable(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, (OSError, struct.error, EOFError)) and "truncated" in str(error).lower():
        return "truncated: the file stops before the image does"
    return f"broken image data: {str(error).splitlines()[0][:80] if str(error) else type(error).__name__}"


def _eight_bit(image: Image.Image, channels: int) -> Image.Image:
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values: NDArray[np.float32] = np.array(image, np.float32)  # worked on in place: images may be large
        np.nan_to_num(values, copy=False, posinf=65535, neginf=0)
        clear = values == image.info["transparency"] if "transparency" in image.info else None
        top = values.max(initial=0)
        wide = top > 255 or image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
        values.clip(0, None, out=values)
        values *= 255 if image.mode == "F" and top <= OVERSHOT else 255 / 65535 if wide else 1
        values += 0.5
        if clear is not None:
            values[clear] = 255
        image = Image.fromarray(values.clip(0, 255, out=values).astype(np.uint8))
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", opaque.size, "white"), opaque)
    return image.convert("RGB" if channels == 3 else "L")
