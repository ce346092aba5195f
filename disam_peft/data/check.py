"""The data check: every file is read, hashed and decoded once. What was found is kept in the cache between runs."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from disam_peft.common.cache import use
from disam_peft.common.files import cache_folder, write_atomically
from disam_peft.common.progress import track
from disam_peft.data.dataset import DomainDataset, Skipped
from disam_peft.data.transforms.decode import BadImage, decode_image
from disam_peft.errors import UserError

MAX_BAD_SHARE = 0.01
_FORMAT = 4  # of the findings in the cache; to be raised when decoding judges a file differently
_LISTED = 10


@dataclass(frozen=True)
class CheckedFile:
    """What the check found out about one file."""

    sha256: str
    """Empty where the file could not be read at all."""
    width: int
    height: int
    reason: str
    """Why it cannot be used; empty where it can."""


def verified(
    dataset: DomainDataset, *, skip_bad: bool = False, progress: bool = True, again: bool = False
) -> DomainDataset:
    """``dataset`` with the hash of every file, after a check that every file is an image.

    Args:
        again: read all files, also those that an earlier check knows.
        skip_bad: leave bad images out and record them in ``skipped``, if they are at most 1 % of all images.

    Raises:
        UserError: there are bad images; lists up to ten of them and says how many there are.
    """
    known = None if again else remembered(dataset)
    findings = known if known is not None else _examine_files(dataset, progress=progress)
    return with_findings(dataset, findings, skip_bad=skip_bad, remembered=known is not None)


def with_findings(
    dataset: DomainDataset, findings: Sequence[CheckedFile], *, skip_bad: bool, remembered: bool
) -> DomainDataset:
    """``dataset`` with what was found out about each of its samples, see ``verified``.

    Raises:
        UserError: as ``verified``.
    """
    bad = [i for i, finding in enumerate(findings) if finding.reason]
    hashes = tuple(finding.sha256 for finding in findings)
    hashed = replace(dataset, hashes=hashes, remembered=remembered)
    if not bad:
        return hashed
    share = f"{len(bad)} of {len(dataset)} images ({len(bad) / len(dataset):.1%}) cannot be used"
    if not skip_bad or len(bad) > MAX_BAD_SHARE * len(dataset):
        lines = [f"  {dataset.source(i)}: {findings[i].reason}" for i in bad[:_LISTED]]
        if len(bad) > _LISTED:
            lines.append(f"  and {len(bad) - _LISTED} more")
        action = (
            f"more than the {MAX_BAD_SHARE:.0%} that data.skip_bad may leave out; mend or remove them"
            if skip_bad
            else f"mend or remove them, or set data.skip_bad to true (allowed up to {MAX_BAD_SHARE:.0%})"
        )
        raise UserError("\n".join([f"{share}:", *lines, action]))
    warnings.warn(f"{share} and are left out (data.skip_bad)", stacklevel=2)
    kept = hashed.select(i for i, finding in enumerate(findings) if not finding.reason)
    if lost := sorted(set(dataset.present_domains) - set(kept.present_domains)):
        raise UserError(
            f"no image of the domain {', '.join(map(repr, lost))} can be used, for example {dataset.source(bad[0])}: "
            f"{findings[bad[0]].reason}; mend them, or leave the domain out of data.domains"
        )
    skipped = tuple(Skipped(dataset.source(i), findings[i].reason) for i in bad)
    return replace(kept, skipped=dataset.skipped + skipped)


def examine(dataset: DomainDataset, *, progress: bool = True) -> list[CheckedFile]:
    """What is found out about each sample. The findings of an earlier run are taken where ``remembered`` has them."""
    known = remembered(dataset)
    return known if known is not None else _examine_files(dataset, progress=progress)


def remembered(dataset: DomainDataset) -> list[CheckedFile] | None:
    """The findings of an earlier check of the same files: no name, size, time of change or inode is new since. None
    where there are none."""
    cache_file = _cache_file(dataset)
    found = _read_findings(cache_file, len(dataset))
    if found is not None:
        use(cache_file, dataset.origin)
    return found


def _examine_files(dataset: DomainDataset, *, progress: bool) -> list[CheckedFile]:
    cache_file = _cache_file(dataset)  # as the files are now: what changes from here on is noticed the next time
    scan = _scan(dataset)
    findings = list(track(scan, "checking images", total=len(dataset)) if progress else scan)
    # A file that could not be read may become readable without a change of its size or time, so it is checked again.
    if all(finding.sha256 for finding in findings):
        _write_findings(cache_file, findings)
        use(cache_file, dataset.origin)
    return findings


def _scan(dataset: DomainDataset) -> Iterator[CheckedFile]:
    # Threads: hashing and Pillow's decoders release the interpreter lock, and nothing has to be sent to a process.
    threads = min(16, (os.cpu_count() or 1) + 2)
    with ThreadPoolExecutor(threads) as pool:
        indices = iter(range(len(dataset)))
        while chunk := list(islice(indices, 64 * threads)):  # a future per sample of a large set would fill memory
            yield from pool.map(lambda i: _find(dataset, i), chunk)


def _find(dataset: DomainDataset, index: int) -> CheckedFile:
    try:
        data = dataset.content(index)
    except BadImage as error:
        return CheckedFile("", 0, 0, error.reason)
    digest = hashlib.sha256(data).hexdigest()
    try:
        image = decode_image(data, "", max_pixels=dataset.max_pixels)
    except BadImage as error:
        return CheckedFile(digest, 0, 0, error.reason)
    return CheckedFile(digest, image.width, image.height, "")


# -- findings in the cache ----------------------------------------------------------------------------------


def _cache_file(dataset: DomainDataset) -> Path:
    # What holds the embedded images stands for them: they have no time of change of their own.
    identity = (_FORMAT, dataset.fingerprint, str(dataset.base), dataset.max_pixels, dataset.state_of_embedded)
    digest = hashlib.sha256(repr(identity).encode() + dataset.file_states_N4.tobytes()).hexdigest()
    return cache_folder() / "checks" / f"{digest}.json"


def _read_findings(path: Path, count: int) -> list[CheckedFile] | None:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        findings = [CheckedFile(str(sha), int(w), int(h), str(reason)) for sha, w, h, reason in rows]
    except (OSError, ValueError, TypeError):
        return None  # never written, or damaged: look again
    return findings if len(findings) == count else None


def _write_findings(path: Path, findings: list[CheckedFile]) -> None:
    rows = [[f.sha256, f.width, f.height, f.reason] for f in findings]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(rows))
    except OSError as error:
        warnings.warn(
            f"the data check cannot be remembered in {path.parent} ({error.strerror}) and will run again next "
            "time; set DISAM_PEFT_CACHE to a folder that can be written",
            stacklevel=2,
        )
