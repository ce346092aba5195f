"""Result tables as data, as Markdown and as LaTeX. The templates of the page make HTML of the same data."""

from __future__ import annotations

import html
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from disam_peft.common.records import RAW, ResultRow, pool_title

METHOD_TITLES = {
    "zero_shot": "zero-shot",
    "erm": "ERM",
    "sam": "SAM",
    "disam": "DISAM",
    "gsam": "GSAM",
    "disam_gsam": "DISAM + GSAM",
    "sagm": "SAGM",
    "disam_sagm": "DISAM + SAGM",
}
Column = tuple[str, str]
"""A method and whose weights its numbers are of, as in ``ResultRow``: ``("disam", "ema")``."""


def column_titles(columns: Iterable[Column]) -> dict[Column, str]:
    """The titles of the columns of one table, in the order in which they stand there.

    Weights are named only where some column is of an average: then ``DISAM, raw`` stands beside ``DISAM, ema``.
    """
    order = list(METHOD_TITLES)
    known = sorted(set(columns), key=lambda column: (order.index(column[0]), column[1] != RAW, column[1]))
    named = any(weights != RAW for _, weights in known)
    return {
        (method, weights): METHOD_TITLES[method] + (f", {weights}" if named and method != "zero_shot" else "")
        for method, weights in known
    }


def training_domains(held_out: str | None) -> str:
    """What a run was trained on, in words."""
    return "on all domains" if held_out is None else f"without {held_out}"


@dataclass(frozen=True)
class SeedMean:
    """The mean of a number over seeds."""

    mean: float
    deviation: float | None
    """Standard deviation (ddof 1); None for a single seed."""
    seeds: int

    def text(self, scale: float, digits: int | None) -> str:
        """The mean and its deviation with ``digits`` decimal places; None: with three significant digits."""
        numbers = [scale * self.mean] + ([] if self.deviation is None else [scale * self.deviation])
        # "#" keeps zeros at the end, which count, and a point at the end, which does not
        texts = [f"{x:#.3g}".removesuffix(".") if digits is None else f"{x:.{digits}f}" for x in numbers]
        return " ± ".join(texts)


@dataclass(frozen=True)
class ComparisonTable:
    """Held-out domains in lines (and their mean, if there are several), methods in columns. Where averages of the
    weights were kept, each has a column of its own. None stands where a method was not run."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, tuple[SeedMean | None, ...]], ...]
    scale: float
    digits: int | None
    corner: str = "held out"
    """The title of the first column, which names the lines."""
    pooled: int = 0
    """How many of the last lines are over the domains above."""
    label_columns: tuple[str, ...] = ()
    """Titles of further columns of text, after the first: settings that tell the lines apart."""
    labels: tuple[tuple[str, ...], ...] = ()
    """Their texts, one tuple for each line; none where there are no such columns."""

    @property
    def titles(self) -> tuple[str, ...]:
        """Of all columns but the first."""
        return (*self.label_columns, *self.columns)

    def texts(self) -> list[tuple[str, list[str]]]:
        """The lines as they are printed."""
        labels = self.labels or ((),) * len(self.lines)
        return [
            (name, [*told, *("n/a" if cell is None else cell.text(self.scale, self.digits) for cell in cells)])
            for (name, cells), told in zip(self.lines, labels, strict=True)
        ]

    def markdown(self) -> str:
        header = f"| {markdown_text(self.corner)} | {' | '.join(map(markdown_text, self.titles))} |"
        rule = "|---|" + "---|" * len(self.titles)
        lines = [f"| {markdown_text(name)} | {' | '.join(map(markdown_text, texts))} |" for name, texts in self.texts()]
        return "\n".join([f"**{markdown_text(self.title)}**", "", header, rule, *lines])

    def latex(self) -> str:
        lines = [
            " & ".join([latex_text(name), *(latex_text(text) for text in texts)]) + r" \\"
            for name, texts in self.texts()
        ]
        head = " & ".join([latex_text(self.corner), *map(latex_text, self.titles)]) + r" \\"
        columns = "l" + "r" * len(self.titles)
        body = "\n".join([head, "\\midrule", *lines])
        return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\n\\bottomrule\n\\end{{tabular}}"


def compare_held_out(
    rows: Iterable[ResultRow], metric: str = "top1", *, about: str | None = None
) -> list[ComparisonTable]:
    """One table per backbone and adapter: ``metric`` on the domain that each run did not see.

    Zero-shot numbers do not depend on the seed of a run: they are counted once. Rows say no more of a run than its
    backbone, adapter, method and seed: hand over runs that differ in nothing else. ``held_out_tables`` does so.

    Args:
        about: how the title begins; unset: with adapter and backbone.
    """
    by_place: dict[tuple[str, str], dict[tuple[str, Column], dict[int, float]]]
    by_place = defaultdict(lambda: defaultdict(dict))
    zero_shot: dict[str, dict[tuple[str, Column], dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row.split != "held_out" or not row.is_of(row.held_out) or row.metric != metric or row.value is None:
            continue
        assert row.held_out is not None, "no row is of a domain without a name"
        place = (row.held_out, (row.method, row.weights))
        if row.method == "zero_shot":
            zero_shot[row.backbone][place][0] = row.value
        else:
            by_place[row.backbone, row.adapter][place][row.seed] = row.value
    percent = metric in ("top1", "macro_accuracy")
    tables = []
    for (backbone, adapter), values in by_place.items():
        held_out = sorted({domain for domain, _ in values})
        known = {place: seeds for place, seeds in zero_shot[backbone].items() if place[0] in held_out}
        values = {**values, **known}
        columns = column_titles(column for _, column in values)
        lines = [(d, tuple(mean_over_seeds(values.get((d, column))) for column in columns)) for d in held_out]
        if len(held_out) > 1:
            means = [mean_over_domains([values.get((d, column)) for d in held_out]) for column in columns]
            lines.append((pool_title("mean", held_out), tuple(means)))
        title = f"{about or f'{adapter} on {backbone}'}: {'accuracy (%)' if percent else metric} on the held-out domain"
        shown, scale, digits = tuple(columns.values()), 100 if percent else 1, 1 if percent else 3
        tables.append(ComparisonTable(title, shown, tuple(lines), scale, digits, pooled=int(len(held_out) > 1)))
    return tables


def mean_over_seeds(by_seed: dict[int, float] | None) -> SeedMean | None:
    """Mean and deviation of one value per seed; None if there is none."""
    if not by_seed:
        return None
    values = list(by_seed.values())
    return SeedMean(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def mean_over_domains(domains: list[dict[int, float] | None]) -> SeedMean | None:
    """Mean over domains, seed by seed, over the seeds that every domain has; zero-shot has one."""
    if any(not by_seed for by_seed in domains):
        return None
    complete = [by_seed for by_seed in domains if by_seed]
    seeds = set.intersection(*(set(by_seed) for by_seed in complete))
    return mean_over_seeds({seed: statistics.fmean(by_seed[seed] for by_seed in complete) for seed in seeds})


def markdown_text(text: str) -> str:
    """Text as it may stand in a cell of a Markdown table.

    One line without HTML, links and images: what shows Markdown would take a tag in a name for a tag, and would fetch
    the picture of ``![](address)``.
    """
    plain = " ".join(text.split()).replace("\\", "\\\\")
    return html.escape(re.sub(r"([\[\]|`*])", r"\\\1", plain), quote=False)


def latex_text(text: str) -> str:
    """Text with the characters that LaTeX takes for commands written out."""
    text = " ".join(text.split())  # an empty line would end the table's row
    special = {"±": r"$\pm$", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)
