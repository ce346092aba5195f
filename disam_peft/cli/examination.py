"""The examination on a terminal."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from disam_peft.doctor.examine import Examination
from disam_peft.doctor.finding import Finding

COLOURS = {"ok": "green", "failed": "bold red", "not available": "yellow"}


def print_examination(examination: Examination, console: Console | None = None) -> None:
    """Environment, one line per check with what was measured below it, and the sum."""
    console = console or Console()
    around = "  ".join(f"{name} {value}" for name, value in examination.environment.items())
    console.print(around, style="dim", markup=False, highlight=False)
    title = f"{escape(examination.subject)}, on synthetic images"
    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
    table.add_column("check")
    for name in ("measured", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for finding in examination.findings:
        table.add_row(*_cells(finding))
    console.print(table)
    counts = {verdict: sum(f.verdict == verdict for f in examination.findings) for verdict in COLOURS}
    summed = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    console.print(f"{summed}; {examination.seconds:.0f} s", highlight=False)


def _cells(finding: Finding) -> tuple[str, str, str, str]:
    colour = COLOURS[finding.verdict]
    return (
        f"{escape(finding.check)}\n[dim]  {escape(finding.what)}[/dim]",
        _number(finding.measured),
        _number(finding.limit),
        f"[{colour}]{finding.verdict}[/{colour}]",
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:.1e}"
