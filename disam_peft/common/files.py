"""Files and folders that appear whole or not at all, and the folder for what can be computed again."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from disam_peft.errors import UserError

DRAFT_SUFFIX = ".tmp"


def write_atomically(path: Path, content: bytes | str, *, durable: bool = False) -> None:
    """Replace the file ``path`` by ``content``. Whoever reads it sees the old file or the new one, never a part.

    For the program's own files, which are no links: ``write_output`` is for paths that the user gave.

    Args:
        content: text is written as UTF-8.
        durable: return only when the content and the name of the file are on the disk, so that a power cut cannot take
            them back.

    Raises:
        UserError: ``path`` is a link or a folder, which somebody else made.
        OSError: the file cannot be written. The old file is then untouched, and no draft is left behind.
    """
    require_own_file(path)
    data = content.encode() if isinstance(content, str) else content
    # A name of its own for every attempt: other processes, on other machines too, may write the same file now. It is
    # cut, because a name of the greatest length that is allowed has no room for more.
    draft = path.with_name(f".{path.name[:60]}.{secrets.token_hex(4)}{DRAFT_SUFFIX}")
    try:
        if durable:
            write_through(draft, data)
        else:
            draft.write_bytes(data)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def require_no_link(path: Path) -> None:
    """Pass if ``path`` is no symbolic link, or is not there.

    Raises:
        UserError: it is one. What is written to it would replace a file elsewhere.
    """
    if path.is_symlink():
        raise UserError(
            f"{path} is a link to {os.readlink(path)}, and our own files are not written through links; remove the "
            "link, or choose another output"
        )


def require_own_file(path: Path) -> None:
    """Pass if ``path`` is a file, or is not there. A folder cannot be replaced by a file, and whoever opens a pipe may
    wait for ever.

    Raises:
        UserError: it is a link, a folder or a pipe.
    """
    require_no_link(path)
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise UserError(f"{path} is {what}, where a file of our own belongs; remove it, or choose another output")


def append_line(path: Path, line: str) -> None:
    """Append a line to a file of the program's own, which is made where it is missing.

    Raises:
        UserError: ``path`` is a link, a folder or a pipe.
        OSError: the file cannot be written.
    """
    require_own_file(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def write_output(path: Path, content: bytes | str) -> None:
    """Write a file to a path that the user gave: as ``write_atomically``, but a link stays a link, and the file that it
    leads to is replaced. What is no file, such as a pipe or ``/dev/stdout``, is written to. Folders are made.

    Raises:
        UserError: it cannot be written; names the path and the cause.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if path.exists() and not path.is_file():  # a folder is an OSError
            path.write_bytes(data)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(os.path.realpath(path)), data)
    except OSError as error:
        raise _not_writable(path, error) from error


def output_folder(path: Path) -> Path:
    """The folder ``path`` that the user gave, which is made where it is missing.

    Raises:
        UserError: it cannot be made; names the path and the cause.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(path, error) from error
    return path


def _not_writable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be written ({error.strerror or error}); choose another place")


def is_draft(path: Path) -> bool:
    """Whether a file is what ``write_atomically`` leaves behind when its process is killed."""
    return path.name.startswith(".") and path.name.endswith(DRAFT_SUFFIX)


def write_through(path: Path, content: bytes) -> None:
    """Write a new file; its content is on the disk when this returns. Its name may not be, see ``sync_folder``.

    Raises:
        FileExistsError: there is a file of this name.
    """
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def wait_for_disk(path: Path) -> None:
    """Return when the content of a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names of the files in ``folder`` are on the disk. Windows has no such call; nothing is done."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def published(directory: Path, *, replaces: str | None = None) -> Iterator[Path]:
    """Yield an empty folder beside ``directory``; rename it to ``directory`` on success, remove it on any error.

    Args:
        replaces: a folder that holds a file of this name may be replaced. Its old content stays until the new content
            is complete.

    Raises:
        UserError: ``directory`` exists, is not empty, and may not be replaced.
    """
    occupied = directory.exists() and not (directory.is_dir() and not any(directory.iterdir()))
    if occupied and not (replaces and (directory / replaces).is_file()):
        raise UserError(f"{directory} already exists and is not empty; choose another folder or remove it first")
    directory.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, not the system's temporary folder: a rename works only within one file system.
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()  # with the user's own permissions; mkdtemp's folder is private
        yield new
        if occupied:
            directory.rename(old)
        new.rename(directory)
    except BaseException:
        if old.exists() and not directory.exists():
            old.rename(directory)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def cache_folder() -> Path:
    """The folder for what can be computed or copied again: ``$DISAM_PEFT_CACHE``, or ``~/.cache/disam_peft``."""
    given = os.environ.get("DISAM_PEFT_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "disam_peft"
