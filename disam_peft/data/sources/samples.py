"""What every reader of a source returns: an Arrow table of images, and the class, domain and key of each sample."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from disam_peft.data.sources.given_splits import GivenPart, part_of
from disam_peft.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

MAX_FILE_BYTES = 2**30
"""Largest image file, which is read as a whole. The largest image that is accepted by default fits uncompressed."""

UNNAMED_DOMAIN: Final = "unnamed"
"""The one domain of data that do not say which domain a sample belongs to."""


@dataclass(frozen=True)
class Samples:
    """Samples in the order of their source; row i of ``images`` has ``labels[i]``, ``domains[i]``, ``keys[i]`` and
    ``given_parts[i]``."""

    images: Dataset
    """An Arrow table with the one column ``image`` of {bytes, path}, not decoded."""
    labels: Sequence[str]
    domains: Sequence[str]
    keys: Sequence[str]
    origin: str
    """What messages call the source."""
    base: Path | None = None
    """The folder that relative paths start from."""
    ignored: Mapping[str, int] = field(default_factory=dict)
    """Kind of file -> number of files that are no samples."""
    ignored_in: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Kind of file -> folder below ``base`` -> number, for messages."""
    without_images: Mapping[str, str] = field(default_factory=dict)
    """Domains that the source has a place for but no image that can be used -> what to say of them."""
    given_parts: Sequence[GivenPart] | None = None
    """Which part the source itself puts each sample into; None where it does not say."""


class Fence:
    """Refuses paths that lead out of the given folders: by ``..``, as absolute names, or through symbolic links."""

    def __init__(self, *roots: Path) -> None:
        self._roots = [os.path.join(os.path.realpath(root), "") for root in roots]
        self._parents: dict[str, str] = {}
        self._name = " or ".join(map(str, roots))

    def require(self, path: str, what: str) -> None:
        """Pass if ``path`` lies inside when every link is followed.

        Raises:
            UserError: it lies outside. ``what`` is the beginning of the message.
        """
        parent, name = os.path.split(path)
        if name in ("", ".", "..") or os.path.islink(path):
            real = os.path.realpath(path)
        else:  # tables list many files in few folders, whose real paths are kept
            if parent not in self._parents:
                self._parents[parent] = os.path.realpath(parent)
            real = os.path.join(self._parents[parent], name)
        if not any(os.path.join(real, "").startswith(root) for root in self._roots):
            raise UserError(
                f"{what} {path} leads to {real}, outside of {self._name}; "
                "copy the file there, or name the folder that holds all images as the root"
            )


def require_domains(wanted: Iterable[str], known: Iterable[str], origin: str) -> None:
    """Refuse a name of ``data.domains`` that is not among ``known``.

    Raises:
        UserError: there is such a name; names the close ones.
    """
    known = sorted(known)
    for name in wanted:
        if name not in known:
            raise UserError(
                f"data.domains: no domain {name!r} in {origin}{did_you_mean(name, known)} (found: {', '.join(known)})"
                + (
                    "; this name was read as a given split: set data.given_splits to ignore if it is a domain"
                    if part_of(name)
                    else ""
                )
            )
