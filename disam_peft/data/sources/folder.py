"""Folder trees ``root/<domain>/<class>/*.jpg``."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from disam_peft.config.data import ARCHIVE_SUFFIXES
from disam_peft.data.sources.samples import Fence, Samples, require_domains
from disam_peft.data.transforms.decode import EXTENSIONS
from disam_peft.errors import UserError, did_you_mean

LAYOUT = "root/<domain>/<class>/*.jpg"


def read_folders(root: Path, domains: Sequence[str] | None = None) -> Samples:
    """Every image of the tree, or of these ``domains`` only.

    Hidden files, files of other kinds and files outside of a class folder are left out and counted.

    Raises:
        UserError: no such folder, another layout, or a link that leads out of ``root``.
    """
    import datasets

    _require_folder(root)
    tree = _TreeReader(root)
    wanted = {unicodedata.normalize("NFC", name) for name in domains} if domains is not None else None
    folders = {unicodedata.normalize("NFC", entry.name): entry for entry in tree.folders(str(root))}
    if wanted is not None:
        require_domains(sorted(wanted), folders, str(root))
        folders = {name: entry for name, entry in folders.items() if name in wanted}
    paths: list[str] = []
    labels: list[str] = []
    names: list[str] = []
    for domain, domain_entry in folders.items():
        for class_entry in tree.folders(domain_entry.path):
            found = tree.images(class_entry.path)
            paths += found
            labels += [class_entry.name] * len(found)
            names += [domain] * len(found)
    if not paths:
        raise UserError(f"no images in {root}: expected {LAYOUT}{tree.hint()}")
    relative = [os.path.relpath(path, root) for path in paths]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return Samples(
        images=datasets.Dataset.from_dict({"image": relative}, features=features),
        labels=labels,
        domains=names,
        keys=[unicodedata.normalize("NFC", Path(path).as_posix()) for path in relative],
        origin=str(root),
        base=root.absolute(),
        ignored=dict(sorted(tree.ignored.items())),
    )


def _require_folder(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise UserError(
            f"data.root={root} is a file; expected a folder laid out as {LAYOUT}, or one as an archive "
            f"({' '.join(ARCHIVE_SUFFIXES)}); for a table use data.table"
        )
    parent = root.absolute().parent
    siblings = [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    hint = did_you_mean(root.name, siblings)
    raise UserError(f"data.root={root} does not exist{hint}; expected a folder laid out as {LAYOUT}")


class _TreeReader:
    """Lists a tree level by level in sorted order, and counts the files that are no samples."""

    def __init__(self, root: Path) -> None:
        self.ignored: Counter[str] = Counter()
        self._fence = Fence(root)
        self._root = root
        self._loose = ""  # the first image found where only folders were expected

    def folders(self, path: str) -> list[os.DirEntry[str]]:
        """The folders in a folder, sorted. Files that are there are counted as ignored."""
        kept = []
        for entry in self._entries(path):
            if entry.is_dir():
                kept.append(entry)
            elif _is_image(entry.name):
                self.ignored["image outside a class folder"] += 1
                self._loose = self._loose or entry.path
            else:
                self.ignored[_kind(entry.name)] += 1
        return kept

    def images(self, path: str) -> list[str]:
        """The paths of the image files of a class folder, sorted."""
        kept = []
        for entry in self._entries(path):
            if entry.is_dir():
                raise UserError(
                    f"{entry.path} is a folder where images were expected: {LAYOUT}. If the tree has one more level, "
                    f"name the folder above the domains as data.root (such as {Path(path).parent}); "
                    "otherwise move the images up"
                )
            if not _is_image(entry.name):
                self.ignored[_kind(entry.name)] += 1
            elif entry.is_file() or not os.path.exists(entry.path):  # the data check reports a broken link
                kept.append(entry.path)
            else:
                self.ignored["not a regular file"] += 1
        return kept

    def _entries(self, path: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(path) as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"folder {path} cannot be listed ({error.strerror}); check its permissions") from error
        for entry in entries:
            if entry.name.startswith(".") or entry.name in ("__MACOSX", "Thumbs.db"):
                self.ignored["hidden"] += 1
                continue
            _require_text(entry)
            if entry.is_symlink():
                self._fence.require(entry.path, "the link")
            yield entry

    def hint(self) -> str:
        """Why there may be no images, judged by what was passed over."""
        if self._loose:
            above = Path(self._loose).parent
            if above == self._root:
                return f"; the images lie in {above} itself, without domain and class folders"
            return (
                "; this looks like root/<class>/*.jpg: the level of domains is missing. Put each domain's class "
                f"folders under a folder of its own, such as {self._root}/photo/{above.name}/"
            )
        if self.ignored:
            counts = ", ".join(f"{count} {kind}" for kind, count in self.ignored.most_common(5))
            return f"; passed over: {counts} (read are {' '.join(sorted(EXTENSIONS))})"
        return ""


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _kind(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no extension"


def _require_text(entry: os.DirEntry[str]) -> None:
    try:
        entry.name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"file name {entry.path!r} is not valid UTF-8; rename it") from error
