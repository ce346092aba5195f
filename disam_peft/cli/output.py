"""All tables that verbs print on the terminal, made from records, reports and findings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from disam_peft.common.records import RAW, Pool, ResultRow, pool_title
from disam_peft.errors import printable

if TYPE_CHECKING:
    from disam_peft.common.cache import Kept
    from disam_peft.doctor.check_result import CheckResult
    from disam_peft.doctor.examine import Examination
    from disam_peft.experiments.demo import DemoLine
    from disam_peft.report.comparison import Comparison, TextTable

_LISTED = 20
VERDICT_COLOURS = {"ok": "green", "failed": "bold red", "not available": "yellow"}


class Terminal(Console):
    """A console that makes every text ``printable`` first, and takes ``:cat:`` for what it is.

    Square brackets have a meaning in the cells of tables: names go there through ``rich.markup.escape``.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def print_held_out(rows: Iterable[ResultRow], console: Console | None = None) -> None:
    """What the runs of one training are worth: on the domains that they held out; where nothing was held out, on the
    test part of the data, or on held-back images of every domain where the data give none."""
    found = list(rows)
    if any(row.held_out is None for row in found):
        split = "test" if any(row.split == "test" for row in found) else "source_validation"
        shown = [row for row in found if row.split == split and row.pooled is None]
        which = "the test part of the data" if split == "test" else "held-back images"
        title, corner = f"Accuracy on {which} (top-1, %)", "domain"
    else:
        shown = [row for row in found if row.split == "held_out" and row.is_of(row.held_out)]
        title, corner = "Accuracy on the held-out domain (top-1, %)", "held out"
    _print_by_domain(shown, title, corner, console or Terminal())


def _print_by_domain(shown: list[ResultRow], title: str, corner: str, console: Console) -> None:
    """One line per domain, zero-shot beside the adapter; and their mean, if there are several.

    Weights are named where averages of them were kept. The columns after the accuracies are, for each domain,
    of the last rows there, which are those of the weights that selection chose. What is wider than the terminal is
    turned: one line per column.
    """
    averaged = any(row.weights != RAW for row in shown)

    def column(row: ResultRow) -> str:
        name = "zero-shot" if row.method == "zero_shot" else row.method
        return f"{name}, {row.weights}" if averaged and row.method != "zero_shot" else name

    values = {(row.domain, column(row), row.metric): row.value for row in shown}
    domains = list(dict.fromkeys(domain for domain, _, _ in values))
    methods = list(dict.fromkeys(method for _, method, _ in values))
    last = {row.domain: column(row) for row in shown if row.chosen is not False}  # of each domain the last row

    def line(name: str, of: Iterable[str]) -> tuple[str, ...]:
        chosen = list(of)

        def mean(method: str | None, metric: str) -> float | None:
            found = [values.get((domain, method or last[domain], metric)) for domain in chosen]
            numbers = [value for value in found if value is not None]
            return sum(numbers) / len(numbers) if len(numbers) == len(chosen) else None

        return (
            escape(name),
            *(_percent(mean(method, "top1")) for method in methods),
            _percent(mean(None, "macro_accuracy")),
            _number(mean(None, "nll")),
            _number(mean(None, "ece")),
        )

    header = (corner, *methods, "macro", "NLL", "ECE")
    lines = [line(domain, [domain]) for domain in domains]
    of_mean = [line(pool_title("mean", domains), domains)] if len(domains) > 1 else []
    is_wide = (
        sum(max(map(cell_len, column)) + 3 for column in zip(header, *lines, *of_mean, strict=True)) > console.width
    )
    if is_wide:  # several averages: a line for each of them
        header, *lines = zip(header, *lines, *of_mean, strict=True)
        of_mean = []
    table = Table(title=title, box=box.SIMPLE, title_justify="left", min_width=len(title) if is_wide else None)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for cells in lines:
        table.add_row(*cells)
    if of_mean:
        table.add_section()
        table.add_row(*of_mean[0])
    console.print(table)
    if averaged:
        weights = {row.domain: row.weights for row in shown if row.chosen is not False}
        same = set(weights.values())
        whose = same.pop() if len(same) == 1 else ", ".join(f"{domain}: {name}" for domain, name in weights.items())
        console.print(f"macro, NLL and ECE are those of the weights that were chosen ({whose})", markup=False)


def _split_title(split: str) -> str:
    return "source val." if split == "source_validation" else split.replace("_", " ")


def print_demo(lines: Iterable[DemoLine], held_out: str, console: Console | None = None) -> None:
    """Every arm of the demo on the held-out domain, and what it cost."""
    texts = [
        (
            line.arm,
            *(f"{100 * line.accuracy:.1f}", f"{line.nll:.3f}", f"{line.ece:.3f}"),
            "none" if line.gradients is None else str(line.gradients),
        )
        for line in lines
    ]
    columns = ("arm", "accuracy (%)", "NLL", "ECE", "gradients")
    _print_texts(console or Terminal(), f"On {held_out}, which training did not see", columns, texts)


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """What was measured and what can be said of it, measure by measure; then what failed."""
    from disam_peft.report.comparison import value_tables, verdict_table

    console = console or Terminal()
    for metric in comparison.metrics:
        values = value_tables(comparison, metric)[0]
        if _width(values) > console.width:
            values = min(values, values.transposed(), key=_width)
        if _width(values) > console.width:
            values = values.without_deviations()
        _print_texts(console, values.title, values.columns, values.lines)
        verdicts = verdict_table(comparison, metric)
        shown = [verdicts.columns.index(name) for name in ("mean", "95 % interval", "verdict", "p, Holm")]
        named = verdicts.columns.index("difference") + 1  # condition and pair in one
        lines = [(": ".join(line[:named]), *(line[i] for i in shown)) for line in verdicts.lines]
        _print_texts(console, verdicts.title, ("difference", *(verdicts.columns[i] for i in shown)), lines)
    # the first line of each error; comparison.json has them whole
    failed = [
        f"{', '.join(filter(None, (f.condition, f.arm, f.held_out)))}, seed {f.seed}: {f.error.splitlines()[0]}"
        for f in comparison.failed
    ]
    print_list(console, "failed runs", failed)


def _width(table: TextTable) -> int:
    columns = zip(table.columns, *table.lines, strict=True)
    return sum(max(map(len, column)) + 2 for column in columns)


def _print_texts(console: Console, title: str, columns: Iterable[str], lines: Iterable[Iterable[str]]) -> None:
    table = Table(title=escape(title), box=box.SIMPLE, title_justify="left", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(
            escape(column),
            justify="left" if number == 0 else "right",
            no_wrap=number > 0,
            min_width=None if number else 12,
        )
    for line in lines:
        table.add_row(*map(escape, line))
    console.print(table)


def print_evaluation(
    rows: Iterable[ResultRow], recorded: Iterable[ResultRow] | None, title: str, console: Console | None = None
) -> None:
    """Every split and domain, with the top-1 that training recorded for the same, where it did.

    Args:
        recorded: None: nothing was recorded of these weights, and there is no such column.
    """
    console = console or Terminal()
    found = [] if recorded is None else recorded
    before = {(r.method, r.split, r.domain, r.pooled, r.metric): r.value for r in found if r.chosen is not False}
    table = Table(title=f"{escape(title)} (accuracies in %)", box=box.SIMPLE, title_justify="left", pad_edge=False)
    for name in ("split", "domain"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "top-1", "macro", "NLL", "ECE", *([] if recorded is None else ["recorded"])):
        table.add_column(name, justify="right", no_wrap=True)
    lines: dict[tuple[str, str, Pool | None], dict[str, ResultRow]] = {}
    for row in rows:
        lines.setdefault((row.split, row.domain, row.pooled), {})[row.metric] = row
    for (split, domain, pooled), of in lines.items():
        top1 = of["top1"]
        if pooled in ("mean", "worst") and top1.n == 1:
            continue  # over one domain: the line above again
        table.add_row(
            _split_title(split),
            escape(domain if pooled is None else pool_title(pooled, [name for _, name, of in lines if of is None])),
            str(top1.n),
            _percent(top1.value),
            _percent(of["macro_accuracy"].value),
            _number(of["nll"].value),
            _number(of["ece"].value),
            *([] if recorded is None else [_percent(before.get((top1.method, split, domain, pooled, "top1")))]),
        )
    console.print(table)


def print_sweep(rows: Iterable[Mapping[str, Any]], title: str, console: Console | None = None) -> None:
    """One line per setting, in the order given."""
    console = console or Terminal()
    table = Table(title=escape(title), box=box.SIMPLE, title_justify="left")
    table.add_column("method")
    for name in ("learning rate", "rho", "lambda", "best step", "top-1 (%)", "NLL"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["method"],
            *(f"{row[key]:g}" for key in ("learning_rate", "rho", "variance_weight")),
            str(row["best_step"]),
            "diverged" if row["source_top1"] is None else _percent(row["source_top1"]),
            _number(row["source_nll"]),
        )
    console.print(table)


def print_sharpness(rows: Iterable[ResultRow], console: Console | None = None) -> None:
    """Every measure (lines) on every split (columns)."""
    console = console or Terminal()
    found = list(rows)
    places = list(dict.fromkeys((row.split, row.domain, row.n) for row in found))
    table = Table(title="Sharpness", box=box.SIMPLE, title_justify="left", pad_edge=False)
    table.add_column("measure", no_wrap=True)
    for split, domain, n in places:
        table.add_column(f"{_split_title(split)}\n{escape(domain)}, n={n}", justify="right")
    values = {(row.metric, row.split): row.value for row in found}
    for metric in dict.fromkeys(row.metric for row in found):
        numbers = [values.get((metric, split)) for split, _, _ in places]
        table.add_row(metric, *("n/a" if value is None else f"{value:.4g}" for value in numbers))
    console.print(table)


def print_list(console: Console, title: str, lines: list[str]) -> None:
    """A title with the number of lines, and the first of them."""
    console.print(f"{title}: {len(lines) or 'none'}", markup=False)
    for line in lines[:_LISTED]:
        console.print(f"  {line}", markup=False, soft_wrap=True)  # paths stay whole
    if len(lines) > _LISTED:
        console.print(f"  and {len(lines) - _LISTED} more")


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def print_examination(examination: Examination, console: Console | None = None) -> None:
    """The machine, one line per check with what was measured below it, and how many checks have which verdict."""
    console = console or Terminal()
    around = "  ".join(f"{name} {value}" for name, value in examination.environment.items())
    console.print(around, style="dim", markup=False, highlight=False)
    title = f"{escape(examination.subject)}, on synthetic images"
    table = Table(title=title, box=box.SIMPLE, title_justify="left", pad_edge=False)
    table.add_column("check")
    for name in ("measured", "limit"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for finding in examination.findings:
        table.add_row(*_finding_cells(finding))
    console.print(table)
    counts = {verdict: sum(f.verdict == verdict for f in examination.findings) for verdict in VERDICT_COLOURS}
    summed = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    console.print(f"{summed}; {examination.seconds:.0f} s", highlight=False)


def _finding_cells(finding: CheckResult) -> tuple[str, str, str, str]:
    colour = VERDICT_COLOURS[finding.verdict]
    return (
        f"{escape(finding.check)}\n[dim]  {escape(finding.what)}[/dim]",
        _measured(finding.measured),
        _measured(finding.limit),
        f"[{colour}]{finding.verdict}[/{colour}]",
    )


def _measured(value: float | None) -> str:
    if value is None:
        return "-"
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:.1e}"


def print_cache(entries: list[Kept], folder: str, now: float, console: Console | None = None) -> None:
    """What is kept in the cache, the longest unused first, and how much it is together."""
    table = Table(title=f"{escape(folder)}: {decimal(sum(e.size for e in entries))}", box=box.SIMPLE_HEAD)
    table.add_column("name", overflow="fold")
    for heading in ("size", "unused for"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("data", overflow="fold")
    for entry in entries:
        name = f"{entry.kind}/{entry.path.name[:12]}" + (".partial" if entry.path.suffix == ".partial" else "")
        age = _age(max(0.0, now - entry.used))
        table.add_row(escape(name), decimal(entry.size), age, entry.state, escape(", ".join(entry.data) or "?"))
    (console or Terminal()).print(table)


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return "now"
