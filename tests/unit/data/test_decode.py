"""Each kind of image file, and each way for one to be broken."""

from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from disam_peft.data.transforms.decode import BadImage, decode_image


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, int, int]:
    image = decode_image(data, "x")
    assert image.mode == "RGB"
    red, green, blue = np.asarray(image)[y, x].tolist()
    return red, green, blue


def test_row_14_grey_and_bilevel():
    assert pixel(encode(Image.new("L", (2, 2), 77), "PNG")) == (77, 77, 77)
    assert pixel(encode(Image.new("1", (2, 2), 1), "PNG")) == (255, 255, 255)


def test_row_14_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 128, 129, 32768, 65535]], dtype=np.uint16)
    # 128/257 = 0.498 and 129/257 = 0.502; clipping to 8 bits would give 128, 129, 255
    for kind in ("PNG", "TIFF"):
        rgb = np.asarray(decode_image(encode(Image.fromarray(values), kind), "x"))
        assert rgb[0].tolist() == [[v] * 3 for v in (0, 0, 1, 128, 255)]


def test_row_14_palette_with_and_without_a_transparent_colour():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert pixel(encode(image, "PNG"), 1) == (200, 100, 50)
    assert pixel(encode(image, "PNG", transparency=1), 1) == (255, 255, 255)
    assert pixel(encode(image, "PNG", transparency=1), 0) == (10, 20, 30)


def test_row_14_alpha_is_laid_over_white():
    assert pixel(encode(Image.new("RGBA", (1, 1), (255, 0, 0, 0)), "PNG")) == (255, 255, 255)
    half = pixel(encode(Image.new("RGBA", (1, 1), (0, 0, 0, 128)), "PNG"))
    assert half == (127, 127, 127)
    assert pixel(encode(Image.new("LA", (1, 1), (0, 0)), "PNG")) == (255, 255, 255)
    opaque = encode(Image.new("RGB", (1, 1), (9, 8, 7)), "PNG", transparency=(9, 8, 7))
    assert pixel(opaque) == (255, 255, 255)


def test_row_14_cmyk():
    red = pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert red[0] > 250 and red[1] < 5 and red[2] < 5


# Where the top left pixel of the upright picture lies in the stored one, by EXIF orientation.
TOP_LEFT = {1: (0, 0), 2: (2, 0), 3: (2, 1), 4: (0, 1), 5: (0, 0), 6: (0, 1), 7: (2, 1), 8: (2, 0)}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_row_14_exif_rotation(orientation):
    stored = Image.new("RGB", (3, 2))
    stored.putdata([(40 * i, 0, 0) for i in range(6)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode_image(encode(stored, "PNG", exif=exif), "x")
    assert upright.size == ((3, 2) if orientation < 5 else (2, 3))
    assert upright.getpixel((0, 0)) == stored.getpixel(TOP_LEFT[orientation])


def test_row_14_rotation_and_transparency_together():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encode(image, "PNG", transparency=1, exif=exif)
    assert pixel(data, 0) == (255, 255, 255) and pixel(data, 1) == (10, 20, 30)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_row_14_unreadable_exif_counts_as_none():
    data = encode(Image.new("RGB", (3, 2), (5, 6, 7)), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode_image(data, "x").size == (3, 2)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_row_14_animated_gives_the_first_frame(kind):
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    assert pixel(encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)) == (255, 0, 0)


def test_row_14_ranges_that_are_not_defined_are_refused():
    with pytest.raises(BadImage, match="floating-point"):
        decode_image(encode(Image.new("F", (2, 2), 0.5), "TIFF"), "x")
    with pytest.raises(BadImage, match="32-bit"):
        decode_image(encode(Image.new("I", (2, 2), 70000), "TIFF"), "x")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nearly nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")


def test_row_13_pixel_cap_by_the_header():
    data = encode(Image.new("RGB", (20, 10)), "PNG")
    assert decode_image(data, "x", max_pixels=200).size == (20, 10)
    with pytest.raises(BadImage, match=r"image a/b\.png: 20 x 10 = 200 pixels, more than the limit of 199"):
        decode_image(data, "a/b.png", max_pixels=199)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_001, 50_000])
def test_row_13_between_and_above_the_limits_of_pillow(side):
    """Pillow only warns at 100 megapixels and raises an error of its own at 2500."""
    with pytest.raises(BadImage, match=r"image big\.png: .*pixels.*more than the limit of 100000000"):
        decode_image(png_header(side, side), "big.png")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"\n<!DOCTYPE html><html>404</html>", "HTML or XML"),
        (b"<?xml version='1.0'?><svg/>", "HTML or XML"),
        (b"\x00\x01\x02 nothing", "not an image of a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image of a known format"),
        (png_header(64, 64), "truncated|cannot be decoded"),
    ],
)
def test_row_12_not_an_image(data, reason):
    with pytest.raises(BadImage, match=reason) as caught:
        decode_image(data, "dir/file.jpg")
    assert caught.value.source == "dir/file.jpg"
    assert str(caught.value) == f"image dir/file.jpg: {caught.value.reason}"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
def test_row_12_truncated(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    assert decode_image(data, "x").size == (64, 64)
    for share in (0.5, 0.9):
        with pytest.raises(BadImage, match="image x: "):
            decode_image(data[: int(len(data) * share)], "x")


def test_bad_image_crosses_processes():
    error = pickle.loads(pickle.dumps(BadImage.of("a.jpg", "why")))
    assert isinstance(error, BadImage)
    assert (error.source, error.reason, str(error)) == ("a.jpg", "why", "image a.jpg: why")


@pytest.mark.parametrize("size", [(1_000_000, 1), (1, 1_000_000), (20_000, 10), (679, 1)])
@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_row_68_a_strip_that_resizing_would_blow_up(size, kind):
    """384 * 384 pixels times the length over the width."""
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, kind)
    with pytest.raises(
        BadImage, match=rf"image s: {size[0]} x {size[1]} is a strip: .* more than the limit of 100000000"
    ):
        decode_image(buffer.getvalue(), "s")


@pytest.mark.parametrize("size", [(678, 1), (3, 2000), (5000, 100)])
def test_row_68_long_pictures_are_read(size):
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    assert decode_image(buffer.getvalue(), "s").size == size


def test_raising_max_pixels_is_not_advised_where_it_cannot_help():
    header = b"P6\n20000 20000\n255\n" + bytes(100)
    with pytest.raises(BadImage, match="shrink the image") as caught:
        decode_image(header, "big", max_pixels=100_000_000)
    assert "raise data.max_pixels" not in str(caught.value)
