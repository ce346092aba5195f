"""A comparison as data: the measures of every run, and the tables made from them. Its JSON file is read back."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disam_peft.common.records import pool_title
from disam_peft.common.typed_json import read_typed
from disam_peft.errors import UserError
from disam_peft.report.result_tables import METHOD_TITLES, SeedMean, latex_text, markdown_text
from disam_peft.report.run_measures import DIAGNOSTICS, MEASURES, Measure
from disam_peft.report.statistics import PairedComparison, judged, paired, seed_differences

COMPARISON = "comparison.json"
ZERO_SHOT = "zero_shot"
NONE = "none"
"""Stands in place of a held-out domain where nothing was held out."""
WORST = "worst"
"""Stands in its place where a number is the worst over the held-out domains."""


@dataclass(frozen=True)
class MeasureRow:
    """One number of one run."""

    condition: str
    arm: str
    """``zero_shot``: of the model before it was trained; ``zero_shot, A`` where arm A starts from another one."""
    held_out: str | None
    seed: int
    metric: str
    value: float | None
    """None where it is not defined."""


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error."""

    condition: str
    arm: str
    held_out: str | None
    seed: int
    error: str


@dataclass(frozen=True)
class RunPlace:
    """Where a run keeps its records."""

    condition: str
    arm: str
    held_out: str | None
    seed: int
    folder: str
    """From the comparison's folder on."""


@dataclass(frozen=True)
class Comparison:
    """What was compared, and every number that was measured.

    Attributes:
        arms, conditions: name -> overrides of the recipe.
        pairs: of arms, ``(first, second)``.
        metrics: what they are compared by; each is a family of tests of its own.
        held_out: condition -> the domains that were held out; None where a run held nothing out.
        fresh_data: whether every seed had images of its own.
    """

    title: str
    question: str
    arms: dict[str, dict[str, Any]]
    conditions: dict[str, dict[str, Any]]
    pairs: list[tuple[str, str]]
    metrics: list[str]
    held_out: dict[str, list[str | None]]
    seeds: list[int]
    fresh_data: bool
    rows: list[MeasureRow]
    runs: list[RunPlace]
    failed: list[Failure]
    baseline: str = ""
    """The arm that gains are counted from; empty in a comparison of 0.1."""
    recorded: int = 0
    """How many runs were not run here: their numbers were taken from records."""
    recorded_with: list[str] = field(default_factory=list)
    """What these were made with, e.g. ``disam_peft 0.2.0, torch 2.14.1``."""
    verdicts: dict[str, list[Judgement]] = field(default_factory=dict)
    """By metric; worked out from the rows by ``judge``."""

    def values(self, condition: str, metric: str) -> dict[str, dict[tuple[str | None, int], float]]:
        """arm -> (held-out domain, seed) -> value, where there is one. Of a worst value the domain is ``WORST``."""
        found: dict[str, dict[tuple[str | None, int], float]] = {}
        for row in self.rows:
            if (row.condition, row.metric) == (condition, measured(metric)) and row.value is not None:
                found.setdefault(row.arm, {})[row.held_out, row.seed] = row.value
        if metric == measured(metric):
            return found
        return {arm: self._worst(of, condition, metric) for arm, of in found.items()}

    def domains(self, condition: str, metric: str) -> list[str | None]:
        """The held-out domains that a measure has numbers of; ``WORST`` alone where it is the worst over them."""
        return self.held_out[condition] if metric == measured(metric) else [WORST]

    def _worst(
        self, values: dict[tuple[str | None, int], float], condition: str, metric: str
    ) -> dict[tuple[str | None, int], float]:
        """Of the seeds that have every held-out domain."""
        worst = min if MEASURES[metric].higher_is_better else max
        domains = self.held_out[condition]
        seeds = sorted({seed for _, seed in values})
        complete = [seed for seed in seeds if all((domain, seed) in values for domain in domains)]
        return {(WORST, seed): worst(values[domain, seed] for domain in domains) for seed in complete}


@dataclass(frozen=True)
class Judgement:
    """Two arms under one condition."""

    condition: str
    result: PairedComparison


@dataclass(frozen=True)
class TextTable:
    """A table as it is printed; the first column names the line."""

    title: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    pooled: int = 0
    """How many of the last lines are over those above."""

    def transposed(self) -> TextTable:
        """Lines as columns."""
        first, *others = zip(self.columns, *self.lines, strict=True)
        return TextTable(self.title, tuple(first), tuple(map(tuple, others)))

    def without_deviations(self) -> TextTable:
        """Means alone, for where there is little room."""
        return TextTable(self.title, self.columns, tuple(tuple(t.split(" ± ")[0] for t in line) for line in self.lines))

    def markdown(self) -> str:
        rule = "|" + "---|" * len(self.columns)
        rows = [f"| {' | '.join(map(markdown_text, line))} |" for line in (self.columns, *self.lines)]
        return "\n".join([f"**{markdown_text(self.title)}**", "", rows[0], rule, *rows[1:]])

    def latex(self) -> str:
        head, *lines = [" & ".join(map(latex_text, line)) + r" \\" for line in (self.columns, *self.lines)]
        columns = "l" + "r" * (len(self.columns) - 1)
        body = "\n".join([f"\\begin{{tabular}}{{{columns}}}", "\\toprule", head, "\\midrule", *lines])
        return f"% {self.title}\n{body}\n\\bottomrule\n\\end{{tabular}}"


def read_comparison(folder: Path) -> Comparison:
    """The comparison that was written to ``folder``. What another version wrote is read as far as this one knows it:
    fields that came later have their defaults, and further ones are passed over.

    Raises:
        UserError: there is none; it holds something else. Names the file and the line.
    """
    path = folder / COMPARISON
    if not path.exists():
        raise UserError(f"no comparison in {folder}: expected {COMPARISON}, which disam-peft compare writes")
    return read_typed(path, Comparison, "a comparison")


def measured(metric: str) -> str:
    """The measure that rows have, from which this one is made."""
    known = MEASURES.get(metric)
    return known.worst_of if known is not None and known.worst_of else metric


def judge(comparison: Comparison) -> dict[str, list[Judgement]]:
    """Every pair of arms under every condition, by each metric. All of one metric are one family of tests."""
    found = {}
    for metric in comparison.metrics:
        places = [(condition, pair) for condition in comparison.conditions for pair in comparison.pairs]
        results = [
            paired(*pair, comparison.values(condition, metric), comparison.domains(condition, metric))
            for condition, pair in places
        ]
        results = judged(results, higher_is_better=MEASURES[metric].higher_is_better)
        found[metric] = [Judgement(condition, result) for (condition, _), result in zip(places, results, strict=True)]
    return found


def value_tables(comparison: Comparison, metric: str) -> list[TextTable]:
    """Means of every arm with their deviation over seeds: over all held-out domains (conditions in lines), then for
    every condition domain by domain."""
    measure = MEASURES[metric]
    arms = _arms(comparison, metric)
    titles = tuple(map(arm_title, arms))
    over_all, by_condition = [], []
    for condition in comparison.conditions:
        values, domains = comparison.values(condition, metric), comparison.domains(condition, metric)
        lines = [(d or NONE, *(_text(values.get(arm, {}), [d], measure) for arm in arms)) for d in domains]
        mean = tuple(_text(values.get(arm, {}), domains, measure) for arm in arms)
        over_all.append((condition, *mean))
        if len(domains) > 1:
            lines.append((pool_title("mean", domains), *mean))
        title = f"{measure.title}{f', {condition}' if condition else ''}"
        by_condition.append(TextTable(title, ("held out", *titles), tuple(lines), pooled=int(len(domains) > 1)))
    if len(comparison.conditions) == 1:
        return by_condition
    title = f"{measure.title}, mean over held-out domains"
    return [TextTable(title, ("condition", *titles), tuple(over_all)), *by_condition]


def verdict_table(comparison: Comparison, metric: str) -> TextTable:
    """A line per condition and pair: difference, deviation, interval, p and the verdict in words."""
    measure = MEASURES[metric]
    several = len(comparison.conditions) > 1
    lines = []
    for one in comparison.verdicts[metric]:
        result = one.result
        lines.append(
            (
                *((one.condition,) if several else ()),
                f"{arm_title(result.first)} - {arm_title(result.second)}",
                _signed(result.mean, measure),
                "n/a" if result.low is None else f"{_signed(result.low, measure)} to {_signed(result.high, measure)}",
                verdict_words(result),
                "n/a" if result.p is None else f"{_p(result.p)} ({result.test})",
                _p(result.p_t),
                _p(result.p_wilcoxon),
                _number(result.deviation, measure),
                str(result.seeds),
            )
        )
    columns = ("difference", "mean", "95 % interval", "verdict", "p, Holm", "p, t", "p, Wilcoxon", "sd", "seeds")
    return TextTable(f"Differences: {measure.title}", (*(("condition",) if several else ()), *columns), tuple(lines))


def diagnostics_table(comparison: Comparison) -> TextTable:
    """How the training of each arm went: means over held-out domains and seeds, of what was measured at all."""
    several = len(comparison.conditions) > 1
    known = {row.metric for row in comparison.rows if not is_zero_shot(row.arm) and row.value is not None}
    shown = {name: measure for name, measure in DIAGNOSTICS.items() if name in known}
    lines = []
    for condition in comparison.conditions:
        by_metric = {name: comparison.values(condition, name) for name in shown}
        for arm in comparison.arms:
            texts = [
                _text(by_metric[name].get(arm, {}), comparison.held_out[condition], measure)
                for name, measure in shown.items()
            ]
            lines.append((*((condition,) if several else ()), arm_title(arm), *texts))
    columns = tuple(name.replace("_", " ") for name in shown)
    explained = "; ".join(f"{name.replace('_', ' ')}: {measure.title}" for name, measure in shown.items())
    return TextTable(
        f"How training went ({explained})", (*(("condition",) if several else ()), "arm", *columns), tuple(lines)
    )


def is_zero_shot(arm: str) -> bool:
    """Whether these are numbers of a model before it was trained."""
    return arm == ZERO_SHOT or arm.startswith(f"{ZERO_SHOT}, ")


def arm_title(arm: str) -> str:
    """Of a method as everywhere; of another arm its name."""
    if is_zero_shot(arm):
        return f"{METHOD_TITLES[ZERO_SHOT]}{arm.removeprefix(ZERO_SHOT)}"
    return METHOD_TITLES.get(arm, "ERM 2x" if arm == "erm_2x" else arm)


def verdict_words(result: PairedComparison) -> str:
    """The verdict with titles of arms."""
    if result.verdict in ("first", "second"):
        return f"{arm_title(result.first if result.verdict == 'first' else result.second)} better"
    return result.verdict


def means(comparison: Comparison, metric: str) -> dict[str, list[float | None]]:
    """arm -> its mean under each condition, over held-out domains and seeds."""
    found: dict[str, list[float | None]] = {arm: [] for arm in _arms(comparison, metric)}
    for condition in comparison.conditions:
        values = comparison.values(condition, metric)
        for arm, line in found.items():
            numbers = by_seed(values.get(arm, {}), comparison.domains(condition, metric))
            line.append(statistics.fmean(numbers) if numbers else None)
    return found


def seed_values(comparison: Comparison, one: Judgement, metric: str) -> list[float]:
    """The differences, seed by seed, that a judgement rests on."""
    values = comparison.values(one.condition, metric)
    first, second = (values.get(arm, {}) for arm in (one.result.first, one.result.second))
    return seed_differences(first, second, comparison.domains(one.condition, metric))


def by_seed(values: dict[tuple[str | None, int], float], held_out: Sequence[str | None]) -> list[float]:
    """The mean over ``held_out`` of every seed that has them all."""
    seeds = sorted({seed for _, seed in values})
    complete = [seed for seed in seeds if all((domain, seed) in values for domain in held_out)]
    return [statistics.fmean(values[domain, seed] for domain in held_out) for seed in complete]


def _arms(comparison: Comparison, metric: str) -> list[str]:
    known = [row.arm for row in comparison.rows if row.metric == measured(metric) and row.value is not None]
    before = [arm for arm in dict.fromkeys(known) if is_zero_shot(arm) and arm not in comparison.arms]
    return [*before, *comparison.arms]


def _text(values: dict[tuple[str | None, int], float], held_out: Sequence[str | None], measure: Measure) -> str:
    numbers = by_seed(values, held_out)
    if not numbers:
        return "n/a"
    deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
    return SeedMean(statistics.fmean(numbers), deviation, len(numbers)).text(measure.scale, measure.digits)


def _signed(value: float | None, measure: Measure) -> str:
    if value is None:
        return "n/a"
    return f"{round(measure.scale * value, measure.digits + 1) + 0.0:+.{measure.digits + 1}f}"  # + 0.0: no minus zero


def _number(value: float | None, measure: Measure) -> str:
    return "n/a" if value is None else f"{measure.scale * value:.{measure.digits + 1}f}"


def _p(value: float | None) -> str:
    if value is None:
        return "n/a"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
