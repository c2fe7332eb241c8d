import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from reslab.data.decode import SCAN, Unreadable, decode, decode_square, decode_whole, formats, read_header


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def gradient(mode: str = "RGB") -> Image.Image:
    ramp = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (40, 1))
    return Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], axis=2)).convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_every_common_format_decodes_to_nearly_the_same(kind: str) -> None:
    got = decode(encoded(gradient(), kind), 40, 3)
    assert got.shape == (40, 40, 3)
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - np.asarray(gradient()).astype(int)).mean() < 12


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("1", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("L", "JPEG")],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_becomes_eight_bit_grey_or_colour(mode: str, kind: str, channels: int) -> None:
    got = decode(encoded(gradient(mode), kind), 40, channels)
    want = np.asarray(gradient(mode).convert("RGB" if channels == 3 else "L")).reshape(40, 40, channels)
    assert np.abs(got.astype(int) - want.astype(int)).mean() < 12


@pytest.mark.parametrize("scale", [1, 257], ids=["values up to 255", "values up to 65535"])
def test_sixteen_bit_images_keep_their_shades(scale: int) -> None:
    ramp = np.tile(np.arange(0, 240, 6, dtype=np.uint16), (40, 1)) * 257
    got = decode(encoded(Image.fromarray(ramp), "PNG"), 40, 1)
    assert np.abs(got[:, :, 0].astype(int) - ramp // 257).max() <= 1


def test_float_tiff_in_unit_range_is_scaled() -> None:
    ramp = np.tile(np.linspace(0, 1, 40, dtype=np.float32), (40, 1))
    got = decode(encoded(Image.fromarray(ramp), "TIFF"), 40, 1)
    assert (got[0, 0, 0], got[0, -1, 0]) == (0, 255)
    overshot = decode(encoded(Image.fromarray(ramp * 1.01), "TIFF"), 40, 1)
    assert (overshot[0, 0, 0], overshot[0, 20, 0], overshot[0, -1, 0]) == (0, 132, 255)


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
def test_dark_images_of_sixteen_bits_stay_dark(order: str) -> None:
    entries = [(256, 3, 4), (257, 3, 4), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 4), (279, 4, 32)]
    pixels = np.full((4, 4), 200, f"{order}u2").tobytes()
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(pixels)) + pixels
    fields = b"".join(struct.pack(f"{order}HHI{'Hxx' if kind == 3 else 'I'}", tag, kind, 1, value) for tag, kind, value in entries)
    tiff = head + struct.pack(f"{order}H", len(entries)) + fields + struct.pack(f"{order}I", 0)
    assert (decode(tiff, 4, 1) == 1).all(), "200 of 65,535"


def test_transparency_goes_onto_white() -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert (decode(encoded(clear, "PNG"), 16, 3) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_rotation_is_applied(orientation: int, kind: str) -> None:
    upright = Image.new("RGB", (64, 32), "black")
    upright.paste("white", (0, 0, 20, 20))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that turns an upright picture as a camera stores it
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif, **{"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(kind, {}))
    assert read_header(data)[:2] == (64, 32)
    want = np.asarray(upright).astype(int)
    for got in (decode(data, 32, 3), decode_square(data, 32, 3)):  # the middle square: columns 16 to 47
        assert np.abs(got.astype(int) - want[:, 16:48]).max() < 40
    assert np.abs(decode_whole(data).astype(int) - want).max() < 40


@pytest.mark.parametrize(("least", "side"), [(600, 600), (301, 600), (300, 300), (150, 150), (76, 150), (10, 75), (2000, 600)])
def test_the_middle_square_is_reduced_by_halves_only_and_not_resampled(least: int, side: int) -> None:
    image = gradient().resize((800, 600), Image.Resampling.BICUBIC)
    got = decode_square(encoded(image, "JPEG", quality=95), least, 3)
    assert got.shape == (side, side, 3)
    want = np.asarray(image.crop((100, 0, 700, 600)).resize((side, side), Image.Resampling.BOX)).astype(int)
    assert np.abs(got.astype(int) - want).mean() < 2
    assert decode_square(encoded(image, "PNG"), least, 1).shape == (600, 600, 1), "other formats come whole"


def test_large_jpegs_are_reduced_to_what_a_full_decode_gives() -> None:
    image = gradient().resize((800, 600), Image.Resampling.BICUBIC)
    got = decode(encoded(image, "JPEG", quality=92), 64, 3).astype(int)
    want = np.asarray(image.crop((100, 0, 700, 600)).resize((64, 64), Image.Resampling.BOX)).astype(int)
    assert np.abs(got - want).mean() < 2


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"0" * 99))
        + chunk(b"IEND", b"")
    )


whole = encoded(gradient().resize((200, 200)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"just some text in a .jpg", "not an image"),
        (encoded(gradient(), "ICO"), "not an image of a known format"),
        (whole[:-2] + SCAN * 500 + whole[-2:], "more than 500 scans"),
        (b"<html></html>", "not an image"),
        (whole[: len(whole) // 2], "truncated"),
        (encoded(gradient().resize((300, 300)), "PNG")[:900], "truncated"),
        (bomb(50_000, 50_000), "megapixels"),
        (bomb(12_000, 12_000), "megapixels"),
    ],
    ids=["zero bytes", "text", "icon", "many scans", "html", "cut jpeg", "cut png", "bomb", "below Pillow's own limit"],
)
def test_unusable_files_are_unreadable_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        read_header(data)
    with pytest.raises(Unreadable):
        decode(data, 32, 3)


def test_no_reader_hands_what_lies_within_to_another_or_to_a_program() -> None:
    assert {"JPEG", "PNG", "TIFF", "WEBP"} <= set(formats())
    assert not {"EPS", "WMF", "PDF", "IPTC", "ICO", "ICNS", "FPX", "MIC"} & set(formats())


def test_header_says_grey_only_without_colour() -> None:
    assert [read_header(encoded(gradient(m), "PNG")).grey for m in ("L", "1", "RGB", "P")] == [True, True, False, False]


def test_a_png_with_damaged_pixels_and_a_whole_end_is_not_black() -> None:
    whole = encoded(gradient(), "PNG")
    damaged = whole[:100] + b"\xff" * len(whole[100:-60]) + whole[-60:]
    for read in (lambda data: decode(data, 24, 3), lambda data: decode_square(data, 24, 3), decode_whole):
        with pytest.raises(Unreadable, match="broken image data"):
            read(damaged)


def test_the_head_of_a_png_is_read_without_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda self: decoded.append(self))
    assert read_header(encoded(gradient().resize((30, 20)), "PNG"))[:2] == (30, 20)
    assert not decoded


def test_a_png_is_turned_also_where_its_exif_is_behind_the_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    first = encoded(gradient().resize((30, 20)), "PNG", exif=exif)
    at = first.index(b"eXIf") - 4
    block = first[at : at + 12 + int.from_bytes(first[at : at + 4], "big")]
    end = first.index(b"IEND") - 4
    last = first[:at] + first[at + len(block) : end] + block + first[end:]
    for data in (first, last):
        assert read_header(data)[:2] == (20, 30)
        assert decode_whole(data).shape == (30, 20, 3)
    assert (decode(first, 20, 3) == decode(last, 20, 3)).all()
