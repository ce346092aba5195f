"""The images of a run by content: written, read back, and told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from disam_peft.common.run_images import IMAGES, RunImages, read_images, size_as_content, write_images
from disam_peft.errors import UserError

RUN = RunImages(
    key=("b/x/0.png", "a/x/0.png", "a/\N{GREEK SMALL LETTER ALPHA}/1.png"),
    content=("0" * 64, "1" * 64, "f" * 64),
    domain=("b", "a", "a"),
    class_name=("x", "x", "\N{GREEK SMALL LETTER ALPHA}"),
    part=("held_out", "training", "validation"),
    size=(10, 20, 30),
    class_words={"x": "cross", "\N{GREEK SMALL LETTER ALPHA}": "alpha"},
)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_images(tmp_path / IMAGES, RUN)
    found = read_images(tmp_path / IMAGES)
    assert found == RUN and found.identity == RUN.identity and len(found) == 3
    assert [path.name for path in tmp_path.iterdir()] == [IMAGES]


def test_the_identity_is_that_of_the_data_whatever_a_run_does_with_them() -> None:
    order = (2, 0, 1)
    turned = RunImages(
        *(tuple(getattr(RUN, name)[i] for i in order) for name in ("key", "content", "domain", "class_name")),
        part=("training", "training", "held_out"),
        size=tuple(RUN.size[i] for i in order),
        class_words=dict(reversed(list(RUN.class_words.items()))),
    )
    assert turned.identity == RUN.identity


@pytest.mark.parametrize(
    "changes",
    [
        {"key": ("b/x/0.png", "a/x/0.png", "a/x/2.png")},
        {"content": ("0" * 64, "1" * 64, "e" * 64)},
        {"domain": ("b", "a", "b")},
        {"class_name": ("x", "x", "x")},
        {"class_words": {"x": "cross"}},
        {"given": ("", "validation", "")},
        {"given": ("", "test", "")},
    ],
)
def test_other_data_have_another_identity(changes: dict[str, object]) -> None:
    assert replace(RUN, **changes).identity != RUN.identity


def test_what_older_files_lack_is_unknown_and_their_identity_the_same(tmp_path: Path) -> None:
    full = replace(RUN, given=("", "test", ""), state=("a", "b", "c"))
    write_images(tmp_path / IMAGES, full)
    assert read_images(tmp_path / IMAGES) == full
    assert replace(RUN, given=("", "", "")).identity == replace(full, given=None).identity == RUN.identity


def test_sizes_in_place_of_hashes_are_marked() -> None:
    assert RUN.is_hashed
    sizes = replace(RUN, content=tuple(map(size_as_content, RUN.size)))
    assert not sizes.is_hashed and sizes.content[0] == "size:10"
    assert sizes.identity != RUN.identity


def test_row_61_a_damaged_or_foreign_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / IMAGES
    with pytest.raises(UserError, match=r"images\.parquet does not exist"):
        read_images(path)
    write_images(path, RUN)
    whole = path.read_bytes()
    for damaged in (b"", b"PAR1", whole[:-20], whole[: len(whole) // 2], b"\0" * 100, whole[:40] + b"\xff" * 40):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"images\.parquet cannot be read as the images of a run"):
            read_images(path)
    columns = {name: list(getattr(RUN, name)) for name in ("key", "content", "domain", "class_name", "part", "size")}
    for changes, message in (
        ({"part": ["training", "training", "sold"]}, "part 'sold' is none of training, validation"),
        ({"size": ["1", "2", "3"]}, "lacks some of the columns"),
        ({"content": ["0", None, "1"]}, "has no content in row 1"),
    ):
        pq.write_table(pa.table({**columns, **changes}), path)
        with pytest.raises(UserError, match=message):
            read_images(path)


def test_row_61_every_flipped_byte_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / IMAGES
    write_images(path, RUN)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 0x55
        path.write_bytes(flipped)
        try:
            found = read_images(path)
        except UserError as error:
            assert str(path) in str(error)
        else:
            assert isinstance(found, RunImages)
