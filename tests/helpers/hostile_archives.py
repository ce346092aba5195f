"""Archives that a stranger might send: every kind of trick, in variations drawn with a seed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.helpers.tiny_images import write_image

TAR_MODES = ("tar", "tar.gz", "tar.xz", "tar.bz2")
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "tar": bytes,
    "tar.gz": gzip.compress,
    "tar.xz": lzma.compress,
    "tar.bz2": bz2.compress,
}
Entry = tarfile.TarInfo | tuple[str, bytes]
IMAGE = "photo/dog/0.png"


def picture(folder: Path) -> bytes:
    return write_image(folder / "photo/dog/0.png", (24, 24)).read_bytes()


class Maker:
    """Writes one archive with honest members first, so that something would be on the disk when it is refused."""

    def __init__(self, folder: Path, rng: Random) -> None:
        self.folder, self.rng, self.image = folder, rng, picture(folder / "source")

    # -- containers ------------------------------------------------------------------------------------------

    def tar(
        self, *entries: tarfile.TarInfo | tuple[str, bytes], form: int = tarfile.PAX_FORMAT, mode: str = ""
    ) -> Path:
        return self.packed(self.tar_bytes(*entries, form=form), mode or self.rng.choice(TAR_MODES))

    def tar_bytes(self, *entries: Entry, form: int = tarfile.PAX_FORMAT) -> bytes:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form, errors="surrogateescape") as archive:
            for entry in ((IMAGE, self.image), *entries):
                if isinstance(entry, tarfile.TarInfo):
                    archive.addfile(entry)
                else:
                    info = tarfile.TarInfo(entry[0])
                    info.size = len(entry[1])
                    archive.addfile(info, io.BytesIO(entry[1]))
        return buffer.getvalue()

    def packed(self, content: bytes, mode: str) -> Path:
        return self.file(f"x.{mode}", PACKERS[mode](content))

    def file(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def zip(self, *entries: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
        path = self.folder / "x.zip"
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, content in ((IMAGE, self.image), *entries):
                archive.writestr(name, content, None if isinstance(name, zipfile.ZipInfo) else method)
        return path

    def either(self, *entries: tuple[str, bytes]) -> Path:
        return self.zip(*entries) if self.rng.random() < 0.5 else self.tar(*entries)

    # -- names -----------------------------------------------------------------------------------------------

    def absolute_name(self) -> Path:
        return self.either((f"{self.folder}/escaped.png", self.image))

    def dot_dot(self) -> Path:
        up = "../" * self.rng.randint(1, 12)
        return self.either((self.rng.choice(["", "photo/", "photo/dog/"]) + up + "escaped.png", self.image))

    def drive(self) -> Path:
        return self.either((self.rng.choice(["C:/escaped.png", "c:escaped.png", "photo/D:/1.png"]), self.image))

    def backslash(self) -> Path:
        return self.either(
            (self.rng.choice(["..\\..\\escaped.png", "photo\\dog\\1.png", "\\\\host\\x.png"]), self.image)
        )

    def control_character(self) -> Path:
        return self.either((f"photo/dog/a{chr(self.rng.choice([1, 7, 10, 13, 27, 127, 133]))}b.png", self.image))

    def nul_in_a_zip_name(self) -> Path:
        path = self.zip(("photo/dog/1.png#.exe", self.image))
        return self.file("x.zip", path.read_bytes().replace(b"1.png#", b"1.png\0"))

    def undecodable_name(self) -> Path:
        return self.tar(("photo/dog/\udcff\udcfe.png", self.image), form=tarfile.GNU_FORMAT)

    def long_name(self) -> Path:
        return self.either((self.rng.choice(["photo/dog/" + "x" * 300, "é" * 140, "/".join("abcdefgh" * 200)]), b"x"))

    def deep_name(self) -> Path:
        return self.either(("d/" * self.rng.randint(40, 90) + "1.png", self.image))

    def case_twins(self) -> Path:
        return self.either((self.rng.choice(["photo/dog/0.PNG", "photo/Dog/1.png", "PHOTO/cat/1.png"]), self.image))

    def accent_twins(self) -> Path:
        name = "photo/dog/caf\u00e9.png"
        return self.either((name, self.image), (unicodedata.normalize("NFD", name), self.image))

    def the_same_name_twice(self) -> Path:
        return self.either((self.rng.choice([IMAGE, f"./{IMAGE}", "photo//dog/0.png"]), b"other"))

    def file_and_folder(self) -> Path:
        if self.rng.random() < 0.5:
            return self.either((f"{IMAGE}/1.png", self.image))
        return self.either(("photo/dog", self.image))

    # -- kinds -----------------------------------------------------------------------------------------------

    def tar_link(self, kind: bytes, target: str, name: str = "photo/dog/link.png") -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        return info

    def symbolic_link(self) -> Path:
        return self.tar(self.tar_link(tarfile.SYMTYPE, self.rng.choice(["/etc/passwd", "../../../x", "0.png"])))

    def through_a_link(self) -> Path:
        return self.tar(
            self.tar_link(tarfile.SYMTYPE, str(self.folder), "photo/cat"), ("photo/cat/escaped.png", self.image)
        )

    def hard_link(self) -> Path:
        return self.tar(self.tar_link(tarfile.LNKTYPE, self.rng.choice(["/etc/passwd", "../escaped.png", IMAGE])))

    def device(self) -> Path:
        info = self.tar_link(self.rng.choice([tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]), "")
        info.devmajor, info.devminor = 1, 8
        return self.tar(info)

    def sparse(self) -> Path:
        info = tarfile.TarInfo("photo/dog/1.png")
        info.pax_headers = {"GNU.sparse.size": str(2**50), "GNU.sparse.map": "0,1", "GNU.sparse.numblocks": "1"}
        return self.tar(info)

    def zip_kind(self) -> Path:
        info = zipfile.ZipInfo("photo/dog/1.png")
        info.create_system = 3
        info.external_attr = self.rng.choice([0o120777, 0o010644, 0o020644, 0o060644, 0o140644, 0o040755]) << 16
        return self.zip((info, b"/etc/passwd"))

    def folder_with_content(self) -> Path:
        return self.zip((zipfile.ZipInfo("photo/cat/"), self.image))

    def encrypted(self) -> Path:
        content = bytearray(self.zip(("photo/dog/1.png", self.image)).read_bytes())
        flag = self.rng.choice([0x1, 0x41])
        for mark, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            place = content.rindex(mark) + offset
            struct.pack_into("<H", content, place, struct.unpack_from("<H", content, place)[0] | flag)
        return self.file("x.zip", bytes(content))

    def other_method(self) -> Path:
        return self.zip(("photo/dog/1.png", self.image), method=self.rng.choice([zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]))

    # -- sizes -----------------------------------------------------------------------------------------------

    def too_many_members(self) -> Path:
        return self.either(*((f"photo/dog/{i}.txt", b"") for i in range(1, 120)))

    def too_large(self) -> Path:
        return self.either(*((f"photo/dog/{i}.png", self.rng.randbytes(300_000)) for i in range(1, 8)))

    def too_large_a_file(self) -> Path:
        return self.either(("photo/dog/1.png", self.rng.randbytes(1_300_000)))

    def bomb(self) -> Path:
        return self.either(("photo/dog/1.png", bytes(1_500_000)))

    def overlapping(self) -> Path:
        """Many entries of the directory for one piece of data, as in the bombs that reach a petabyte."""
        path = self.folder / "x.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(IMAGE, self.rng.randbytes(20_000))
            [first] = archive.filelist
            for i in range(self.rng.randint(2, 40)):
                again = zipfile.ZipInfo(f"photo/dog/o{i}.png")
                for field in ("compress_type", "CRC", "compress_size", "file_size", "header_offset", "flag_bits"):
                    setattr(again, field, getattr(first, field))
                archive.filelist.append(again)
        return path

    def lying_size(self) -> Path:
        content = bytearray(self.zip(("photo/dog/1.png", self.rng.randbytes(5_000))).read_bytes())
        place = content.rindex(b"PK\1\2") + 24  # uncompressed size in the directory
        struct.pack_into("<I", content, place, self.rng.choice([0, 10, 4_999, 5_001, 2**32 - 2]))
        return self.file("x.zip", bytes(content))

    def giant_header(self) -> Path:
        """An extended header or long name that asks for gigabytes of memory at once."""
        info = tarfile.TarInfo("././@LongLink")
        info.type = self.rng.choice([tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
        info.size = self.rng.choice([2**31, 2**33, -512])
        return self.packed(info.tobuf(tarfile.GNU_FORMAT) + bytes(4096), self.rng.choice(TAR_MODES))

    def chain_of_headers(self) -> Path:
        info = tarfile.TarInfo("x")
        info.type = tarfile.XHDTYPE
        return self.packed(info.tobuf() * 5_000 + bytes(1024), self.rng.choice(TAR_MODES))

    def backwards(self) -> Path:
        """A member of negative size, which sends a reader back to where it was, for ever."""
        info = tarfile.TarInfo("photo/dog/1.png")
        info.size = -512 * self.rng.randint(1, 3)
        content = self.tar_bytes()
        return self.packed(content[:-10240] + info.tobuf(tarfile.GNU_FORMAT) + bytes(1024), "tar")

    def hidden_in_an_extended_header(self) -> Path:
        info = tarfile.TarInfo("photo/dog/1.png")
        info.pax_headers = {"path": self.rng.choice(["../escaped.png", str(self.folder / "escaped.png")])}
        return self.tar(info)

    def large_dictionary(self) -> Path:
        return self.file("x.tar.xz", with_dictionary(lzma.compress(self.tar_bytes())))

    # -- damage ----------------------------------------------------------------------------------------------

    def truncated(self) -> Path:
        path = self.either(*((f"photo/dog/{i}.png", self.rng.randbytes(2_000)) for i in range(1, 5)))
        content = path.read_bytes()
        zeros = 10_300 if path.suffix == ".tar" else 30  # a tar ends in zeros that mean nothing
        return self.file(path.name, content[: self.rng.randint(0, len(content) - zeros)])

    def flipped_bits(self) -> Path:
        """Inside the packed content, where every bit counts."""
        path = self.zip(("photo/dog/1.png", self.rng.randbytes(4_000)))
        if self.rng.random() < 0.7:
            path = self.tar(("photo/dog/1.png", self.rng.randbytes(4_000)), mode=self.rng.choice(TAR_MODES[1:]))
        content = bytearray(path.read_bytes())
        place = content.rindex(b"PK\3\4") + 100 if path.suffix == ".zip" else 40
        content[self.rng.randint(place, place + 1_500)] ^= 1 << self.rng.randrange(8)
        return self.file(path.name, bytes(content))

    def damaged_tar_header(self) -> Path:
        """The library would take it for the end, and leave out what follows."""
        content = bytearray(self.tar_bytes(*((f"photo/dog/{i}.png", self.image) for i in range(1, 5))))
        content[content.index(b"photo/dog/2.png") + self.rng.randrange(100)] ^= 0x20
        return self.packed(bytes(content), self.rng.choice(TAR_MODES))

    def another_name_in_front_of_the_content(self) -> Path:
        content = self.zip(("photo/dog/1.png", self.image)).read_bytes()
        return self.file("x.zip", content.replace(b"photo/dog/1.png", b"../../../../e.p", 1))

    def something_else(self) -> Path:
        content = self.rng.choice(
            [b"", b"<!doctype html><p>404", self.image, b"Rar!\x1a\7\0" + bytes(99), bytes(20_480)]
        )
        return self.file(f"x.{self.rng.choice(['zip', *TAR_MODES])}", content)

    # -- content ---------------------------------------------------------------------------------------------

    def an_archive_in_it(self) -> Path:
        """Like the archive that holds itself: what is inside is never opened."""
        inner = self.zip().read_bytes()
        path = self.folder / "x.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(self.rng.choice(["r/r.zip", "photo/dog/r.zip", "r.tar.gz"]), inner)
        return path

    def nothing_of_use(self) -> Path:
        mode = self.rng.choice(["zip", *TAR_MODES])
        names = self.rng.choice([(), ("readme.txt",), ("0.png",), ("dog/0.png",), ("a/b/c/d/e/0.png",)])
        if mode == "zip":
            path = self.folder / "x.zip"
            with zipfile.ZipFile(path, "w") as archive:
                for name in names:
                    archive.writestr(name, self.image)
            return path
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name))
        return self.packed(buffer.getvalue(), mode)


def with_dictionary(xz: bytes) -> bytes:
    """The same file with a header that asks for a dictionary of 1.5 GB."""
    content = bytearray(xz)
    size = (content[12] + 1) * 4
    place = content.index(b"\x21\x01", 12, 12 + size) + 2  # the filter's id, the length of its properties
    content[place] = 37
    struct.pack_into("<I", content, 12 + size - 4, zlib.crc32(bytes(content[12 : 12 + size - 4])))
    return bytes(content)


KINDS = tuple(
    name
    for name, member in vars(Maker).items()
    if not name.startswith("_") and name not in {"tar", "tar_bytes", "packed", "file", "zip", "either", "tar_link"}
)
