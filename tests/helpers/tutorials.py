"""Reads docs/extending.md as its reader does: new files, and changes to files that are there.

A fenced block with a title is a file. ``python title="path"`` is a new file. ``diff title="path"`` changes a file: each
of its hunks (separated by ``@@``) is found by its context and removed lines, which must stand in the file once. A line
that ends in ``...`` stands for every line that begins so, and what follows in it is kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "extending.md"
REST = "..."


@dataclass(frozen=True)
class Block:
    """A fenced block: the heading that it stands under, its language, the file that it is about, and its text."""

    heading: str
    language: str
    path: str
    text: str


def blocks(page: str) -> list[Block]:
    """All fenced blocks with a title, in order."""
    found, heading = [], ""
    pattern = r'^## (?P<heading>[^\n]*)$|^```(?P<language>\w+) title="(?P<path>[^"]+)"\n(?P<text>.*?)^```$'
    for match in re.finditer(pattern, page, re.M | re.S):
        if match["heading"] is not None:
            heading = match["heading"]
        else:
            found.append(Block(heading, match["language"], match["path"], match["text"]))
    return found


def applied(block: Block, before: str | None) -> str:
    """The file's text after this block; ``before`` is None where there is no such file.

    Raises:
        ValueError: a new file that is there already, a change of a file that is not, or a hunk that fits nowhere or in
            several places.
    """
    if block.language != "diff":
        if before is not None:
            raise ValueError(f"{block.path} is there already; a change of it is a diff block")
        return block.text
    if before is None:
        raise ValueError(f"{block.path} is not there")
    for hunk in block.text.split("@@\n"):
        before = _with_hunk(before, hunk.splitlines(), block.path)
    return before


def _with_hunk(text: str, lines: list[str], path: str) -> str:
    wanted = [line[1:] for line in lines if not line.startswith("+")]
    pattern = "\n".join(
        re.escape(line.removesuffix(REST)) + (r"(.*)" if line.endswith(REST) else "") for line in wanted
    )
    places = list(re.finditer(rf"^{pattern}$", text, re.M))
    if not wanted or len(places) != 1:
        raise ValueError(f"{path}: a hunk fits in {len(places)} places, not in one:\n" + "\n".join(lines))
    rests = iter(places[0].groups())
    out: list[str] = []
    rest = ""
    for line in lines:
        if line.endswith(REST):
            if not line.startswith("+"):
                rest = next(rests)  # an added line has the rest of the removed line before it
            line = line.removesuffix(REST) + rest
        if not line.startswith("-"):
            out.append(line[1:])
    start, end = places[0].span()
    return text[:start] + "\n".join(out) + text[end:]


def apply_all(found: list[Block], root: Path) -> None:
    """Write the files of all blocks below ``root``."""
    for block in found:
        path = root / block.path
        after = applied(block, path.read_text(encoding="utf-8") if path.exists() else None)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(after, encoding="utf-8")
