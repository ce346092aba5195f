"""Words by which data say which part a sample belongs to: the names of folders, of hub splits, cells of a column."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Literal, get_args

from disam_peft.errors import UserError

GivenPart = Literal["train", "validation", "test"]
PARTS: Final[tuple[GivenPart, ...]] = get_args(GivenPart)

WORDS: Final[dict[str, GivenPart]] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
"""Word, in small letters -> the part that it names."""

SPLIT_COLUMNS: Final = ("split", "splits", "partition", "subset", "set")
"""Names, in small letters, by which a column of splits is recognised where ``data.split_column`` is not set."""


def part_of(word: str) -> GivenPart | None:
    """The part that a word names, in any case; None for every other word."""
    return WORDS.get(word.strip().casefold())


def are_splits(names: Iterable[str], what: str) -> bool:
    """Whether ``names``, which stand in one place of the data, are given splits: every one of them is such a word.

    Args:
        what: the place, as the beginning of a message ("the folders photo/train, photo/val").

    Raises:
        UserError: a training part and another one are named, and something else beside them, so that both readings
            would be wrong for some of the samples.
    """
    found = sorted(set(names))
    parts = {part for name in found if (part := part_of(name))}
    others = [name for name in found if part_of(name) is None]
    if not others:
        return bool(found)
    if "train" in parts and len(parts) > 1:
        words = ", ".join(repr(name) for name in found if part_of(name))
        listed = ", ".join(map(repr, others[:5])) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise UserError(
            f"{what} are given splits ({words}) beside other names ({listed}); rename or move the others "
            f"({', '.join(WORDS)} are read as splits), or set data.given_splits to ignore if none of them is a split"
        )
    return False


def parts_of_column(cells: Sequence[str], where: str, *, required: bool) -> list[GivenPart] | None:
    """The part of each cell of a column of splits; None if the column is about something else.

    Args:
        where: the column and its table, for messages.
        required: the user named the column, so that every cell must be a split.

    Raises:
        UserError: some cells name splits and others do not.
    """
    if not are_splits(cells, where):
        if not required:
            return None
        strange = next(cell for cell in cells if part_of(cell) is None)
        raise UserError(f"{where} holds {strange!r}; expected one of {', '.join(WORDS)} in every row")
    return [WORDS[cell.strip().casefold()] for cell in cells]
