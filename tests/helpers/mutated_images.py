"""Image files with something wrong: by chance, with a seed, and by design, of giant declared sizes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image, features


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int = 40, height: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def originals() -> dict[str, bytes]:
    """One file of each kind that Pillow writes and the project reads."""
    image = noise(20, 16).resize((40, 32))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    turned = {"save_all": True, "append_images": [image.rotate(90)]}
    found = {kind: encode(image, kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")}
    found |= {
        f"TIFF {name}": encode(image, "TIFF", compression=name)
        for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")
    }
    Image.init()
    found |= {
        kind: encode(image, kind) for kind in ("DIB", "ICO", "PCX", "SGI", "DDS", "AVIF", "QOI") if kind in Image.SAVE
    }
    if features.check("jpg_2000"):
        found["JPEG2000"] = encode(image, "JPEG2000")
    found |= {
        "JPEG progressive": encode(image, "JPEG", progressive=True, exif=exif),
        "JPEG CMYK": encode(image.convert("CMYK"), "JPEG"),
        "PNG palette": encode(image.convert("P"), "PNG", transparency=3),
        "PNG 16": encode(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)), "PNG"),
        "PNG animated": encode(image, "PNG", exif=exif, **turned),
        "GIF animated": encode(image.convert("P"), "GIF", **turned),
        "WEBP animated": encode(image, "WEBP", exif=exif, **turned),
        "TIFF fax": encode(image.convert("1"), "TIFF", compression="group4"),
    }
    return found


def mutated(data: bytes, rng: Random) -> bytes:
    """One to three things done to a file."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if len(content) > 8:
            rng.choice(MUTATIONS)(content, rng)
    return bytes(content)


def _truncate(content: bytearray, rng: Random) -> None:
    del content[rng.randrange(len(content)) :]


def _cut_out(content: bytearray, rng: Random) -> None:
    place = rng.randrange(len(content))
    del content[place : place + rng.randint(1, 40)]


def _flip_bits(content: bytearray, rng: Random) -> None:
    for _ in range(rng.randint(1, 30)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)


def _edit_header(content: bytearray, rng: Random) -> None:
    for _ in range(rng.randint(1, 6)):
        content[rng.randrange(min(len(content), 120))] = rng.randrange(256)


def _swap_pieces(content: bytearray, rng: Random) -> None:
    first, second = sorted(rng.randrange(len(content)) for _ in range(2))
    size = rng.randint(1, 64)
    content[first : first + size], content[second : second + size] = (
        content[second : second + size],
        content[first : first + size],
    )


def _append_junk(content: bytearray, rng: Random) -> None:
    content += rng.randbytes(rng.randint(1, 2000))


def _huge_number(content: bytearray, rng: Random) -> None:
    place = rng.randrange(min(len(content), 200))
    content[place : place + 4] = rng.choice([b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff"])


MUTATIONS: tuple[Callable[[bytearray, Random], None], ...] = (
    _truncate, _cut_out, _flip_bits, _edit_header, _swap_pieces, _append_junk, _huge_number,
)  # fmt: skip


# -- by design -----------------------------------------------------------------------------------------------


def giants() -> dict[str, bytes]:
    """Small files that claim, or unpack to, far more than they should."""
    image = noise()
    found = {}
    lossy = bytearray(encode(image, "WEBP"))
    place = lossy.index(b"\x9d\x01\x2a") + 3
    lossy[place : place + 4] = struct.pack("<HH", 16383, 16383)
    moving = bytearray(encode(image, "WEBP", save_all=True, append_images=[image.rotate(90)]))
    place = moving.index(b"VP8X") + 12
    moving[place : place + 6] = b"\xff\x3f\x00" * 2
    screen, frame = bytearray(encode(image, "GIF")), bytearray(encode(image, "GIF"))
    screen[6:10] = b"\xff" * 4
    place = frame.rindex(b"\x2c\0\0\0\0") + 5
    frame[place : place + 4] = b"\xff" * 4
    jpeg = bytearray(encode(image, "JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = b"\xff" * 4
    bitmap = bytearray(encode(image, "BMP"))
    struct.pack_into("<ii", bitmap, 18, 60_000, 60_000)
    found |= {"WEBP": lossy, "WEBP animated": moving, "GIF screen": screen, "GIF frame": frame, "JPEG": jpeg}
    found |= {
        "BMP": bitmap,
        "PPM": b"P6 60000 60000 255\n" + bytes(99),
        "PPM in words": b"P3 " + b"9" * 500 + b" 1 255\n",
    }
    for compression in (1, 5, 8):
        for size in ((60_000, 60_000), (16, 2**31 - 16)):
            found[f"TIFF tiles {compression} {size}"] = tiled(compression, *size)
    png = encode(image, "PNG")
    for name in (b"zTXt", b"iCCP"):
        found[f"PNG {name!r}"] = png[:33] + chunk(name, b"k\0\0" + zlib.compress(bytes(10**8))) + png[33:]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    found["PNG"] = png[:8] + header + png[33:]
    return {name: bytes(data) for name, data in found.items()}


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def tiled(compression: int, width: int, length: int) -> bytes:
    """A TIFF of 16 x 16 pixels in one tile of any size."""
    shorts = {258: 8, 259: compression, 262: 1, 277: 1}
    longs = {256: 16, 257: 16, 322: width, 323: length, 324: 200, 325: 100}
    entries = {tag: struct.pack("<HHIHxx", tag, 3, 1, value) for tag, value in shorts.items()}
    entries |= {tag: struct.pack("<HHII", tag, 4, 1, value) for tag, value in longs.items()}
    directory = struct.pack("<H", len(entries)) + b"".join(entries[tag] for tag in sorted(entries)) + bytes(4)
    return (b"II*\0\x08\0\0\0" + directory).ljust(200, b"\0") + zlib.compress(bytes(256)).ljust(100, b"\0")


def many_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes ``count`` times more."""
    data = encode(Image.new("RGB", (16, 16), (90, 80, 70)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]
