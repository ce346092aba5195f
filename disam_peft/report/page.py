"""One self-contained HTML page: no script, no request, everything inside; readable on a phone and on paper."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from disam_peft.report.figures import accuracy_bars, domain_curves
from disam_peft.report.runs import RunRecord
from disam_peft.report.tables import METHOD_TITLES, compare_held_out


@dataclass(frozen=True)
class Picture:
    """A PNG with a caption."""

    caption: str
    png: bytes

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class _Group:
    """The runs of one adapter, seed and held-out domain, method by method."""

    held_out: str
    about: str
    losses: Markup
    weights: Markup


def build_report(
    runs: Sequence[RunRecord],
    output: Path,
    *,
    title: str = "Results",
    introduction: Sequence[str] = (),
    pictures: Sequence[Picture] = (),
) -> None:
    """Write the page for ``runs`` to ``output``. Names from data and recipes are escaped.

    Args:
        introduction: paragraphs before the first table.
        pictures: shown above it.
    """
    # one loader for the one template that ships here; autoescape for all that comes from outside
    loader = PackageLoader("disam_peft.report", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    tables = compare_held_out(row for run in runs for row in run.rows)
    page = environment.get_template("page.html.j2").render(
        title=title,
        introduction=introduction,
        pictures=pictures,
        runs=[run for run in runs if run.steps],
        # Markup: our own SVG, in which matplotlib has escaped every label
        tables=[(table, Markup(accuracy_bars(table))) for table in tables],
        groups=_groups(runs),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")


def _groups(runs: Sequence[RunRecord]) -> list[_Group]:
    order = list(METHOD_TITLES)

    def place(run: RunRecord) -> tuple[str, str, str, int]:
        row = run.trained
        return row.held_out, row.backbone, row.adapter, row.seed

    groups = []
    for (held_out, backbone, adapter, seed), members in groupby(sorted(runs, key=place), key=place):
        shown = sorted((run for run in members if run.steps), key=lambda run: order.index(run.trained.method))
        if shown:
            groups.append(
                _Group(
                    held_out,
                    f"{adapter} on {backbone}, seed {seed}",
                    Markup(domain_curves(shown, "domain_loss", "loss")),
                    Markup(domain_curves(shown, "domain_weight", "weight in the ascent")),
                )
            )
    return groups
