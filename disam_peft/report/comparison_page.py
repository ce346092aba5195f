"""A comparison as files: Markdown, LaTeX and one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from disam_peft.common.files import write_atomically
from disam_peft.report.comparison import (
    Comparison,
    TextTable,
    arm_title,
    diagnostics_table,
    means,
    value_tables,
    verdict_table,
)
from disam_peft.report.comparison_figures import arm_lines, difference_intervals, domain_panels
from disam_peft.report.drawing import draw
from disam_peft.report.gains import gains_figure, gains_table
from disam_peft.report.result_tables import markdown_text, training_domains
from disam_peft.report.run_measures import MEASURES
from disam_peft.report.runs import RunRecord

PANELS = 5
METHOD = (
    "Arms are paired by held-out domain and seed. The seed is the unit: a difference is averaged over the held-out "
    "domains within each seed. sd: standard deviation over seeds (ddof 1). 95 % interval: bootstrap over seeds "
    "(percentiles; over few seeds it is too narrow, so no verdict rests on it alone). A verdict needs an interval "
    "without 0 and p < 0.05 after Holm's correction for all comparisons by the same measure on this page; p is "
    "Wilcoxon's where so few seeds could pass with it, else the paired t test's."
)
FRESH = "Every seed painted images of its own: seeds are independent samples of the benchmark."
SAME = "All seeds saw the same data: what is found here speaks about these data."


@dataclass(frozen=True)
class _Section:
    """One measure."""

    title: str
    values: TextTable
    by_condition: list[TextTable]
    verdicts: TextTable
    intervals: Markup
    lines: Markup | None


@dataclass(frozen=True)
class _Gains:
    """What every arm gains under one condition."""

    table: TextTable
    figure: Markup


@dataclass(frozen=True)
class _Curves:
    """Training without one domain, under one condition."""

    about: str
    losses: Markup
    weights: Markup


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """``comparison.md``, ``comparison.tex`` and ``comparison.html``. Names are escaped.

    Args:
        folder: where the comparison's runs are, too.
    """
    tables = _tables(comparison)
    write_atomically(folder / "comparison.md", _markdown(comparison, tables))
    write_atomically(folder / "comparison.tex", "\n\n".join(t.latex() for t in tables) + "\n")
    loader = PackageLoader("disam_peft.report", "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    page = environment.get_template("comparison.html.j2").render(
        comparison=comparison,
        sections=[_section(comparison, metric) for metric in comparison.metrics],
        gains=_gains(comparison),
        diagnostics=diagnostics_table(comparison),
        curves=_curves(comparison, folder),
        method=about(comparison),
        arms=[(arm_title(name), _settings(given)) for name, given in comparison.arms.items()],
        conditions=[(name, _settings(given)) for name, given in comparison.conditions.items() if name],
        tables=tables,
    )
    write_atomically(folder / "comparison.html", page)


def _section(comparison: Comparison, metric: str) -> _Section:
    first, *others = value_tables(comparison, metric)
    several = len(comparison.conditions) > 1
    return _Section(
        MEASURES[metric].title,
        first,
        others,
        verdict_table(comparison, metric),
        # Markup: our own SVG, in which matplotlib has escaped every label
        Markup(difference_intervals(comparison, metric)),
        Markup(arm_lines(comparison, metric, means(comparison, metric))) if several else None,
    )


def _gains(comparison: Comparison) -> list[_Gains]:
    found = []
    for condition in comparison.conditions:
        if (table := gains_table(comparison, condition)) is not None:
            figure = draw("gains", table.title, partial(gains_figure, comparison, condition))
            found.append(_Gains(table, Markup(figure.wide)))
    return found


def _curves(comparison: Comparison, folder: Path) -> list[_Curves]:
    """Without the first held-out domain, under every condition, of the first few arms; means over seeds."""
    found = []
    for condition, domains in comparison.held_out.items():
        arms: dict[str, list[RunRecord]] = {}
        for place in comparison.runs:
            if (place.condition, place.held_out) == (condition, domains[0]):
                arms.setdefault(place.arm, []).append(RunRecord(folder / place.folder))
        shown = {arm: runs for arm, runs in arms.items() if all(run.steps for run in runs)}
        shown = {arm: shown[arm] for arm in list(shown)[:PANELS]}
        if shown:
            title = f"{f'{condition}: ' if condition else ''}{training_domains(domains[0])}, means over seeds"
            losses, weights = (
                Markup(domain_panels(shown, name, label))
                for name, label in (("domain_loss", "loss"), ("domain_weight", "weight in the ascent"))
            )
            found.append(_Curves(title, losses, weights))
    return found


def _tables(comparison: Comparison) -> list[TextTable]:
    tables = []
    for metric in comparison.metrics:
        tables += [*value_tables(comparison, metric), verdict_table(comparison, metric)]
    gained = [table for name in comparison.conditions if (table := gains_table(comparison, name)) is not None]
    return [*tables, *gained, diagnostics_table(comparison)]


def _markdown(comparison: Comparison, tables: Sequence[TextTable]) -> str:
    question = [markdown_text(comparison.question)] if comparison.question else []
    parts = [f"# {markdown_text(comparison.title)}", *question, about(comparison)]
    parts += [table.markdown() for table in tables]
    if comparison.failed:
        lines = [
            "- "
            + markdown_text(
                ", ".join(filter(None, (f.condition, f.arm, f.held_out, f"seed {f.seed}"))) + f": {f.error}"
            )
            for f in comparison.failed
        ]
        parts.append("\n".join([f"**{len(lines)} runs failed**", "", *lines]))
    return "\n\n".join(parts) + "\n"


def about(comparison: Comparison) -> str:
    """How to read the tables."""
    taken = ""
    if comparison.recorded:
        total = comparison.recorded + len(comparison.runs) + len(comparison.failed)
        taken = (
            f" {comparison.recorded} of {total} runs are taken from records ({'; '.join(comparison.recorded_with)})."
        )
    return f"{METHOD} {FRESH if comparison.fresh_data else SAME}{taken}"


def _settings(overrides: dict[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in overrides.items()) or "as in the recipe"
