"""Which kinds of image files are read: Pillow's own readers, and those of plugins that are installed."""

from __future__ import annotations

import importlib
from contextlib import suppress
from functools import cache
from typing import Final

from PIL import Image

# A list, because some of Pillow's other readers start a program (EPS runs Ghostscript), or take any bytes at all for a
# picture because their files do not begin with a mark (TGA).
_WANTED: Final = (
    "JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "DIB", "ICO", "ICNS", "PCX", "SGI",
    "QOI", "DDS",
)  # fmt: skip
# Packages that teach Pillow a kind of file -> the function that does so; None: the import does.
_PLUGINS: Final = {"pillow_heif": "register_heif_opener", "pillow_avif": None}
_NEEDED_FOR: Final = {".heic": "pillow-heif", ".heif": "pillow-heif", ".hif": "pillow-heif", ".avif": "a newer Pillow"}
# Kinds of pictures that are not read, so that a message can tell them from files that nobody takes for pictures.
_OTHER_PICTURES: Final = frozenset((
    ".heic", ".heif", ".hif", ".avif", ".jxl", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".svg",
    ".eps", ".ai", ".psd", ".tga", ".exr", ".hdr", ".dcm", ".nii", ".xcf", ".pcd", ".pfm", ".fits",
))  # fmt: skip


@cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here, in the order in which a file's beginning is compared."""
    for package, function in _PLUGINS.items():
        with suppress(ImportError):
            module = importlib.import_module(package)
            if function is not None:
                getattr(module, function)()
    Image.init()
    return tuple(name for name in _WANTED if name in Image.OPEN)


@cache
def readable_extensions() -> frozenset[str]:
    """Endings of file names, in small letters with the dot, that are taken for images."""
    formats = {*readable_formats(), "MPO"}  # several JPEGs in one file, as some cameras write them: read as JPEG
    endings = {ending for ending, name in Image.registered_extensions().items() if name in formats}
    return frozenset(endings - {".pfm"})  # floating-point pixels have no defined range


def looks_like_image(ending: str) -> bool:
    """Whether a file with this ending is a picture, be it one that is read here or not."""
    return ending in readable_extensions() or ending in _OTHER_PICTURES


def package_for(ending: str) -> str | None:
    """What has to be installed so that files with this ending are read; None where nothing is known to help."""
    return None if ending in readable_extensions() else _NEEDED_FOR.get(ending)
