import io
import struct
import tracemalloc
import zlib
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image

from reslab.data.decode import SCAN, Unreadable, decode, decode_square, decode_whole, dimensions, formats, read_header


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def gradient(mode: str = "RGB") -> Image.Image:
    ramp = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (40, 1))
    return Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], axis=2)).convert(mode)


@pytest.mark.parametrize("size", [(41, 32), (32, 41), (45, 32)], ids=str)
def test_what_needs_no_resampling_gets_none(size: tuple[int, int]) -> None:
    """The middle between two pixels would be the mean of both, at every pixel."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    top, left = ((side - 32) // 2 for side in size)
    assert np.array_equal(decode(encoded(Image.fromarray(pixels), "PNG"), 32, 3), pixels[top : top + 32, left : left + 32])


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
    tags = [(256, 3, 4), (257, 3, 4), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 3, 4), (279, 4, 32)]
    assert (decode(tiff(order, np.full((4, 4), 200, f"{order}u2").tobytes(), *tags), 4, 1) == 1).all(), "200 of 65,535"


@pytest.mark.parametrize(("value", "shade"), [(255, 1), (256, 1), (65535, 255)])
def test_a_pgm_of_sixteen_bits_is_scaled_by_its_depth_and_not_by_what_it_holds(value: int, shade: int) -> None:
    assert (decode(b"P5 4 4 65535\n" + np.full((4, 4), value, ">u2").tobytes(), 4, 1) == shade).all()


def test_a_large_image_of_sixteen_bits_takes_little_memory_beside_itself() -> None:
    data = encoded(Image.fromarray(np.zeros((1000, 1000), np.uint16)), "PNG")
    tracemalloc.start()
    decode(data, 8, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 1000 * 1000


def test_transparency_goes_onto_white() -> None:
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert (decode(encoded(clear, "PNG"), 16, 3) == 255).all()


@pytest.mark.parametrize(
    ("bits", "colour", "pixels", "clear", "other"),
    [
        (16, 0, struct.pack(">2H", 1000, 40000), (1000,), 156),
        (16, 2, struct.pack(">6H", 1000, 2000, 3000, 40000, 40000, 40000), (1000, 2000, 3000), 156),
        (2, 0, bytes([0b01100000]), (1,), 170),
        (4, 0, bytes([0x3A]), (3,), 170),
        (8, 0, bytes([3, 170]), (3,), 170),
    ],
)
def test_the_transparent_value_of_a_png_is_white_at_every_depth(bits: int, colour: int, pixels: bytes, clear: tuple[int, ...], other: int) -> None:
    data = png((2, 1, bits, colour, 0, 0, 0), b"\0" + pixels, transparent=struct.pack(f">{len(clear)}H", *clear))
    assert decode_whole(data).tolist() == [[[255] * 3, [other] * 3]]


@pytest.mark.parametrize("colour", [0, 2, 3])
def test_a_png_with_a_transparent_value_and_no_pixels_is_unreadable(colour: int) -> None:
    whole = png((2, 1, 8, colour, 0, 0, 0), b"\0" + bytes(6), transparent=bytes(6))
    without = whole[: whole.index(b"IDAT") - 4] + whole[whole.index(b"IEND") - 4 :]
    read_header(without)
    for read in (decode_whole, lambda data: decode(data, 32, 3)):
        with pytest.raises(Unreadable):
            read(without)


def test_the_transparent_colour_of_a_tga_is_white() -> None:
    head = struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 2, 32, 0, 0, 2, 1, 8, 0)
    data = head + bytes([0, 0, 255, 0]) + bytes([0, 255, 0, 255]) + bytes([0, 1])
    assert decode_whole(data).tolist() == [[[255, 255, 255], [0, 255, 0]]]


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


@pytest.mark.parametrize(("least", "side"), [(600, 600), (301, 600), (300, 300), (222, 300), (150, 150), (76, 150), (10, 75), (2000, 600)])
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


def png(header: tuple[int, ...], pixels: bytes, transparent: bytes = b"") -> bytes:
    """A PNG of these pixels; `header` is width, height, bits, colour and three zeros."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    clear = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *header)) + clear + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises width x height pixels."""
    return png((width, height, 8, 2, 0, 0, 0), b"0" * 99)


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


def tiff(order: str, pixels: bytes, *tags: tuple[int, int, int]) -> bytes:
    """A TIFF of one strip or tile, at byte 8, with (tag, 3 for a short or 4 for a long, value)."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(pixels)) + pixels
    fields = b"".join(struct.pack(f"{order}HHI{'Hxx' if kind == 3 else 'I'}", tag, kind, 1, value) for tag, kind, value in tags)
    return head + struct.pack(f"{order}H", len(tags)) + fields + struct.pack(f"{order}I", 0)


def test_a_tiff_is_as_large_as_its_tile() -> None:
    tags = [(256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), (322, 4, 6000), (323, 4, 5000), (324, 4, 8), (325, 4, 64)]
    assert dimensions(tiff("<", bytes(64), *tags)) == (6000, 5000)
    assert dimensions(encoded(gradient(), "TIFF")) == (40, 40)


@pytest.mark.parametrize(
    ("block", "refused"),
    [
        ([(322, 4, 24_000), (323, 4, 24_000), (324, 4, 8), (325, 4, 64)], True),
        ([(273, 4, 8), (278, 4, 1_000_000), (279, 4, 64)], True),
        ([(273, 4, 8), (278, 4, 2**32 - 1), (279, 4, 64)], False),
    ],
    ids=["tile", "strip", "all of the image in a strip"],
)
def test_a_small_tiff_of_a_huge_tile_is_refused(block: list[tuple[int, int, int]], refused: bool) -> None:
    pixels = zlib.compress(bytes(100 * 100))
    tags = [(256, 4, 100), (257, 4, 100), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1), *block]
    for read in (read_header, dimensions, lambda data: decode(data, 8, 1)):
        with pytest.raises(Unreadable, match="tile of more than 89 megapixels") if refused else nullcontext():
            read(tiff("<", pixels.ljust(64), *sorted(tags)))


def test_memory_that_runs_out_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(gradient(), "BMP")

    def full(self: Image.Image) -> None:
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", full)
    for read in (read_header, lambda data: decode(data, 8, 3), decode_whole):
        with pytest.raises(MemoryError):
            read(data)


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
