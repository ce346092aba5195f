"""``frontier.json``: how a run's numbers change along the line from zero-shot to trained weights. Needs neither torch
nor NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from disam_peft.common.records import Pool, write_json
from disam_peft.common.typed_json import read_typed
from disam_peft.errors import UserError

FRONTIER = "frontier.json"


@dataclass(frozen=True)
class FrontierRow:
    """One number at one alpha. The fields after ``alpha`` are those of ``ResultRow``."""

    alpha: float
    split: str
    domain: str
    metric: str
    value: float | None
    n: int
    pooled: Pool | None = None


@dataclass(frozen=True)
class Frontier:
    """A run between its zero-shot weights (alpha = 0) and its trained ones (alpha = 1), and beyond. The first fields
    are those of ``ResultRow``."""

    backbone: str
    adapter: str
    method: str
    held_out: str | None
    seed: int
    weights: str
    rule: str
    """The rule of selection, and ``metric`` the metric, by which the recommended alpha was chosen on source validation.
    """
    metric: str
    recommended: float
    """The best alpha by source validation; of equals the one nearest to 1."""
    rows: list[FrontierRow]

    @cached_property
    def alphas(self) -> list[float]:
        return list(dict.fromkeys(row.alpha for row in self.rows))

    @property
    def judged(self) -> str | None:
        """The split that nobody chose by: the held-out domain, or where nothing was held out the given test part; None
        where the data give none."""
        splits = {row.split for row in self.rows}
        return next((split for split in ("held_out", "test") if split in splits), None)

    def domains(self, split: str) -> list[str]:
        return list(dict.fromkeys(row.domain for row in self.rows if row.split == split and row.pooled is None))

    def curve(self, split: str, metric: str, domain: str | None = None) -> list[float | None]:
        """A metric at each of ``alphas``; None where it is not defined.

        Args:
            domain: unset: the mean over the domains of the split.
        """
        return [self._values.get((alpha, split, domain, metric)) for alpha in self.alphas]

    @cached_property
    def _values(self) -> dict[tuple[float, str, str | None, str], float | None]:
        return {
            (row.alpha, row.split, row.domain if row.pooled is None else None, row.metric): row.value
            for row in self.rows
            if row.pooled in (None, "mean")
        }


def mean_curve(frontiers: Sequence[Frontier], split: str, metric: str) -> list[float | None]:
    """The mean over several runs, at the alphas that all of them have in common with the first; None where one of them
    has no number."""
    curves = [one.curve(split, metric) for one in frontiers]
    means: list[float | None] = []
    for at_alpha in zip(*curves, strict=True):
        known = [value for value in at_alpha if value is not None]
        means.append(sum(known) / len(known) if len(known) == len(curves) else None)
    return means


def write_frontier(path: Path, frontier: Frontier) -> None:
    """Replace ``path``; a reader sees the old file or the new one."""
    write_json(path, asdict(frontier))


def read_frontier(path: Path) -> Frontier:
    """
    Raises:
        UserError: no such file, or something else than a frontier. Names the file and the line.
    """
    found: Frontier = read_typed(path, Frontier, "a frontier, as disam-peft frontier writes it")
    if not found.rows or found.recommended not in found.alphas:
        raise UserError(f"{path}: recommends alpha={found.recommended:g}, at which it has no number; make it again")
    return found
