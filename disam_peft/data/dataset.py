"""The samples of a run, each an image with a class and a domain, and views of a part of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from disam_peft.common.file_hashes import FileState, place_and_state
from disam_peft.data.sources.given_splits import GivenPart
from disam_peft.data.sources.samples import MAX_FILE_BYTES
from disam_peft.data.transforms.decode import MAX_PIXELS, BadImage, decode_image
from disam_peft.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

IMAGE = "image"


@dataclass(frozen=True)
class Skipped:
    """A sample that ``skip_bad`` left out."""

    source: str
    reason: str


@dataclass(frozen=True, eq=False)
class PixelPlan:
    """Training reads its images from a store of resized pixels, which is built when it is first needed."""

    whole: DomainDataset
    """All samples that were loaded. One store serves every view of them, whatever domain is held out."""
    side: int | Literal["auto"]


@dataclass(frozen=True, eq=False)
class DomainDataset:
    """N samples. ``select`` gives views, which keep the numbers of classes and domains. N is used so in this file.

    Attributes:
        classes: names as in the source, sorted; ``labels`` counts in them.
        prompt_names: the same classes, as words for a prompt.
        domains: names, sorted; ``domain_ids`` counts in them. A view may lack some, see ``present_domains``.
        labels, domain_ids: (N,) int64.
        keys: the permanent name of each sample: its path below the root, with ``/``, or its row. Splits depend on it.
        images: Arrow table with the one column ``image`` of {bytes, path}.
        rows: (N,) the row of ``images`` for each sample.
        base: the folder that relative paths start from.
        origin: where the table came from, for messages.
        given_parts: the part that the source itself puts each sample into, "train", "validation" or "test"; None
            where it does not say.
        ignored: files that the reader of the source left out because they are no samples, counted by kind.
        ignored_in: of these, kind -> folder -> number.
        skipped: what ``skip_bad`` left out.
        hashes: sha256 of every file; None where the data check has not run.
        remembered: whether ``hashes`` are those of an earlier check: no size, time of change or inode is new since.
        pixel_plan: from which store of pixels training reads; None: it decodes the files.
    """

    images: Dataset
    rows: np.ndarray
    labels: np.ndarray
    domain_ids: np.ndarray
    keys: tuple[str, ...]
    classes: tuple[str, ...]
    prompt_names: tuple[str, ...]
    domains: tuple[str, ...]
    origin: str
    base: Path | None = None
    max_pixels: int = MAX_PIXELS
    given_parts: tuple[GivenPart, ...] | None = None
    ignored: Mapping[str, int] = field(default_factory=dict)
    ignored_in: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    hashes: tuple[str, ...] | None = None
    remembered: bool = False
    pixel_plan: PixelPlan | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image:
        """Sample ``index`` as an upright RGB image.

        Raises:
            BadImage: it cannot be read or decoded; names the file.
        """
        return decode_image(self.content(index), self.source(index), max_pixels=self.max_pixels)

    def content(self, index: int) -> bytes:
        """The image file of sample ``index``, undecoded.

        Raises:
            BadImage: it cannot be read, or has more than 1 GiB.
        """
        entry = self._entry(index)
        if entry["bytes"] is not None:
            return entry["bytes"]
        try:
            with open(self._path(entry["path"]), "rb") as file:
                if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                    reason = f"larger than {MAX_FILE_BYTES} bytes, which no usable image is"
                    raise BadImage.of(self.source(index), reason)
                return file.read()
        except OSError as error:
            raise BadImage.of(self.source(index), f"cannot be read ({error.strerror or error})") from error

    def source(self, index: int) -> str:
        """The file, or the row of the table, that sample ``index`` comes from."""
        entry = self._entry(index)
        if entry["bytes"] is None:
            return self._path(entry["path"])
        inner = f" ({entry['path']})" if entry["path"] else ""
        return f"row {int(self.rows[index])} of {self.origin}{inner}"

    def _entry(self, index: int) -> dict:
        return self.images[int(self.rows[index])][IMAGE]

    def _path(self, path: str) -> str:
        return os.path.join(self.base, path) if self.base is not None else path

    # -- views -----------------------------------------------------------------------------------------------

    def select(self, indices: Iterable[int] | np.ndarray) -> DomainDataset:
        """A view of the samples at ``indices``, in that order."""
        chosen = np.fromiter(indices, dtype=np.int64)
        if len(chosen) and not (chosen.min() >= 0 and chosen.max() < len(self)):
            raise IndexError(f"indices {chosen.min()} to {chosen.max()} of a dataset of {len(self)} samples")
        return replace(
            self,
            rows=self.rows[chosen],
            labels=self.labels[chosen],
            domain_ids=self.domain_ids[chosen],
            keys=tuple(self.keys[i] for i in chosen),
            given_parts=tuple(self.given_parts[i] for i in chosen) if self.given_parts is not None else None,
            hashes=tuple(self.hashes[i] for i in chosen) if self.hashes is not None else None,
        )

    def in_parts(self, parts: Iterable[GivenPart]) -> DomainDataset:
        """A view of the samples that the source puts into one of these parts; of none where it does not say."""
        wanted, given = set(parts), self.given_parts or ()
        return self.select(i for i, part in enumerate(given) if part in wanted)

    def with_domains(self, names: Iterable[str]) -> DomainDataset:
        """A view of the samples of these domains.

        Raises:
            UserError: a domain that has no samples here; names the close ones.
        """
        wanted = [self.domain_id(name) for name in names]
        return self.select(np.flatnonzero(np.isin(self.domain_ids, wanted)))

    def domain_id(self, name: str) -> int:
        """The number of a domain that has samples here.

        Raises:
            UserError: it has none, or there is no such domain.
        """
        present = self.present_domains
        if name not in present:
            raise UserError(
                f"domain {name!r} has no samples in {self.origin}{did_you_mean(name, present)} "
                f"(found: {', '.join(present) or 'none'})"
            )
        return self.domains.index(name)

    @cached_property
    def present_domains(self) -> tuple[str, ...]:
        """The domains that have samples in this view."""
        return tuple(self.domains[d] for d in np.unique(self.domain_ids))

    # -- identity --------------------------------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> str:
        """sha256, hex, over keys, classes, domains, given parts and file sizes, in order; independent of where the data
        lie."""
        digest = hashlib.sha256()
        sizes_N = self.sizes_and_times[0]
        for i, key in enumerate(self.keys):
            names = (key, self.classes[self.labels[i]], self.domains[self.domain_ids[i]], str(sizes_N[i]))
            digest.update("\0".join(names).encode() + b"\1")
        if self.given_parts is not None:
            digest.update("\0".join(self.given_parts).encode())
        return digest.hexdigest()

    @cached_property
    def content_identity(self) -> str:
        """sha256, hex, over ``fingerprint`` and contents: the check's hashes, or where it has not run, the place and
        all that the file system notes about the files (for embedded images, about the table)."""
        digest = hashlib.sha256(self.fingerprint.encode())
        if self.hashes is not None:
            digest.update("".join(self.hashes).encode())
        else:
            digest.update(f"{self.base}\0{self.state_of_embedded}\0".encode() + self.file_states_N4.tobytes())
        return digest.hexdigest()

    @cached_property
    def state_of_embedded(self) -> str:
        """What the table of embedded images calls its own state, and what the file system notes about its files; empty
        where all images are files of their own."""
        if not (self.sizes_and_times[1] == 0).any():
            return ""
        told = [getattr(self.images, "_fingerprint", "")]
        for file in sorted(str(file["filename"]) for file in self.images.cache_files):
            told.append(place_and_state(Path(file)) if os.path.exists(file) else f"{file} is gone")
        return json.dumps(told)

    @property
    def sizes_and_times(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) size in bytes (-1: the file is gone) and (N,) time of change in ns (0: embedded), both int64."""
        return self.file_states_N4[:, 0], self.file_states_N4[:, 1]

    @cached_property
    def file_states_N4(self) -> np.ndarray:
        """(N, 4) int64: size in bytes (-1: the file is gone), time of change in ns, time of change of what the file
        system notes about it in ns, and inode; all but the size are 0 for embedded images."""
        import pyarrow.compute as pc

        column = self.images.with_format("arrow")[:][IMAGE]
        paths = pc.struct_field(column, "path")
        lengths = pc.binary_length(pc.struct_field(column, "bytes"))
        states_N4 = np.zeros((len(self), 4), dtype=np.int64)
        lengths_all, paths_all = lengths.to_pylist(), paths.to_pylist()
        for i, row in enumerate(self.rows):
            if lengths_all[row] is not None:
                states_N4[i, 0] = lengths_all[row]
                continue
            try:
                states_N4[i] = FileState.of(self._path(paths_all[row]))
            except OSError:
                states_N4[i, 0] = -1
        return states_N4

    def content_hash(self, index: int) -> str:
        """sha256 of the image file of sample ``index``, hex.

        Raises:
            BadImage: it cannot be read.
        """
        if self.hashes is not None:
            return self.hashes[index]
        return hashlib.sha256(self.content(index)).hexdigest()
