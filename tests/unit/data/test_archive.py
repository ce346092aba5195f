"""Archives as data: honest ones load like the folder, hostile ones leave no trace."""

from __future__ import annotations

import errno
import os
import random
import shutil
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from disam_peft.config.data import DataConfig
from disam_peft.data.load import load
from disam_peft.data.sources import archive as archives
from disam_peft.data.sources import archive_members as members
from disam_peft.errors import UserError
from tests.helpers.hostile_archives import KINDS, Maker

# Where a later Python refuses by itself, the archive is "damaged".
REASONS = {
    "absolute_name": "has an absolute name",
    "dot_dot": r"leads out of the archive by '\.\.'",
    "drive": "has an absolute name",
    "backslash": "has a backslash in its name",
    "control_character": "has a control character",
    "nul_in_a_zip_name": "has a control character",
    "undecodable_name": "undecodable bytes in its name",
    "long_name": "has a name longer than 1024 bytes, or a part of one longer than 255",
    "deep_name": "lies deeper than 32 folders",
    "case_twins": "are one name where case",
    "accent_twins": r"caf(\\xe9|e\\u0301)\.png' are one name where case or the spelling of accents is ignored",
    "the_same_name_twice": "is there twice",
    "file_and_folder": "is a file and a folder at once",
    "symbolic_link": "is a symbolic link to '",
    "through_a_link": "member 'photo/cat' is a symbolic link to '",
    "hard_link": "is a hard link to '.*--hard-dereference",
    "device": "is a device, pipe or something unknown",
    "sparse": "is a sparse file",
    "zip_kind": "is a (symbolic link|device, pipe or socket|folder and a file at once)",
    "folder_with_content": "is a folder and a file at once",
    "encrypted": "is encrypted",
    "other_method": r"is packed by method (12|14); accepted are stored and deflate",
    "too_many_members": "has more than the limit of 100 members.*raise data.max_archive_files",
    "too_large": "holds more than the limit of 0.002 GB unpacked.*raise data.max_archive_gb",
    "too_large_a_file": "is larger than 1200000 bytes",
    "bomb": "unpacks to more than 100 times its size",
    "overlapping": "has members that overlap each other",
    "lying_size": "is damaged",
    "giant_header": "has a header of -?[0-9]+ bytes|is damaged",
    "chain_of_headers": "is damaged",
    "backwards": "of an impossible size|is damaged",
    "hidden_in_an_extended_header": "has an absolute name|leads out of the archive",
    "large_dictionary": "needs more than 268435456 bytes of memory",
    "truncated": "is damaged",
    "flipped_bits": "is damaged",
    "damaged_tar_header": r"is damaged.*\(ReadError: the end is missing\)",
    "another_name_in_front_of_the_content": "is damaged.*differ",
    "something_else": "is damaged, or no (zip|tar) archive at all|no images in",
    "an_archive_in_it": r"no images in .*x\.zip: expected .*passed over: 1 \.(zip|gz)",
    "nothing_of_use": "no images in .*: expected|a folder where images were expected|is damaged",
}
OFTEN = {"truncated": 10, "flipped_bits": 10}
CASES = [(kind, number) for kind in KINDS for number in range(OFTEN.get(kind, 3))]


def test_row_16_covers_every_kind():
    assert set(REASONS) == set(KINDS)
    assert len(KINDS) >= 40 and len(CASES) >= 130


@pytest.fixture
def small_caps(monkeypatch):
    monkeypatch.setattr(members, "FREE_BYTES", 400_000)
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1_200_000)
    return {"max_archive_gb": 0.002, "max_archive_files": 100}


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def kept_in(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in cache.rglob("*")}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(("kind", "number"), CASES)
def test_row_16_hostile_archives(kind, number, tmp_path, own_cache, small_caps):
    (tmp_path / "work").mkdir()
    archive = getattr(Maker(tmp_path / "work", random.Random(f"{kind} {number}")), kind)()
    before = everything_in(tmp_path)
    with pytest.raises(UserError, match=f"(?s){REASONS[kind]}") as caught:
        load(DataConfig(root=archive, **small_caps))
    assert str(archive) in str(caught.value)
    assert everything_in(tmp_path) == before
    assert kept_in(own_cache) <= {"archives", "archives/.lock"}
    for place in (tmp_path, *tmp_path.parents, own_cache.parent):
        assert not (place / "escaped.png").exists()


@pytest.mark.parametrize("mode", ["zip", "tar", "tar.gz", "tar.xz", "tar.bz2"])
def test_what_surrounds_the_tricks_is_honest(mode, tmp_path, small_caps):
    """Without its trick each of those archives loads, under the same limits: it was the trick that was refused."""
    maker = Maker(tmp_path, random.Random(0))
    archive = maker.zip() if mode == "zip" else maker.tar(mode=mode)
    assert load(DataConfig(root=archive, **small_caps)).keys == ("photo/dog/0.png",)


# -- honest archives -----------------------------------------------------------------------------------------


def pack(folder: Path, archive: Path, top: str = "") -> Path:
    """As ``zip -r`` and ``tar -c`` do, folders and a leading ``./`` or one folder around included."""
    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
            for path in sorted(folder.rglob("*")):
                target.write(path, Path(top) / path.relative_to(folder))
    else:
        mode = {".tgz": "gz", ".txz": "xz", ".tbz2": "bz2"}.get(archive.suffix, archive.suffix[1:].replace("tar", ""))
        with tarfile.open(archive, f"w:{mode}") as target:  # type: ignore[call-overload]
            target.add(folder, top or ".")
    return archive


@pytest.fixture
def root(tree):
    root = tree(["art", "photo"], ["cat", "dog"], 3)
    (root / "art/cat/notes.txt").write_text("by hand")
    (root / "photo/.DS_Store").write_bytes(b"x")
    return root


@pytest.mark.parametrize("top", ["", "pacs"])
@pytest.mark.parametrize(
    "name", ["x.zip", "X.ZIP", "x.tar", "x.tar.gz", "x.tgz", "x.tar.xz", "x.txz", "x.tar.bz2", "x.tbz2"]
)
def test_an_honest_archive_loads_equal_to_the_folder(name, top, root, tmp_path):
    plain = load(DataConfig(root=root))
    packed = load(DataConfig(root=pack(root, tmp_path / name, top).rename(tmp_path / f"a {name}")))
    assert packed.fingerprint == plain.fingerprint and packed.content_identity == plain.content_identity
    for field in ("keys", "classes", "domains", "prompt_names", "hashes", "ignored"):
        assert getattr(packed, field) == getattr(plain, field)
    assert packed.labels.tolist() == plain.labels.tolist() and packed.domain_ids.tolist() == plain.domain_ids.tolist()
    assert all(packed.image(i).tobytes() == plain.image(i).tobytes() for i in range(len(plain)))
    assert len(plain) == 12 and packed.origin == str(tmp_path / f"a {name}")


def test_it_is_unpacked_once_and_again_when_it_changes(root, tmp_path, own_cache, monkeypatch):
    built = []
    build = archives._build
    monkeypatch.setattr(archives, "_build", lambda *given: (built.append(given[1].name), build(*given)))
    archive = pack(root, tmp_path / "x.zip")
    assert len(load(DataConfig(root=archive))) == len(load(DataConfig(root=archive))) == 12
    copied = shutil.copy(archive, tmp_path / "elsewhere.zip")
    assert len(load(DataConfig(root=copied))) == 12
    assert len(built) == 1
    (root / "art/cat/0.png").unlink()
    assert len(load(DataConfig(root=pack(root, archive)))) == 11
    assert len(built) == 2
    shutil.rmtree(own_cache / "archives" / built[1])  # a cache may be deleted at any time
    assert len(load(DataConfig(root=archive))) == 11
    assert built[2] == built[1]


@pytest.mark.parametrize("verify", [True, "full"])
def test_row_65_an_archive_replaced_by_one_of_its_size_and_time_is_another_one(verify, root, tmp_path, own_cache):
    archive, picture = tmp_path / "x.tar", next(root.rglob("*.png"))
    pack(root, archive)
    before, first = archive.stat(), load(DataConfig(root=archive))
    content = picture.read_bytes()  # whose last four bytes are a checksum that nobody looks at
    picture.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    archive.unlink()
    pack(root, archive)
    os.utime(archive, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert archive.stat().st_size == before.st_size
    second = load(DataConfig(root=archive, verify=verify))
    assert sum(a != b for a, b in zip(first.hashes, second.hashes, strict=True)) == 1


def test_row_65_a_full_check_reads_the_archive_whatever_is_noted_of_it(root, tmp_path, own_cache):
    archive = pack(root, tmp_path / "x.zip")
    place = archives.unpacked(archive, max_gb=1, max_files=99)
    (noted,) = (own_cache / "archives" / "seen").iterdir()
    other = own_cache / "archives" / ("0" * 64)
    shutil.copytree(own_cache / "archives" / noted.read_text(), other)
    noted.write_text(other.name)
    assert other in (found := archives.unpacked(archive, max_gb=1, max_files=99)).parents or found == other
    assert archives.unpacked(archive, max_gb=1, max_files=99, again=True) == place
    assert noted.read_text() != other.name, "the next ordinary check finds the right one"


def test_of_several_at_once_one_unpacks(root, tmp_path, monkeypatch):
    built, found = [], []
    build = archives._build
    monkeypatch.setattr(archives, "_build", lambda *given: (built.append(1), build(*given)))
    archive = pack(root, tmp_path / "x.tar.gz")
    call = lambda: found.append(archives.unpacked(archive, max_gb=1, max_files=99))  # noqa: E731
    threads = [threading.Thread(target=call) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 6 and len(set(found)) == 1 and len(built) == 1


def test_what_a_kill_left_behind_is_removed(root, tmp_path):
    archive = pack(root, tmp_path / "x.zip")
    place = archives.unpacked(archive, max_gb=1, max_files=99)
    draft = place.with_suffix(".partial")
    place.rename(draft)
    (draft / "art" / "cat" / "half.png").write_bytes(b"half")
    again = archives.unpacked(archive, max_gb=1, max_files=99)
    assert again == place and not draft.exists()
    assert not (again / "art/cat/half.png").exists() and (again / "art/cat/0.png").exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_row_34_a_disk_that_takes_no_more_keeps_nothing(code, root, tmp_path, own_cache, monkeypatch):
    written = []
    write = archives._write

    def failing(archive, member, path):
        written.append(path)
        if len(written) == 5:
            raise OSError(code, os.strerror(code), str(path))
        write(archive, member, path)

    monkeypatch.setattr(archives, "_write", failing)
    archive = pack(root, tmp_path / "x.zip")
    with pytest.raises(UserError, match=rf"{os.strerror(code)}\); make room, or set DISAM_PEFT_CACHE"):
        load(DataConfig(root=archive))
    assert len(written) == 5 and kept_in(own_cache) == {"archives", "archives/.lock"}
    monkeypatch.setattr(archives, "_write", write)
    assert len(load(DataConfig(root=archive))) == 12


@pytest.mark.parametrize(("limit", "low", "high"), [("max_archive_gb", 1e-6, 1e-3), ("max_archive_files", 19, 20)])
def test_the_limits_are_the_users(limit, low, high, root, tmp_path):
    archive = pack(root, tmp_path / "x.zip")
    with zipfile.ZipFile(archive) as content:
        assert len(content.namelist()) == 20  # 12 images, 2 other files, 6 folders
    with pytest.raises(UserError, match=f"raise data.{limit}"):
        load(DataConfig(root=archive, **{limit: low}))
    assert len(load(DataConfig(root=archive, **{limit: high}))) == 12


def test_limits_without_an_archive_are_a_mistake():
    with pytest.raises(ValueError, match=r"max_archive_gb has no meaning with data\.root that is no archive; "):
        DataConfig(root="folder", max_archive_gb=3)
    with pytest.raises(ValueError, match=r"max_archive_files has no meaning with data\.table"):
        DataConfig(table="x.zip", max_archive_files=3)


def test_names_that_are_no_archive_of_ours(tmp_path):
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    with pytest.raises(UserError, match=r"is a file; expected a folder .* or one as an archive \(\.zip \.tar "):
        load(DataConfig(root=tmp_path / "x.rar"))
    with pytest.raises(UserError, match=r"gone\.zip does not exist"):
        load(DataConfig(root=tmp_path / "gone.zip"))
    (tmp_path / "x.zip").write_bytes(b"x")
    with pytest.raises(UserError, match=r"gone\.zip does not exist"):
        load(DataConfig(root=tmp_path / "gone.zip"))


def test_check_data_reads_an_archive(root, tmp_path, capsys):
    from disam_peft.cli.app import check_data

    check_data(str(pack(root, tmp_path / "x.tar.xz", "top")), json_file=tmp_path / "found.json")
    assert "12 images" in capsys.readouterr().out
    assert '"domains": [' in (tmp_path / "found.json").read_text()
