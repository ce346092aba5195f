"""Whatever bytes come as an image: a defined picture or BadImage, in bounded time and memory."""

from __future__ import annotations

import subprocess
import sys
from random import Random

import numpy as np
import pytest
from PIL import Image, features

from disam_peft.config.data import DataConfig
from disam_peft.data.census import inspect
from disam_peft.data.load import load
from disam_peft.data.transforms.decode import BadImage, decode_image
from disam_peft.data.transforms.formats import readable_formats
from disam_peft.errors import UserError
from tests.helpers.mutated_images import encode, giants, many_scans, mutated, noise, originals
from tests.helpers.paths import environment

COUNT = 500


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Pillow's remarks on broken EXIF blocks and the like
@pytest.mark.timeout(120)
def test_row_12_mutated_images_are_defined_or_bad(tmp_path):
    sources = originals()
    folder = tmp_path / "photo" / "cat"
    folder.mkdir(parents=True)
    for number in range(COUNT):
        rng = Random(number)
        (folder / f"{number:03}.png").write_bytes(mutated(sources[rng.choice(sorted(sources))], rng))
    dataset = load(DataConfig(root=tmp_path, verify=False, max_pixels=1_000_000))
    report = inspect(dataset, progress=False)
    reasons = {bad.source: bad.reason for bad in report.bad}
    good = 0
    for i in range(len(dataset)):
        source = dataset.source(i)
        try:
            pixels_HWC = np.asarray(dataset.image(i))
        except BadImage as error:
            assert error.reason == reasons[source]
            continue
        assert source not in reasons
        assert pixels_HWC.ndim == 3 and pixels_HWC.shape[2] == 3 and pixels_HWC.dtype == np.uint8
        assert 0 < pixels_HWC.shape[0] * pixels_HWC.shape[1] <= 1_000_000
        good += 1
    assert report.total == COUNT == good + len(report.bad)
    assert good > 50 and len(report.bad) > 200, "both ends are reached"
    with pytest.raises(UserError, match=f"{len(report.bad)} of {COUNT} images .* cannot be used"):
        load(DataConfig(root=tmp_path, max_pixels=1_000_000))


def test_the_originals_are_fine():
    assert len(originals()) >= 19
    for name, data in originals().items():
        assert decode_image(data, name).mode == "RGB"


@pytest.mark.slow
def test_row_13_giant_claims_cost_no_memory():
    """In a process of its own, which may not grow by more than 200 MB; the claims are 256 MB to 17 GB of pixels."""
    code = """
import resource
from tests.helpers.mutated_images import giants, originals
from disam_peft.data.transforms.decode import BadImage, decode_image
files = giants()
for data in originals().values():
    decode_image(data, "x")  # Pillow loads its readers
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
for name, data in files.items():
    try:
        raise SystemExit(f"{name} gave {decode_image(data, name).size}")
    except BadImage:
        pass
print(len(files), peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment(), timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    count, grown = map(int, done.stdout.split())
    assert count == len(giants()) >= 16
    assert grown < 200_000  # kB


def test_row_13_a_file_too_large_to_be_read(tree, monkeypatch):
    dataset = load(DataConfig(root=tree(["photo"], ["cat"], 2)))
    size = len(dataset.content(0))
    monkeypatch.setattr("disam_peft.data.dataset.MAX_FILE_BYTES", size)
    assert len(dataset.content(0)) == size
    monkeypatch.setattr("disam_peft.data.dataset.MAX_FILE_BYTES", size - 1)
    with pytest.raises(BadImage, match=rf"cat/0\.png: larger than {size - 1} bytes"):
        dataset.content(0)


def test_a_jpeg_of_very_many_scans_is_not_decoded():
    """Every scan passes over all pixels again: a file of 10 MB could keep a reader busy for minutes."""
    assert decode_image(many_scans(80), "x").size == (16, 16)
    with pytest.raises(BadImage, match=r"a JPEG of 110 scans, more than the limit of 100"):
        decode_image(many_scans(100), "x")


@pytest.mark.parametrize("name", ["TGA", "EPS", "PDF", "IM", "SPIDER", "MSP", "BLP"])
def test_formats_that_nobody_asked_for_are_not_tried(name, monkeypatch):
    Image.init()
    data = encode(noise().convert({"SPIDER": "F", "MSP": "1", "BLP": "P"}.get(name, "RGB")), name)
    opened = []
    for other in set(Image.OPEN) - set(readable_formats()):
        reader, _ = Image.OPEN[other]
        monkeypatch.setitem(Image.OPEN, other, (lambda *given, r=reader: opened.append(r) or r(*given), None))
    with pytest.raises(BadImage, match="not an image of a known format"):
        decode_image(data, "x.png")
    assert not opened


@pytest.mark.parametrize("name", ["DIB", "ICO", "PCX", "SGI", "DDS", "JPEG2000", "AVIF", "ICNS"])
def test_other_kinds_of_files_that_pillow_decodes_are_read(name):
    Image.init()
    if name not in Image.SAVE or (name == "JPEG2000" and not features.check("jpg_2000")):
        pytest.skip(f"this Pillow cannot write {name}")
    picture = noise(8, 8).resize((64, 64))
    read = np.asarray(decode_image(encode(picture, name), "x").resize((64, 64))).astype(float)
    assert np.abs(read - np.asarray(picture)).mean() < 6  # some of them lose a little


@pytest.mark.parametrize(
    "start", [b"SIMPLE  =                    T", b"8BPS\0\1", b"\xd7\xcd\xc6\x9a", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_openings_of_formats_with_helpers_and_bugs_are_not_followed(start):
    """FITS, Photoshop, WMF, EPS."""
    with pytest.raises(BadImage, match="not an image of a known format"):
        decode_image(start + bytes(4000), "x.png")
