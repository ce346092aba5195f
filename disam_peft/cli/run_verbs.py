"""The verb ``runs``: what runs there are, how far each has come, and what tells them apart."""

from __future__ import annotations

import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from disam_peft.cli.terminal import say

if TYPE_CHECKING:
    from rich.console import Console

    from disam_peft.experiments.run_list import ListedRun

_COLOURS = {"finished": "green", "interrupted": "yellow", "running": "cyan", "damaged": "bold red"}
_OTHER_COLUMNS = 37  # letters beside the first column: steps, state and result
_SHARED = ("backbone", "adapter", "method", "data")


def runs(
    folder: Annotated[Path, typer.Argument(help="A folder with runs at any depth.")] = Path("runs"),
    sort: Annotated[
        str, typer.Option(help="A column (name, held_out, state, steps, result, ...) or a setting, e.g. adapter.rank.")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every setting.")] = False,
) -> None:
    """List runs: what they are, what tells them apart, how far they have come, and what they reached."""
    from disam_peft.experiments.run_list import list_runs, sort_runs, told_apart_by

    found = list_runs(folder)
    if sort:
        found = sort_runs(found, sort)
    if as_json:
        from disam_peft.common.records import json_text

        differing = told_apart_by(found)
        sys.stdout.write(json_text({"told_apart_by": differing, "runs": [asdict(run) for run in found]}))
    elif not found:
        say(f"no run in {folder}")
    else:
        print_runs(found, folder)


def print_runs(found: Sequence[ListedRun], folder: Path, console: Console | None = None) -> None:
    """A run's folder, steps, state and result; then, in at most two lines, what tells it from most of the others. What
    all runs have in common stands above."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from disam_peft.cli.output import Terminal
    from disam_peft.experiments.run_list import apart_from_most

    console = console or Terminal()
    readable = [run for run in found if run.settings]
    shared = {name: {getattr(run, name) for run in readable} for name in _SHARED}
    common = [f"{name} {escape(str(*values))}" for name, values in shared.items() if len(values) == 1]
    counts = Counter(run.state for run in found)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    console.print(f"{len(found)} {'run' if len(found) == 1 else 'runs'} in {escape(str(folder))}: {states}")
    if common and len(found) > 1:
        console.print(f"all of them: {', '.join(common)}")
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("top-1 (%)", justify="right", no_wrap=True)
    twins = _same_name_other_data(readable)
    for run, telling in zip(found, apart_from_most(found), strict=True):
        place = Path(run.folder)
        differ = [name for name in _SHARED if len(shared[name]) > 1 and run.settings]
        apart = [getattr(run, name) for name in differ if name != "data"]
        apart += sorted(telling, key=lambda words: "=" in words.partition(" ")[0])  # words before numbers
        apart += [run.data] if "data" in differ else []
        if run.data in twins and run.data_identity:
            apart.append(f"data {run.data_identity[:8]}")
        told = run.problem or _in_lines(apart, console.width - _OTHER_COLUMNS)
        shown = escape(place.relative_to(folder).as_posix() if place != folder else run.folder)
        table.add_row(
            f"{shown}\n[dim]{escape(textwrap.indent(told, '  '))}[/dim]" if told else shown,
            f"{run.steps}/{run.all_steps}" if run.all_steps else ("none" if run.settings else "-"),
            f"[{_COLOURS[run.state]}]{run.state}[/]",
            "-" if run.result is None else f"{100 * run.result:.1f}",
        )
    console.print(table)


def _in_lines(parts: Sequence[str], width: int) -> str:
    """The parts in at most two lines; how many have no place there is said."""
    for count in range(len(parts), 0, -1):
        left = f"and {len(parts) - count} more" if count < len(parts) else ""
        lines = textwrap.wrap(", ".join([*parts[:count], *filter(None, [left])]), max(24, width))
        if len(lines) <= 2 or count == 1:
            return "\n".join(lines)
    return ""


def _same_name_other_data(found: Sequence[ListedRun]) -> set[str]:
    identities: dict[str, set[str]] = {}
    for run in found:
        if run.data_identity:
            identities.setdefault(run.data, set()).add(run.data_identity)
    return {name for name, different in identities.items() if len(different) > 1}
