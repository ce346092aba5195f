"""Lists a tree of folders: where its images are, and which files are no samples."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from disam_peft.data.sources.samples import Fence
from disam_peft.data.transforms.formats import looks_like_image, readable_extensions
from disam_peft.errors import UserError

MAX_LEVELS: Final = 4
"""Levels of folders that are looked into: one more than any layout that is read has, so that it can be named."""
OUTSIDE: Final = "image outside a class folder"
NOT_REGULAR: Final = "not a regular file"


@dataclass(frozen=True)
class ImageFolder:
    """A folder that holds images itself."""

    parts: tuple[str, ...]
    """Names of the folders from the root down to this one; none for the root itself."""
    files: tuple[str, ...]
    """Names of the images in it, sorted."""

    @property
    def depth(self) -> int:
        """Levels below the root."""
        return len(self.parts)


class FolderTree:
    """What lies below a root, level by level in sorted order.

    Attributes:
        folders: every folder, the root left out, as the names that lead to it.
        images: every folder that holds images.
        ignored: kind of file -> number of files that are no samples.
        ignored_in: kind of file -> folder -> number, for messages about where they are.
    """

    def __init__(self, root: Path, top: Sequence[str] | None = None) -> None:
        """List ``root``.

        Args:
            top: of the folders in ``root`` itself, look into these only. None: into all.

        Raises:
            UserError: a folder that cannot be listed, a name that is no text, a link that leads out of ``root``.
        """
        self.root = root
        self.folders: list[tuple[str, ...]] = []
        self.images: list[ImageFolder] = []
        self.ignored: Counter[str] = Counter()
        self.ignored_in: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._fence = Fence(root)
        self._readable = readable_extensions()
        self._list((), None if top is None else frozenset(top))

    def passed_over(self, parts: tuple[str, ...], kind: str, count: int = 1) -> None:
        """Count files in the folder ``parts`` that are no samples."""
        if count:
            self.ignored[kind] += count
            self.ignored_in[kind]["/".join(parts)] += count

    def holds_pictures(self, parts: tuple[str, ...]) -> bool:
        """Whether there is a file below that looks like an image, readable or not; also true where there is no file
        at all, and so nothing that would say that the folder is for something else."""
        inside = "/".join(parts)
        kinds = {
            kind
            for kind, folders in self.ignored_in.items()
            if any(folder == inside or folder.startswith(f"{inside}/") for folder in folders)
        }
        return not kinds or any(kind == OUTSIDE or looks_like_image(kind) for kind in kinds)

    def _list(self, parts: tuple[str, ...], top: frozenset[str] | None) -> None:
        files: list[str] = []
        below: list[str] = []
        for entry in self._entries(parts):
            if entry.is_dir():
                if len(parts) == MAX_LEVELS:
                    self.passed_over(parts, f"folder more than {MAX_LEVELS} levels deep")
                elif top is None or entry.name in top:
                    below.append(entry.name)
            elif self._is_readable(entry.name):
                if entry.is_file() or not os.path.exists(entry.path):  # the data check reports a broken link
                    files.append(entry.name)
                else:
                    self.passed_over(parts, NOT_REGULAR)
            else:
                self.passed_over(parts, _kind(entry.name))
        if files:
            self.images.append(ImageFolder(parts, tuple(files)))
        for name in below:
            self.folders.append((*parts, name))
            self._list((*parts, name), None)

    def _entries(self, parts: tuple[str, ...]) -> Iterator[os.DirEntry[str]]:
        path = os.path.join(self.root, *parts)
        try:
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"folder {path} cannot be listed ({error.strerror}); check its permissions") from error
        for entry in entries:
            if entry.name.startswith(".") or entry.name in ("__MACOSX", "Thumbs.db"):
                self.passed_over(parts, "hidden")
                continue
            _require_text(entry)
            if entry.is_symlink():
                self._fence.require(entry.path, "the link")
            yield entry

    def _is_readable(self, name: str) -> bool:
        return os.path.splitext(name)[1].lower() in self._readable


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no extension"


def _require_text(entry: os.DirEntry[str]) -> None:
    try:
        entry.name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"file name {entry.path!r} is not valid UTF-8; rename it") from error
