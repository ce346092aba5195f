"""Files are replaced whole or not at all; what is asked to be on the disk is forced there."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from disam_peft.common.files import (
    append_line,
    is_draft,
    output_folder,
    published,
    write_atomically,
    write_output,
    write_through,
)
from disam_peft.errors import UserError


def test_text_and_bytes_replace_what_was_there(tmp_path: Path):
    path = tmp_path / "a.json"
    write_atomically(path, "first: é")
    assert path.read_bytes() == "first: é".encode()
    write_atomically(path, b"\x00second")
    assert path.read_bytes() == b"\x00second"
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_longest_name_that_a_file_system_allows(tmp_path: Path):
    for name in ("a" * 255, "é" * 127, "😀" * 63):
        write_atomically(tmp_path / name, name)
        assert (tmp_path / name).read_text(encoding="utf-8") == name
    assert len(os.listdir(tmp_path)) == 3


def test_a_link_stays_a_link_and_its_file_is_replaced(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    for content in ("first", "second"):
        write_output(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "folder" / "file").read_text() == content
    assert os.listdir(tmp_path / "folder") == ["file"]


@pytest.mark.parametrize("write", [write_atomically, append_line])
@pytest.mark.parametrize("target", ["victim", "nowhere"])
def test_row_64_our_own_files_are_not_written_through_links(tmp_path: Path, write, target: str):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=f"link is a link to .*{target}, .*remove the link"):
        write(tmp_path / "link", "text")
    assert sorted(os.listdir(tmp_path)) == ["link", "victim"]
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("make", [lambda path: write_output(path, "text"), output_folder])
def test_row_72_a_path_of_the_user_that_cannot_be_written_is_an_error(tmp_path: Path, make):
    (tmp_path / "file").write_text("no folder")
    for path in (tmp_path / "file" / "x", tmp_path / ("a" * 300), Path("/proc/nope/x")):
        with pytest.raises(UserError, match=r"cannot be written \(.*\); choose another place"):
            make(path)
    with pytest.raises(UserError, match="cannot be written"):
        write_output(tmp_path, "text")
    assert os.listdir(tmp_path) == ["file"]


def test_folders_on_the_way_to_a_path_of_the_user_are_made(tmp_path: Path):
    write_output(tmp_path / "a" / "b.json", "text")
    assert (tmp_path / "a" / "b.json").read_text() == "text"
    assert output_folder(tmp_path / "c" / "d").is_dir()


def test_standard_output_is_written_to_and_stays(tmp_path: Path):
    before = os.lstat("/dev/stdout")
    code = (
        "from pathlib import Path; from disam_peft.common.files import write_output;"
        "write_output(Path('/dev/stdout'), 'text')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "text"
    assert os.lstat("/dev/stdout").st_ino == before.st_ino


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("write", [write_atomically, append_line])
@pytest.mark.parametrize(("make", "what"), [(os.mkdir, "a folder"), (os.mkfifo, "no file")])
def test_row_61_a_folder_or_a_pipe_in_place_of_our_own_file_is_an_error(tmp_path: Path, write, make, what: str):
    make(tmp_path / "there")
    with pytest.raises(UserError, match=f"there is {what}, where a file of our own belongs; remove it, or choose"):
        write(tmp_path / "there", "text")
    assert os.listdir(tmp_path) == ["there"] and not (tmp_path / "there").is_file()


def test_others_may_read_it_as_any_other_file(tmp_path: Path):
    """A temporary file of the system is private to its owner; a record of results must not be."""
    (tmp_path / "plain").write_text("")
    write_atomically(tmp_path / "ours", "")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_after_an_error_the_old_file_is_there_and_no_draft(tmp_path: Path, monkeypatch, failing: str):
    path = tmp_path / "a.json"
    path.write_text("old")

    def full(*arguments):
        assert [entry for entry in os.listdir(tmp_path) if is_draft(Path(entry))], "nothing was written yet"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new", durable=True)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_durable_forces_the_content_before_the_rename_and_the_name_after_it(tmp_path: Path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle):
        calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def noted_replace(source, target):
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_atomically(tmp_path / "a", "text")
    assert calls == ["rename"]
    write_atomically(tmp_path / "a", "text", durable=True)
    assert calls == ["rename", "file", "rename", "folder"]


def test_writers_at_the_same_time_leave_one_of_the_contents(tmp_path: Path):
    path, contents = tmp_path / "a", [str(i) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: write_atomically(path, content), contents))
    assert path.read_text() in contents
    assert os.listdir(tmp_path) == ["a"]


def test_writing_through_never_overwrites(tmp_path: Path):
    write_through(tmp_path / "a", b"first")
    with pytest.raises(FileExistsError):
        write_through(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"


def test_a_folder_is_replaced_by_a_complete_one_alone(tmp_path: Path):
    place = tmp_path / "model"
    with published(place) as draft:
        (draft / "mark").write_text("old")
        assert not place.exists()
    with pytest.raises(RuntimeError), published(place, replaces="mark") as draft:
        (draft / "mark").write_text("half")
        raise RuntimeError
    assert (place / "mark").read_text() == "old"
    with published(place, replaces="mark") as draft:
        (draft / "mark").write_text("new")
    assert (place / "mark").read_text() == "new"
    assert os.listdir(tmp_path) == ["model"]


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("Dear mother")
    for replaces in (None, "mark"):
        with (
            pytest.raises(UserError, match="already exists and is not empty"),
            published(tmp_path / "letters", replaces=replaces),
        ):
            raise AssertionError("never gets here")
    assert (tmp_path / "letters" / "to_mother.txt").read_text() == "Dear mother"


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one_there(tmp_path: Path, monkeypatch):
    """The last of two renames fails: the old folder was out of the way by then."""
    place = tmp_path / "model"
    with published(place) as draft:
        (draft / "mark").write_text("old")
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(5, "Input/output error")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="Input/output error"), published(place, replaces="mark") as draft:
        (draft / "mark").write_text("new")
    assert (place / "mark").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]
