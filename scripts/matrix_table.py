"""The outcomes of `scripts/matrix.py` as a table of docs/guide/backbones.md: a line for each family, a column for each
adapter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

BEGIN, END = "<!-- the next lines are written by scripts/matrix.py -->", "<!-- end of what scripts/matrix.py writes -->"
WORKS, REFUSED = "works", "refused"

FAMILIES: tuple[tuple[str, str], ...] = (
    (r"coca_.*roberta|coca_", "CoCa"),
    (r"roberta|xlm-roberta", "RoBERTa and XLM-RoBERTa texts"),
    (r"mt5-", "mT5 texts"),
    (r"nllb-", "NLLB texts"),
    (r".*-CLIPA", "CLIPA"),
    (r".*-worldwide", "MetaCLIP 2"),
    (r"ViT-.*-SigLIP", "SigLIP, SigLIP 2"),
    (r"PE-Core", "PE-Core"),
    (r"EVA0", "EVA01, EVA02"),
    (r"MobileCLIP2?-[BL]", "MobileCLIP-B, -L"),
    (r"MobileCLIP", "MobileCLIP-S"),
    (r"ViTamin", "ViTamin"),
    (r"convnext", "ConvNeXt"),
    (r"RN\d", "CLIP's ResNets"),
    (r"swin|vit_relpos", "Swin, relative positions"),
    (r"vit_medium", "average-pooled ViT"),
    (r"ViT-", "open_clip's ViT"),
)
"""By the beginning of a name of open_clip; the first that fits counts. A class of transformers stands for itself."""


class Outcome(Protocol):
    """What the table needs of a cell."""

    @property
    def family(self) -> str: ...

    @property
    def model(self) -> str: ...

    @property
    def small(self) -> str: ...

    @property
    def adapter(self) -> str: ...

    @property
    def outcome(self) -> str: ...

    @property
    def note(self) -> str: ...


def family_of(family: str, model: str) -> str:
    """The line of the table that a model stands in."""
    if family == "transformers":
        return f"`{model}`"
    return next((label for pattern, label in FAMILIES if re.match(pattern, model)), model)


def table(cells: Sequence[Outcome], columns: Sequence[str], models: int) -> str:
    """Markdown: how often which outcome, the table, and what its signs mean.

    Args:
        models: number of all architectures, tried or not.
    """
    rows: dict[str, list[Outcome]] = {}
    for cell in cells:
        rows.setdefault(family_of(cell.family, cell.model), []).append(cell)
    counts = Counter(cell.outcome for cell in cells)
    tried, small = len({cell.model for cell in cells}), len({cell.small for cell in cells})
    told = ", ".join(f"{counts[name]} {name}" for name in sorted(counts, key=lambda name: -counts[name]))
    fewer = {column: sum(cell.adapter == column for cell in cells) for column in columns}
    partly = [f"{column} ({count})" for column, count in fewer.items() if count < tried]
    lines = [
        f"Tried: {tried} of {models} architectures ({small} different ones once they are small) with {len(columns)} "
        f"adapters, {len(cells)} cells: {told}." + (f" Not on all of them: {', '.join(partly)}." if partly else ""),
        "",
        f"| architectures | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    notes: dict[str, list[str]] = {}
    names = sorted({cell.model for cell in cells}, key=len, reverse=True)
    for family, of_family in rows.items():
        number = len({cell.model for cell in of_family})
        signs = [_sign([cell for cell in of_family if cell.adapter == column], notes, names) for column in columns]
        lines.append(f"| {family}{f' ({number})' if number > 1 else ''} | {' | '.join(signs)} |")
    sentences = [f"{number + 1}: {note}" for number, note in enumerate(notes)]
    return "\n".join([*lines, "", *(f"{one}  " for one in sentences)]).rstrip() + "\n"


def _sign(cells: Sequence[Outcome], notes: dict[str, list[str]], names: Sequence[str]) -> str:
    """``yes``, ``no``, or how many of the family work; with the numbers of what is to be said."""
    if not cells:
        return "not tried"
    working = sum(cell.outcome == WORKS for cell in cells)
    told = []
    for cell in cells:
        if cell.note:
            note = cell.note
            for name in names:  # one sentence stands for all models
                note = note.replace(name, "the model")
            note = re.sub(r"\s+", " ", note)[:180]
            known = notes.setdefault(note, [])
            known.append(cell.model)
            told.append(list(notes).index(note) + 1)
    numbers = "".join(f" ({number})" for number in sorted(set(told))[:3])
    failed = any(cell.outcome not in (WORKS, REFUSED) for cell in cells)
    word = "yes" if working == len(cells) else "no" if working == 0 else f"{working} of {len(cells)}"
    return f"{'FAILED ' if failed else ''}{word}{numbers}"


def write_table(page: Path, cells: Sequence[Outcome], columns: Sequence[str], models: int) -> None:
    """Put the table between its marks on the page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{table(cells, columns, models)}\n{END}{after}", encoding="utf-8")
