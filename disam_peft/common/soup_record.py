"""``soup.json``: what the adapter of a folder was averaged from. Loads no torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from disam_peft.common.files import write_atomically
from disam_peft.common.records import json_text
from disam_peft.common.typed_json import read_typed

SOUP = "soup.json"
SOUP_WEIGHTS = "soup"
"""What stands in ``weights`` in the rows of results of a soup."""
SoupMethod = Literal["uniform", "greedy"]


@dataclass(frozen=True)
class Ingredient:
    """One run whose adapter was averaged, or was not.

    Attributes:
        run: its folder.
        adapter: sha256, hex, of the tensors of its adapter.
        weights: whose they are: ``raw``, or the name of an average.
        seed: of the run.
        kept: whether it is part of the soup.
        score: of the run alone on source validation, by the rule of the soup's recipe; None: it was not measured.
        soup_score: of the soup with it and with what was kept before it; None: it was not measured.
        method: by which it was trained, as in recipes; empty in files of earlier versions.
    """

    run: str
    adapter: str
    weights: str
    seed: int
    kept: bool
    score: float | None = None
    soup_score: float | None = None
    method: str = ""


@dataclass(frozen=True)
class SoupRecord:
    """What a soup was made of, in the order in which it was made.

    Attributes:
        score: of the soup on source validation; None: there are no images that every ingredient held back.
    """

    method: SoupMethod
    ingredients: list[Ingredient]
    score: float | None = None

    @property
    def kept(self) -> list[Ingredient]:
        return [one for one in self.ingredients if one.kept]


def write_soup(folder: Path, record: SoupRecord) -> None:
    """Write the file to the folder of a soup."""
    write_atomically(folder / SOUP, json_text(asdict(record)))


def read_soup(folder: Path) -> SoupRecord | None:
    """What the adapter in ``folder`` was averaged from; None for the folder of a run that was trained.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    path = folder / SOUP
    if not path.is_file():
        return None
    found: SoupRecord = read_typed(path, SoupRecord, "the ingredients of a soup")
    return found


def soup_settings(folder: Path) -> dict[str, Any]:
    """What tells a soup from runs with the same recipe, among the settings of its recipe; empty for a run."""
    record = read_soup(folder)
    if record is None:
        return {}
    digest = hashlib.sha256(json.dumps(sorted(one.adapter for one in record.kept)).encode()).hexdigest()
    methods = sorted({one.method for one in record.kept})
    of = f" ({' and '.join(methods)})" if len(methods) > 1 else ""  # the recipe has that of the first alone
    return {"soup": f"{record.method} of {len(record.kept)}{of}, {digest[:8]}"}
