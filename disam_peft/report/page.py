"""The report as one HTML page that contains everything: no script, no request; it fits phones and paper."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from disam_peft.common.files import output_folder, write_atomically, write_output
from disam_peft.report.configurations import configurations
from disam_peft.report.drawing import draw
from disam_peft.report.figures import accuracy_bars, configuration_dots
from disam_peft.report.groups import group_runs
from disam_peft.report.held_out_tables import held_out_tables
from disam_peft.report.runs import RunRecord


@dataclass(frozen=True)
class Picture:
    """A PNG with a caption."""

    caption: str
    png: bytes

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


def build_report(
    runs: Sequence[RunRecord],
    output: Path,
    *,
    title: str = "Results",
    introduction: Sequence[str] = (),
    pictures: Sequence[Picture] = (),
    figures: Path | None = None,
) -> None:
    """Write the page for ``runs`` to ``output``, and its figures and tables as files. Names from data and recipes are
    escaped.

    Args:
        introduction: paragraphs before the first table.
        pictures: shown above it.
        figures: folder for every figure as SVG and PNG, and for ``tables.md`` and ``tables.tex``; unset:
            ``report_figures`` beside a page ``report.html``. The page does not need it.
    """
    # one loader for the one template that ships here; autoescape for all that comes from outside
    loader = PackageLoader("disam_peft.report", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["number"] = lambda value: "n/a" if value is None else f"{value:.4f}"
    tables = held_out_tables(configurations(runs))
    bars = [
        draw(f"00_accuracy_{number}", f"Dots. {table.title}", partial(configuration_dots, table))
        if table.labels
        else draw(f"00_accuracy_{number}", f"Bar chart. {table.title}", partial(accuracy_bars, table))
        for number, table in enumerate(tables, start=1)
    ]
    groups = group_runs(runs)
    page = environment.get_template("page.html.j2").render(
        title=title,
        introduction=introduction,
        pictures=pictures,
        runs=[run for run in runs if run.steps],
        count=len(runs),
        tables=list(zip(tables, bars, strict=True)),
        groups=groups,
    )
    output_folder(output.parent)
    write_output(output, page)
    folder = figures if figures is not None else output.with_name(f"{output.stem}_figures")
    output_folder(folder)
    for drawing in [*bars, *(drawing for group in groups for drawing in group.drawings)]:
        drawing.save(folder)
    every = [*tables, *(group.sharpness for group in groups if group.sharpness is not None)]
    write_atomically(folder / "tables.md", "\n\n".join(table.markdown() for table in every) + "\n")
    named = [f"% {' '.join(table.title.split())}\n{table.latex()}" for table in every]
    write_atomically(folder / "tables.tex", "\n\n".join(named) + "\n")
