"""What ``check-data`` prints: the census in a form that fits the terminal, what is wrong, what training will say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from disam_peft.cli.output import Terminal, print_list
from disam_peft.errors import printable

if TYPE_CHECKING:
    from disam_peft.data.census import DataReport, DuplicateGroup
    from disam_peft.experiments.data_verdict import DataVerdict

_Rows = list[list[str]]


def print_data_report(report: DataReport, console: Console | None = None) -> None:
    """The census, then what is wrong with it."""
    console = console or Terminal()
    _print_census(report, console)
    if report.given is not None:
        lines = [[name, *map(str, row)] for name, row in zip(report.domains, report.given, strict=True)]
        lines.append(["all", *(str(sum(row[part] for row in report.given)) for part in range(3))])
        _print_table(console, "given splits (data.given_splits=ignore: not used)", _GIVEN, lines)
    if report.sizes is not None:
        small, median, large = report.sizes.smallest, report.sizes.median, report.sizes.largest
        console.print(
            f"sizes: {small[0]}x{small[1]} to {large[0]}x{large[1]} pixels, median {median[0]:g}x{median[1]:g}"
        )
    if any(name != name.lower() for name in report.prompt_names):
        console.print(
            "in prompts, a class whose words all begin with a capital is written in small letters (House: house); "
            "acronyms, and names in which only some words have capitals, keep them (data.class_names overrides)"
        )
    for kind, count in report.ignored.items():
        where = list(report.ignored_in.get(kind, {}))
        places = ", ".join(name or "the top folder" for name in where[:3])
        more = f" and {len(where) - 3} other folders" if len(where) > 3 else ""
        console.print(f"passed over: {count} {kind}" + (f" in {places}{more}" if where else ""), markup=False)
    print_list(console, "bad files", [f"{bad.source}: {bad.reason}" for bad in report.bad])
    print_list(console, "the same image twice in a domain", [" = ".join(g.sources) for g in report.duplicates_within])
    print_list(
        console,
        "the same image in several domains (a leak once one of them is held out)",
        [" = ".join(g.sources) for g in report.duplicates_across],
    )
    if report.given is not None:
        print_list(console, "the same image in several given splits", [_with(g, g.parts) for g in report.across_parts])
    print_list(console, "the same image with several classes", [_with(g, g.classes) for g in report.conflicts])
    if report.twins:
        print_list(console, "names that differ in case alone", [" = ".join(group) for group in report.twins])
    if report.without_images:
        print_list(console, "domains without an image", list(report.without_images.values()))


def print_verdict(verdict: DataVerdict, console: Console | None = None) -> None:
    """What ``train`` will say of the data, refusals first."""
    console = console or Terminal()
    for refusal in verdict.refusals:
        console.print(f"train will refuse: {refusal}", style="red", markup=False, soft_wrap=True)
    for warning in verdict.warnings:
        console.print(f"train will warn: {warning}", style="yellow", markup=False, soft_wrap=True)
    if verdict.refusals:
        return
    sizes = ", ".join(f"{name} {count}" for name, count in verdict.sizes.items())
    if len(verdict.held_out) > 1:
        which = f"any of the {len(verdict.held_out)} domains can be held out"
        sizes += " (of all domains together)"
    elif verdict.held_out:
        which = f"{verdict.held_out[0]} is held out"
    else:
        which = "nothing is held out"
    console.print(f"train can use these data: {which}; images: {sizes}", style="green", markup=False)


def _with(group: DuplicateGroup, words: Sequence[str]) -> str:
    return f"{' = '.join(group.sources)} ({', '.join(words)})"


_GIVEN = ("domain", "train", "validation", "test")


def _print_census(report: DataReport, console: Console) -> None:
    """Classes by domains, the other way around, or two tables with sums: the first that is no wider than the
    terminal."""
    classes = [
        name if prompt == name else f"{name} ({prompt})"
        for name, prompt in zip(report.classes, report.prompt_names, strict=True)
    ]
    title = f"{report.total} images"
    of_class = [[row[label] for row in report.counts] for label in range(len(classes))]
    by_class: _Rows = [[name, *map(_count, of_class[label])] for label, name in enumerate(classes)]
    by_class.append(["all", *(str(sum(row)) for row in report.counts)])
    by_domain: _Rows = [
        [name, str(sum(row)), *map(_count, row)] for name, row in zip(report.domains, report.counts, strict=True)
    ]
    by_domain.append(["all", str(report.total), *(str(sum(row)) for row in of_class)])
    for header, rows in (
        (["class", *report.domains], by_class),
        (["domain", "all", *report.classes], by_domain),
    ):
        if _width(header, rows) <= console.width:
            _print_table(console, title, header, rows)
            return
    domains = [
        [name, str(sum(row)), f"{sum(map(bool, row))} of {len(row)}", f"{min(row)} to {max(row)}"]
        for name, row in zip(report.domains, report.counts, strict=True)
    ]
    _print_table(console, title, ("domain", "images", "classes", "per class"), domains)
    summed = [
        [name, str(sum(row)), f"{sum(map(bool, row))} of {len(row)}", f"{min(row)} to {max(row)}"]
        for name, row in zip(classes, of_class, strict=True)
    ]
    _print_table(console, "", ("class", "images", "domains", "per domain"), summed)
    console.print("(all counts: --json FILE)")


def _count(number: int) -> str:
    return str(number) if number else "-"


def _width(header: Sequence[str], rows: _Rows) -> int:
    # SIMPLE boxes: a blank on each side of every cell, and one at each end of the line
    return 2 + sum(max(len(printable(cell)) for cell in column) + 2 for column in zip(header, *rows, strict=True))


def _print_table(console: Console, title: str, header: Sequence[str], rows: _Rows) -> None:
    table = Table(title=title or None, box=box.SIMPLE, title_justify="left")
    for number, name in enumerate(header):
        table.add_column(escape(name), justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for row in rows[:-1] if rows and rows[-1][0] == "all" else rows:
        table.add_row(*map(escape, row))
    if rows and rows[-1][0] == "all":
        table.add_section()
        table.add_row(*rows[-1])
    console.print(table)
