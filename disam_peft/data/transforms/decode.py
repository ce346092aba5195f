"""From the bytes of an image file to an RGB picture. Every kind of file has one defined conversion or a named error.

| file                       | becomes                                                                |
|----------------------------|------------------------------------------------------------------------|
| EXIF orientation           | turned upright; unreadable EXIF counts as none                         |
| grey, palette, CMYK, YCbCr | RGB as Pillow converts it; embedded colour profiles are not applied    |
| alpha, transparent colour  | laid over white                                                        |
| 16-bit grey                | ``round(v * 255 / 65535)``                                             |
| animated, several pages    | the first frame                                                        |
| 32-bit integers, floats    | BadImage, unless the integers fit 16 bits: their range is not defined  |
| more pixels than allowed   | BadImage, by the header, before any of them is decoded                 |
| more pixels once resized   | BadImage, by the header: a strip, longer than 678 times its width      |
"""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Final

import numpy as np
from PIL import Image

from disam_peft.data.transforms.formats import readable_formats
from disam_peft.errors import UserError

MAX_PIXELS: Final = 100_000_000
MOST_PIXELS: Final = 178_956_970
"""The largest value that ``data.max_pixels`` may have: beyond it, Pillow refuses by itself."""
# Models resize the short side of a picture to their input and keep its aspect, so that a strip of few pixels becomes a
# picture of very many: its pixels are counted at the largest input that is common.
RESIZED_SIDE: Final = 384
MAX_RESIZED_PIXELS: Final = 100_000_000
# A progressive JPEG is decoded once per scan, and a scan may have a few bytes; encoders write about ten scans.
MAX_SCANS: Final = 100

_ORIENTATION_TAG: Final = 0x0112
_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(UserError):
    """An image that cannot be used. ``source`` says which file or row it is, ``reason`` why."""

    # One argument only, because an exception that is sent to another process is built again from its arguments.
    source: str = ""
    reason: str = ""

    @classmethod
    def of(cls, source: str, reason: str) -> BadImage:
        error = cls(f"image {source}: {reason}")
        error.source, error.reason = source, reason
        return error


def decode_image(data: bytes, source: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in ``data`` as an upright RGB image, by the table of this module.

    Args:
        data: the content of an image file.
        source: path or row, for the message.
        max_pixels: width times height allowed. It is compared with the header, before any pixel is decoded.

    Raises:
        BadImage: empty, not an image, truncated, too large, or of a kind without a defined conversion.
    """
    if not data:
        raise BadImage.of(source, "the file is empty (0 bytes)")
    try:
        picture = Image.open(io.BytesIO(data), formats=readable_formats())
        _require_size(picture, source, max_pixels)
        if data.startswith(b"\xff\xd8") and (scans := data.count(b"\xff\xda")) > MAX_SCANS:
            raise BadImage.of(source, f"a JPEG of {scans} scans, more than the limit of {MAX_SCANS}; save it again")
        picture.load()
        _require_size(picture, source, max_pixels)  # an icon holds a file of its own, which may be larger than it says
        return _to_rgb(_upright(picture), source)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage.of(source, _too_large(str(error).rstrip("."), max_pixels)) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise whatever a broken file leads them to
        raise BadImage.of(source, _why(data, error)) from error


def to_picture(image: object, source: str) -> Image.Image:
    """An image in memory as an upright RGB image, by the table of this module.

    Args:
        image: of PIL, or an array (H, W, 3) or (H, W) of uint8.
        source: for the message.

    Raises:
        BadImage: something else, or of a kind without a defined conversion.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
            reason = f"an array of shape {image.shape} and {image.dtype}; expected (H, W, 3) or (H, W) of uint8"
            raise BadImage.of(source, reason)
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        kinds = "a path, the bytes of a file, a PIL image or an array of uint8"
        reason = f"of the type {type(image).__name__}; expected {kinds}"
        raise BadImage.of(source, reason)
    return _to_rgb(_upright(image), source)


def _require_size(picture: Image.Image, source: str, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise BadImage.of(
            source, _too_large(f"{width} x {height} = {width * height} pixels", max_pixels, width * height)
        )
    short, long = sorted((width, height))
    resized = RESIZED_SIDE**2 * long // max(short, 1)
    if resized > MAX_RESIZED_PIXELS:
        raise BadImage.of(
            source,
            f"{width} x {height} is a strip: resized so that its short side has {RESIZED_SIDE} pixels, it would have "
            f"{resized} pixels, more than the limit of {MAX_RESIZED_PIXELS}; cut it into pieces, or pad its short side",
        )


def _too_large(size: str, max_pixels: int, pixels: int | None = None) -> str:
    could_help = pixels is not None and pixels <= MOST_PIXELS
    action = "shrink the image or raise data.max_pixels" if could_help else "shrink the image"
    return f"{size}, more than the limit of {max_pixels}; {action}"


def _why(data: bytes, error: Exception) -> str:
    start = data[:256].lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg", b"<head")):
        return "holds HTML or XML text, not an image (a failed download?)"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not an image of a known format ({', '.join(readable_formats())})"
    if "truncated" in str(error).lower():
        return "the file is truncated"
    return f"cannot be decoded ({type(error).__name__}: {error})"


def _upright(picture: Image.Image) -> Image.Image:
    orientation = None
    with suppress(Exception):  # the pixels are fine even where the EXIF block is not
        orientation = picture.getexif().get(_ORIENTATION_TAG)
    turn = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return picture if turn is None else picture.transpose(turn)


def _to_rgb(picture: Image.Image, source: str) -> Image.Image:
    if picture.mode.startswith("I"):
        return _from_integers(picture, source)
    if picture.mode == "F":
        raise BadImage.of(source, "floating-point pixels have no defined range; save it with 8 or 16 bits")
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _from_integers(picture: Image.Image, source: str) -> Image.Image:
    grey_HW = np.asarray(picture).astype(np.int64)
    if grey_HW.min() < 0 or grey_HW.max() > 65535:
        raise BadImage.of(source, "32-bit pixels have no defined range; save it with 8 or 16 bits")
    scaled_HW = (grey_HW * 255 + 32767) // 65535
    return Image.fromarray(scaled_HW.astype(np.uint8)).convert("RGB")
