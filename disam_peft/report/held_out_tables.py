"""What runs reached where nobody trained, a line for each configuration that is not the same in all its settings."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from disam_peft.common.records import RAW, ResultRow, pool_title
from disam_peft.config.wording import setting_in_words
from disam_peft.report.configurations import Configuration, data_titles, is_of_zero_shot, telling_apart
from disam_peft.report.result_tables import (
    METHOD_TITLES,
    ComparisonTable,
    SeedMean,
    compare_held_out,
    mean_over_domains,
    mean_over_seeds,
)

Cells = dict[str, dict[int, float]]
"""Domain -> seed -> value."""


def held_out_tables(found: Sequence[Configuration], metric: str = "top1") -> list[ComparisonTable]:
    """``metric`` on the domain that each run did not see, a table for each data set, backbone and adapter. Only runs
    that are equal but for their seed are pooled.

    Where the configurations of a table differ in nothing but the method, methods are the columns and held-out domains
    the lines. Otherwise every configuration has a line, with the settings that tell it apart, and the domains are the
    columns. Runs that held nothing out have tables of their own, over their test images where there are some, else over
    those by which their weights were chosen.
    """
    titles = data_titles(found)
    places: dict[tuple[str, str, str, bool], list[Configuration]] = {}
    for one in found:
        for of_all in (False, True):
            runs = tuple(run for run in one.runs if (run.trained.held_out is None) == of_all)
            if runs:
                place = (one.data.identity, one.backbone, one.adapter, of_all)
                places.setdefault(place, []).append(Configuration(one.data, one.settings, runs))
    tables = []
    for (identity, backbone, adapter, of_all), members in places.items():
        about = f"{adapter} on {backbone}" + (f", {titles[identity]}" if titles[identity] else "")
        simple = not of_all and not telling_apart(members) and len({one.zero_shot_key for one in members}) == 1
        if simple and len({one.method for one in members}) == len(members):
            rows = [row for one in members for run in one.runs for row in run.rows]
            tables += compare_held_out(rows, metric, about=about)
        else:
            tables.append(_by_configuration(members, metric, about, of_all))
    return [table for table in tables if table.lines]


def _by_configuration(members: list[Configuration], metric: str, about: str, of_all: bool) -> ComparisonTable:
    keys = telling_apart(members)
    lines: list[tuple[str, tuple[str, ...], Cells]] = []
    known: set[str] = set()
    for one in members:
        if one.zero_shot_key in known:
            continue
        known.add(one.zero_shot_key)
        same = [other for other in members if other.zero_shot_key == one.zero_shot_key]
        rows = [row for other in same for run in other.runs for row in run.rows if row.method == "zero_shot"]
        cells = {domain: dict(list(by_seed.items())[:1]) for domain, by_seed in _cells(rows, metric).items()}
        if cells:  # it does not depend on the seed of a run: one number for each domain
            told = tuple(setting_in_words(key, one.settings.get(key)) if is_of_zero_shot(key) else "" for key in keys)
            lines.append((METHOD_TITLES["zero_shot"], told, cells))
    order = list(METHOD_TITLES)

    def rank(one: Configuration) -> tuple[Any, ...]:
        return order.index(one.method), [_sortable(key, one.settings.get(key)) for key in keys]

    for one in sorted(members, key=rank):
        rows = [row for run in one.runs for row in run.rows if row.method != "zero_shot"]
        weights = sorted({row.weights for row in rows}, key=lambda name: (name != RAW, name))
        told = tuple(setting_in_words(key, one.settings.get(key)) for key in keys)
        for name in weights:
            title = METHOD_TITLES[one.method] + (f", {name}" if len(weights) > 1 else "")
            lines.append((title, told, _cells([row for row in rows if row.weights == name], metric)))
    domains = sorted({domain for _, _, cells in lines for domain in cells})
    percent = metric in ("top1", "macro_accuracy")
    where = "on all domains" if of_all else "on the held-out domain"
    columns = (*domains, *((pool_title("mean", domains),) if len(domains) > 1 else ()))
    seeds = [max((len(by_seed) for by_seed in cells.values()), default=0) for _, _, cells in lines]
    several = max(seeds, default=0) > 1
    labels = [(*told, *((str(count),) if several else ())) for (_, told, _), count in zip(lines, seeds, strict=True)]
    return ComparisonTable(
        f"{about}: {'accuracy (%)' if percent else metric} {where}",
        columns,
        tuple((title, _line(cells, domains)) for title, _, cells in lines),
        100 if percent else 1,
        1 if percent else 3,
        corner="method",
        label_columns=(*(_short(key, keys) for key in keys), *(("seeds",) if several else ())),
        labels=tuple(labels),
    )


def _line(cells: Mapping[str, dict[int, float]], domains: Sequence[str]) -> tuple[SeedMean | None, ...]:
    of_domains = [cells.get(domain) for domain in domains]
    mean = (mean_over_domains(of_domains),) if len(domains) > 1 else ()
    return (*map(mean_over_seeds, of_domains), *mean)


def _cells(rows: Iterable[ResultRow], metric: str) -> Cells:
    """Of runs that held a domain out its numbers there, of others those of every domain of one split."""
    found: Cells = {}
    every = [row for row in rows if row.metric == metric and row.value is not None and row.pooled is None]
    tested = {"test"} if any(row.split == "test" for row in every) else {"source_validation"}
    for row in every:
        wanted = row.split in tested if row.held_out is None else row.split == "held_out" and row.is_of(row.held_out)
        if wanted and row.value is not None:
            found.setdefault(row.domain, {}).setdefault(row.seed, row.value)
    return found


def _short(key: str, keys: Sequence[str]) -> str:
    """The last part of a setting's name, where no other ends so."""
    last = key.split(".")[-1]
    return last if sum(other.split(".")[-1] == last for other in keys) == 1 else key


def _sortable(key: str, value: Any) -> tuple[int, float, str]:
    """Unset before numbers, in their order, before everything else, by its text."""
    if value is None:
        return 0, 0.0, ""
    if isinstance(value, (int, float)):
        return 1, float(value), ""
    return 2, 0.0, setting_in_words(key, value)


def best_by_source_validation(found: Sequence[Configuration], count: int) -> list[Configuration]:
    """At most ``count`` configurations, in the order given: those with the highest accuracy on source validation, of
    each method as many. The held-out domain has no say in what is shown."""
    by_method: dict[str, list[Configuration]] = {}
    for one in sorted(found, key=lambda one: -_source_validation(one)):
        by_method.setdefault(one.method, []).append(one)
    chosen: list[int] = []
    for rank in range(len(found)):
        chosen += [id(members[rank]) for members in by_method.values() if rank < len(members)]
    return [one for one in found if id(one) in chosen[:count]]


def _source_validation(one: Configuration) -> float:
    values = [
        row.value
        for run in one.runs
        for row in run.chosen_rows
        if row.split == "source_validation" and row.pooled == "mean" and row.metric == "top1" and row.value is not None
    ]
    return statistics.fmean(values) if values else float("-inf")
