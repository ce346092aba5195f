"""Folder trees ``root/<domain>/<class>/*.jpg``, also with a level of given splits or without the level of domains.

| images lie in                                                                | are read as                        |
|------------------------------------------------------------------------------|------------------------------------|
| ``<domain>/<class>/``                                                        | a domain and a class               |
| ``<class>/``                                                                 | a class in the one unnamed domain  |
| ``<split>/<domain>/<class>/``, ``<domain>/<split>/<class>/``                 | the same, with a given part        |
| ``<split>/<class>/``                                                         | the unnamed domain, with a part    |

A level is one of splits where all of its folders have names such as train, val and test (``given_splits.WORDS``).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from disam_peft.config.data import ARCHIVE_SUFFIXES
from disam_peft.data.sources.folder_tree import OUTSIDE, FolderTree, ImageFolder
from disam_peft.data.sources.given_splits import GivenPart, are_splits, part_of
from disam_peft.data.sources.samples import UNNAMED_DOMAIN, Samples, require_domains
from disam_peft.data.transforms.formats import readable_extensions
from disam_peft.errors import UserError, did_you_mean

LAYOUT: Final = "root/<domain>/<class>/*.jpg"
_LEVELS: Final = ("first", "second", "third", "fourth")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class _Layout:
    """What the levels of folders above the images mean."""

    depth: int
    split: int | None
    """The level of given splits, counted from 0; None: there is none."""

    @property
    def others(self) -> list[int]:
        """The levels that are not splits: those of the domain, where there is one, and of the class."""
        return [level for level in range(self.depth) if level != self.split]

    @property
    def domain(self) -> int | None:
        """The level of domains; None where there is one unnamed domain."""
        return self.others[0] if len(self.others) == 2 else None


def read_folders(root: Path, domains: Sequence[str] | None = None, *, use_given_splits: bool = True) -> Samples:
    """Every image of the tree, or of these ``domains`` only.

    Hidden files, files of other kinds and files outside of a class folder are left out and counted.

    Args:
        use_given_splits: read folders called train, val and test as given splits, where ``domains`` does not name them.

    Raises:
        UserError: no such folder, another layout, no such domain, or a link that leads out of ``root``.
    """
    import datasets

    tree, named = _listed(root, domains)
    layout = _layout(tree, use_given_splits=use_given_splits, domains_are_first=named)
    for folder in tree.images:
        if folder.depth < layout.depth:
            tree.passed_over(folder.parts, OUTSIDE, len(folder.files))
    folders = [folder for folder in tree.images if folder.depth == layout.depth]
    names = [_nfc(f.parts[layout.domain]) if layout.domain is not None else UNNAMED_DOMAIN for f in folders]
    if domains is not None:
        wanted = {_nfc(name) for name in domains}
        require_domains(sorted(wanted), set(names), str(root))
        chosen = [i for i, name in enumerate(names) if name in wanted]
        folders, names = [folders[i] for i in chosen], [names[i] for i in chosen]
    paths = ["/".join((*folder.parts, name)) for folder in folders for name in folder.files]
    counts = [len(folder.files) for folder in folders]
    labels = [folder.parts[layout.others[-1]] for folder in folders]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return Samples(
        images=datasets.Dataset.from_dict({"image": paths}, features=features),
        labels=_repeated(labels, counts),
        domains=_repeated(names, counts),
        keys=[_nfc(path) for path in paths],
        origin=str(root),
        base=root.absolute(),
        ignored=dict(sorted(tree.ignored.items())),
        ignored_in={kind: dict(where) for kind, where in tree.ignored_in.items()},
        without_images=_without_images(tree, layout, set(names)) if domains is None else {},
        given_parts=_parts(folders, layout, counts),
    )


def require_images(root: Path) -> None:
    """Pass if there is an image below ``root`` in a place where some layout has them.

    Raises:
        UserError: there is none; says what is there.
    """
    tree, _ = _listed(root, None)
    shallowest = min((folder for folder in tree.images if folder.parts), key=lambda folder: folder.depth)
    if shallowest.depth > 3:
        raise UserError(_too_deep(tree, shallowest, ignored=False))


def _listed(root: Path, domains: Sequence[str] | None) -> tuple[FolderTree, bool]:
    """The tree, and whether its first level is that of the ``domains`` that are asked for; the others are then not
    looked at."""
    _require_folder(root)
    top: list[str] | None = None
    if domains is not None:
        wanted, there = {_nfc(name) for name in domains}, dict[str, str]()
        with suppress(OSError):  # the tree says why it cannot be listed
            there = {_nfc(path.name): path.name for path in root.iterdir() if path.is_dir()}
        if wanted <= there.keys():
            top = [there[name] for name in sorted(wanted)]
    tree = FolderTree(root, top)
    if not any(folder.depth for folder in tree.images):
        raise UserError(f"no images in {root}: expected {LAYOUT}{_hint(tree)}")
    return tree, top is not None


def _layout(tree: FolderTree, *, use_given_splits: bool, domains_are_first: bool) -> _Layout:
    counts = Counter[int]()
    for folder in tree.images:
        counts[folder.depth] += len(folder.files)
    depth = max(counts)
    deepest = [folder for folder in tree.images if folder.depth == depth]
    split = None
    for level in range(int(domains_are_first), min(depth, 3)) if use_given_splits else ():
        names = {folder.parts[level] for folder in deepest}
        if are_splits(names, f"the folders on the {_LEVELS[level]} level of {tree.root}"):
            split = level
            break
    if depth - (split is not None) > 2:
        raise UserError(_too_deep(tree, deepest[0], ignored=not use_given_splits))
    if depth == 1 and split is not None:
        raise UserError(
            f"the images of {tree.root} lie in {', '.join(f.parts[0] for f in deepest)} without class folders; "
            "expected root/<split>/<class>/*.jpg (if these are classes, set data.given_splits to ignore)"
        )
    above = sum(count for level, count in counts.items() if 0 < level < depth)
    if above > counts[depth]:
        raise UserError(
            f"most images of {tree.root} ({above} of {sum(counts.values())}) lie higher in the tree than "
            f"{'/'.join(deepest[0].parts)}/{deepest[0].files[0]}: it is not clear which folders are classes; "
            f"bring all of them to one level, {LAYOUT} or root/<class>/*.jpg"
        )
    return _Layout(depth, split)


def _parts(folders: Sequence[ImageFolder], layout: _Layout, counts: Sequence[int]) -> list[GivenPart] | None:
    if layout.split is None:
        return None
    parts = [part_of(folder.parts[layout.split]) for folder in folders]
    return _repeated([part for part in parts if part is not None], counts)


def _without_images(tree: FolderTree, layout: _Layout, found: set[str]) -> dict[str, str]:
    """A folder that stands where domains stand, and gave no sample, would be a domain that is gone without a word."""
    if layout.domain is None:
        return {}
    places: dict[str, list[tuple[str, ...]]] = {}
    for parts in tree.folders:
        if len(parts) == layout.domain + 1 and _nfc(parts[-1]) not in found:
            places.setdefault(_nfc(parts[-1]), []).append(parts)
    return {
        name: f"domain {name!r} of {tree.root} has no image that can be used ({_inside(tree, folders)}); read are "
        f"{' '.join(sorted(readable_extensions()))}, laid out as {LAYOUT}. Convert or move its files, remove the "
        "folder, or name the domains to use in data.domains"
        for name, folders in places.items()
        if any(map(tree.holds_pictures, folders))
    }


def _inside(tree: FolderTree, folders: Sequence[tuple[str, ...]]) -> str:
    starts = tuple("/".join(parts) + "/" for parts in folders)
    kinds = Counter[str]()
    for kind, where in tree.ignored_in.items():
        kinds[kind] += sum(count for folder, count in where.items() if f"{folder}/".startswith(starts))
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5) if count)
    return f"passed over: {listed}" if listed else "its folder is empty"


def _too_deep(tree: FolderTree, folder: ImageFolder, *, ignored: bool) -> str:
    path = tree.root.joinpath(*folder.parts)
    tops = sorted({f.parts[0] for f in tree.images if f.parts})
    if ignored and any(part_of(name) for name in folder.parts):
        action = "it looks like given splits: set data.given_splits to auto"
    elif len(tops) == 1:
        action = (
            f"If the tree has one more level, name the folder above the domains as data.root (such as "
            f"{tree.root / tops[0]}); otherwise move the images up into their class folders"
        )
    else:
        action = (
            "Move the images up into their class folders, or write a table with their paths, classes and domains "
            "(data.table)"
        )
    return f"{path} is a folder where images were expected: {LAYOUT}. {action}"


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


def _hint(tree: FolderTree) -> str:
    """Why there may be no images, judged by what was passed over."""
    if tree.images:
        return f"; the images lie in {tree.root} itself, without domain and class folders"
    if tree.ignored:
        counts = ", ".join(f"{count} {kind}" for kind, count in tree.ignored.most_common(5))
        return f"; passed over: {counts} (read are {' '.join(sorted(readable_extensions()))})"
    return ""


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _repeated(values: Sequence[_Value], counts: Sequence[int]) -> list[_Value]:
    return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
