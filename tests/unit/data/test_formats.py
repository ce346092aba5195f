"""Kinds of image files: by what Pillow and its plugins can read, and what is said of the others."""

from __future__ import annotations

import io
import sys
from types import ModuleType

import pytest
from PIL import Image, PngImagePlugin

from disam_peft.config.data import DataConfig
from disam_peft.data.load import load
from disam_peft.data.transforms import formats
from disam_peft.data.transforms.decode import BadImage, decode_image
from tests.helpers.tiny_images import write_image

MARK = b"a new kind of picture"


class NewImage(PngImagePlugin.PngImageFile):
    """A PNG behind a mark of its own: what a plugin would read."""

    format = "HEIF"

    def __init__(self, fp: io.BytesIO, filename: object = None) -> None:
        super().__init__(io.BytesIO(fp.read()[len(MARK) :]))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch):
    """A package like pillow-heif, which teaches Pillow a kind of file once its function is called."""
    Image.init()
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "EXTENSION", dict(Image.EXTENSION))
    package = ModuleType("pillow_heif")

    def register() -> None:
        Image.register_open("HEIF", NewImage, lambda start: start.startswith(MARK[:16]))
        Image.register_extension("HEIF", ".heic")

    package.register_heif_opener = register  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    for function in (formats.readable_formats, formats.readable_extensions):
        function.cache_clear()
    yield
    for function in (formats.readable_formats, formats.readable_extensions):
        function.cache_clear()


def as_heic(path):
    path.with_suffix(".heic").write_bytes(MARK + path.read_bytes())
    path.unlink()


def test_row_69_files_are_read_where_the_plugin_is_installed(tree, plugin):
    root = tree(["photo", "sketch"], ["cat", "dog"], 2)
    as_heic(root / "photo/cat/0.png")
    dataset = load(DataConfig(root=root))
    assert dataset.keys[0] == "photo/cat/0.heic" and dataset.ignored == {}
    assert dataset.image(0).size == (12, 10)


@pytest.mark.skipif("HEIF" in formats.readable_formats(), reason="the plugin is installed here")
def test_without_the_plugin_the_package_is_named(tmp_path):
    assert formats.package_for(".heic") == "pillow-heif" and formats.package_for(".png") is None
    data = MARK + write_image(tmp_path / "x.png").read_bytes()
    with pytest.raises(BadImage, match="not an image of a known format"):
        decode_image(data, "x.heic")


@pytest.mark.parametrize(
    "ending", [".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"]
)
def test_endings_that_are_read(ending):
    assert ending in formats.readable_extensions() and formats.looks_like_image(ending)


@pytest.mark.parametrize("ending", [".eps", ".pdf", ".tga", ".psd", ".pfm", ".txt", ".py", ""])
def test_endings_that_are_not(ending):
    assert ending not in formats.readable_extensions()


def test_notes_are_no_pictures():
    assert not any(map(formats.looks_like_image, (".txt", ".csv", ".json", "", ".md", "hidden")))
    assert formats.looks_like_image(".heic") and formats.looks_like_image(".svg")
